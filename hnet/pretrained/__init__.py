"""Released weights under our parameter names.

  relabel         the machinery: tensors of theirs as tensors of ours, both ways
  hnet_release    the official H-Net checkpoints
  release_config  their config files
  llama           Llama, Mistral, Qwen2 and Qwen3 under the names of the transformers library
  llama_config    their config files
"""
