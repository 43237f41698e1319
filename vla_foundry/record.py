"""The record of an experiment, experiment.json in its run folder: made when a run starts, completed when it ends.

    version, name
    starts       one object per start: time, first step, command, processes, device, versions, commit, and `inputs`,
                 what checkpoints keep about their tokenizer, images, statistics and spec
    config       every value of the resolved config; origins: where those that are no defaults were given
    seeds        of the training, the data and the model
    packages     the version of every installed package, at the newest start
    data         SHA-256 of each manifest (which holds those of the shards), and of the statistics and spec beside it
    end          step, samples and time, and what stopped the run early; absent while it runs, or if it was killed
    losses       {"train" | "validation": [[step, loss], ...]}; of long runs, evenly spaced ones
    evaluations  tables of evaluation/*.json, see `record_evaluation`

Local paths below the user's home begin with `~`.
"""

import json
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vla_foundry.config.loading import to_plain
from vla_foundry.params.data.mixture import MixtureDataParams
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.parsing import parse_record
from vla_foundry.provenance import (
    has_uncommitted_changes,
    hide_home,
    read_all_versions,
    read_git_commit,
    read_package_versions,
)
from vla_foundry.robotics.spec import SPEC_NAME
from vla_foundry.run_folder import (
    EVALUATION_FOLDER,
    EXPERIMENT_NAME,
    METRICS_NAME,
    STATISTICS_NAME,
    hold_lock,
    read_side_file,
)
from vla_foundry.shards import sha256_of
from vla_foundry.storage.uri import absolute_uri, join_uri, open_input, parent_uri, write_text
from vla_foundry.world import World

RECORD_VERSION = 1
_PACKAGES = ("vla-foundry", "torch", "numpy", "transformers", "tokenizers", "safetensors", "webdataset")
# most losses of a kind that the record keeps
_MAX_LOSSES = 200


def record_start(
    run_folder: Path,
    params: TrainExperimentParams,
    world: World,
    first_step: int,
    *,
    inputs: dict[str, Any],
    origins: Mapping[str, str],
) -> list[str]:
    """Add this start of a run to its record.

    Args:
        inputs: see `describe_inputs`.
        origins: config path of each given or derived value -> where it comes from.

    Returns:
        Lines for the user: whether the record was damaged, so that earlier starts are lost.
    """
    notices: list[str] = []

    def add(record: dict[str, Any]) -> None:
        starts = record.get("starts", [])
        if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
            notices.append(f"{run_folder / EXPERIMENT_NAME} is rewritten, because it could not be read.")
            record.clear()
            starts = []
        record.pop("end", None)
        record.update(
            name=run_folder.name,
            starts=[*starts, _describe_start(world, first_step) | {"inputs": inputs}],
            config=_without_home(to_plain(params)),
            origins={path: hide_home(origin) for path, origin in sorted(origins.items())},
            seeds={"hparams.seed": params.hparams.seed, **_data_seeds(params)},
            packages=read_all_versions(),
            data={name: hash_data(to_plain(part)) for name, part in params.data.parts().items()},
        )

    return _change(run_folder, add) + notices


def record_end(run_folder: Path, *, step: int, samples: int, stopped_by: int) -> None:
    """Complete the record of a run that ends.

    Args:
        stopped_by: number of the signal that stopped it; 0: the end of its budget.
    """

    def add(record: dict[str, Any]) -> None:
        record["losses"] = read_losses(run_folder)
        record["end"] = {
            "time": _now(),
            "step": step,
            "samples": samples,
            "stopped_by": signal.Signals(stopped_by).name if stopped_by else None,
        }

    _change(run_folder, add)


def record_evaluation(run_folder: str | Path, table: Mapping[str, Any]) -> None:
    """Keep a table in a run's folder, as evaluation/<name>.json, and in its record.

    Args:
        table: {"name", "metrics": {metric: {"value", "interval" (optional; 95%), "n" (optional)}}, "settings"}; one
            of the same name is replaced.
    """
    name = re.sub(r"[^\w.-]+", "_", str(table["name"]))
    text = json.dumps(dict(table), indent=1, ensure_ascii=False) + "\n"
    write_text(str(Path(run_folder, EVALUATION_FOLDER, f"{name}.json")), text)
    _change(Path(run_folder), lambda record: None)


def read_evaluations(run_folder: Path) -> list[dict[str, Any]]:
    """Return the tables of a run's folder, by name of the file; what is none is left out."""
    found = [read_side_file(path) for path in sorted((run_folder / EVALUATION_FOLDER).glob("*.json"))]
    return [table for table in found if isinstance(table, dict) and isinstance(table.get("metrics"), dict)]


def read_losses(run_folder: Path) -> dict[str, list[list[Any]]]:
    """Return the losses of a run's metrics.jsonl by kind, at most so many; see the module."""
    losses: dict[str, list[list[Any]]] = {"train": [], "validation": []}
    path = run_folder / METRICS_NAME
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            entry = parse_record(line, METRICS_NAME)
            losses[entry["kind"]].append([entry["step"], entry["loss"]])
        except (ValueError, TypeError, KeyError):
            continue
    for kind, found in losses.items():
        stride = -(-len(found) // _MAX_LOSSES)
        losses[kind] = found[::-1][:: max(stride, 1)][::-1]  # the last one is kept
    return losses


def _change(run_folder: Path, change: Callable[[dict[str, Any]], None]) -> list[str]:
    """Change a record in place; training and evaluations may do so at a time. Returns lines for the user."""
    path = run_folder / EXPERIMENT_NAME
    # beside the folder, as its own lock, or in it where only it is writable (a mount)
    place = run_folder.parent if os.access(run_folder.parent, os.W_OK) else run_folder
    with hold_lock(place / f".{run_folder.name}.record.lock", wait=True):
        found = read_side_file(path)
        is_damaged = path.exists() and not isinstance(found, dict)
        record = found if isinstance(found, dict) else {}
        record["version"] = RECORD_VERSION
        change(record)
        record["evaluations"] = read_evaluations(run_folder)
        write_text(str(path), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return [f"{path} is rewritten, because it could not be read."] if is_damaged else []


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _describe_start(world: World, first_step: int) -> dict[str, Any]:
    import torch

    on_gpu = world.device.startswith("cuda")
    return {
        "time": _now(),
        "first_step": first_step,
        "command": [hide_home(word) for word in sys.argv],
        "world_size": world.world_size,
        "device": torch.cuda.get_device_name(world.device) if on_gpu else platform.machine(),
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": read_package_versions(_PACKAGES),
        # null outside a repository
        "commit": read_git_commit(),
        "is_dirty": has_uncommitted_changes(),
    }


def _without_home(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_home(item) for item in value]
    return hide_home(value) if isinstance(value, str) else value


def _data_seeds(params: TrainExperimentParams) -> dict[str, int | None]:
    seeds = {f"data.datasets.{name}.seed": part.seed for name, part in params.data.parts().items()}
    return {"data.seed": params.data.seed} | (seeds if isinstance(params.data, MixtureDataParams) else {})


def hash_data(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the SHA-256 of each manifest of a data section, and of the statistics and spec that go with it.

    A file that is not there, or cannot be read, has null.
    """
    described = []
    given = data.get("dataset_statistics") or []
    for number, manifest in enumerate(data.get("dataset_manifest") or []):
        folder = parent_uri(manifest)
        statistics = given[number] if number < len(given) else join_uri(folder, STATISTICS_NAME)
        files = {"manifest": manifest, "statistics": statistics, "spec": join_uri(folder, SPEC_NAME)}
        hashes = {f"{name}_sha256": _hash_file(location) for name, location in files.items()}
        described.append({"manifest": hide_home(manifest), **hashes})
    return described


def _hash_file(location: str) -> str | None:
    try:
        with open_input(absolute_uri(location)) as file:
            return sha256_of(file)
    except (OSError, ValueError):
        return None
