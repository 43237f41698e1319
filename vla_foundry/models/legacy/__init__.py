"""Code that only legacy checkpoints need."""
