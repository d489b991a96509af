"""Files of weights that other programs wrote or will read, and the runs that are made of them.

  tensor_files     .pt, .safetensors (one, or shards in a directory) and .npz as a mapping from name to array
  tensor_writers   the same files, written
  gguf_file        .gguf: such a mapping with the transformers library's names, its config and its vocabulary
  tokenizer_files  tokenizer.json and tokenizer_config.json, from either and to either
  run_directory    a run at step 0 that holds no more than weights
"""
