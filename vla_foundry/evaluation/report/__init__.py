"""Report of a comparison: one HTML page without a server, and its numbers and figures as files."""
