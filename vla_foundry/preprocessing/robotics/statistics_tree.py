"""Merge what the tasks of a job counted: eight at a time, in the order of the tasks, field by field."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla_foundry.preprocessing.output import PROGRESS_FOLDER
from vla_foundry.preprocessing.tasks import Task, run_tasks
from vla_foundry.robotics.episode_blocks import format_arrays
from vla_foundry.robotics.statistics import MERGE_WIDTH, FieldStatistics, merge_field_statistics
from vla_foundry.robotics.statistics_format import pack_statistics, unpack_statistics
from vla_foundry.storage.npz import NpzFile
from vla_foundry.storage.uri import join_uri, read_range, size_of, write_bytes


def merge_parts(
    folder: str, parts: Sequence[str], *, num_workers: int | None, ray_address: str | None
) -> dict[str, FieldStatistics]:
    """Merge files of packed statistics; the result depends on the files and their order alone.

    Args:
        folder: the output folder.
        parts: paths of the files within it, at least one.
        num_workers: as of run_tasks.
        ray_address: as of run_tasks.
    """
    level, names = 0, list(parts)
    while len(names) > 1:
        groups = [names[first : first + MERGE_WIDTH] for first in range(0, len(names), MERGE_WIDTH)]
        merged = [f"{PROGRESS_FOLDER}/merged_{level}_{number:06d}.npz" for number in range(len(groups))]
        tasks = [
            Task(number=number, name=f"statistics {level}.{number}", weight=len(group), payload=(group, merged[number]))
            for number, group in enumerate(groups)
        ]
        finished = run_tasks(
            _merge_group, tasks, shared=folder, title="statistics", num_workers=num_workers, ray_address=ray_address
        )
        for _ in finished:
            pass
        level, names = level + 1, merged
    part = _open(folder, names[0])
    return {name: _read_field(part, name) for name in _field_names(part)}


def _merge_group(folder: str, task: Task) -> None:
    group, target = task.payload
    parts = [_open(folder, name) for name in group]
    arrays: dict[str, np.ndarray] = {}
    for name in sorted({name for part in parts for name in _field_names(part)}):
        fields = [_read_field(part, name) for part in parts if f"{name}|shape" in part]
        arrays |= pack_statistics({name: merge_field_statistics(fields)})
    write_bytes(join_uri(folder, target), format_arrays(arrays))


def _open(folder: str, name: str) -> NpzFile:
    uri = join_uri(folder, name)
    return NpzFile(lambda offset, size: read_range(uri, offset, size), size_of(uri))


def _field_names(part: NpzFile) -> list[str]:
    return sorted(name.removesuffix("|shape") for name in part.names if name.endswith("|shape"))


def _read_field(part: NpzFile, name: str) -> FieldStatistics:
    arrays: Mapping[str, Any] = {key: part.read(key) for key in part.names if key.rpartition("|")[0] == name}
    return unpack_statistics(arrays)[name]
