"""The rows of one LeRobot episode: numbers, times and tasks, each checked against what the `meta` folder says."""

from collections.abc import Mapping, Sequence

import numpy as np

from vla_foundry.preprocessing.robotics.converters.lerobot_meta import DatasetInfo, EpisodeEntry
from vla_foundry.preprocessing.robotics.converters.lerobot_parquet import numbers_of, read_episode_rows
from vla_foundry.robotics.episode_blocks import InstructionSpan

_ROWS_AT_ONCE = 4096
# features that are read where info.json has them, besides the times
_COUNTERS = ("frame_index", "index", "task_index")


def read_rows(info: DatasetInfo, entry: EpisodeEntry, signals: Sequence[str]) -> dict[str, np.ndarray]:
    """Read signals, `timestamp` and counters of an episode: {feature: (L, width)}, of the types that info.json says.

    Raises:
        ValueError: the file is missing or broken, a feature is not as info.json says, or the rows are not those that
            the tables say; one line that names the file.
    """
    import pyarrow as pa

    where = f"{entry.data_uri}: episode {entry.index}"
    names = ["timestamp", *(name for name in _COUNTERS if name in info.features), *signals]
    batches = list(read_episode_rows(entry.data_uri, entry.index, names, rows_at_once=_ROWS_AT_ONCE))
    num_rows = sum(batch.num_rows for batch in batches)
    if num_rows != entry.length or not num_rows:
        raise ValueError(f"{where} has {num_rows} rows, but length {entry.length} in meta/episodes.")
    table = pa.Table.from_batches(batches)
    arrays = {}
    for name in dict.fromkeys(names):
        try:
            arrays[name] = _read_feature(info, name, table.column(name).combine_chunks())
        except ValueError as error:
            raise ValueError(f"{where}: column '{name}' {error}.") from None
    _check_counters(arrays, entry, where)
    return arrays


def _read_feature(info: DatasetInfo, name: str, column: object) -> np.ndarray:
    feature = info.features.get(name)
    if feature is None:
        raise ValueError("is not among the features of meta/info.json")
    values = numbers_of(column, feature.width)
    declared = np.dtype(feature.dtype)
    kinds = {"u": "i"}
    if kinds.get(values.dtype.kind, values.dtype.kind) != kinds.get(declared.kind, declared.kind):
        raise ValueError(f"holds {values.dtype}, but meta/info.json says {feature.dtype}")
    return values.astype(declared)


def _check_counters(arrays: Mapping[str, np.ndarray], entry: EpisodeEntry, where: str) -> None:
    firsts = {"frame_index": 0, "index": entry.first_row}
    for name, first in firsts.items():
        if name not in arrays or first is None:
            continue
        values, expected = arrays[name][:, 0], first + np.arange(entry.length)
        if not np.array_equal(values, expected):
            row = int(np.argmax(values != expected))
            raise ValueError(f"{where}: row {row} has {name} {values[row]}, expected {expected[row]}.")


def instructions_of(
    task_indices: np.ndarray | None, tasks: Mapping[int, str], entry: EpisodeEntry
) -> list[InstructionSpan]:
    """Return the instruction of every stretch of frames with one task.

    Args:
        task_indices: (L, 1); None: the rows do not say, and the episode's first task holds throughout.
        tasks: {task_index: text}.

    Raises:
        ValueError: a frame has a task that there is not.
    """
    if task_indices is None:
        text = entry.tasks[0] if entry.tasks else ""
        return [InstructionSpan(start=0, end=entry.length, texts={"original": [text]})] if text else []
    indices = task_indices[:, 0]
    starts = [0, *(np.flatnonzero(np.diff(indices)) + 1).tolist()]
    spans = []
    for start, end in zip(starts, [*starts[1:], len(indices)], strict=True):
        index = int(indices[start])
        if index not in tasks:
            raise ValueError(
                f"{entry.data_uri}: episode {entry.index} has task_index {index} at frame {start}, which is not "
                f"among the {len(tasks)} of meta/tasks."
            )
        if tasks[index].strip():
            spans.append(InstructionSpan(start=start, end=end, texts={"original": [tasks[index]]}))
    return spans
