"""The config engine: words and YAML files in, frozen dataclasses out. It knows no section by name."""
