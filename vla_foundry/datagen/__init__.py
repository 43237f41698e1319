"""Record demonstrations and captioned scenes in simulators."""
