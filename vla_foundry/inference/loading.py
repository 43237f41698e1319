"""Find a run, and load its model on the device asked for."""

import dataclasses
import os
from typing import TYPE_CHECKING

from vla_foundry.io.uri import exists, is_remote, join_uri, parent_uri
from vla_foundry.params.models.base import ModelParams
from vla_foundry.params.models.transformer import TransformerHFParams
from vla_foundry.params.models.vlm import VLMHFParams, VLMParams
from vla_foundry.run_folder import MODEL_CONFIG_NAME, MODEL_FILES_FOLDER

if TYPE_CHECKING:
    import torch
    from torch import nn

# a checkpoint lies at most this deep in its run (run/checkpoints/step_N/model.safetensors)
_DEPTH = 4


def find_run_folder(checkpoint: str) -> str:
    """Return the run folder that a checkpoint lies in.

    Raises:
        FileNotFoundError: there is no such checkpoint, or it lies in no run folder.
    """
    if not is_remote(checkpoint) and not exists(checkpoint):
        raise FileNotFoundError(
            f"checkpoint {checkpoint} does not exist. Give a run folder or one of its step folders."
        )
    folder = checkpoint.rstrip("/") if is_remote(checkpoint) else os.path.abspath(checkpoint)
    for _ in range(_DEPTH):
        if exists(join_uri(folder, MODEL_CONFIG_NAME)):
            return folder
        folder = parent_uri(folder)
    raise FileNotFoundError(f"checkpoint {checkpoint} lies in no run folder: there is no {MODEL_CONFIG_NAME} above it.")


def choose_device(name: str) -> "torch.device":
    """Return the device called `name`; "auto": a GPU if there is one.

    Raises:
        ValueError: there is no such device.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device '{name}' is not there: torch sees {torch.cuda.device_count()} GPUs. Use --device cpu."
        )
    return device


def load_run_model(
    params: ModelParams, run_folder: str, checkpoint: str, use_ema: bool | None, device: "torch.device"
) -> "nn.Module":
    """Load the model of a run, for inference.

    Args:
        params: of the run's model.
        run_folder: of the run; the architectures that it keeps need not be published any more.
        checkpoint: run folder, or step folder within it.
        use_ema: take the averaged weights; None: if there are any.
        device: where to put it.

    Raises:
        ValueError: the weights do not fit.
    """
    from vla_foundry.models import create_model
    from vla_foundry.models.weights import has_ema, load_model_checkpoint

    files = join_uri(run_folder, MODEL_FILES_FOLDER)
    if not is_remote(files) and exists(files):
        if isinstance(params, TransformerHFParams):
            params = dataclasses.replace(params, hf_pretrained=files)
        elif isinstance(params, (VLMParams, VLMHFParams)):
            params = params.with_model_files(files)
    model = create_model(params, load_pretrained=False)
    load_model_checkpoint(model, checkpoint, use_ema=has_ema(checkpoint) if use_ema is None else use_ema)
    return model.to(device).eval()
