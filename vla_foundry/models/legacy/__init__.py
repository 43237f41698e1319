"""What only checkpoints of the earlier implementation need."""
