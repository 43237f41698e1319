"""The config engine: words and YAML files in, frozen dataclasses out. It refers to no section by name."""
