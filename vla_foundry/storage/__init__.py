"""Read and write files by name: local paths, s3:// and hf:// through one set of functions."""
