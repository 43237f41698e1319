"""The model-agnostic training loop and what it stands on."""
