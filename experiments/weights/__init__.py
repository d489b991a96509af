"""Files of weights that other programs wrote, and the runs that are made of them.

  tensor_writers  the same files, written
  tensor_files    .pt, .safetensors (one, or shards in a directory) and .npz as a mapping from name to array
  gguf_file       .gguf: the same, with its config and its vocabulary, under the names of the transformers library
  run_directory   a run at step 0 that holds no more than weights
  tokenizer_files tokenizer.json and tokenizer_config.json of a run, read and written
"""
