"""Judge trained models: scenes to describe, rollouts, results, statistics."""
