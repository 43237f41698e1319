"""Models and batch handlers by the name in `model.type`; importing this file needs no torch."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from vla_foundry.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from vla_foundry.models.base import BatchHandler
    from vla_foundry.params.experiment import TrainExperimentParams
    from vla_foundry.params.models.base import ModelParams

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


def register_batch_handler(
    name: str,
) -> "Callable[[Callable[[TrainExperimentParams], BatchHandler]], Callable[[TrainExperimentParams], BatchHandler]]":
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
        FileNotFoundError: there is no such checkpoint.
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
