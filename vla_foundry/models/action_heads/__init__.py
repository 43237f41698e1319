"""Action heads: what predicts actions from the backbone's conditioning."""
