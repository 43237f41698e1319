"""Bytes by name: local paths, s3:// and hf:// behind one set of functions."""
