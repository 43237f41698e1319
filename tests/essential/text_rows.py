"""Rows of text for tests: read a microbatch of shards through a pipeline."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vla_foundry.batch import Batch, Documents
from vla_foundry.data.cache import ShardCache
from vla_foundry.data.pipelines.stages import Pipeline, Rows
from vla_foundry.data.plan import SamplePlan
from vla_foundry.data.reader import Dataset, ShardReader
from vla_foundry.shards import parse_manifest


def create_rows(
    manifests: Sequence[Path],
    positions: Sequence[int],
    *,
    global_batch_size: int = 4,
    pieces: Sequence[int] | None = None,
) -> Rows:
    datasets = [
        Dataset(manifest=str(m), modality="text", entries=tuple(parse_manifest(m.read_text(encoding="utf-8"), str(m))))
        for m in manifests
    ]
    sizes = [[entry.num_sequences for entry in dataset.entries] for dataset in datasets]
    plan = SamplePlan(
        sizes,
        [1.0] * len(sizes),
        seed=0,
        global_batch_size=global_batch_size,
        block_size=100,
        shuffle=False,
        pieces=pieces,
    )
    at = np.asarray(positions)
    reader = ShardReader(datasets, ShardCache(str(manifests[0].parent / "cache"), 10**9))
    return Rows(at, plan.locate(at), plan, reader)


def read(pipeline: Pipeline, rows: Rows) -> Batch:
    pipeline.check(rows.reader)
    pipeline.pieces_per_row(rows.reader)
    return pipeline.create_batch(rows)


def lengths_by_row(documents: Documents) -> list[list[int]]:
    """Lengths of each row's segments; those of padding are negative."""
    signed = np.where(documents.is_padding, -documents.lengths, documents.lengths)
    return [part.tolist() for part in np.split(signed, np.cumsum(documents.num_per_row)[:-1])]
