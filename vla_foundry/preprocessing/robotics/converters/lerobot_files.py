"""Read the files of LeRobot datasets: parquet tables, the rows of one episode, video frames matched to recorded times.

A frame is found by its time, never by its number: rows and video frames may begin at different times, and one file may
hold many episodes. Decoding starts at the key frame before the first time and continues frame by frame, so every frame
is exact and memory holds two. One thread reads each file, because episodes run in parallel.
"""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_foundry.images.codec import MAX_PIXELS, check_size
from vla_foundry.preprocessing.robotics.converters.converter import name_broken_file
from vla_foundry.preprocessing.sources import check_unique
from vla_foundry.storage.uri import open_input

if TYPE_CHECKING:
    import av
    import av.container
    import pyarrow as pa
    import pyarrow.parquet as pq

_EPISODE_COLUMN = "episode_index"
# a frame this close to a time, in frames, is used without looking at the next one
_EXACT = 1e-3
# |a|, |b|, |c|, |d| of display matrices, and how far they may be from whole numbers
_QUARTER_TURNS = ((1, 0, 0, 1), (0, 1, 1, 0))
_MATRIX_ROUNDING = 1e-3
_DECODER_OPTIONS = {"max_pixels": str(MAX_PIXELS)}


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

        with _open_stream(self.uri) as (container, stream):
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
                _raise_unless_broken(error)
                raise ValueError(
                    f"{self.uri}: the video is damaged: nothing can be decoded after {decoded} frames "
                    f"({_reason(error)})."
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


def displayed_image(frame: "av.VideoFrame", uri: str) -> np.ndarray:
    """Convert a frame to RGB as a player shows it, uint8 (H, W, 3).

    The colour matrix and range stated in the video are applied, and so is its display matrix, as phones write it.

    Raises:
        ValueError: the display matrix is not a mirroring or a rotation by quarter turns.
    """
    image = frame.to_ndarray(format="rgb24")
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return image
    # 3 x 3 fixed-point numbers: a point (x, y) of the frame, y down, is shown at (a x + c y, b x + d y)
    values = np.frombuffer(bytes(side_data), "<i4")[[0, 1, 3, 4]] / 65536
    a, b, c, d = values.round().astype(int).tolist()
    if abs(values - (a, b, c, d)).max() > _MATRIX_ROUNDING or (abs(a), abs(b), abs(c), abs(d)) not in _QUARTER_TURNS:
        raise ValueError(
            f"{uri}: the display matrix {values.tolist()} is not a rotation by quarter turns. Encode the video upright."
        )
    if a == 0:  # rows become columns
        image = image.transpose(1, 0, 2)
    columns, rows = a + c, b + d
    return np.ascontiguousarray(image[:: rows or 1, :: columns or 1])


@contextmanager
def _open_stream(uri: str) -> "Iterator[tuple[av.container.InputContainer, av.VideoStream]]":
    try:
        import av
        import av.error
    except ImportError:
        raise ValueError(
            "videos need PyAV, which is not installed: uv pip install 'vla-foundry[preprocessing]'"
        ) from None
    # a file object instead of a name, because FFmpeg takes some names for protocols
    with open_input(uri) as file:
        try:
            # opening decodes a frame, and the header of the file may say less than that has
            container = av.open(file, mode="r", options=dict(_DECODER_OPTIONS))
        except (av.error.FFmpegError, OSError, ValueError) as error:
            _raise_unless_broken(error)
            raise ValueError(f"{uri} is not a readable video, or is cut off ({_reason(error)}).") from None
        with container:
            if not container.streams.video:
                raise ValueError(f"{uri} is not a readable video, or is cut off (no video stream in it).")
            stream = container.streams.video[0]
            if stream.time_base is None or not stream.width or not stream.height:
                raise ValueError(
                    f"{uri}: the header of the video is damaged, or its frames have more than {MAX_PIXELS:,} pixels."
                )
            if stream.sample_aspect_ratio not in (None, 0, 1):
                raise ValueError(
                    f"{uri}: its pixels are not square ({stream.sample_aspect_ratio}). Scale the video: "
                    "ffmpeg -i IN -vf scale=iw*sar:ih,setsar=1 OUT."
                )
            check_size((stream.height, stream.width), f"{uri}: a frame")
            stream.codec_context.options = dict(_DECODER_OPTIONS)
            stream.codec_context.thread_count = 1
            yield container, stream


def _raise_unless_broken(error: Exception) -> None:
    """Re-raise trouble of the machine or the network, as opposed to broken bytes."""
    import av.error

    # broken offsets lead to EINVAL, when they point before the beginning of the file
    if not isinstance(error, av.error.FFmpegError) and getattr(error, "errno", None) not in (None, errno.EINVAL):
        raise error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
