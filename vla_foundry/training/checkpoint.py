"""Save and restore a TrainState as a step folder (see run_folder.py): written aside, flushed, hashed, then renamed.

Weights and average are whole files; the optimizer's moments are sharded, each rank writing its own, in the
safetensors storage of torch.distributed.checkpoint, which can read them back on any number of ranks. Nothing is
pickled.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, distribute_tensor

from vla_foundry.models.weights import BASE_KEY, Base, check_base
from vla_foundry.run_folder import (
    CHECKPOINTS_FOLDER,
    COMPLETE_NAME,
    EMA_WEIGHTS_NAME,
    MODEL_WEIGHTS_NAME,
    STATE_NAME,
    TRAINING_STATE_FOLDER,
    WRITING_PREFIX,
    list_step_folders,
    step_folder_name,
)
from vla_foundry.storage.local import name_errors, size_and_sha256, sync_folder
from vla_foundry.storage.uri import read_object, write_bytes
from vla_foundry.training.distributed import (
    gather,
    gather_objects,
    local_shard,
    main_rank_first,
    named_persistent_buffers,
    shard_like,
)
from vla_foundry.training.optimization.ema import EMA
from vla_foundry.training.state import TrainState
from vla_foundry.world import World

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_weights(
    path: Path, tensors: Mapping[str, Tensor], *, is_main: bool, base: Base | None = None
) -> tuple[int, str]:
    """Collective: call on every rank. Write tensors, sharded or not, as one file, and flush it to disk.

    Args:
        is_main: True on the rank that writes; the others only send their shards.
        base: the weights that are left out.

    Returns:
        Size in bytes and SHA-256 of the file, on the writing rank (0 and "" elsewhere).
    """
    if not is_main:
        for tensor in tensors.values():
            if isinstance(tensor, DTensor):
                gather(tensor)
        return 0, ""
    with name_errors(path), path.open("wb") as file:
        digest = hashlib.sha256()
        _write(file, digest, _format_header(tensors, {} if base is None else {BASE_KEY: base.digest}))
        for tensor in tensors.values():
            whole = gather(tensor).cpu().contiguous()
            _write(file, digest, whole.reshape(-1).view(torch.uint8).numpy().data)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _write(file: BinaryIO, digest, content: bytes | memoryview) -> None:
    file.write(content)
    digest.update(content)


def _format_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    # https://huggingface.co/docs/safetensors: length of the header (8 bytes), JSON, then the tensors end to end
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_weights(path: Path, tensors: Mapping[str, Tensor], *, base: Base | None = None) -> None:
    """Read a file into tensors in place, sharded or not; each rank keeps its shard.

    Raises:
        ValueError: the file's names or shapes do not match the tensors, or it belongs to another base.
    """
    with safe_open(path, framework="pt") as file:
        check_base(path, (file.metadata() or {}).get(BASE_KEY), base)
        _check_names(path, set(file.keys()), tensors)
        for name, tensor in tensors.items():
            local_shard(tensor).copy_(_read_shard(path, file, name, tensor))


def _check_names(path: Path, found: set[str], tensors: Mapping[str, Tensor]) -> None:
    missing, unknown = sorted(tensors.keys() - found), sorted(found - tensors.keys())
    if missing or unknown:
        raise ValueError(
            f"{path} belongs to another model: {len(missing)} weights are missing (such as {missing[:1]}), "
            f"{len(unknown)} are unknown (such as {unknown[:1]}). Use the config it was saved with."
        )


def _read_shard(path: Path, file: Any, name: str, like: Tensor) -> Tensor:
    """Read this rank's part of a tensor that is sharded like `like`."""
    whole = file.get_tensor(name)
    if whole.shape != like.shape:
        raise ValueError(
            f"{path}: '{name}' has shape {tuple(whole.shape)}, the model's is {tuple(like.shape)}. "
            "Use the config it was saved with."
        )
    if isinstance(like, DTensor):
        whole = whole.to(like.device_mesh.device_type)
        whole = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return local_shard(whole)


STATE_VERSION = 1
# approximate bytes of moments per file; a rank holds this much twice while it writes
_FILE_SIZE = 1 << 30
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_checkpoint(
    run_folder: Path, state: TrainState, *, world: World, facts: Mapping[str, Any], max_checkpoints: int | None = None
) -> Path:
    """Collective: call on every rank. Write the checkpoint of `state.step`; it is on disk on return.

    Args:
        facts: extra JSON-serializable entries of state.json (the data plan, logger ids).
        max_checkpoints: number of newest checkpoints to keep; None keeps all.

    Returns:
        The step folder.
    """
    final = run_folder / CHECKPOINTS_FOLDER / step_folder_name(state.step)
    folder = final.with_name(WRITING_PREFIX + final.name)
    files: dict[str, tuple[int, str]] = {}
    scalars = {"version": STATE_VERSION, **_read_scalars(state), "world_size": world.world_size, **facts}
    with _explain_errors(folder, state, world):
        main_rank_first(world, lambda: _create_empty(folder))
        path = folder / MODEL_WEIGHTS_NAME
        files[path.name] = write_weights(path, model_tensors(state), is_main=world.is_main, base=state.base)
        if state.ema is not None:
            path = folder / EMA_WEIGHTS_NAME
            files[path.name] = write_weights(path, ema_tensors(state), is_main=world.is_main, base=state.base)
        if all(gather_objects((folder / TRAINING_STATE_FOLDER).is_dir())):
            _write_moments(folder / TRAINING_STATE_FOLDER, state)
            files.update(_hash_moments(folder, world))
        else:
            # other machines have disks of their own: the main rank writes their shards too
            path = folder / TRAINING_STATE_FOLDER / "moments.safetensors"
            files[str(path.relative_to(folder))] = write_weights(path, _moment_tensors(state), is_main=world.is_main)
        main_rank_first(world, lambda: _finish(folder, final, files, scalars))
    if world.is_main and max_checkpoints is not None:
        for old in list_step_folders(run_folder)[max(max_checkpoints, 1) :]:
            shutil.rmtree(old)
    return final


@contextmanager
def _explain_errors(folder: Path, state: TrainState, world: World) -> Iterator[None]:
    """Turn an error of the disk into one line with the space that a checkpoint needs, and delete what was written."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        # torch gathers the errors of all ranks, and raises them on every one
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        cause = causes[0]
        if not isinstance(cause, OSError):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        if not world.is_main:
            raise SystemExit(2) from None
        sizes = [tensor.numel() * tensor.element_size() for tensor in _moment_tensors(state).values()]
        for tensors in (model_tensors(state), *([ema_tensors(state)] if state.ema is not None else [])):
            sizes += [tensor.numel() * tensor.element_size() for tensor in tensors.values()]
        with suppress(OSError):
            free = shutil.disk_usage(folder.parent).free
            raise ValueError(
                f"{cause.filename or folder / TRAINING_STATE_FOLDER}: {cause.strerror}. A checkpoint needs "
                f"{sum(sizes) / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free. Make room, then continue with "
                "--resume auto."
            ) from error
        raise


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
    read_weights(step_folder / MODEL_WEIGHTS_NAME, model_tensors(state), base=state.base)
    _check_optimizer(step_folder, state, saved["optimizer"])
    _load_moments(step_folder / TRAINING_STATE_FOLDER, state, saved["optimizer"]["steps"])
    state.step = saved["step"]
    for name, value in saved["counters"].items():
        getattr(state.counters, name).fill_(value)
    saved["notices"] = []
    if state.ema is not None:
        if (step_folder / EMA_WEIGHTS_NAME).is_file():
            _read_averages(step_folder / EMA_WEIGHTS_NAME, state, state.ema)
        else:
            for name, average in state.ema.averages.items():
                average.copy_(local_shard(state.parameters[name]))
            saved["notices"].append(f"{step_folder} has no average of the weights; it starts from the weights.")
    return saved


def _read_averages(path: Path, state: TrainState, ema: EMA) -> None:
    """Read averages only: a weight that is frozen now keeps its value, and its average beside it."""
    with safe_open(path, framework="pt") as file:
        check_base(path, (file.metadata() or {}).get(BASE_KEY), state.base)
        _check_names(path, set(file.keys()), model_tensors(state))
        for name, parameter in _own_parameters(state).items():
            average = _read_shard(path, file, name, parameter)
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


def _read_scalars(state: TrainState) -> dict[str, Any]:
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


def _create_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / TRAINING_STATE_FOLDER).mkdir(parents=True)


def _optimizer_states(state: TrainState) -> dict[nn.Parameter, dict[str, Tensor]]:
    # torch types its keys as tensors
    return cast(dict[nn.Parameter, dict[str, Tensor]], state.optimizer.state)


def _moment_tensors(state: TrainState) -> dict[str, Tensor]:
    names = {parameter: name for name, parameter in state.parameters.items()}
    tensors = {
        f"{moment}.{names[parameter]}": values[moment]
        for parameter, values in _optimizer_states(state).items()
        for moment in _MOMENTS
        if moment in values
    }
    # the storage cannot slice scalars
    return {name: tensor.reshape(1) if tensor.ndim == 0 else tensor for name, tensor in tensors.items()}


def _write_moments(folder: Path, state: TrainState) -> None:
    tensors = _moment_tensors(state)
    files: dict[str, int] = {}
    size = 0
    for name, tensor in tensors.items():
        files[name] = 1 + size // _FILE_SIZE
        size += tensor.numel() * tensor.element_size()
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    with _quiet():
        state_dict_saver.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())


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
    if steps:
        with _quiet():
            state_dict_loader.load(
                _moment_tensors(state),
                storage_reader=HuggingFaceStorageReader(str(folder)),
                no_dist=not dist.is_initialized(),
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warnings about single-process use and about its own deprecated parts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        yield


def _hash_moments(folder: Path, world: World) -> dict[str, tuple[int, str]]:
    """Return the size and SHA-256 of every file of moments; each rank reads its share."""
    paths = sorted((folder / TRAINING_STATE_FOLDER).iterdir())
    mine: dict[str, tuple[int, str]] = {}
    for path in paths[world.rank :: world.world_size]:
        mine[str(path.relative_to(folder))] = size_and_sha256(path)
    merged: dict[str, tuple[int, str]] = {}
    for part in gather_objects(mine):
        merged.update(part)
    return merged


def _finish(
    folder: Path,
    final: Path,
    files: dict[str, tuple[int, str]],
    scalars: Mapping[str, Any],
) -> None:
    content = json.dumps(scalars, indent=1).encode()
    write_bytes(str(folder / STATE_NAME), content)
    files[STATE_NAME] = (len(content), hashlib.sha256(content).hexdigest())
    sync_folder(str(folder / TRAINING_STATE_FOLDER))
    write_bytes(str(folder / COMPLETE_NAME), json.dumps(files, indent=1).encode())
    # a folder already here is a damaged checkpoint: a run continues from its newest valid one
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    sync_folder(str(final.parent))
