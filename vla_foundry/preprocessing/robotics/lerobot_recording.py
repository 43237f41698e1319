"""Record one episode for a LeRobot dataset: check and encode every frame as it comes, and keep statistics.

A recorded part is a folder: `frames.parquet` (one row per frame), `<camera column>.mp4` if images are stored as
videos, and `episode.json` (task, length, image statistics, facts of the caller). It appears whole or not at all.

Videos are H.264 that seeks fast, and parts are joined without encoding again. Statistics have the shapes and
definitions of the lerobot library: quantiles over all episodes are the means of the episodes' quantiles, weighted by
frames. Two differences: the std of images is right (the library squares uint8), and every frame counts (the library
samples some).
"""

import io
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Num, UInt8
from PIL import Image

from vla_foundry.storage.local import TEMPORARY_SUFFIX
from vla_foundry.storage.uri import read_object

_QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
# statistic -> nested lists of one column, and "count" -> [frames]
ColumnStatistics = dict[str, Any]
# every second frame is a key frame, so a reader decodes at most two to get any one; no frame refers to a later one
_OPTIONS = {"g": "2", "bf": "0", "crf": "18", "preset": "veryfast"}
_PIXEL_FORMAT = "yuv420p"
FRAMES, FACTS = "frames.parquet", "episode.json"
# columns that every dataset has
INDEX_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")


def vector_statistics(values: Num[np.ndarray, "L C"]) -> ColumnStatistics:
    """Return statistics of each of C numbers over L frames; extremes keep the type of the values."""
    wide = values.astype(np.float64)
    quantiles = np.quantile(wide, list(_QUANTILES.values()), axis=0)
    return {
        "min": values.min(axis=0).tolist(),
        "max": values.max(axis=0).tolist(),
        "mean": wide.mean(axis=0).tolist(),
        "std": wide.std(axis=0).tolist(),
        "count": [len(values)],
        **{name: row.tolist() for name, row in zip(_QUANTILES, quantiles, strict=True)},
    }


class ImageStatistics:
    """Exact statistics of images in little memory: a histogram of each colour."""

    def __init__(self) -> None:
        self._counts = np.zeros((3, 256), np.int64)
        self._num_frames = 0

    def add(self, image: UInt8[np.ndarray, "H W 3"]) -> None:
        """Count one image."""
        for colour in range(3):
            self._counts[colour] += np.bincount(image[..., colour].reshape(-1), minlength=256)
        self._num_frames += 1

    def finish(self) -> ColumnStatistics:
        """Return the statistics of each colour, shape [3, 1, 1], values 0 .. 1."""
        levels = np.arange(256) / 255
        total = self._counts.sum(axis=1)
        mean = self._counts @ levels / total
        variance = (self._counts * (levels - mean[:, None]) ** 2).sum(axis=1) / total
        cumulative = self._counts.cumsum(axis=1)
        present = self._counts > 0
        values = {
            "min": levels[present.argmax(axis=1)],
            "max": levels[255 - present[:, ::-1].argmax(axis=1)],
            "mean": mean,
            "std": np.sqrt(variance),
        }
        for name, share in _QUANTILES.items():
            values[name] = levels[(cumulative >= share * total[:, None]).argmax(axis=1)]
        shaped: ColumnStatistics = {name: value.reshape(3, 1, 1).tolist() for name, value in values.items()}
        return shaped | {"count": [self._num_frames]}


def merge_statistics(first: ColumnStatistics, second: ColumnStatistics) -> ColumnStatistics:
    """Merge the statistics of a column over two sets of frames; quantiles are averaged by frames."""
    old, new = ({name: np.array(value) for name, value in each.items()} for each in (first, second))
    count = old["count"] + new["count"]
    share = (new["count"] / count)[0]
    step = new["mean"] - old["mean"]
    variance = old["std"] ** 2 * (1 - share) + new["std"] ** 2 * share + step**2 * share * (1 - share)
    merged = {
        "min": np.minimum(old["min"], new["min"]),
        "max": np.maximum(old["max"], new["max"]),
        "mean": old["mean"] + step * share,
        "std": np.sqrt(variance),
        "count": count,
        **{name: old[name] + (new[name] - old[name]) * share for name in _QUANTILES},
    }
    return {name: value.tolist() for name, value in merged.items()}


class VideoEncoder:
    """Writes one mp4 file, frame by frame; the same frames give the same bytes."""

    def __init__(self, path: Path | BytesIO, *, fps: int, size: tuple[int, int]) -> None:
        import av

        self._av = av
        self._output = av.open(str(path) if isinstance(path, Path) else path, "w", format="mp4")
        stream: Any = self._output.add_stream("libx264", rate=fps, options=_OPTIONS)
        stream.height, stream.width = size
        stream.pix_fmt = _PIXEL_FORMAT
        # threads would split frames into slices
        stream.thread_count = 1
        self._stream = stream

    def add(self, image: UInt8[np.ndarray, "H W 3"]) -> None:
        """Encode one frame."""
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        self._output.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write the remaining frames and the file's index."""
        self._output.mux(self._stream.encode())
        self._output.close()


class VideoJoiner:
    """Appends mp4 files of one encoding to one file, without encoding again."""

    def __init__(self, path: Path, *, fps: int) -> None:
        import av

        self._av = av
        self._output = av.open(str(path), "w", format="mp4")
        self._stream: Any = None
        self._fps = fps
        self._num_frames = 0

    @property
    def seconds(self) -> float:
        """Length of the file so far."""
        return self._num_frames / self._fps

    def append(self, path: Path) -> None:
        """Copy all frames of a file to the end."""
        with self._av.open(str(path)) as source:
            stream = source.streams.video[0]
            if self._stream is None:
                self._stream = self._output.add_stream_from_template(stream)
            assert stream.time_base is not None
            start = round(Fraction(self._num_frames, self._fps) / stream.time_base)
            for packet in source.demux(stream):
                if packet.pts is None or packet.dts is None:
                    continue  # the end mark
                packet.pts += start
                packet.dts += start
                packet.stream = self._stream
                self._output.mux(packet)
                self._num_frames += 1

    def close(self) -> None:
        """Write the file's index."""
        self._output.close()


def describe_video(*, fps: int, size: tuple[int, int]) -> dict[str, Any]:
    """Return the `info` of a video feature."""
    return {
        "video.height": size[0],
        "video.width": size[1],
        "video.codec": "h264",
        "video.pix_fmt": _PIXEL_FORMAT,
        "video.is_depth_map": False,
        "video.fps": fps,
        "video.channels": 3,
        "has_audio": False,
    }


@dataclass(frozen=True, kw_only=True)
class LeRobotFeatures:
    """The columns of a dataset.

    Raises:
        ValueError: a column's name is invalid or used twice, or a video cannot have the size.
    """

    # frames per second
    fps: int
    # the robot's name
    robot_type: str
    # column of float32 vectors -> name of each number
    vectors: dict[str, tuple[str, ...]]
    # column of images -> (height, width)
    cameras: dict[str, tuple[int, int]]
    # store images in mp4 files (lossy) instead of as PNG
    video: bool = False

    def __post_init__(self) -> None:
        if self.fps < 1:
            raise ValueError(f"fps must be at least 1, got {self.fps}.")
        names = [*INDEX_COLUMNS, *self.vectors, *self.cameras]
        for name in names:
            if names.count(name) > 1 or not name or "/" in name:
                raise ValueError(f"column '{name}' must be unique, without '/', and not named as one of LeRobot's own.")
        for name, parts in self.vectors.items():
            if not parts:
                raise ValueError(f"column '{name}' must have at least one number.")
        for name, size in self.cameras.items():
            if self.video and (size[0] % 2 or size[1] % 2):
                raise ValueError(f"'{name}' has {size[1]} x {size[0]} pixels: a video's width and height must be even.")


@dataclass(frozen=True, kw_only=True)
class EpisodePart:
    """A recorded episode, without its frames."""

    folder: Path
    # the instruction
    task: str
    # frames
    length: int
    # bytes of frames.parquet
    num_bytes: int
    # camera column -> statistics of its images
    picture_statistics: dict[str, ColumnStatistics]
    # further facts, from the recorder's caller
    facts: dict[str, Any]


def read_part(folder: Path) -> EpisodePart:
    """Read a recorded episode's facts.

    Raises:
        FileNotFoundError: the episode was not recorded.
    """
    facts = read_object(str(folder / FACTS))
    return EpisodePart(folder=folder, num_bytes=(folder / FRAMES).stat().st_size, **facts)


def delete_leftovers(folder: Path) -> None:
    """Delete unfinished parts below `folder`; no other process may be writing there."""
    for leftover in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        shutil.rmtree(leftover)


class EpisodeRecorder:
    """Records one episode to the folder `path`; as a context manager, it leaves nothing unless `finish` is called.

    Memory: the episode's PNG files; with videos, only the current frame.
    """

    def __init__(self, path: Path, features: LeRobotFeatures) -> None:
        self._path, self._features = path, features
        self._vectors: dict[str, list[np.ndarray]] = {name: [] for name in features.vectors}
        self._pictures: dict[str, list[bytes]] = {name: [] for name in features.cameras if not features.video}
        self._statistics = {name: ImageStatistics() for name in features.cameras}
        self._num_frames = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY_SUFFIX}")
        self._temporary.mkdir()
        self._videos = {
            name: VideoEncoder(self._temporary / f"{name}.mp4", fps=features.fps, size=size)
            for name, size in features.cameras.items()
            if features.video
        }

    @property
    def num_frames(self) -> int:
        """Frames so far."""
        return self._num_frames

    def add(self, vectors: Mapping[str, np.ndarray], images: Mapping[str, np.ndarray]) -> None:
        """Record one frame.

        Args:
            vectors: column -> numbers, float [C].
            images: column -> image, uint8 [H, W, 3].

        Raises:
            ValueError: a column is missing or unknown, or has another shape or type, or a number is not finite.
        """
        self._check_names("vectors", set(vectors), set(self._features.vectors))
        self._check_names("images", set(images), set(self._features.cameras))
        for name, parts in self._features.vectors.items():
            values = vectors[name]
            if values.dtype.kind != "f" or values.shape != (len(parts),):
                raise self._fail(f"'{name}' must be floats ({len(parts)},), got {values.dtype} {values.shape}.")
            if not np.isfinite(values).all():
                raise self._fail(f"'{name}' must be finite, got {values.tolist()}.")
        for name, size in self._features.cameras.items():
            image = images[name]
            if image.dtype != np.uint8 or image.shape != (*size, 3):
                raise self._fail(f"'{name}' must be uint8 {(*size, 3)}, got {image.dtype} {image.shape}.")
        for name, values in vectors.items():
            self._vectors[name].append(values.astype(np.float32))
        for name, image in images.items():
            self._statistics[name].add(image)
            if self._features.video:
                self._videos[name].add(image)
            else:
                self._pictures[name].append(_encode_png(image))
        self._num_frames += 1

    def finish(self, task: str, facts: Mapping[str, Any] | None = None) -> None:
        """Write the part; if another process has written it meanwhile, keep the other one.

        Args:
            task: the instruction.
            facts: JSON values to keep with the part.

        Raises:
            ValueError: there is no frame, or no task.
        """
        if not self._num_frames or not task.strip():
            raise ValueError(f"{self._path.name}: an episode needs frames ({self._num_frames}) and a task ('{task}').")
        self._close_videos()
        self._write_frames()
        known = {
            "task": task,
            "length": self._num_frames,
            "picture_statistics": {name: one.finish() for name, one in self._statistics.items()},
            "facts": dict(facts or {}),
        }
        (self._temporary / FACTS).write_text(json.dumps(known), encoding="utf-8")
        try:
            os.rename(self._temporary, self._path)
        except OSError:
            if not (self._path / FACTS).exists():
                raise

    def discard(self) -> None:
        """Delete the unfinished part."""
        self._close_videos()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def __enter__(self) -> "EpisodeRecorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def _write_frames(self) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        columns: dict[str, Any] = {}
        for name, rows in self._vectors.items():
            columns[name] = vector_array(np.stack(rows))
        for name, pictures in self._pictures.items():
            paths = [f"frame-{number:06d}.png" for number in range(len(pictures))]
            columns[name] = pa.StructArray.from_arrays(
                [pa.array(pictures, pa.binary()), pa.array(paths, pa.string())], names=["bytes", "path"]
            )
        parquet.write_table(pa.table(columns), self._temporary / FRAMES, compression="none", use_dictionary=False)

    def _close_videos(self) -> None:
        while self._videos:
            self._videos.popitem()[1].close()

    def _fail(self, problem: str) -> ValueError:
        return ValueError(f"{self._path.name}, frame {self._num_frames}: {problem}")

    def _check_names(self, what: str, given: set[str], wanted: set[str]) -> None:
        if given != wanted:
            missing, unknown = sorted(wanted - given), sorted(given - wanted)
            raise self._fail(f"{what} must match the features; missing: {missing}, unknown: {unknown}.")


def vector_array(values: np.ndarray) -> Any:
    """Return rows [L, C] as the Arrow array that LeRobot stores: plain numbers if C is 1."""
    import pyarrow as pa

    flat = pa.array(values.reshape(-1))
    return flat if values.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _encode_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # level 3: hardly larger than 6, in a third of the time
    Image.fromarray(image).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
