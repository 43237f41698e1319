"""Load weights into a model from step folders, .safetensors files, and .pt files of earlier code."""

import hashlib
import json
import pickle
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vla_foundry.params.models.policy import list_starts
from vla_foundry.params.models.roles import ModelParams
from vla_foundry.run_folder import (
    CHECKPOINTS_FOLDER,
    COMPLETE_NAME,
    EMA_WEIGHTS_NAME,
    MODEL_WEIGHTS_NAME,
    find_checkpoint,
    index_name,
    list_step_folders,
    newest_step_folder,
    weights_patterns,
)
from vla_foundry.shards import sha256_of
from vla_foundry.storage.local import size_and_sha256
from vla_foundry.storage.uri import exists, fetch, is_remote, join_uri, list_files, name_of, parent_uri, read_object
from vla_foundry.tensors import Entry, open_tensors

# tables that earlier code stored and this code computes
_COMPUTED = re.compile(r"(^|\.)inv_freq$")
_EARLIER_CHECKPOINT = re.compile(r"checkpoint_(\d+)\.pt")
_NUM_NAMED = 3
# key of a .safetensors file's metadata: the hash of the base that its adapters belong to
BASE_KEY = "base_sha256"


class Base(NamedTuple):
    """The weights that adapters (LoRA) leave as they are; a checkpoint holds all others, and this hash."""

    # SHA-256 of names, shapes and values
    digest: str
    names: frozenset[str]
    # where they come from, for messages
    source: str


def list_frozen(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that are not trained, by name."""
    return {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}


def digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Return the SHA-256 of each tensor by name, its type and shape included."""
    digests = {}
    for name, tensor in tensors:
        content = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
        content.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        digests[name] = content.hexdigest()
    return digests


def describe_base(model: nn.Module, params: ModelParams, digests: Mapping[str, str] | None = None) -> Base | None:
    """Describe the base of a model as `create_model` returns it, with its weights loaded; None without adapters.

    Args:
        digests: of its frozen weights, if they are known.
    """
    if params.lora is None:
        return None
    digests = digest_tensors(list_frozen(model).items()) if digests is None else digests
    digest = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    return Base(digest, frozenset(digests), ", ".join(list_starts(params)) or "new weights")


def check_base(path: str | Path, found: str | None, base: Base | None) -> None:
    """Check that a file of weights holds all weights, or else what belongs to `base`.

    Args:
        found: the hash of the base that the file names.

    Raises:
        ValueError: they do not belong together.
    """
    if found == (None if base is None else base.digest):
        return
    if base is None:
        raise ValueError(
            f"{path} holds adapters (LoRA), not all weights, so no other model can start from it. Merge them first: "
            "vla-foundry merge --checkpoint RUN --output NEW_RUN."
        )
    if found is None:
        raise ValueError(
            f"{path} holds all weights, not adapters (LoRA). To adapt them, start a new run from it with "
            "--model.resume_weights_only true."
        )
    raise ValueError(
        f"{path} holds adapters (LoRA) of weights with SHA-256 {found[:16]}, but those of {base.source} have "
        f"{base.digest[:16]}. Put back the weights it was trained on, and model.lora.train if that has changed."
    )


def load_model_checkpoint(
    model: nn.Module, path: str | Path, *, use_ema: bool = False, base: Base | None = None
) -> None:
    """Load all weights of a checkpoint into `model`, in place; every name and shape must fit.

    Values are converted to the model's dtypes. For tied names, the file needs to hold only one of them. A model that
    had other names before translates them in its method `translate_weights`.

    Args:
        path: a run folder (its newest complete checkpoint), a step folder, a .safetensors or a .pt file; local, s3://
            or hf://.
        use_ema: load the averaged weights, if `path` is a folder.
        base: the weights of the model that the checkpoint leaves out.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: it cannot be read, or its names and shapes differ from the model's.
    """
    with open_checkpoint(path, use_ema=use_ema, base=base) as entries:
        if base is not None:
            _load(model, entries, str(path), but=base.names)
            _round_base(model, base, next(iter(entries.values())).read().dtype)
            return
        _load(model, _translate(model, entries), str(path))


def _translate(model: nn.Module, entries: Mapping[str, Entry]) -> Mapping[str, Entry]:
    translate: Any = getattr(model, "translate_weights", None)
    return entries if translate is None else translate(entries)


@torch.no_grad()
def _round_base(model: nn.Module, base: Base, dtype: torch.dtype) -> None:
    """Round a base to the precision that its adapters were trained with; pure_bf16 rounds all weights."""
    for name, weight in model.named_parameters():
        if name in base.names and torch.promote_types(weight.dtype, dtype) != dtype:
            weight.copy_(weight.to(dtype))


def load_part_checkpoint(
    model: nn.Module, checkpoint: str, *, part: str, path: str, may_grow: Collection[str] = ()
) -> None:
    """Load a part of a model from its own checkpoint, or from a checkpoint of a larger model that contains it.

    Args:
        part: name of the part in the larger model.
        path: config path of the part, for messages.
        may_grow: names of tensors that may have more rows than the checkpoint; the extra rows stay unchanged.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: it cannot be read or does not fit.
    """
    with open_checkpoint(checkpoint) as entries:
        entries = dict(_entries_of_part(entries, part))
        tensors = model.state_dict(keep_vars=True)
        for name in may_grow:
            if name in entries and name in tensors and entries[name].shape[0] < tensors[name].shape[0]:
                entries[name] = _grown(entries[name], tensors[name])
        _load(model, entries, f"{checkpoint} ({path}.resume_from_checkpoint)")


def count_stored_rows(checkpoint: str, names: Collection[str], *, part: str) -> int | None:
    """Return the number of rows of the first of these tensors in a checkpoint; None if it has none of them.

    Args:
        part: see `load_part_checkpoint`.
    """
    with open_checkpoint(checkpoint) as entries:
        found = _entries_of_part(entries, part)
        return next((found[name].shape[0] for name in names if name in found), None)


def _entries_of_part(entries: "Mapping[str, Entry]", part: str) -> "Mapping[str, Entry]":
    inside = {name.removeprefix(f"{part}."): entry for name, entry in entries.items() if name.startswith(f"{part}.")}
    return inside or entries


def _grown(entry: "Entry", tensor: Tensor) -> "Entry":
    rest = tensor.detach()[entry.shape[0] :]
    return Entry(tensor.shape, lambda: torch.cat([entry.read().to(rest), rest]))


def find_tied_names(model: nn.Module) -> dict[str, str]:
    """Map every other name of a tied parameter to its first name."""
    firsts: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = firsts.setdefault(id(parameter), name)
        if first != name:
            tied[name] = first
    return tied


def find_weights_file(folder: str | Path, *, use_ema: bool = False) -> Path:
    """Return the weights file of a local step folder, or of a run folder's newest checkpoint.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it has no complete checkpoint, or no averaged weights.
    """
    folder = Path(folder)
    name = EMA_WEIGHTS_NAME if use_ema else MODEL_WEIGHTS_NAME
    checkpoints = folder if folder.name == CHECKPOINTS_FOLDER else folder / CHECKPOINTS_FOLDER
    if not list_step_folders(folder) and checkpoints.is_dir():
        # checkpoints of an earlier run, by number, because checkpoint_10 comes after checkpoint_9
        found = {path: _EARLIER_CHECKPOINT.fullmatch(path.name) for path in checkpoints.iterdir()}
        earlier = {int(match[1]): path for path, match in found.items() if match is not None}
        if earlier:
            newest = earlier[max(earlier)]
            return newest.with_name(newest.name.replace("checkpoint_", "ema_")) if use_ema else newest
    path = find_checkpoint(folder, only=weights_patterns(name)) / name
    index = path.with_name(index_name(name))
    if index.is_file():
        return index
    if not path.is_file():
        fix = "The run kept no average of its weights (ema.enabled)." if use_ema else "Use another checkpoint."
        raise ValueError(f"Checkpoint {path.parent} has no {name}. {fix}")
    return path


def has_ema(path: str | Path) -> bool:
    """Return True if a run or step folder also holds averaged weights; a file stands for itself."""
    location = str(path)
    if _is_file_name(location):
        return False
    if is_remote(location):
        return exists(_find_remote_weights(location, use_ema=True))
    weights = find_weights_file(location)
    names = (EMA_WEIGHTS_NAME, index_name(EMA_WEIGHTS_NAME)) if weights.name.startswith(MODEL_WEIGHTS_NAME) else ()
    return any(weights.with_name(name).is_file() for name in names)


@contextmanager
def open_checkpoint(
    path: str | Path, *, use_ema: bool = False, base: Base | None = None
) -> Iterator[Mapping[str, "Entry"]]:
    """Open a checkpoint to read it tensor by tensor; see `load_model_checkpoint`.

    Yields:
        name -> entry; names are those of the unwrapped model.
    """
    with tempfile.TemporaryDirectory(prefix="vla_foundry_weights_") as folder:
        files = _fetch_weights(locate_weights(str(path), use_ema=use_ema), folder)
        if not all(file.is_file() for file in files):
            raise FileNotFoundError(f"Checkpoint {path} does not exist.")
        if files[0].suffix != ".safetensors":
            values = _read_pt_weights(files[0])
            yield _clean_names({name: Entry(value.shape, lambda v=value: v) for name, value in values})
            return
        with open_tensors(files) as (entries, metadata):
            for each in metadata:
                check_base(path, each.get(BASE_KEY), base)
            yield _clean_names(entries)


def _fetch_weights(source: str, folder: str) -> list[Path]:
    """Return the local files of weights: the one named, or those of an index; remote ones are checked."""
    marks: dict[str, Any] = {}
    if is_remote(source):
        with suppress(FileNotFoundError):
            marks = read_object(join_uri(parent_uri(source), COMPLETE_NAME))

    def bring(location: str) -> Path:
        if not is_remote(location):
            return Path(location)
        local = Path(fetch(location, folder))
        entry = marks.get(name_of(location))
        if entry is not None and entry != list(size_and_sha256(local)):
            local.resolve().unlink()  # it may lie in a cache
            raise ValueError(
                f"{location} does not have the SHA-256 it was written with. Run the command again to download it again."
            )
        return local

    first = bring(source)
    if not source.endswith(index_name(".safetensors")):
        return [first]
    return [bring(join_uri(parent_uri(source), name)) for name in _read_shard_names(first)]


def list_weights_files(step_folder: Path, name: str) -> list[Path]:
    """Return the files that hold the weights called `name` in a local step folder: that one, or those of its index."""
    index = step_folder / index_name(name)
    return [step_folder / shard for shard in _read_shard_names(index)] if index.is_file() else [step_folder / name]


def _read_shard_names(index: Path) -> list[str]:
    """Return the names of the files of an index, in order.

    Raises:
        ValueError: it is broken, or names files elsewhere.
    """
    content = read_object(str(index))
    # ranks that each hold a part of all tensors write a list
    listed = content.get("files", content.get("weight_map"))
    listed = list(listed.values()) if isinstance(listed, dict) else listed
    names = sorted(set(map(str, listed))) if isinstance(listed, list) else []
    if not names or any(not name.endswith(".safetensors") or "/" in name for name in names):
        raise ValueError(f"{index} names no files of weights beside it.")
    return names


def locate_weights(location: str, *, use_ema: bool = False) -> str:
    """Return the file of weights that a run folder, step folder or file stands for."""
    if _is_file_name(location):
        return location
    if is_remote(location):
        return _find_remote_weights(location, use_ema)
    return str(find_weights_file(location, use_ema=use_ema))


def _is_file_name(name: str) -> bool:
    return name.endswith((".safetensors", ".pt"))


def _find_remote_weights(folder: str, use_ema: bool) -> str:
    files = list_files(folder)
    # the folder itself may be a step folder
    step = newest_step_folder(files) or (folder if join_uri(folder, COMPLETE_NAME) in files else None)
    if step is None:
        raise ValueError(f"{folder} has no complete checkpoint. Give a run folder, a step folder or a weights file.")
    name = EMA_WEIGHTS_NAME if use_ema else MODEL_WEIGHTS_NAME
    index = join_uri(step, index_name(name))
    return index if index in files else join_uri(step, name)


def read_pt(path: Path) -> Any:
    """Read a torch.save file without running code from it; tensors stay on disk until used.

    Raises:
        ValueError: it holds anything but tensors and plain values, or is corrupt.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"Checkpoint {path} cannot be read safely (tensors and plain values only): {reason}") from None


def _read_pt_weights(path: Path) -> list[tuple[str, Tensor]]:
    content = read_pt(path)
    for key in ("state_dict", "ema_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ValueError(f"Checkpoint {path} holds a {type(content).__name__}, not weights by name.")
    return [(str(name), value) for name, value in content.items() if isinstance(value, Tensor)]


def _clean_names(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Strip torch.compile's and DDP's additions from names, and drop computed tables."""
    names = strip_wrapper_names(entries)
    return {names[name]: entry for name, entry in entries.items() if not _COMPUTED.search(names[name])}


def strip_wrapper_names(stored: Iterable[str]) -> dict[str, str]:
    """Map stored names to names without torch.compile's and DDP's additions."""
    names = {name: name.replace("_orig_mod.", "") for name in stored}
    while names and all(name.startswith("module.") for name in names.values()):
        names = {old: new.removeprefix("module.") for old, new in names.items()}
    return names


@torch.no_grad()
def _load(model: nn.Module, entries: Mapping[str, Entry], source: str, *, but: Collection[str] = frozenset()) -> None:
    """Copy entries into a model; all of its tensors must be there but those named by `but`."""
    tensors = model.state_dict(keep_vars=True)
    tied = find_tied_names(model)
    given = {tied.get(name, name) for name in entries}
    missing = sorted(name for name in tensors if tied.get(name, name) not in given and tied.get(name, name) not in but)
    unexpected = sorted(name for name in entries if name not in tensors)
    shapes = [
        f"{name} {list(entry.shape)}, in the model {list(tensors[name].shape)}"
        for name, entry in entries.items()
        if name in tensors and entry.shape != tensors[name].shape
    ]
    faults = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
    if any(names for _, names in faults):
        listed = "; ".join(
            f"{what}: {', '.join(names[:_NUM_NAMED])}"
            + (f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else "")
            for what, names in faults
            if names
        )
        raise ValueError(
            f"Checkpoint {source} does not fit the model: {listed}. Use the model params it was saved with: "
            f'--SECTION "include RUN/config_model.yaml", with SECTION the part that starts from it.'
        )
    for name, entry in entries.items():
        if tied.get(name) not in entries:
            tensors[name].copy_(entry.read())


def digest_weights(checkpoint: str, use_ema: bool | None) -> str | None:
    """Return the SHA-256 of a checkpoint's weights (use_ema: see `load_run_model`); None: a remote one does not say."""
    if is_remote(checkpoint):
        location = locate_weights(checkpoint, use_ema=has_ema(checkpoint) if use_ema is None else use_ema)
        mark = join_uri(parent_uri(location), COMPLETE_NAME)
        entry = read_object(mark).get(name_of(location)) if exists(mark) else None
        return entry[1] if isinstance(entry, list) and location.endswith(".safetensors") else None
    path = find_weights_file(checkpoint, use_ema=has_ema(checkpoint) if use_ema is None else use_ema)
    if path.suffix == ".json":  # of several files, that of their SHA-256s
        mark, names = path.with_name(COMPLETE_NAME), _read_shard_names(path)
        listed = read_object(str(mark))
        unlisted = [name for name in names if name not in listed]
        if unlisted:
            raise ValueError(f"{mark} does not list {unlisted[0]}, which {path.name} names. Use another checkpoint.")
        return hashlib.sha256("".join(listed[name][1] for name in names).encode()).hexdigest()
    with path.open("rb") as file:
        return sha256_of(file)
