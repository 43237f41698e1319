"""The model-agnostic training loop and its supporting modules."""
