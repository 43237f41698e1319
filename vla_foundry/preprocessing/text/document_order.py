"""Divide documents into tasks and shuffle them: a pure function of the files, their sizes and a seed."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from vla_foundry.preprocessing.sources import SourceFile
from vla_foundry.preprocessing.tasks import Task
from vla_foundry.preprocessing.text.documents import DocumentTally, Piece, Skipped, Unit, split_files

# units per task where files can be divided, so that a task's documents come from several places
_UNITS_PER_TASK = 8
_MIN_UNIT_BYTES = 16 << 10
_MAX_TASK_BYTES = 256 << 20
# a small source is divided into this many tasks, so that all cores have work, but not into smaller ones than this
_MIN_NUM_TASKS = 64
_MIN_TASK_BYTES = 1 << 20
# documents are shuffled among as many as fill this much memory
_SHUFFLE_BYTES = 32 << 20
# purposes of random numbers
_SHUFFLE_UNITS, _SHUFFLE_DOCUMENTS = 0, 1


def divide_into_tasks(files: Iterable[SourceFile], *, seed: int, task_bytes: int) -> list[Task]:
    """Divide files into tasks of about `task_bytes` bytes of text, or less where there is little text.

    Units of all files are shuffled by the seed; a task is a stretch of that order.
    """
    files = list(files)
    share = max(sum(file.weight for file in files) // _MIN_NUM_TASKS, _MIN_TASK_BYTES)
    task_bytes = min(task_bytes, share, _MAX_TASK_BYTES)
    units = split_files(files, max(task_bytes // _UNITS_PER_TASK, _MIN_UNIT_BYTES))
    order = np.random.default_rng([seed, _SHUFFLE_UNITS]).permutation(len(units))
    tasks: list[Task] = []
    group: list[Unit] = []
    weight = 0
    for index in order:
        unit = units[index]
        if group and weight + unit.weight > task_bytes:
            tasks.append(_task(len(tasks), group, weight))
            group, weight = [], 0
        group.append(unit)
        weight += unit.weight
    if group:
        tasks.append(_task(len(tasks), group, weight))
    return tasks


def _task(number: int, units: Sequence[Unit], weight: int) -> Task:
    more = f" and {len(units) - 1} more" if len(units) > 1 else ""
    return Task(number=number, name=f"task {number} ({units[0].file.name}{more})", weight=weight, payload=units)


def shuffled_documents(
    rows: Iterable[Piece | Skipped], tally: DocumentTally, *, seed: int, task_number: int
) -> Iterator[Piece]:
    """Shuffle documents within stretches that fit in memory; the pieces of a document stay together, in order.

    Args:
        rows: documents in the order of the files.
        tally: counts documents and skipped rows.
        seed: of the job.
        task_number: so that each task has an order of its own.
    """
    documents: list[list[Piece]] = []
    size = stretch = 0
    for row in rows:
        if isinstance(row, Skipped):
            tally.add(row.reason, row.where, num_lost_bytes=row.num_bytes)
            continue
        if row.part == 0 or not documents:
            documents.append([])
        documents[-1].append(row)
        tally.num_good += row.is_last
        size += len(row.text)
        if size >= _SHUFFLE_BYTES:
            yield from _permuted(documents, (seed, _SHUFFLE_DOCUMENTS, task_number, stretch))
            documents, size = [], 0
            stretch += 1
    yield from _permuted(documents, (seed, _SHUFFLE_DOCUMENTS, task_number, stretch))


def _permuted(documents: list[list[Piece]], key: Sequence[int]) -> Iterator[Piece]:
    if not documents:
        return
    # a document that continues from the last stretch stays first, and one that continues in the next stays last
    first = int(documents[0][0].part > 0)
    stop = len(documents) - int(not documents[-1][-1].is_last)
    order = np.arange(len(documents))
    if first < stop:
        order[first:stop] = first + np.random.default_rng(list(key)).permutation(stop - first)
    for index in order:
        yield from documents[index]
