"""Every config dataclass, torch-free."""
