"""Compare policies: read rollouts, test differences while they come in, and say which policies are apart."""
