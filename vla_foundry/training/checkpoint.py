"""What a checkpoint holds of a TrainState, and how to restore it from a step folder (see run_folder.py).

Each rank reads the rows that it keeps of sharded tensors, whatever ranks wrote them. Nothing is pickled.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vla_foundry.models.weights import BASE_KEY, Base, check_base, list_weights_files
from vla_foundry.run_folder import EMA_WEIGHTS_NAME, MODEL_WEIGHTS_NAME, STATE_NAME, TRAINING_STATE_FOLDER
from vla_foundry.storage.uri import read_object
from vla_foundry.tensors import Entry, open_tensors
from vla_foundry.training.distributed import local_rows, local_shard, named_persistent_buffers, shard_like
from vla_foundry.training.optimization.ema import EMA
from vla_foundry.training.state import TrainState

STATE_VERSION = 1
_MOMENTS = ("exp_avg", "exp_avg_sq")


def load_checkpoint(step_folder: Path, state: TrainState) -> dict[str, Any]:
    """Collective: call on every rank. Restore `state` in place from a verified step folder.

    Returns:
        The contents of state.json, plus lines to show the user under "notices".

    Raises:
        ValueError: the checkpoint belongs to another model or has another version.
    """
    saved = read_object(str(step_folder / STATE_NAME))
    if saved["version"] != STATE_VERSION:
        raise ValueError(
            f"{step_folder / STATE_NAME} has version {saved['version']}; this code reads {STATE_VERSION}. "
            "Use --model.resume_weights_only true."
        )
    read_weights(step_folder, model_tensors(state), base=state.base)
    _check_optimizer(step_folder, state, saved["optimizer"])
    _load_moments(step_folder / TRAINING_STATE_FOLDER, state, saved["optimizer"]["steps"])
    state.step = saved["step"]
    for name, value in saved["counters"].items():
        getattr(state.counters, name).fill_(value)
    saved["notices"] = []
    if state.ema is not None:
        if any(path.is_file() for path in list_weights_files(step_folder, EMA_WEIGHTS_NAME)):
            _read_averages(step_folder, state, state.ema)
        else:
            for name, average in state.ema.averages.items():
                average.copy_(local_shard(state.parameters[name]))
            saved["notices"].append(f"{step_folder} has no average of the weights; it starts from the weights.")
    return saved


def read_weights(step_folder: Path, tensors: Mapping[str, Tensor], *, base: Base | None = None) -> None:
    """Read weights into tensors in place, sharded or not; each rank reads the rows that it keeps.

    Raises:
        ValueError: the names or shapes do not match the tensors, or the weights belong to another base.
    """
    with open_tensors(list_weights_files(step_folder, MODEL_WEIGHTS_NAME)) as (entries, metadata):
        _check_weights(step_folder, entries, metadata, tensors, base)
        for name, tensor in tensors.items():
            local_shard(tensor).copy_(_read_shard(step_folder, entries[name], name, tensor))


def _check_weights(
    step_folder: Path,
    entries: Mapping[str, Entry],
    metadata: list[dict[str, str]],
    tensors: Mapping[str, Tensor],
    base: Base | None,
) -> None:
    for each in metadata:
        check_base(step_folder, each.get(BASE_KEY), base)
    missing, unknown = sorted(tensors.keys() - entries.keys()), sorted(entries.keys() - tensors.keys())
    if missing or unknown:
        raise ValueError(
            f"{step_folder} belongs to another model: {len(missing)} weights are missing (such as {missing[:1]}), "
            f"{len(unknown)} are unknown (such as {unknown[:1]}). Use the config it was saved with."
        )


def _read_shard(step_folder: Path, entry: Entry, name: str, like: Tensor) -> Tensor:
    """Read this rank's part of a tensor that is sharded like `like`."""
    if entry.shape != like.shape:
        raise ValueError(
            f"{step_folder}: '{name}' has shape {tuple(entry.shape)}, the model's is {tuple(like.shape)}. "
            "Use the config it was saved with."
        )
    return entry.read_rows(local_rows(like))


def _read_averages(step_folder: Path, state: TrainState, ema: EMA) -> None:
    """Read averages only: a weight that is frozen now keeps its value, and its average beside it."""
    with open_tensors(list_weights_files(step_folder, EMA_WEIGHTS_NAME)) as (entries, metadata):
        _check_weights(step_folder, entries, metadata, model_tensors(state), state.base)
        for name, parameter in _own_parameters(state).items():
            average = _read_shard(step_folder, entries[name], name, parameter)
            if name in ema.averages:
                ema.averages[name].copy_(average)
            else:
                ema.hold(name, average.to(parameter.device))


def _own_parameters(state: TrainState) -> dict[str, nn.Parameter]:
    base = frozenset() if state.base is None else state.base.names
    return {name: parameter for name, parameter in state.parameters.items() if name not in base}


def model_tensors(state: TrainState) -> dict[str, Tensor]:
    """Return what a checkpoint holds by name, as it is sharded: weights outside a base, tied ones once, and buffers."""
    return {**_own_parameters(state), **named_persistent_buffers(state.model)}


def ema_tensors(state: TrainState) -> dict[str, Tensor]:
    """Return `model_tensors` with weights replaced by their averages."""
    assert state.ema is not None
    averages = {name: shard_like(value, state.parameters[name]) for name, value in state.ema.averages.items()}
    return {**model_tensors(state), **averages}


def read_scalars(state: TrainState) -> dict[str, Any]:
    """Return what state.json holds of a state."""
    names = {parameter: name for name, parameter in state.parameters.items()}
    steps = {names[parameter]: int(values["step"]) for parameter, values in _optimizer_states(state).items()}
    groups = [
        {
            "names": [names[parameter] for parameter in group["params"]],
            **{key: group[key] for key in ("weight_decay", "betas", "eps", "is_muon")},
        }
        for group in state.optimizer.param_groups
    ]
    return {
        "step": state.step,
        "total_steps": len(state.schedule),
        # of the last update
        "lr": float(state.lr),
        "counters": {name: int(value) for name, value in vars(state.counters).items()},
        "optimizer": {"steps": steps, "groups": groups},
    }


def _optimizer_states(state: TrainState) -> dict[nn.Parameter, dict[str, Tensor]]:
    # torch types its keys as tensors
    return cast(dict[nn.Parameter, dict[str, Tensor]], state.optimizer.state)


def moment_tensors(state: TrainState) -> dict[str, Tensor]:
    """Return the optimizer's moments by name, as they are sharded."""
    names = {parameter: name for name, parameter in state.parameters.items()}
    tensors = {
        f"{moment}.{names[parameter]}": values[moment]
        for parameter, values in _optimizer_states(state).items()
        for moment in _MOMENTS
        if moment in values
    }
    # the storage cannot slice scalars
    return {name: tensor.reshape(1) if tensor.ndim == 0 else tensor for name, tensor in tensors.items()}


def _muon_parameters(state: TrainState) -> set[nn.Parameter]:
    return {parameter for group in state.optimizer.param_groups if group["is_muon"] for parameter in group["params"]}


def _check_optimizer(step_folder: Path, state: TrainState, saved: Mapping[str, Any]) -> None:
    """Check that the same weights are Muon's as when moments were saved, of those that have some."""
    before = {name for group in saved["groups"] if group.get("is_muon") for name in group["names"]}
    muon = _muon_parameters(state)
    for name in saved["steps"].keys() & state.parameters.keys():
        if (name in before) != (state.parameters[name] in muon):
            raise ValueError(
                f"{step_folder} was trained with {'muon' if before else 'adamw'}, which hparams.optimizer must be to "
                "resume it. Set it so, or use --model.resume_weights_only true."
            )


def _load_moments(folder: Path, state: TrainState, steps: Mapping[str, int]) -> None:
    unknown = sorted(steps.keys() - state.parameters.keys())
    if unknown:
        raise ValueError(
            f"{folder} holds moments of {unknown[0]}, which this model lacks. Use --model.resume_weights_only true."
        )
    muon = _muon_parameters(state)
    for name, step in steps.items():
        parameter = state.parameters[name]
        moments = _MOMENTS[:1] if parameter in muon else _MOMENTS
        state.optimizer.state[parameter] = {
            "step": torch.tensor(float(step), dtype=torch.float32, device=local_shard(parameter).device),
            **{moment: torch.zeros_like(parameter, requires_grad=False) for moment in moments},
        }
    wanted = moment_tensors(state)
    if wanted:
        with open_tensors(sorted(folder.glob("*.safetensors"))) as (entries, _):
            for name, tensor in wanted.items():
                if name not in entries:
                    raise ValueError(f"{folder} has no '{name}'. Use an older checkpoint.")
                local_shard(tensor).copy_(_read_shard(folder, entries[name], name, tensor))
