"""What the training loop and inference expect of a model and of its batch handler."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vla_foundry.batch import IGNORE_INDEX, Batch


@dataclass(eq=False)
class LanguageModelOutput:
    """What a language model returns when it is given no targets.

    `hidden_states` has one entry more than the model has blocks: entry 0 is the embedding, entry i the output of
    block i, and the last one is taken after the final norm.
    """

    # (B, T, V), or the last `logits_to_keep` places of each row; None where the model has no output head
    logits: Float[Tensor, "B T V"] | None
    # None unless asked for
    hidden_states: tuple[Float[Tensor, "B S D"], ...] | None = None
    # keys and values so far: pass it to the next call
    past_key_values: Any = None


@runtime_checkable
class TrainableModel(Protocol):
    """A model the loop can train. `model(**inputs)` with targets returns a LossOutput."""

    def blocks(self) -> list[nn.Module]:
        """The units that activation checkpointing, compilation and sharding wrap."""
        ...

    def init_weights(self) -> None:
        """Give every parameter its initial value; called after a model made on the meta device gets its memory."""
        ...

    def num_flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of forward and backward per token of a row of `seq_len` tokens."""
        ...


@runtime_checkable
class SavesFiles(Protocol):
    """A model that needs more than its params and weights to be loaded again."""

    def save_files(self, folder: Path) -> None:
        """Write what it needs to `folder` (MODEL_FILES_FOLDER of a run)."""
        ...


@runtime_checkable
class BatchHandler(Protocol):
    """Turns a batch (see batch.py) into what the model's forward takes."""

    def prepare(self, batch: Batch, device: torch.device | str) -> dict[str, Any]:
        """Return forward's keyword arguments, on `device`; nothing waits for the device."""
        ...

    def count_targets(self, inputs: dict[str, Any]) -> Tensor:
        """The number of valid targets among prepared inputs, a scalar on their device."""
        ...


def count_valid_targets(targets: Int[Tensor, "*shape"]) -> Int[Tensor, ""]:
    """The number of targets that are not IGNORE_INDEX, as a scalar on their device."""
    return (targets != IGNORE_INDEX).sum()
