"""`vla-foundry preprocess image_caption`: pairs in folders, and lists of paths or URLs, to shards."""
