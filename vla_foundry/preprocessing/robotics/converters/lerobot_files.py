"""Read the files of LeRobot datasets: parquet tables, the rows of one episode, video frames matched to recorded times.

A frame is found by its time, never by its number: rows and video frames may begin at different times, and one file may
hold many episodes. Decoding starts at the key frame before the first time and continues frame by frame, so every frame
is exact and memory holds two. One thread reads each file, because episodes run in parallel.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_foundry.images.video import displayed_image, open_video, raise_unless_broken, reason_of
from vla_foundry.preprocessing.robotics.converters.converter import name_broken_file
from vla_foundry.preprocessing.sources import check_unique
from vla_foundry.storage.uri import open_input

if TYPE_CHECKING:
    import av
    import pyarrow as pa
    import pyarrow.parquet as pq

_EPISODE_COLUMN = "episode_index"
# a frame this close to a time, in frames, is used without looking at the next one
_EXACT = 1e-3


@contextmanager
def _open_parquet(uri: str) -> "Iterator[pq.ParquetFile]":
    """Open a file; any error in its bytes, now or while it is read, becomes a ValueError that names it."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(
            ".parquet needs pyarrow, which is not installed: uv pip install 'vla-foundry[preprocessing]'"
        ) from None
    # Arrow also raises OSError for bytes that it cannot decode
    with name_broken_file(uri, "parquet file", pa.ArrowException, OSError), open_input(uri) as file:
        yield pq.ParquetFile(file)


def read_columns(uri: str, columns: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """Read columns of a small table as Python values.

    Args:
        columns: the columns to read; None: all.

    Raises:
        ValueError: the file is missing or broken, lacks a column, or has a text that is not UTF-8.
    """
    with _open_parquet(uri) as parquet:
        names = parquet.schema_arrow.names if columns is None else list(columns)
        _require_columns(uri, names, parquet.schema_arrow)
        table = parquet.read(columns=names, use_threads=False)
        return {name: list(_values(f"{uri} row {{row}}: '{name}'", table.column(name))) for name in names}


def _values(where: str, column: "pa.ChunkedArray") -> Iterator[Any]:
    for row, value in enumerate(column):
        try:
            yield value.as_py()
        except UnicodeDecodeError:
            raise ValueError(f"{where.format(row=row)} is not UTF-8 text.") from None


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
    """Yield the rows of one episode, a few at a time; only row groups that can hold the episode are read.

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
    check_unique(uri, schema.names, names)


def _row_groups_of(parquet: "pq.ParquetFile", episode: int) -> list[int]:
    """Return the row groups whose index range, if they state one, includes the episode."""
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
        ValueError: null, not numbers, or another width; the caller puts the column in front.
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


@dataclass(frozen=True, eq=False)
class VideoFrames:
    """Read the frames of an episode from a video file, one for each of its times."""

    # the file
    uri: str
    # float64 (L,) ascending: when each frame is shown, seconds from the first frame of the file
    times: np.ndarray
    # rate of the episode, frames per second: the unit of `tolerance`
    fps: float
    # how far a frame may be from its time, in frames
    tolerance: float

    def read(self) -> Iterator[np.ndarray]:
        """Yield the frames as they are displayed, uint8 (H, W, 3) RGB.

        Raises:
            ValueError: the file is broken, ends early, or has no frame at a time.
        """
        for frame in self._matched():
            yield displayed_image(frame, self.uri)

    def _matched(self) -> "Iterator[av.VideoFrame]":
        """Yield for each time the frame that is nearest to it."""
        frames = self._decode(from_key_frame=True)
        before: tuple[float, Any] | None = None
        after = next(frames, None)
        if after is not None and after[0] > self.times[0] and self.times[0] > 0:
            # the container's index led past the first time
            frames = self._decode(from_key_frame=False)
            after = next(frames, None)
        for number, time in enumerate(self.times):
            while after is not None and (after[0] - time) * self.fps < -_EXACT:
                before, after = after, next(frames, None)
            near = [shown for shown in (after, before) if shown is not None]
            if not near:
                raise ValueError(f"{self.uri}: no frame can be decoded.")
            shown = min(near, key=lambda shown: abs(shown[0] - time))
            if abs(shown[0] - time) * self.fps > self.tolerance:
                raise ValueError(self._no_frame_message(number, shown[0], is_over=after is None))
            yield shown[1]

    def _no_frame_message(self, number: int, nearest: float, *, is_over: bool) -> str:
        time = self.times[number]
        where = (
            f"ends at {nearest:.3f} s, before" if is_over and nearest < time else f"has {nearest:.3f} s as nearest to"
        )
        distance = abs(nearest - time) * self.fps
        return (
            f"{self.uri}: the video {where} frame {number} of the episode at {time:.3f} s: {distance:.2f} frames away, "
            f"allowed are {self.tolerance:g} (timestamp_tolerance)."
        )

    def _decode(self, *, from_key_frame: bool) -> "Iterator[tuple[float, av.VideoFrame]]":
        """Yield (seconds from the first frame, frame) in order, from the last key frame before the first time or from
        the beginning."""
        import av.error

        with open_input(self.uri) as file, open_video(file, self.uri) as (container, stream):
            decoded, time_base, first_pts = 0, float(stream.time_base or 0), stream.start_time or 0
            try:
                if from_key_frame and self.times[0] > 0:
                    start = self.times[0] - self.tolerance / self.fps
                    container.seek(first_pts + int(start / time_base), stream=stream, backward=True)
                for frame in container.decode(stream):
                    decoded += 1
                    if frame.pts is None:
                        raise ValueError(f"{self.uri}: a frame has no time (the {decoded}th decoded one).")
                    seconds = (frame.pts - first_pts) * time_base
                    if frame.is_corrupt:
                        raise ValueError(f"{self.uri}: the frame at {seconds:.3f} s is damaged.")
                    yield seconds, frame
            except (av.error.FFmpegError, OSError) as error:
                raise_unless_broken(error)
                raise ValueError(
                    f"{self.uri}: the video is damaged: nothing can be decoded after {decoded} frames "
                    f"({reason_of(error)})."
                ) from None

    def first_size(self) -> tuple[int, int]:
        """Return (W, H) of the first frame of the file as it is displayed.

        Raises:
            ValueError: the file is not a video, is damaged, or cannot be displayed by square pixels in quarter turns.
            FileNotFoundError: the file does not exist.
        """
        for _, frame in self._decode(from_key_frame=False):
            height, width = displayed_image(frame, self.uri).shape[:2]
            return width, height
        raise ValueError(f"{self.uri}: no frame can be decoded.")
