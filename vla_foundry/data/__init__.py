"""Read data: sample order, shards, pipelines and the loader. The plan, reader and cache do not need torch."""

from typing import TYPE_CHECKING

from vla_foundry.registry import import_lazily

if TYPE_CHECKING:
    from vla_foundry.data.loader import DataLoader
    from vla_foundry.data.mixture import MixtureLoader, create_dataloader
    from vla_foundry.data.pipelines.stages import register_pipeline

__all__ = ["DataLoader", "MixtureLoader", "create_dataloader", "register_pipeline"]

__getattr__, __dir__ = import_lazily(
    __name__,
    {
        "DataLoader": "vla_foundry.data.loader",
        "MixtureLoader": "vla_foundry.data.mixture",
        "create_dataloader": "vla_foundry.data.mixture",
        "register_pipeline": "vla_foundry.data.pipelines.stages",
    },
)
