"""Text jobs: tokenized shards, shards of raw text, and the training of a tokenizer."""
