"""What decides the order of the samples, in words: saved with a checkpoint, and compared when training goes on."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from vla_foundry.data.plan import PLAN_VERSION, SamplePlan
from vla_foundry.data.reader import Dataset

# key of a description -> what the user calls it
_NAMES = {
    "plan_version": "the version of the plan",
    "seed": "data.seed",
    "shuffle": "data.shuffle",
    "shuffle_buffer_size": "data.shuffle_buffer_size",
    "global_batch_size": "hparams.global_batch_size",
    "seq_len": "data.seq_len",
}
_DATASET_NAMES = {
    "modality": "modality",
    "share": "share of a batch",
    "num_shards": "number of shards",
    "num_samples": "number of samples",
    "digest": "list of shards (names, counts or checksums)",
}


def describe_plan(plan: SamplePlan, datasets: Sequence[Dataset], *, seq_len: int) -> dict[str, Any]:
    """Describe a plan and its datasets in plain JSON types."""
    total = sum(plan.shares)
    return {
        "plan_version": PLAN_VERSION,
        "seed": plan.seed,
        "shuffle": plan.shuffle,
        "shuffle_buffer_size": plan.block_size,
        "global_batch_size": plan.global_batch_size,
        "seq_len": seq_len,
        "datasets": [
            {
                "manifest": dataset.manifest,
                "modality": dataset.modality,
                "share": round(share / total, 9),
                "num_shards": len(dataset.entries),
                "num_samples": num_samples,
                "digest": _digest(dataset),
            }
            for dataset, share, num_samples in zip(datasets, plan.shares, plan.num_samples_of, strict=True)
        ],
    }


def _digest(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    for entry in dataset.entries:
        digest.update(f"{entry.shard}\t{entry.num_sequences}\t{entry.sha256 or entry.num_bytes}\n".encode())
    return digest.hexdigest()


def fingerprint_of(description: dict[str, Any]) -> str:
    """Hash a description; where the manifests lie does not count."""
    datasets = [{name: value for name, value in row.items() if name != "manifest"} for row in description["datasets"]]
    text = json.dumps({**description, "datasets": datasets}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_description(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Check that two descriptions give the same order.

    Raises:
        ValueError: they do not; the line says what changed.
    """
    changes = [
        f"{name} was {saved.get(key)}, is {current[key]}"
        for key, name in _NAMES.items()
        if saved.get(key) != current[key]
    ]
    rows, saved_rows = current["datasets"], saved.get("datasets", [])
    if len(rows) != len(saved_rows):
        changes.append(f"data.dataset_manifest had {len(saved_rows)} datasets, has {len(rows)}")
    else:
        for number, (row, saved_row) in enumerate(zip(rows, saved_rows, strict=True)):
            changes += _dataset_changes(f"dataset {number} ({row['manifest']})", saved_row, row)
    if changes:
        raise ValueError(
            f"The order of the data is not that of the checkpoint: {'; '.join(changes)}. Restore it, or go on with "
            "--data.accept_changed_data true (samples may be repeated or left out)."
        )


def _dataset_changes(where: str, saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    changes = [
        f"{where}: {name} was {saved.get(key)}, is {current[key]}"
        for key, name in _DATASET_NAMES.items()
        if key != "digest" and saved.get(key) != current[key]
    ]
    if not changes and saved.get("digest") != current["digest"]:
        changes.append(f"{where}: {_DATASET_NAMES['digest']} changed")
    return changes
