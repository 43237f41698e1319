"""Cut windows of time steps around anchors, with their padding masks, and read windows from either layout.

In a window of P past and F future steps the anchor is step P. Exactly one of the three masks is True at each step:

| mask        | True where                                                              |
|-------------|-------------------------------------------------------------------------|
| past_mask   | the step lies before the anchor and within the episode: observed        |
| future_mask | the step is the anchor or later and within the episode: to be predicted |
| is_padding  | the step lies outside the episode: neither observed nor to be predicted |

The published layout ("samples") stores each window separately, with its images. The default layout ("episodes") stores
each frame once and cuts windows when they are read, with the same functions as preprocessing, so both layouts of a
recording give bit-identical windows. (With the padding `reflect`, this holds only for the whole stored window, because
the window's own part of the episode is mirrored. Padded steps are masked anyway.) Only the requested data is read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar, get_args

import numpy as np
from jaxtyping import Int64, Num

from vla_foundry.parsing import parse_record
from vla_foundry.robotics.episode_blocks import EpisodeInfo
from vla_foundry.robotics.fields import PaddingStrategy, PoseGroup, Window, image_name
from vla_foundry.robotics.fit import WindowSpec
from vla_foundry.robotics.transforms import RelativePoses
from vla_foundry.storage.npz import NpzFile

# image extensions, in search order
IMAGE_EXTENSIONS = ("jpg", "png", "jpeg", "webp")
# windows to create at a time; bounds the memory of a long episode
_CHUNK = 256

# a shard's handle of a member
Member = TypeVar("Member")


@dataclass(frozen=True, eq=False)
class Windows:
    """N windows of T steps over one episode."""

    # the window around each anchor
    window: Window
    # (N,) int64, the frame at each anchor
    anchors: np.ndarray
    # (N, T) int64, the frame within the episode that each step takes its values from
    frames: np.ndarray
    # (N, T) bool, True where the step lies outside the episode
    is_padding: np.ndarray
    # values of those steps
    padding: PaddingStrategy

    @property
    def past_mask(self) -> np.ndarray:
        """(N, T) bool, True where a step is observed: before the anchor, within the episode."""
        return ~self.is_padding & (np.arange(self.window.num_steps) < self.window.anchor)

    @property
    def future_mask(self) -> np.ndarray:
        """(N, T) bool, True where a step must be predicted: the anchor or later, within the episode."""
        return ~self.is_padding & (np.arange(self.window.num_steps) >= self.window.anchor)

    def apply(self, values: Num[np.ndarray, "L *C"]) -> Num[np.ndarray, "N T *C"]:
        """Gather an episode's values (one row per frame) into the windows; padding is zero if the strategy is zero."""
        taken = values[self.frames]
        if self.padding == "zero":
            taken[self.is_padding] = 0
        return taken

    def invert(self, values: Num[np.ndarray, "N T *C"]) -> Num[np.ndarray, "L *C"]:
        """Return an episode's rows from the first to the last frame in the windows; zero for frames in no window."""
        is_inside = ~self.is_padding
        frames = self.frames[is_inside] - self.frames.min()
        rows = np.zeros((frames.max() + 1, *values.shape[2:]), dtype=values.dtype)
        rows[frames] = values[is_inside]
        return rows


def create_windows(
    anchors: Int64[np.ndarray, " N"], num_frames: int, window: Window, *, padding: PaddingStrategy = "copy"
) -> Windows:
    """Work out the frames and masks of the windows around `anchors`.

    `reflect` mirrors at the first and last valid frame of the window without repeating it, and back and forth if the
    valid part is shorter than the padding (numpy.pad's reflect).

    Args:
        num_frames: frames of the episode (L).

    Raises:
        ValueError: an anchor lies outside the episode.
    """
    assert padding in get_args(PaddingStrategy), padding
    outside = (anchors < 0) | (anchors >= num_frames)
    if outside.any():
        raise ValueError(f"anchor {anchors[outside][0]} lies outside the episode of {num_frames} frames.")
    steps = anchors[:, None] + np.array(window.offsets, dtype=np.int64)  # (N, T)
    is_padding = (steps < 0) | (steps >= num_frames)
    frames = np.clip(steps, 0, num_frames - 1)
    if padding == "reflect" and is_padding.any():
        first, last = frames[:, :1], frames[:, -1:]
        length = last - first
        # a triangle wave of period 2 * length; a single frame has nothing to mirror and is copied
        phase = np.remainder(steps - first, np.maximum(2 * length, 1))
        frames = first + np.where(phase > length, 2 * length - phase, phase)
    return Windows(window=window, anchors=anchors, frames=frames, is_padding=is_padding, padding=padding)


def image_frames(
    anchors: Int64[np.ndarray, " N"], image_indices: Sequence[int], num_frames: int
) -> Int64[np.ndarray, "N I"]:
    """Return the frames that lie `image_indices` frames from each anchor, clipped to the episode."""
    offsets = np.array(image_indices, dtype=np.int64)
    return np.clip(anchors[:, None] + offsets, 0, num_frames - 1)


def iterate_windows(
    fields: Mapping[str, np.ndarray],
    anchors: Int64[np.ndarray, " N"],
    num_frames: int,
    window: Window,
    *,
    padding: PaddingStrategy,
    pose_groups: Sequence[PoseGroup] = (),
) -> Iterator[tuple[Windows, dict[str, np.ndarray]]]:
    """Yield the windows around an episode's anchors in chunks, with the values of every field (n, T, C).

    Args:
        fields: fields of the whole episode, (L, C).
        pose_groups: groups whose `_relative` fields are added, in the dtype of the poses.

    Raises:
        ValueError: an anchor lies outside the episode, or a field does not hold a pose.
    """
    poses = RelativePoses(tuple(pose_groups), window.anchor, padding)
    types = {
        name: fields[key].dtype
        for group in pose_groups
        for name, key in zip(group.relative_keys, (group.position_key, group.rotation_key), strict=True)
    }
    for first in range(0, len(anchors), _CHUNK):
        windows = create_windows(anchors[first : first + _CHUNK], num_frames, window, padding=padding)
        values = {name: windows.apply(array) for name, array in fields.items()}
        relative = poses.apply(values, windows.is_padding)
        yield windows, values | {name: array.astype(types[name]) for name, array in relative.items()}


@dataclass(frozen=True, eq=False, kw_only=True)
class RobotWindow:
    """The data read from one sample; T steps."""

    episode_id: str
    # frame of the episode
    anchor: int
    # {field: (T, C)}, in the units of the data, as stored: relative poses are computed later
    fields: dict[str, np.ndarray]
    # bool (T,); exactly one mask is True at each step, see above
    past_mask: np.ndarray
    future_mask: np.ndarray
    is_padding: np.ndarray
    # image files (at inference: uint8 [3, H, W]), in the order of the spec; None: the image is missing
    images: Sequence[Any]
    # {type: instructions}
    instructions: dict[str, list[str]]
    # {name in the config: the row at the anchor}
    calibration: dict[str, np.ndarray] = field(default_factory=dict)


def read_sample_window(members: Mapping[str, Member], read: Callable[[Member], bytes], spec: WindowSpec) -> RobotWindow:
    """Read a separately stored window.

    Args:
        members: members of the sample, by lower-case suffix.
        read: returns the content of a member.

    Raises:
        ValueError: the sample lacks something the spec requires, or is malformed.
    """

    def find(suffix: str) -> bytes:
        if suffix not in members:
            raise ValueError(f"it has no member '{suffix}'; its members are {', '.join(sorted(members))}")
        return read(members[suffix])

    metadata = _parse_object(find("metadata.json"), "metadata.json")
    arrays = NpzFile.from_bytes(find("lowdim.npz"))
    past_mask, future_mask = arrays.read("past_mask"), arrays.read("future_mask")
    # steps before the anchor; LeRobot's published metadata store numbers as text
    past = int(metadata.get("anchor_relative_idx", np.argmax(future_mask)))
    steps = Window(past, len(future_mask) - 1 - past).crop(spec.window)
    fields = {name: _check_steps(name, arrays.read(name), len(future_mask))[steps] for name in spec.stored}
    past_mask, future_mask = past_mask[steps], future_mask[steps]
    calibration = {}
    for name, array in spec.calibration:
        values = arrays.read(array)
        calibration[name] = values[past] if values.ndim == 3 else values
    images = []
    for offset in spec.image_indices:
        for camera in spec.cameras:
            names = [f"{image_name(camera.lower(), offset)}.{extension}" for extension in IMAGE_EXTENSIONS]
            found = next((name for name in names if name in members), None)
            images.append(None if found is None else read(members[found]))
    texts = "language_instructions.json"
    return RobotWindow(
        episode_id=_episode_of(metadata),
        anchor=int(metadata.get("anchor_timestep", metadata.get("frame_index", -1))),
        fields=fields,
        past_mask=past_mask,
        future_mask=future_mask,
        is_padding=~(past_mask | future_mask),
        images=images,
        instructions=_parse_instructions(_parse_object(find(texts), texts) if texts in members else {}),
        calibration=calibration,
    )


def read_episode_window(
    info: EpisodeInfo, arrays: NpzFile, anchor: int, read_frame: Callable[[str, int], bytes | None], spec: WindowSpec
) -> RobotWindow:
    """Cut a window from an episode.

    Args:
        arrays: the episode's fields (L, C); only the rows of the window are read.
        read_frame: returns the image of a camera at a frame, or None if the episode lacks the camera.

    Raises:
        ValueError: the episode lacks something the spec requires, or is malformed.
    """
    first, end = max(0, anchor - spec.window.past), min(info.num_frames, anchor + spec.window.future + 1)
    num_left, num_right = first - (anchor - spec.window.past), anchor + spec.window.future + 1 - end
    windows, masks = _place_window(num_left, num_right, spec.window, spec.padding)
    fields = {}
    for name in spec.stored:
        values = _check_steps(name, arrays.read_rows(name, first, end), end - first)
        fields[name] = windows.apply(values)[0] if num_left or num_right else values
    calibration = {}
    for name, array in spec.calibration:
        is_fixed = len(arrays.shape(array)) == 2
        calibration[name] = arrays.read(array) if is_fixed else arrays.read_rows(array, anchor, anchor + 1)[0]
    frames = image_frames(np.asarray([anchor]), spec.image_indices, info.num_frames)[0].tolist()
    return RobotWindow(
        episode_id=info.episode_id,
        anchor=anchor,
        fields=fields,
        **masks,
        images=[read_frame(camera, frame) for frame in frames for camera in spec.cameras],
        instructions=_parse_instructions(info.instructions_at(anchor)),
        calibration=calibration,
    )


def read_episode_fields(arrays: NpzFile, names: Sequence[str], num_frames: int) -> dict[str, np.ndarray]:
    """Read fields of a whole episode, (L, C), and verify their checksums.

    Raises:
        ValueError: the episode lacks a field, or a field is damaged.
    """
    return {name: _check_steps(name, arrays.read(name), num_frames) for name in names}


@lru_cache(maxsize=4096)  # cached: computing this for each sample would take half as long as reading its fields
def _place_window(
    num_left: int, num_right: int, window: Window, padding: PaddingStrategy
) -> tuple[Windows, dict[str, np.ndarray]]:
    """Return a window, with `num_left` padded steps before its frames and `num_right` after them, and its masks."""
    num_frames = window.num_steps - num_left - num_right
    windows = create_windows(np.asarray([window.past - num_left]), num_frames, window, padding=padding)
    masks = {name: getattr(windows, name)[0] for name in ("past_mask", "future_mask", "is_padding")}
    for mask in masks.values():
        mask.flags.writeable = False
    return windows, masks


def _parse_object(content: bytes, suffix: str) -> dict[str, Any]:
    values = parse_record(content, f"its {suffix}")
    if not isinstance(values, dict):
        raise ValueError(f"its {suffix} is not a JSON object")
    return values


def _check_steps(name: str, values: np.ndarray, num_steps: int) -> np.ndarray:
    if values.ndim != 2 or len(values) != num_steps or values.dtype.kind not in "fiub":
        raise ValueError(
            f"array '{name}' of shape {values.shape} and type {values.dtype} is not a field of {num_steps} steps"
        )
    return values


def _episode_of(metadata: Mapping[str, Any]) -> str:
    if "episode_id" in metadata:
        return str(metadata["episode_id"])
    return f"episode_{metadata['episode_index']}" if "episode_index" in metadata else ""


def _parse_instructions(values: Mapping[str, Any]) -> dict[str, list[str]]:
    """Convert instructions to lists; LeRobot's published instructions are single texts."""
    lists: dict[str, Sequence[Any]] = {
        kind: [texts] if isinstance(texts, str) else texts for kind, texts in values.items()
    }
    return {kind: [text for text in texts if isinstance(text, str) and text] for kind, texts in lists.items()}
