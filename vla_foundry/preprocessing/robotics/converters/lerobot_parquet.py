"""Parquet files of LeRobot datasets: whole small tables, and the rows of one episode in a file of many."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_foundry.storage.uri import open_input

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_EPISODE_COLUMN = "episode_index"


@contextmanager
def _open_parquet(uri: str) -> "Iterator[pq.ParquetFile]":
    """Open a file; what is wrong with it, now or while it is read, becomes a ValueError that names it."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(
            ".parquet needs pyarrow, which is not installed: uv pip install 'vla-foundry[preprocessing]'"
        ) from None
    try:
        with open_input(uri) as file:
            yield pq.ParquetFile(file)
    except FileNotFoundError:
        raise ValueError(f"{uri} is missing.") from None
    except (pa.ArrowException, OSError) as error:  # Arrow raises OSError, too, for what it can not decode
        if getattr(error, "errno", None) is not None:  # trouble of the machine or the network
            raise
        raise ValueError(f"{uri} is no whole parquet file ({' '.join(str(error).split())[:200]}).") from None


def read_columns(uri: str, columns: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """Read columns of a small table as Python values.

    Args:
        columns: those that are needed; null: all.

    Raises:
        ValueError: the file is missing or broken, or lacks a column.
    """
    with _open_parquet(uri) as parquet:
        names = parquet.schema_arrow.names if columns is None else list(columns)
        _require_columns(uri, names, parquet.schema_arrow)
        table = parquet.read(columns=names, use_threads=False)
        return {name: table.column(name).to_pylist() for name in names}


def read_schema(uri: str) -> "pa.Schema":
    """Read the columns' types.

    Raises:
        ValueError: the file is missing or broken.
    """
    with _open_parquet(uri) as parquet:
        return parquet.schema_arrow


def read_episode_rows(
    uri: str, episode: int, columns: Sequence[str], *, rows_at_once: int
) -> "Iterator[pa.RecordBatch]":
    """Yield the rows of one episode, a few at a time.

    Of a file that holds many, only the row groups are read that can hold the episode.

    Raises:
        ValueError: the file is missing or broken, or lacks a column.
    """
    import pyarrow.compute as pc

    with _open_parquet(uri) as parquet:
        names = list(dict.fromkeys([*columns, _EPISODE_COLUMN]))
        _require_columns(uri, names, parquet.schema_arrow)
        groups = _row_groups_of(parquet, episode)
        for batch in parquet.iter_batches(rows_at_once, row_groups=groups, columns=names, use_threads=False):
            mask = pc.equal(batch.column(_EPISODE_COLUMN), episode)  # pyright: ignore[reportAttributeAccessIssue]
            rows = batch.filter(mask)
            if rows.num_rows:
                yield rows


def _require_columns(uri: str, names: Sequence[str], schema: "pa.Schema") -> None:
    missing = next((name for name in names if name not in schema.names), None)
    if missing is not None:
        raise ValueError(f"{uri} has no column '{missing}', only {', '.join(schema.names)[:300]}.")


def _row_groups_of(parquet: "pq.ParquetFile", episode: int) -> list[int]:
    """The row groups that can hold rows of an episode, by the least and the greatest index that they say they hold."""
    metadata = parquet.metadata
    column = [metadata.schema.column(number).path for number in range(metadata.num_columns)].index(_EPISODE_COLUMN)
    groups = []
    for number in range(metadata.num_row_groups):
        found = metadata.row_group(number).column(column).statistics
        if found is None or not found.has_min_max or found.min <= episode <= found.max:
            groups.append(number)
    return groups


def numbers_of(column: "pa.Array", width: int) -> np.ndarray:
    """Turn a column of numbers, or of lists of numbers to any depth, into (rows, width).

    Raises:
        ValueError: null, not numbers, or another width; to be completed by the caller.
    """
    import pyarrow as pa

    rows, values = len(column), column
    if isinstance(values.type, pa.BaseExtensionType):
        values = values.storage
    while (
        pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or pa.types.is_fixed_size_list(values.type)
    ):
        if values.null_count:
            raise ValueError("holds null")
        _require_equal_lengths(values)
        values = values.flatten()
    if values.null_count:
        raise ValueError("holds null")
    if not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)):
        raise ValueError(f"holds {values.type}, not numbers")
    if len(values) != rows * width:
        raise ValueError(f"holds {len(values) / max(rows, 1):g} numbers a row, expected {width}")
    return values.to_numpy(zero_copy_only=False).reshape(rows, width)


def _require_equal_lengths(lists: Any) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_fixed_size_list(lists.type) or not len(lists):
        return
    lengths = pc.min_max(pc.list_value_length(lists)).as_py()  # pyright: ignore[reportAttributeAccessIssue]
    if lengths["min"] != lengths["max"]:
        raise ValueError(f"holds rows of {lengths['min']} to {lengths['max']} numbers")
