"""Load an earlier run's weights into the model that its config describes, and save them as a step folder."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vla_foundry.models import create_model
from vla_foundry.models.policy import LEFT_OUT
from vla_foundry.models.registry import save_model_files
from vla_foundry.models.weights import load_model_checkpoint, read_pt, strip_wrapper_names
from vla_foundry.params.models.policy import RobotPolicyParams
from vla_foundry.params.models.roles import ModelParams
from vla_foundry.run_folder import (
    CHECKPOINTS_FOLDER,
    COMPLETE_NAME,
    EMA_WEIGHTS_NAME,
    MODEL_FILES_FOLDER,
    MODEL_WEIGHTS_NAME,
    step_folder_name,
)
from vla_foundry.storage.local import name_errors, sync_folder
from vla_foundry.tensors import as_parts, write_tensors
from vla_foundry.training.distributed import named_persistent_buffers

_ROTARY_TABLE = ".inv_freq"


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """A checkpoint_N.pt and the ema_N.pt beside it."""

    path: Path
    ema_path: Path | None
    # optimizer steps completed when it was saved
    step: int
    # names of its tensors, without wrapper prefixes
    names: tuple[str, ...]
    # True if it stores rotary frequencies in bf16: training rounded them
    has_bf16_tables: bool


def read_weights_facts(path: Path, ema_path: Path | None) -> StoredWeights:
    """Read a checkpoint's metadata without reading any tensor.

    Raises:
        ValueError: it cannot be read safely, or the earlier implementation did not write it.
    """
    content = read_pt(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} is not a checkpoint of the earlier implementation: it has no state_dict.")
    strange = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise ValueError(f"{path}: state_dict holds '{strange[0]}', which is not a tensor.")
    step = content.get("global_step")
    return StoredWeights(
        path=path,
        ema_path=ema_path,
        step=int(content.get("checkpoint_num", 0) if step is None else step),
        names=tuple(strip_wrapper_names(state).values()),
        has_bf16_tables=any(
            name.endswith(_ROTARY_TABLE) and value.dtype == torch.bfloat16 for name, value in state.items()
        ),
    )


def describe_left_out(stored: StoredWeights, params: ModelParams) -> list[str]:
    """Return one line for each kind of tensor that the model has no place for."""
    reasons = LEFT_OUT if isinstance(params, RobotPolicyParams) else {}
    groups = {reason: [name for name in stored.names if name.startswith(mark)] for mark, reason in reasons.items()}
    groups["rotary tables are computed"] = [name for name in stored.names if name.endswith(_ROTARY_TABLE)]
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} left out: {reason}."
        for reason, names in groups.items()
        if names
    ]


def write_imported(run_folder: Path, params: ModelParams, stored: StoredWeights) -> int:
    """Write the weights, any averaged weights and the model's files.

    Every tensor in the file either goes into the model or is reported by `describe_left_out`.

    Returns:
        The number of parameters.

    Raises:
        ValueError: names or shapes differ from the model's.
    """
    model: Any = create_model(params, load_pretrained=False)

    def load_each() -> Iterator[tuple[str, nn.Module]]:
        for name, path in ((MODEL_WEIGHTS_NAME, stored.path), (EMA_WEIGHTS_NAME, stored.ema_path)):
            if path is not None:
                load_model_checkpoint(model, path)
                yield name, model

    write_step_folder(run_folder, stored.step, load_each())
    save_model_files(model, run_folder / MODEL_FILES_FOLDER)
    return sum(parameter.numel() for parameter in model.parameters())


def write_step_folder(run_folder: Path, step: int, models: Iterable[tuple[str, nn.Module]]) -> None:
    """Write a complete checkpoint of weights alone: the weights of each model to the file of its name."""
    folder = run_folder / CHECKPOINTS_FOLDER / step_folder_name(step)
    folder.mkdir(parents=True)
    files: dict[str, tuple[int, str]] = {}
    for name, model in models:
        tensors = {**dict(model.named_parameters()), **named_persistent_buffers(model)}
        with name_errors(folder / name):
            files[name] = write_tensors(folder / name, as_parts(tensors))
    with (folder / COMPLETE_NAME).open("w", encoding="utf-8") as file:
        file.write(json.dumps(files, indent=1))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(str(folder))
