"""`vla-foundry reproduce`: run the experiment of an experiment.json again, and compare it with the record."""

import math
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vla_foundry.config.command_line import PLUGINS_FLAG, named_plugins, parse_command
from vla_foundry.config.loading import dump_value
from vla_foundry.hub.verify_resume import training_command
from vla_foundry.params.commands.sharing import ReproduceParams
from vla_foundry.progress import say
from vla_foundry.provenance import has_uncommitted_changes, read_all_versions, read_git_commit
from vla_foundry.record import hash_data, read_losses
from vla_foundry.run_folder import CONFIG_NAME, EXPERIMENT_NAME
from vla_foundry.storage.uri import exists, is_remote, join_uri, name_of, parent_uri, read_object

_LOCATIONS = ("dataset_manifest", "dataset_statistics", "val_dataset_manifest", "val_dataset_statistics")
_MAX_SHOWN = 8


def reproduce(params: ReproduceParams) -> Path | None:
    """Train again, and print what differs from the record.

    Returns:
        The new run folder; None for a dry run.

    Raises:
        FileNotFoundError: there is no record.
        ValueError: the record is incomplete, the data is not what it was, training fails, or losses differ by more
            than `tolerance`.
    """
    record = _read_record(params.record)
    config = _find_data(dict(record["config"]), params.data_folder)
    folder = Path(params.output) / str(record["name"])
    changed = list(find_changed_data(record, config))
    num_before = int(record["starts"][-1].get("world_size", 1))
    num_processes = params.num_processes or num_before
    if num_processes != num_before:
        say(f"differs: processes were {num_before}, are {num_processes}")
    for line in [*find_differences(record), *changed]:
        say(f"differs: {line}")
    if params.dry_run:
        return None
    if changed:
        raise ValueError(f"The data is not what the record was made with: {changed[0]}. Restore it, or --data_folder.")
    if folder.exists():
        raise ValueError(f"output {folder} exists. Choose another --output, or delete it.")
    _train(config, folder, num_processes)
    worst = [
        line
        for kind, before in record["losses"].items()
        for line in compare_losses(kind, before, read_losses(folder)[kind], params.tolerance)
    ]
    if worst:
        raise ValueError(f"The losses differ from the record: {worst[0]}. The new run is {folder}.")
    return folder


def _read_record(location: str) -> dict[str, Any]:
    """Read the record of a run that ended.

    Raises:
        ValueError: the file is no record, or the run did not end, or was resumed or stopped.
    """
    if not location.endswith(".json"):
        location = join_uri(location, EXPERIMENT_NAME)
    record = read_object(location)
    shapes = {"name": str, "config": dict, "starts": list, "losses": dict, "end": dict, "data": dict}
    for key, shape in shapes.items():
        if not isinstance(record.get(key), shape):
            missing = "the run has not ended" if key in ("end", "losses") else f"it has no '{key}'"
            raise ValueError(f"{location} is not the record of a whole run: {missing}.")
    name = record["name"]
    if "/" in name or name in ("", ".", "..") or not _is_sound(record):
        raise ValueError(
            f"{location} is not a record that a run wrote: a name, start, loss or dataset in it is strange."
        )
    if record["end"].get("stopped_by"):
        raise ValueError(f"{location}: the run was stopped by {record['end']['stopped_by']}. Continue it first.")
    return record


def _is_sound(record: Mapping[str, Any]) -> bool:
    """Return True if all parts of a record that are used have the types that they are written with."""
    starts, losses = record["starts"], record["losses"]
    data, packages = record["config"].get("data"), record.get("packages")
    sections = list(_sections(record["config"]).values()) if isinstance(data, dict) else [None]
    places = [section.get(key) or [] for section in sections if isinstance(section, dict) for key in _LOCATIONS]
    return (
        starts != []
        and all(isinstance(start, dict) and type(start.get("world_size", 1)) is int for start in starts)
        and isinstance(packages, dict)
        and losses.keys() <= {"train", "validation"}
        and all(
            _is_loss(entry) for found in losses.values() for entry in (found if isinstance(found, list) else [None])
        )
        and all(isinstance(section, dict) for section in sections)
        and all(isinstance(place, list) and all(isinstance(name, str) for name in place) for place in places)
        and all(
            isinstance(entry, dict) and isinstance(entry.get("manifest"), str)
            for part in record["data"].values()
            for entry in (part if isinstance(part, list) else [None])
        )
    )


def _is_loss(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and [type(value) for value in entry[:1]] == [int]
        and len(entry) == 2
        and (entry[1] is None or isinstance(entry[1], int | float))
    )


def _sections(config: Mapping[str, Any]) -> dict[str, Any]:
    data = config.get("data", {})
    return dict(data["datasets"]) if isinstance(data.get("datasets"), dict) else {"data": data}


def _find_data(config: dict[str, Any], folder: str | None) -> dict[str, Any]:
    """Return the config with local data looked for in `folder`, by the last folder and the name of each file."""
    if folder is None:
        return config
    for section in _sections(config).values():
        for key in _LOCATIONS:
            section[key] = [_moved(place, folder) for place in section.get(key) or []]
        if isinstance(section.get("tokenizer"), str) and "/" in section["tokenizer"]:
            section["tokenizer"] = _moved(section["tokenizer"], folder)
    return config


def _moved(place: str, folder: str) -> str:
    if is_remote(place):
        return place
    moved = join_uri(folder, name_of(parent_uri(place)), name_of(place))
    return moved if exists(moved) else place


def find_differences(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield how this machine and source tree differ from those of a record."""
    start = record["starts"][-1]
    if len(record["starts"]) > 1:
        yield f"the run was started {len(record['starts'])} times; it is now trained at once"
    now = {"python": platform.python_version(), "commit": read_git_commit(), "device": _read_device()}
    for name, value in now.items():
        if start.get(name) != value:
            yield f"{name} was {start.get(name)}, is {value}"
    if start.get("is_dirty") or has_uncommitted_changes():
        yield "the source tree has, or had, uncommitted changes"
    before, after = record.get("packages") or {}, read_all_versions()
    changed = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    for name in changed[:_MAX_SHOWN]:
        yield f"package {name} was {before.get(name, 'absent')}, is {after.get(name, 'absent')}"
    if len(changed) > _MAX_SHOWN:
        yield f"{len(changed) - _MAX_SHOWN} more packages: {', '.join(changed[_MAX_SHOWN:])}"


def _read_device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


def find_changed_data(record: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    """Yield which manifests, statistics and specs have another SHA-256 than in a record, or are gone."""
    for name, section in _sections(config).items():
        for before, now in zip(record["data"].get(name) or [], hash_data(section), strict=False):
            for key, digest in now.items():
                if key.endswith("_sha256") and digest != before.get(key):
                    what = f"the {key.removesuffix('_sha256')} of {before['manifest']}"
                    yield f"{what} is missing" if digest is None else f"{what} has another SHA-256"


def _train(config: dict[str, Any], folder: Path, num_processes: int) -> None:
    """Train by the command line, in `num_processes` processes.

    Raises:
        ValueError: training failed; its own output says why.
    """
    config |= {
        "name": folder.name,
        "save_path": str(folder.parent),
        "resume": None,
        "remote_sync": None,
        "wandb": False,
    }
    plugins = config.pop(PLUGINS_FLAG, None) or []
    unnamed = [name for name in plugins if name not in named_plugins()]
    if unnamed:
        raise ValueError(
            f"The run needs the plug-in {unnamed[0]}, and a record runs no code by itself. Add --plugins "
            f"{','.join(plugins)}."
        )
    with tempfile.TemporaryDirectory(prefix="vla_foundry_reproduce_") as scratch:
        path = Path(scratch, CONFIG_NAME)
        path.write_text(dump_value(config), encoding="utf-8")
        words = ["--plugins", ",".join(plugins)] if plugins else []
        done = subprocess.run([*training_command(path, num_processes), *words], check=False)
    if done.returncode:
        raise ValueError(f"Training again ended with code {done.returncode}; see above.")


def compare_losses(kind: str, before: Any, now: list[list[Any]], tolerance: float) -> list[str]:
    """Print how far losses are from those of a record, by step.

    Returns:
        The line, if they differ by more than `tolerance`, relative to the recorded one.
    """
    found = dict(map(tuple, now))
    steps = [(step, loss) for step, loss in before]
    if not steps:
        return []
    missing = [step for step, _ in steps if step not in found]
    if missing:
        return [f"there is no {kind} loss of step {missing[0]}"]
    differences = [(_difference(loss, found[step]), step, loss) for step, loss in steps]
    worst, step, loss = max(differences)
    num_equal = sum(difference == 0 for difference, *_ in differences)
    line = f"{kind} loss: {num_equal} of {len(steps)} are the same numbers"
    if worst:
        line += f"; the largest relative difference is {worst:.3g}, at step {step}: {loss} was, {found[step]} is"
    say(line)
    return [line] if worst > tolerance else []


def _difference(before: float | None, now: float | None) -> float:
    if before == now:
        return 0.0
    return math.inf if before is None or now is None else abs(now - before) / max(abs(before), 1e-12)


def main(argv: list[str]) -> None:
    """Run `vla-foundry reproduce`, and print the new run folder."""
    folder = reproduce(parse_command(ReproduceParams, argv, prog="vla-foundry reproduce", positional=("record",)))
    if folder is not None:
        say(f"reproduced: {folder}")
