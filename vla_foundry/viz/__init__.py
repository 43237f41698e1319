"""Looking at data and at what models do."""
