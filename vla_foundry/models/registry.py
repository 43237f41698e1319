"""Models and batch handlers by the name in `model.type`; importing this file needs no torch."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from vla_foundry.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vla_foundry.batch import Batch
    from vla_foundry.params.experiment import TrainExperimentParams
    from vla_foundry.params.models.roles import ModelParams


@runtime_checkable
class BatchHandler(Protocol):
    """Turns a batch (see batch.py) into what the model's forward takes."""

    def prepare(self, batch: "Batch", device: "torch.device | str") -> dict[str, Any]:
        """Return forward's keyword arguments, on `device`; nothing waits for the device."""
        ...

    def count_targets(self, inputs: dict[str, Any]) -> "Tensor":
        """The number of valid targets among prepared inputs, a scalar on their device."""
        ...


@runtime_checkable
class SavesFiles(Protocol):
    """A model that needs more than its params and weights to be loaded again."""

    def save_files(self, folder: Path) -> None:
        """Write what it needs to `folder` (MODEL_FILES_FOLDER of a run)."""
        ...


H = TypeVar("H", bound="Callable[[TrainExperimentParams], BatchHandler]")

MODELS: "Registry[Callable[..., nn.Module]]" = Registry(
    "model.type", package="vla_foundry.models", decorator="register_model"
)
BATCH_HANDLERS: "Registry[Callable[[TrainExperimentParams], BatchHandler]]" = Registry(
    "batch handler of model.type", package="vla_foundry.models", decorator="register_batch_handler"
)


def register_model(name: str) -> "Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]":
    """Register a factory `(params, load_pretrained=True) -> nn.Module` as the model called `name`.

    The factory builds the module, with published weights where its params name some and `load_pretrained` is true.
    `resume_from_checkpoint` and `freeze` are dealt with by `create_model`.
    """
    return MODELS.register(name)


def register_batch_handler(name: str) -> "Callable[[H], H]":
    """Register what turns batches into the inputs of the model called `name`: a factory that takes the root params."""
    return BATCH_HANDLERS.register(name)


def create_model(params: "ModelParams", load_pretrained: bool = True) -> "nn.Module":
    """Build the model that `params` describe, on torch's default device.

    Args:
        params: of any registered model.
        load_pretrained: false: new weights, whatever checkpoints or published weights the params name. For a model
            whose weights are loaded afterwards, or that is made on the meta device.

    Raises:
        ValueError: the type is not registered, or a checkpoint does not fit.
        FileNotFoundError: the checkpoint does not exist.
    """
    factory = MODELS.get(params.type)
    checkpoint = params.resume_from_checkpoint if load_pretrained else None
    model = factory(params, load_pretrained=load_pretrained and checkpoint is None)
    if checkpoint is not None:
        from vla_foundry.models.weights import load_model_checkpoint

        load_model_checkpoint(model, checkpoint)
    if params.freeze:
        model.requires_grad_(False)
    return model


def create_batch_handler(params: "TrainExperimentParams") -> "BatchHandler":
    """Build the batch handler of the model in `params`."""
    return BATCH_HANDLERS.get(params.model.type)(params)
