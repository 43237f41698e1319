"""Read data: sample order, shards, pipelines and the loader. The plan, reader and cache do not need torch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vla_foundry.data.loader import DataLoader, create_dataloader
    from vla_foundry.data.pipelines.stages import register_pipeline

__all__ = ["DataLoader", "create_dataloader", "register_pipeline"]

_MODULES = {
    "DataLoader": "vla_foundry.data.loader",
    "create_dataloader": "vla_foundry.data.loader",
    "register_pipeline": "vla_foundry.data.pipelines.stages",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)
