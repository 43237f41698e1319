"""Read once what `resolve` has to know: manifests, tokenizers, cores, processes."""

import json
import os
import re
from typing import Any

from vla_foundry.io.uri import exists, is_remote, join_uri, parent_uri, read_text
from vla_foundry.params.derivation import DatasetFacts, Facts, TokenizerFacts, Unavailable
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.run_folder import TOKENIZER_FOLDER
from vla_foundry.shards import MANIFEST_NAME, PROVENANCE_NAME, parse_manifest
from vla_foundry.text.tokenizers import vocab_size_of

# owner/name on the Hugging Face hub, or an old name without an owner
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_RANKS_PER_NODE = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")


def read_facts(params: TrainExperimentParams, world_size: int, *, offline: bool = False) -> Facts:
    """Read the facts that these params call for.

    Args:
        params: as parsed.
        world_size: number of processes.
        offline: do not reach for anything that is remote; such facts, and missing files, are then Unavailable.

    Raises:
        FileNotFoundError: a manifest or a checkpoint is missing.
        ValueError: a manifest is not what it should be.
    """
    data = params.data
    _check_checkpoint(params.model.resume_from_checkpoint, "model.resume_from_checkpoint", offline)
    return Facts(
        world_size=world_size,
        ranks_per_node=_ranks_per_node(world_size),
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        datasets=tuple(_read_dataset(name, "data.dataset_manifest", offline) for name in data.dataset_manifest),
        val_datasets=tuple(
            _read_dataset(name, "data.val_dataset_manifest", offline) for name in data.val_dataset_manifest
        ),
        tokenizer=_read_named_tokenizer(data.tokenizer_name(), offline),
    )


def _ranks_per_node(world_size: int) -> int:
    given = next((os.environ[name] for name in _RANKS_PER_NODE if name in os.environ), "")
    return int(given) if given.isdigit() and int(given) > 0 else world_size


def _check_checkpoint(location: str | None, path: str, offline: bool) -> None:
    if location is None or (is_remote(location) and offline):
        return
    if not exists(location):
        raise FileNotFoundError(f"{path}: {location} does not exist.")


def _read_dataset(manifest: str, path: str, offline: bool) -> DatasetFacts:
    """Read the manifest of one dataset, and what lies beside it."""
    if offline and is_remote(manifest):
        return DatasetFacts(manifest=manifest, num_samples=Unavailable(manifest), provenance={})
    try:
        entries = parse_manifest(read_text(manifest), manifest)
    except (FileNotFoundError, IsADirectoryError):
        if offline:
            return DatasetFacts(manifest=manifest, num_samples=Unavailable(manifest), provenance={})
        inside = join_uri(manifest, MANIFEST_NAME)
        is_folder = not manifest.endswith(MANIFEST_NAME) and exists(inside)
        fix = f"Did you mean {inside}?" if is_folder else "Make it with `vla-foundry preprocess` or `manifest build`."
        raise FileNotFoundError(f"{path}: there is no manifest {manifest}. {fix}") from None
    folder = parent_uri(manifest)
    return DatasetFacts(
        manifest=manifest,
        num_samples=sum(entry.num_sequences for entry in entries),
        provenance=_read_provenance(join_uri(folder, PROVENANCE_NAME)),
        tokenizer=_read_dataset_tokenizer(join_uri(folder, TOKENIZER_FOLDER)),
    )


def _read_provenance(location: str) -> dict[str, Any]:
    """Return what a dataset says about itself: the part `dataset` of its provenance."""
    dataset = _read_json(location).get("dataset", {})
    return dataset if isinstance(dataset, dict) else {}


def _read_json(location: str) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is no such file, or it holds something else."""
    try:
        values = json.loads(read_text(location))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return values if isinstance(values, dict) else {}


def _read_dataset_tokenizer(folder: str) -> TokenizerFacts | None:
    """Return the facts about a dataset's own tokenizer folder, or None if it has none."""
    try:
        return TokenizerFacts(name=folder, vocab_size=vocab_size_of(folder))
    except FileNotFoundError:
        return None


def _read_named_tokenizer(name: str | None, offline: bool) -> TokenizerFacts | None:
    """Return the facts about the tokenizer that data.tokenizer names; None if they are out of reach.

    Raises:
        FileNotFoundError: it can only be a folder of this machine, and there is none.
    """
    if name is None:
        return None
    is_hub_name = _HUB_NAME.fullmatch(name) is not None and not os.path.isdir(name)
    location = f"hf://{name}" if is_hub_name else name
    if is_remote(location) and offline:
        return None
    try:
        return TokenizerFacts(name=name, vocab_size=vocab_size_of(location))
    except (FileNotFoundError, ValueError):
        if is_remote(location) or offline:
            # what loads it will say what is wrong; this only looks at its size
            return None
        raise FileNotFoundError(f"data.tokenizer: {name} is no folder with a tokenizer.json.") from None
