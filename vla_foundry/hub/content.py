"""Collect what is published of a run or a dataset: which files, by what names, cleaned, and divided where too large."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla_foundry.hub.cleaning import clean_text
from vla_foundry.hub.shards import split_weights
from vla_foundry.params.experiment import TrainExperimentParams, load_experiment_params_from_yaml
from vla_foundry.params.models.policy import list_starts
from vla_foundry.robotics.spec import SPEC_NAME, DatasetSpec, parse_spec
from vla_foundry.run_folder import (
    CHECKPOINTS_FOLDER,
    COMPLETE_NAME,
    CONFIG_NAME,
    DATASETS_FOLDER,
    EMA_WEIGHTS_NAME,
    EVALUATION_FOLDER,
    EXPERIMENT_NAME,
    METRICS_NAME,
    MODEL_CONFIG_NAME,
    MODEL_FILES_FOLDER,
    MODEL_WEIGHTS_NAME,
    NORMALIZER_NAME,
    PREPROCESSING_CONFIG_NAME,
    PROCESSOR_FOLDER,
    STATE_NAME,
    STATISTICS_NAME,
    TOKENIZER_FOLDER,
    find_checkpoint,
    index_name,
    read_side_file,
    run_folder_candidates,
)
from vla_foundry.shards import MANIFEST_NAME, parse_manifest
from vla_foundry.storage.local import size_and_sha256
from vla_foundry.storage.uri import is_remote, read_text

LEROBOT_INFO = "meta/info.json"
_RUN_FILES = (
    CONFIG_NAME, MODEL_CONFIG_NAME, EXPERIMENT_NAME, METRICS_NAME, NORMALIZER_NAME, STATISTICS_NAME, SPEC_NAME,
    PREPROCESSING_CONFIG_NAME,
)  # fmt: skip
_RUN_FOLDERS = (TOKENIZER_FOLDER, PROCESSOR_FOLDER, MODEL_FILES_FOLDER, DATASETS_FOLDER, EVALUATION_FOLDER)
_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Content:
    """What is published, and what the card says about it."""

    # run, dataset (ours) or lerobot
    kind: str
    # path in the repository -> local file, cleaned
    files: dict[str, Path]
    # of a run: its params (None: an imported one without), its record, and its checkpoint
    params: TrainExperimentParams | None = None
    record: dict[str, Any] = field(default_factory=dict)
    step_folder: Path | None = None
    # of robot data, or of a policy
    spec: DatasetSpec | None = None
    # of a dataset: path of each manifest -> number of samples and of shards
    manifests: dict[str, tuple[int, int]] = field(default_factory=dict)
    # of a run: bytes and SHA-256 of its large files
    hashes: dict[str, tuple[int, str]] = field(default_factory=dict)
    # of a LeRobot dataset
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def repository_type(self) -> str:
        """Return the hub's word for it."""
        return "model" if self.kind == "run" else "dataset"


def collect(source: str, scratch: Path, *, max_shard_gb: float) -> Content:
    """Collect what is published.

    Args:
        source: run folder, step folder, folder of shards or of folders of shards, or LeRobot dataset.
        scratch: empty folder for changed files.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is none of these, or is incomplete.
    """
    if is_remote(source):
        raise ValueError(f"source {source} is not on this machine. Copy it here first.")
    folder = Path(source).expanduser()
    if not folder.is_dir():
        fault = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"source {folder} {fault}. Give the folder of a run or of a dataset.")
    if (folder / LEROBOT_INFO).is_file():
        files = _list_files(folder)
        return Content(kind="lerobot", files=files, info=read_side_file(folder / LEROBOT_INFO) or {})
    run = next((path for path in map(Path, run_folder_candidates(str(folder))) if _is_run(path)), None)
    if run is not None:
        return _collect_run(run, find_checkpoint(folder), scratch, max_shard_gb)
    manifests = [
        path for path in (folder / MANIFEST_NAME, *sorted(folder.glob(f"*/{MANIFEST_NAME}"))) if path.is_file()
    ]
    if not manifests:
        raise ValueError(
            f"source {folder} is neither a run ({MODEL_CONFIG_NAME}), nor a dataset ({MANIFEST_NAME}), nor a LeRobot "
            f"dataset ({LEROBOT_INFO})."
        )
    return _collect_dataset(folder, manifests, scratch)


def _is_run(folder: Path) -> bool:
    return (folder / MODEL_CONFIG_NAME).is_file()


def _list_files(folder: Path) -> dict[str, Path]:
    """List files by their relative paths, without hidden ones.

    Raises:
        ValueError: a link leads out of the folder.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or not path.is_file():
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} is a link to a file elsewhere, which is not published. Replace it by a copy.")
        files[name.as_posix()] = path
    return files


def _write_cleaned(files: dict[str, Path], scratch: Path) -> dict[str, Path]:
    """Return the files without local paths; those that held some are written to `scratch`."""
    cleaned = {}
    for name, path in files.items():
        cleaned[name] = path
        if name.endswith((".json", ".yaml", ".yml")):
            text = read_text(str(path))
            changed = clean_text(name, text)
            if changed != text:
                cleaned[name] = scratch / name
                cleaned[name].parent.mkdir(parents=True, exist_ok=True)
                cleaned[name].write_text(changed, encoding="utf-8")
    return cleaned


def _collect_run(run: Path, step_folder: Path, scratch: Path, max_shard_gb: float) -> Content:
    params = None
    if (run / CONFIG_NAME).is_file():
        params = load_experiment_params_from_yaml(str(run / CONFIG_NAME))
        local = [start for start in list_starts(params.model) if not start.startswith("hf://") and _is_local(start)]
        if params.model.lora is not None and local:
            raise ValueError(
                f"{run} holds adapters (LoRA) of {local[0]}, which is on this machine. Publish whole weights: "
                f"vla-foundry merge --checkpoint {run} --output NEW_RUN."
            )
    every = _list_files(run)
    files = {name: path for name, path in every.items() if name in _RUN_FILES or name.startswith(_below(_RUN_FOLDERS))}
    below = f"{CHECKPOINTS_FOLDER}/{step_folder.name}"
    if (step_folder / STATE_NAME).is_file():
        files[f"{below}/{STATE_NAME}"] = step_folder / STATE_NAME
    files = _write_cleaned(files, scratch)
    for name in (MODEL_WEIGHTS_NAME, EMA_WEIGHTS_NAME):
        path = step_folder / name
        if (step_folder / index_name(name)).is_file():
            from vla_foundry.models.weights import list_weights_files
            from vla_foundry.tensors import join_files

            # others read whole tensors
            path = scratch / "joined" / below / name
            path.parent.mkdir(parents=True, exist_ok=True)
            join_files(list_weights_files(step_folder, name), path)
        if path.is_file():
            parts = split_weights(path, scratch / below, max_shard_gb * _GB)
            files |= {f"{below}/{part.name}": part for part in parts}
    hashes = _mark_complete(files, below, scratch)
    if params is not None:
        # what others load
        load_experiment_params_from_yaml(str(files[CONFIG_NAME]))
    spec = parse_spec(read_text(str(run / SPEC_NAME)), str(run / SPEC_NAME)) if (run / SPEC_NAME).is_file() else None
    record = read_side_file(files[EXPERIMENT_NAME]) if EXPERIMENT_NAME in files else {}
    return Content(
        kind="run",
        files=files,
        params=params,
        record=record if isinstance(record, dict) else {},
        step_folder=step_folder,
        spec=spec,
        hashes=hashes,
    )


def _below(folders: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{folder}/" for folder in folders)


def _is_local(start: str) -> bool:
    return start.startswith(("/", "~", ".")) or Path(start).exists()


def _mark_complete(files: dict[str, Path], below: str, scratch: Path) -> dict[str, tuple[int, str]]:
    """Add the COMPLETE file of the published part of a step folder; return the bytes and SHA-256 of what it lists."""
    listed = {name: size_and_sha256(path) for name, path in files.items() if name.startswith(f"{below}/")}
    mark = scratch / below / COMPLETE_NAME
    mark.parent.mkdir(parents=True, exist_ok=True)
    inside = {name.removeprefix(f"{below}/"): entry for name, entry in listed.items()}
    mark.write_text(json.dumps(inside, indent=1) + "\n", encoding="utf-8")
    files[f"{below}/{COMPLETE_NAME}"] = mark
    return listed


def _collect_dataset(folder: Path, manifests: list[Path], scratch: Path) -> Content:
    files = {name: path for name, path in _list_files(folder).items() if "_progress" not in Path(name).parts}
    counts = {}
    for manifest in manifests:
        entries = parse_manifest(read_text(str(manifest)), str(manifest))
        for entry in entries:
            shard = manifest.parent / f"{entry.shard}.tar"
            if not shard.is_file():
                raise ValueError(f"{manifest} lists {shard.name}, which is missing. Restore it, or build the manifest.")
            if entry.num_bytes not in (None, shard.stat().st_size):
                raise ValueError(
                    f"{shard} has {shard.stat().st_size} bytes, not the {entry.num_bytes} of the manifest."
                )
        name = manifest.relative_to(folder).as_posix()
        counts[name] = (sum(entry.num_sequences for entry in entries), len(entries))
    spec_file = manifests[0].with_name(SPEC_NAME)
    spec = parse_spec(read_text(str(spec_file)), str(spec_file)) if spec_file.is_file() else None
    return Content(kind="dataset", files=_write_cleaned(files, scratch), spec=spec, manifests=counts)
