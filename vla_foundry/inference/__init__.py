"""Use trained models: generation, and later policies."""
