"""Read and write files by name: local paths, s3://, hf:// and https:// through one set of functions."""
