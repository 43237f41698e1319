"""The interface of converters: find episodes, describe their numbers, and read one episode at a time.

A converter is a class and its params, registered under one name. Put them in a module of your own and load it with
`--plugins`; nothing here has to change:

    \"\"\"One .npz per episode: state (L, 7), action (L, 7), front (L, H, W, 3), fps, task.\"\"\"

    from dataclasses import dataclass
    from pathlib import Path

    import numpy as np

    from vla_foundry.params.commands.preprocessing_robotics import register_converter_params
    from vla_foundry.params.commands.preprocessing_robotics import RoboticsPreprocessParams
    from vla_foundry.preprocessing.robotics import ArrayFrames, BaseRoboticsConverter, Episode, EpisodeRef
    from vla_foundry.preprocessing.robotics import register_converter
    from vla_foundry.robotics.spec import FieldDescription


    @register_converter_params("npz_folder")
    @dataclass(frozen=True, kw_only=True)
    class NpzFolderParams(RoboticsPreprocessParams):
        \"\"\"Folders of .npz files.\"\"\"

        # unit of the state and of the action
        unit: str = "rad"


    @register_converter("npz_folder")
    class NpzFolderConverter(BaseRoboticsConverter):
        \"\"\"Reads folders of .npz files.\"\"\"

        def discover_episodes(self):
            paths = [path for source in self.params.source_episodes for path in sorted(Path(source).glob("*.npz"))]
            return [EpisodeRef(episode_id=path.stem, source=str(path)) for path in paths]

        def discover_cameras(self):
            return ["front"]

        def describe_fields(self):
            state = FieldDescription(shape=(7,), unit=self.params.unit)
            return {"state": state, "action": FieldDescription(shape=(7,), unit=self.params.unit, role="action")}

        def read_episode(self, ref):
            with np.load(ref.source) as file:
                arrays = dict(file)
            fps = float(arrays["fps"])
            return Episode(
                ref=ref,
                fps=fps,
                timestamps=np.arange(len(arrays["state"])) / fps,
                fields={name: arrays[name].astype(np.float32) for name in ("state", "action")},
                cameras={"front": ArrayFrames(arrays["front"])},
                instructions=Episode.one_instruction(str(arrays["task"]), len(arrays["state"])),
            )

    vla-foundry preprocess robotics --plugins npz_folder --type npz_folder --source_episodes DIR --output_dir OUT

The job checks every episode for lengths, shapes, types, NaN, time going backwards, and missing cameras and frames. For
anything else that is wrong with an episode, raise a ValueError of one line that names the file: the episode is then
left out whole, and reported.
"""

import abc
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vla_foundry.params.commands.preprocessing_robotics import RoboticsPreprocessParams
from vla_foundry.preprocessing.output import digest_of
from vla_foundry.registry import Registry
from vla_foundry.robotics.episode_blocks import InstructionSpan
from vla_foundry.robotics.fields import PoseGroup
from vla_foundry.robotics.spec import FieldDescription
from vla_foundry.storage.uri import list_visible, name_of

_CONVERTERS: Registry[type["BaseRoboticsConverter"]] = Registry(
    "type", package="vla_foundry.preprocessing.robotics.converters", decorator="register_converter"
)
register_converter = _CONVERTERS.register


@dataclass(frozen=True)
class EpisodeRef:
    """An episode that was found but not yet read; sent to the process that reads it."""

    # unique among all sources, the same in every run; letters, digits, "_" and "-"
    episode_id: str
    # the episode as the user knows it: a path, a path and an index
    source: str
    # None: no task, or not known before the episode is read
    task: str | None = None
    # None: not known before the episode is read
    num_frames: int | None = None
    # anything else that read_episode needs; picklable and small
    payload: Any = None


@dataclass(kw_only=True)
class CameraFrames:
    """The images of one camera, read one at a time so that a long episode needs no more memory than a short one."""

    # starts a pass over all images, in order: uint8 (H, W, 3) RGB, uint16 (H, W) millimetres for depth, or the bytes of
    # image files; a JPEG that needs no change is stored as it is
    read: Callable[[], Iterator[np.ndarray | bytes]]
    # (W, H) as recorded
    size: tuple[int, int]
    num_frames: int
    is_depth: bool = False
    # what the images come from, for messages
    origin: str = "the recording"

    def __iter__(self) -> Iterator[np.ndarray | bytes]:
        return self.read()

    def __str__(self) -> str:
        return self.origin


def decode_frame(frames: CameraFrames, number: int, image: np.ndarray | bytes) -> np.ndarray:
    """Decode an image that is a file's bytes, and check it: uint8 (H, W, 3), or uint16 (H, W) for depth.

    Raises:
        ValueError: the image is broken, or has another size or type; one line that names its origin and `number`.
    """
    from vla_foundry.images.codec import decode_depth, decode_image  # torch: recording demonstrations goes without

    where = f"{frames}: image {number}"
    if isinstance(image, bytes):
        try:
            decoded = decode_depth(image) if frames.is_depth else decode_image(image).permute(1, 2, 0)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        image = decoded.numpy()
    width, height = frames.size
    if image.ndim >= 2 and image.shape[:2] != (height, width):
        raise ValueError(f"{where} is {image.shape[1]} x {image.shape[0]} pixels, expected {width} x {height}.")
    shape, dtype = ((height, width), "uint16") if frames.is_depth else ((height, width, 3), "uint8")
    if image.shape != shape or image.dtype != dtype:
        raise ValueError(f"{where} is {image.dtype} {image.shape}, expected {dtype} {shape}.")
    return image


class ArrayFrames(CameraFrames):
    """Images in memory or memory-mapped: (L, H, W, 3) uint8, or (L, H, W) uint16 for depth."""

    def __init__(self, images: np.ndarray) -> None:
        if images.ndim not in (3, 4):
            raise ValueError(f"images must be (L, H, W, 3) or (L, H, W), got {images.shape}.")
        num_frames, height, width = images.shape[:3]
        super().__init__(
            read=lambda: iter(images), size=(width, height), num_frames=num_frames, is_depth=images.ndim == 3
        )


@dataclass(kw_only=True)
class Episode:
    """An episode, its images not yet read."""

    ref: EpisodeRef
    # frames per second
    fps: float
    # float64 (L,) seconds, ascending; frame i of every camera was taken at timestamps[i]
    timestamps: np.ndarray
    # {field: float32 or float64 (L, C)}, absolute (or deltas, if described so)
    fields: dict[str, np.ndarray]
    cameras: dict[str, CameraFrames]
    instructions: list[InstructionSpan] = field(default_factory=list)
    # {camera: (3, 3) or (L, 3, 3)} in pixels; integer coordinates are pixel centres
    intrinsics: dict[str, np.ndarray] = field(default_factory=dict)
    # {camera: (4, 4) or (L, 4, 4)}, stored unchanged
    extrinsics: dict[str, np.ndarray] = field(default_factory=dict)
    # anything else, as JSON values
    metadata: dict[str, Any] = field(default_factory=dict)
    # None: the ref's task
    task: str | None = None

    @staticmethod
    def one_instruction(text: str | None, num_frames: int) -> list[InstructionSpan]:
        """Return the instructions of an episode that has one text throughout; none for an empty text."""
        return Episode.instructions_of_frames([text or ""] * num_frames)

    @staticmethod
    def instructions_of_frames(texts: Sequence[str]) -> list[InstructionSpan]:
        """Return the instructions of an episode, given the text of every frame; frames without text have none."""
        spans, start = [], 0
        for text, frames in itertools.groupby(texts):
            end = start + sum(1 for _ in frames)
            if text.strip():
                spans.append(InstructionSpan(start=start, end=end, texts={"original": [text]}))
            start = end
        return spans


class BaseRoboticsConverter(abc.ABC):
    """Reads one kind of recordings; see the module.

    The driver and every process that reads episodes create a converter each: do slow work in `discover_episodes`, and
    put what `read_episode` needs from it into the refs.
    """

    def __init__(self, params: Any) -> None:
        self.params = params

    @abc.abstractmethod
    def discover_episodes(self) -> list[EpisodeRef]:
        """Find all episodes of params.source_episodes, without reading them.

        Raises:
            ValueError: a source is of another kind.
            FileNotFoundError: a source does not exist.
        """

    @abc.abstractmethod
    def discover_cameras(self) -> list[str]:
        """Return the names of all cameras of the source, always in the same order."""

    @abc.abstractmethod
    def describe_fields(self) -> dict[str, FieldDescription]:
        """Return the fields of every episode, and what their numbers mean."""

    def pose_groups(self) -> tuple[PoseGroup, ...]:
        """Return the fields that form poses: these get `_relative` fields, and are resampled as poses."""
        return ()

    @abc.abstractmethod
    def read_episode(self, ref: EpisodeRef) -> Episode:
        """Read an episode; its images are read when its cameras are iterated.

        Raises:
            ValueError: the episode is broken; one line that names the file and what is wrong.
        """

    def describe_source(self) -> dict[str, Any]:
        """Return a fingerprint of the source: number and bytes of all files, and a digest of their names and sizes."""
        digest, num_files, num_bytes = hashlib.sha256(), 0, 0
        for source in self.params.source_episodes:
            for path, (size, _) in list_visible(source).items():
                inside = path[len(source.rstrip("/")) :].lstrip("/") or name_of(path)
                digest.update(f"{inside}\0{size}\n".encode())
                num_files, num_bytes = num_files + 1, num_bytes + size
        return {"num_files": num_files, "num_bytes": num_bytes, "digest": digest.hexdigest()}

    def digest_versions(self) -> str:
        """Return a fingerprint of the versions of all source files: an edited file may keep its size."""
        found = [list_visible(source).values() for source in self.params.source_episodes]
        return digest_of([listed.version for files in found for listed in files])


def create_converter(params: RoboticsPreprocessParams) -> BaseRoboticsConverter:
    """Create the converter that params.type names.

    Raises:
        ValueError: no converter has this name.
    """
    return _CONVERTERS.get(params.type)(params)


@contextmanager
def name_broken_file(uri: str, kind: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn what a library raises for a missing or broken file into a ValueError that names the file.

    An OSError with a number is trouble of the machine or the network, and passes.
    """
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{uri} is missing.") from None
    except errors as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise ValueError(f"{uri} is not a complete {kind} ({' '.join(str(error).split())[:200]}).") from None


_LONGEST = 80


def slug(text: str) -> str:
    """Reduce a text to letters, digits, "_" and "-"; a very long one to its beginning and a digest."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_") or "_"
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST - 9]}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def unique_names(uris: Sequence[str], *, num_parts: int = 1) -> list[str]:
    """Name each of several files or folders by the end of its path, as short as is unique.

    Args:
        num_parts: least number of path parts in a name.

    Raises:
        ValueError: two are the same, or differ only in characters that a name cannot hold.
    """
    parts = [[part for part in uri.split("/") if part not in ("", ".")] for uri in uris]
    lengths = [num_parts] * len(uris)
    while True:
        names = [slug("_".join(path[-length:])) for path, length in zip(parts, lengths, strict=True)]
        counts = Counter(names)
        if len(counts) == len(names):
            return names
        clashing = [number for number, name in enumerate(names) if counts[name] > 1]
        longer = [number for number in clashing if lengths[number] < len(parts[number])]
        if not longer:
            first, second = [uris[number] for number in clashing if names[number] == names[clashing[0]]][:2]
            what = "is given twice" if first == second else f"has the same name as {second}, but for special characters"
            raise ValueError(f"source_episodes: {first} {what}. Leave one out, or rename it.")
        for number in longer:
            lengths[number] += 1
