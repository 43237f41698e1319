"""Record data in simulators: demonstrations by scripted experts, and captioned scenes."""
