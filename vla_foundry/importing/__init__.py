"""Import runs of the earlier implementation."""
