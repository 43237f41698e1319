"""One episode on its way into a LeRobot set: every frame is checked and encoded as it comes, and the whole is one part.

A part is a folder: `frames.parquet` (a row a frame), `<camera column>.mp4` where pictures are stored as videos, and
`episode.json` (task, length, statistics of pictures, facts of the caller). It appears whole or not at all.
"""

import io
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from vla_foundry.preprocessing.robotics.lerobot_statistics import ColumnStatistics, PictureStatistics
from vla_foundry.preprocessing.robotics.lerobot_video import VideoEncoder

FRAMES, FACTS = "frames.parquet", "episode.json"
# columns that a set has besides its own
INDEX_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
_TEMPORARY = ".tmp"


@dataclass(frozen=True, kw_only=True)
class LeRobotFeatures:
    """What every frame of a set holds.

    Raises:
        ValueError: a column's name cannot be, two have the same, or a video cannot have the size.
    """

    # frames in a second
    fps: int
    # the robot's name
    robot_type: str
    # column of float32 vectors -> what each of its numbers is
    vectors: dict[str, tuple[str, ...]]
    # column of pictures -> (height, width)
    cameras: dict[str, tuple[int, int]]
    # whether pictures are stored in mp4 files, a little changed, instead of as PNG
    video: bool = False

    def __post_init__(self) -> None:
        if self.fps < 1:
            raise ValueError(f"fps must be at least 1, got {self.fps}.")
        names = [*INDEX_COLUMNS, *self.vectors, *self.cameras]
        for name in names:
            if names.count(name) > 1 or not name or "/" in name:
                raise ValueError(f"column '{name}' must be named once only, without '/', and not as one of LeRobot's.")
        for name, parts in self.vectors.items():
            if not parts:
                raise ValueError(f"column '{name}' must have at least one number.")
        for name, size in self.cameras.items():
            if self.video and (size[0] % 2 or size[1] % 2):
                raise ValueError(f"'{name}' has {size[1]} x {size[0]} pixels: a video's width and height must be even.")


@dataclass(frozen=True, kw_only=True)
class EpisodePart:
    """What is known of a recorded episode, without its frames."""

    folder: Path
    # what was to be done
    task: str
    # frames
    length: int
    # bytes of frames.parquet
    num_bytes: int
    # camera column -> statistics of its pictures
    picture_statistics: dict[str, ColumnStatistics]
    # what the recorder's caller added
    facts: dict[str, Any]


def read_part(folder: Path) -> EpisodePart:
    """Read what is known of a recorded episode.

    Raises:
        FileNotFoundError: it was not recorded.
    """
    facts = json.loads((folder / FACTS).read_text())
    return EpisodePart(folder=folder, num_bytes=(folder / FRAMES).stat().st_size, **facts)


def delete_leftovers(folder: Path) -> None:
    """Delete parts below `folder` that were never finished; nobody must be writing there."""
    for leftover in folder.glob(f".*{_TEMPORARY}"):
        shutil.rmtree(leftover)


class EpisodeRecorder:
    """Records one episode to the folder `path`; used as a context manager, it leaves nothing unless `finish` is called.

    Memory: the episode's PNG files, or nothing but the frame at hand if pictures go to videos.
    """

    def __init__(self, path: Path, features: LeRobotFeatures) -> None:
        self._path, self._features = path, features
        self._vectors: dict[str, list[np.ndarray]] = {name: [] for name in features.vectors}
        self._pictures: dict[str, list[bytes]] = {name: [] for name in features.cameras if not features.video}
        self._statistics = {name: PictureStatistics() for name in features.cameras}
        self._num_frames = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{_TEMPORARY}")
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
            images: column -> picture, uint8 [H, W, 3].

        Raises:
            ValueError: a column is missing or unknown, or has another shape or type, or a number is not finite.
        """
        self._check_names("vectors", set(vectors), set(self._features.vectors))
        self._check_names("images", set(images), set(self._features.cameras))
        for name, parts in self._features.vectors.items():
            self._check_vector(name, vectors[name], len(parts))
        for name, size in self._features.cameras.items():
            self._check_image(name, images[name], size)
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
        """Write the part; if another process has written it meanwhile, that one stays.

        Args:
            task: what was to be done.
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
        (self._temporary / FACTS).write_text(json.dumps(known))
        try:
            os.rename(self._temporary, self._path)
        except OSError:
            if not (self._path / FACTS).exists():
                raise

    def discard(self) -> None:
        """Delete what is not finished."""
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
            raise self._fail(f"{what} must be those of the features; missing: {missing}, unknown: {unknown}.")

    def _check_vector(self, name: str, values: np.ndarray, width: int) -> None:
        if values.dtype.kind != "f" or values.shape != (width,):
            raise self._fail(f"'{name}' must be floats of shape ({width},), got {values.dtype} of {values.shape}.")
        if not np.isfinite(values).all():
            raise self._fail(f"'{name}' must be finite, got {values.tolist()}.")

    def _check_image(self, name: str, image: np.ndarray, size: tuple[int, int]) -> None:
        if image.dtype != np.uint8 or image.shape != (*size, 3):
            raise self._fail(f"'{name}' must be uint8 of shape {(*size, 3)}, got {image.dtype} of {image.shape}.")


def vector_array(values: np.ndarray) -> Any:
    """An Arrow array of rows [L, C], as LeRobot stores it: plain numbers where C is 1."""
    import pyarrow as pa

    flat = pa.array(values.reshape(-1))
    return flat if values.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _encode_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # level 3: hardly larger than 6, and a third of the time
    Image.fromarray(image).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
