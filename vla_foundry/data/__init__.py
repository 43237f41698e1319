"""Read data: sample order, shards, pipelines and the loader. The plan, reader and cache do not need torch."""

from typing import TYPE_CHECKING

from vla_foundry.registry import import_lazily

if TYPE_CHECKING:
    from vla_foundry.data.loader import DataLoader, create_dataloader
    from vla_foundry.data.pipelines.stages import register_pipeline

__all__ = ["DataLoader", "create_dataloader", "register_pipeline"]

__getattr__, __dir__ = import_lazily(
    __name__,
    {
        "DataLoader": "vla_foundry.data.loader",
        "create_dataloader": "vla_foundry.data.loader",
        "register_pipeline": "vla_foundry.data.pipelines.stages",
    },
)
