"""Raw data in, shards out: jobs made of Ray tasks."""
