"""Parts of models: norms, rotary positions, feed-forwards, attention and its cache."""
