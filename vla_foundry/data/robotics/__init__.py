"""Robot samples: read from either layout, turned into model inputs, normalized; inference uses the same functions."""
