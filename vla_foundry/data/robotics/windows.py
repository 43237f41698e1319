"""Read a sample's window from either layout of robot data: only the arrays, rows and images that are asked for.

The published layout ("samples") stores each window by itself, images and all. The default one ("episodes") stores each
frame once, and windows, padding and relative poses are made here, by the very functions that preprocessing uses; so the
same recording gives the same bits either way. (With the padding `reflect`, only for the whole stored window: what is
mirrored is the window's own part of the episode. Padded steps are masked, whatever they hold.)
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast, get_args

import numpy as np
from torch import Tensor

from vla_foundry.data.reader import EpisodeShard, SampleShard
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.episode_blocks import RESCALED_INTRINSICS
from vla_foundry.robotics.fields import PoseGroup, Window, image_name
from vla_foundry.robotics.fit import find_camera
from vla_foundry.robotics.spec import NamedSpec
from vla_foundry.robotics.windows import PaddingStrategy, compute_relative_fields, create_windows, image_frames
from vla_foundry.storage.npz import NpzFile

# of images, in the order in which they are looked for
IMAGE_EXTENSIONS = ("jpg", "png", "jpeg", "webp")


@dataclass(frozen=True, kw_only=True)
class WindowRequest:
    """What is read of each sample of a dataset."""

    window: Window
    # what stands in steps outside an episode
    padding: PaddingStrategy
    # arrays that are read over the window
    fields: tuple[str, ...]
    # of which arrays among them relative poses are made
    pose_groups: tuple[PoseGroup, ...] = ()
    # as the dataset names them
    cameras: tuple[str, ...]
    # frames from the anchor; images are time-major, cameras within a time
    image_indices: tuple[int, ...]
    # (height, width) of each image, for the black one that stands for a missing one
    image_sizes: tuple[tuple[int, int], ...]
    # (name in the config, array) of cameras, of which the row at the anchor is read
    calibration: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class RobotWindow:
    """What was read of a sample; T steps."""

    episode_id: str
    # frame of the episode
    anchor: int
    # {field: (T, C)}, in the units of the data; what is stored, see `add_relative_fields`
    fields: dict[str, np.ndarray]
    # bool (T,); exactly one is True at each step, see robotics/windows.py
    past_mask: np.ndarray
    future_mask: np.ndarray
    is_padding: np.ndarray
    # image files (at inference: uint8 [3, H, W]), in the order of the request; None: there is no such image
    images: Sequence[bytes | Tensor | None]
    # {type: instructions}
    instructions: dict[str, list[str]]
    # {name in the config: the row at the anchor}
    calibration: dict[str, np.ndarray] = field(default_factory=dict)


def create_request(params: RoboticsDataParams, dataset: NamedSpec) -> WindowRequest:
    """Work out what is read of a dataset for params that fit it.

    Raises:
        ValueError: they do not.
    """
    spec = dataset.spec
    plans = [params.plan_fields(name, dataset) for name in ("action_fields", "proprioception_fields")]
    names = params.camera_names or []
    cameras = [find_camera(name, spec, dataset.name) for name in names]
    # a camera that the dataset lacks is as large as its first one
    sizes = {name: (camera.size[1], camera.size[0]) for name, camera in spec.cameras.items()}
    other = next(iter(sizes.values()), (224, 224))
    image_sizes = tuple(other if camera is None else sizes[camera] for camera in cameras)
    image_indices = tuple(params.image_indices or [])
    padding = spec.padding_strategy
    assert padding in get_args(PaddingStrategy), padding
    return WindowRequest(
        window=params.window,
        padding=cast(PaddingStrategy, padding),
        fields=tuple(dict.fromkeys([*plans[0].stored, *plans[1].stored])),
        pose_groups=tuple(dict.fromkeys([*plans[0].groups, *plans[1].groups])),
        cameras=tuple(camera or name for camera, name in zip(cameras, names, strict=True)),
        image_indices=image_indices,
        image_sizes=image_sizes * len(image_indices),
        calibration=tuple(
            (name, _calibration_array(name, dataset)) for name in (*params.intrinsics_fields, *params.extrinsics_fields)
        ),
    )


def _calibration_array(name: str, dataset: NamedSpec) -> str:
    kind, _, camera = name.partition(".")
    # the intrinsics of the stored image, which published presets call by a name that no shard has
    prefix = RESCALED_INTRINSICS if kind == "intrinsics" else f"{kind}."
    return prefix + (find_camera(camera, dataset.spec, dataset.name) or camera)


def read_published_window(shard: SampleShard, row: int, request: WindowRequest) -> RobotWindow:
    """Read a window that is stored by itself.

    Raises:
        ValueError: the sample lacks what is asked for, or what it holds is broken.
    """
    members = shard.members(row)
    metadata = _parse_json(shard, members, "metadata.json")
    arrays = NpzFile.from_bytes(shard.read_member(_find_member(members, "lowdim.npz")))
    past_mask, future_mask = _read_array(arrays, "past_mask"), _read_array(arrays, "future_mask")
    # steps before the anchor: LeRobot's published metadata hold numbers as text
    past = int(metadata.get("anchor_relative_idx", np.argmax(future_mask)))
    steps = Window(past, len(future_mask) - 1 - past).crop(request.window)
    fields = {name: _check_steps(name, _read_array(arrays, name), len(future_mask))[steps] for name in request.fields}
    past_mask, future_mask = past_mask[steps], future_mask[steps]
    is_padding = ~(past_mask | future_mask)
    calibration = {}
    for name, array in request.calibration:
        values = _read_array(arrays, array)
        calibration[name] = values[past] if values.ndim == 3 else values
    names = [image_name(camera.lower(), offset) for offset in request.image_indices for camera in request.cameras]
    return RobotWindow(
        episode_id=_episode_of(metadata),
        anchor=int(metadata.get("anchor_timestep", metadata.get("frame_index", -1))),
        fields=fields,
        past_mask=past_mask,
        future_mask=future_mask,
        is_padding=is_padding,
        images=[_read_image(shard, members, name) for name in names],
        instructions=_parse_instructions(_parse_json(shard, members, "language_instructions.json", is_optional=True)),
        calibration=calibration,
    )


def read_episode_window(shard: EpisodeShard, row: int, request: WindowRequest) -> RobotWindow:
    """Make a window of an episode.

    Raises:
        ValueError: the episode lacks what is asked for, or what it holds is broken.
    """
    number, anchor = shard.locate(row)
    episode = shard.episode(number)
    num_frames = episode.info.num_frames
    steps = _find_steps(
        max(0, request.window.past - anchor),
        max(0, anchor + request.window.future - num_frames + 1),
        request.window,
        request.padding,
    )
    first = max(0, anchor - request.window.past)
    fields = {}
    for name in request.fields:
        if name not in episode.arrays:
            raise ValueError(unknown_name_message("array", name, episode.arrays.names))
        values = episode.arrays.read_rows(name, first, first + steps.num_frames)
        fields[name] = steps.take(_check_steps(name, values, steps.num_frames))
    calibration = {}
    for name, array in request.calibration:
        is_fixed = len(_shape_of(episode.arrays, array)) == 2
        values = episode.arrays.read(array) if is_fixed else episode.arrays.read_rows(array, anchor, anchor + 1)[0]
        calibration[name] = values
    frames = image_frames(np.asarray([anchor]), request.image_indices, num_frames)[0].tolist()
    return RobotWindow(
        episode_id=episode.info.episode_id,
        anchor=anchor,
        fields=fields,
        past_mask=steps.past_mask,
        future_mask=steps.future_mask,
        is_padding=steps.is_padding,
        images=[shard.read_frame(number, camera, frame) for frame in frames for camera in request.cameras],
        instructions=_parse_instructions(episode.info.instructions_at(anchor)),
        calibration=calibration,
    )


@dataclass(frozen=True, eq=False)
class _Steps:
    """The steps of a window that lies somewhere in an episode; the same wherever as much of it lies outside."""

    # frames of the episode that the window holds
    num_frames: int
    # int64 (T,), which of these each step takes; None: each its own
    frames: np.ndarray | None
    # the steps to be zero; None: none
    zeroed: np.ndarray | None
    # bool (T,)
    past_mask: np.ndarray
    future_mask: np.ndarray
    is_padding: np.ndarray

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Make the window's steps of its frames (num_frames, C)."""
        if self.frames is None:
            return rows
        values = rows[self.frames]
        if self.zeroed is not None:
            values[self.zeroed] = 0
        return values


@lru_cache(maxsize=4096)  # made for each sample, it would take half as long as reading its fields
def _find_steps(num_left: int, num_right: int, window: Window, padding: PaddingStrategy) -> _Steps:
    """Return the steps of a window of which `num_left` lie before the episode and `num_right` after it."""
    num_frames = window.num_steps - num_left - num_right
    windows = create_windows(np.asarray([window.past - num_left]), num_frames, window, padding=padding)
    is_inside = not windows.is_padding.any()
    masks = windows.past_mask[0], windows.future_mask[0], windows.is_padding[0]
    for mask in masks:
        mask.flags.writeable = False
    return _Steps(
        num_frames,
        None if is_inside else windows.frames[0],
        windows.is_padding[0] if padding == "zero" and not is_inside else None,
        *masks,
    )


def add_relative_fields(
    fields: dict[str, np.ndarray], is_padding: np.ndarray, request: WindowRequest
) -> dict[str, np.ndarray]:
    """Return the fields of one window (T, C), or of many (N, T, C), with the relative ones that are not stored.

    Raises:
        ValueError: a field holds what is no pose.
    """
    if not request.pose_groups:
        return fields
    relative = compute_relative_fields(
        fields,
        request.pose_groups,
        anchor=request.window.anchor,
        is_padding=is_padding,
        padding=request.padding,
    )
    return fields | relative


def _find_member(members: Mapping[str, int], suffix: str) -> int:
    if suffix not in members:
        raise ValueError(f"it has no member '{suffix}'; its members are {', '.join(sorted(members))}")
    return members[suffix]


def _parse_json(
    shard: SampleShard, members: Mapping[str, int], suffix: str, *, is_optional: bool = False
) -> dict[str, Any]:
    if is_optional and suffix not in members:
        return {}
    values = json.loads(shard.read_member(_find_member(members, suffix)))
    if not isinstance(values, dict):
        raise ValueError(f"its {suffix} is no object")
    return values


def _read_array(arrays: NpzFile, name: str) -> np.ndarray:
    if name not in arrays:
        raise ValueError(unknown_name_message("array", name, arrays.names))
    return arrays.read(name)


def _shape_of(arrays: NpzFile, name: str) -> tuple[int, ...]:
    if name not in arrays:
        raise ValueError(unknown_name_message("array", name, arrays.names))
    return arrays.shape(name)


def _check_steps(name: str, values: np.ndarray, num_steps: int) -> np.ndarray:
    if values.ndim != 2 or len(values) != num_steps or values.dtype.kind not in "fiub":
        raise ValueError(
            f"array '{name}' of shape {values.shape} and type {values.dtype} is no field of {num_steps} steps"
        )
    return values


def _read_image(shard: SampleShard, members: Mapping[str, int], name: str) -> bytes | None:
    for extension in IMAGE_EXTENSIONS:
        member = members.get(f"{name}.{extension}")
        if member is not None:
            return shard.read_member(member)
    return None


def _episode_of(metadata: Mapping[str, Any]) -> str:
    if "episode_id" in metadata:
        return str(metadata["episode_id"])
    return f"episode_{metadata['episode_index']}" if "episode_index" in metadata else ""


def _parse_instructions(values: Mapping[str, Any]) -> dict[str, list[str]]:
    """Bring instructions to lists: LeRobot's published ones are one text each."""
    lists: dict[str, Sequence[Any]] = {
        kind: [texts] if isinstance(texts, str) else texts for kind, texts in values.items()
    }
    return {kind: [text for text in texts if isinstance(text, str) and text] for kind, texts in lists.items()}
