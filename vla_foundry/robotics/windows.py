"""Windows of time steps around anchors: which frames, which steps are padding, still windows, relative poses.

Preprocessing, load time and inference all make their windows here. For a window of P past and F future steps the
anchor is step P, and of the three masks exactly one is True at every step:

| mask        | True where                                                             |
|-------------|------------------------------------------------------------------------|
| past_mask   | the step lies before the anchor and within the episode: observed       |
| future_mask | the step is the anchor or later and within the episode: to be predicted |
| is_padding  | the step lies outside the episode: neither to be observed nor predicted |
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Int64, Num

from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.fields import PoseGroup, Window
from vla_foundry.robotics.pose import absolute_pose, relative_pose

# what stands in the steps outside the episode: the nearest frame, zeros, or the frames mirrored at its end
PaddingStrategy = Literal["copy", "zero", "reflect"]

# units of thresholds, in the unit that fields are stored in (metres, radians, seconds, newtons, newton-metres)
_UNITS = {
    "m": 1.0, "cm": 1e-2, "mm": 1e-3, "m/s": 1.0, "rad": 1.0, "deg": np.pi / 180, "rad/s": 1.0, "deg/s": np.pi / 180,
    "N": 1.0, "Nm": 1.0,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Windows:
    """N windows of T steps over one episode."""

    # the window that each has around its anchor
    window: Window
    # (N,) int64, the frame at each anchor
    anchors: np.ndarray
    # (N, T) int64, the frame that each step takes its values from, within the episode
    frames: np.ndarray
    # (N, T) bool, True where the step lies outside the episode
    is_padding: np.ndarray
    # what stands in those steps
    padding: PaddingStrategy

    @property
    def past_mask(self) -> np.ndarray:
        """(N, T) bool, True where a step is observed: before the anchor, within the episode."""
        return ~self.is_padding & (np.arange(self.window.num_steps) < self.window.anchor)

    @property
    def future_mask(self) -> np.ndarray:
        """(N, T) bool, True where a step is to be predicted: the anchor or later, within the episode."""
        return ~self.is_padding & (np.arange(self.window.num_steps) >= self.window.anchor)

    def gather(self, values: Num[np.ndarray, "L *C"]) -> Num[np.ndarray, "N T *C"]:
        """Take an episode's values (one row a frame) into the windows; zeros in padding if the strategy is zero."""
        taken = values[self.frames]
        if self.padding == "zero":
            taken[self.is_padding] = 0
        return taken


def create_windows(
    anchors: Int64[np.ndarray, " N"], num_frames: int, window: Window, *, padding: PaddingStrategy = "copy"
) -> Windows:
    """Work out the frames and masks of the windows around `anchors`.

    `reflect` mirrors at the first and last frame of the window's valid part without repeating it, back and forth where
    the part is shorter than the padding (numpy.pad's reflect).

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


@dataclass(frozen=True, eq=False)
class SelectedAnchors:
    """Anchors that may be samples, and how many were left out."""

    # (N,) int64, increasing
    anchors: np.ndarray
    # anchors left out because their window reaches too far beyond the episode
    num_dropped: int


def select_anchors(
    num_frames: int,
    window: Window,
    *,
    stride: int = 1,
    max_padding_left: int | None = None,
    max_padding_right: int | None = None,
) -> SelectedAnchors:
    """Choose every `stride`-th frame whose window needs no more padding than allowed.

    Args:
        num_frames: frames of the episode.
        max_padding_left: most padded steps before the first frame; None: any number.
        max_padding_right: most padded steps after the last frame; None: any number.

    Raises:
        ValueError: stride < 1 or a negative limit.
    """
    if stride < 1:
        raise ValueError(f"stride ({stride}) must be at least 1.")
    for name, limit in (("max_padding_left", max_padding_left), ("max_padding_right", max_padding_right)):
        if limit is not None and limit < 0:
            raise ValueError(f"{name} ({limit}) must be at least 0.")
    candidates = np.arange(0, num_frames, stride, dtype=np.int64)
    keep = np.ones(len(candidates), dtype=bool)
    if max_padding_left is not None:
        keep &= window.past - candidates <= max_padding_left
    if max_padding_right is not None:
        keep &= candidates + window.future - (num_frames - 1) <= max_padding_right
    return SelectedAnchors(anchors=candidates[keep], num_dropped=int(np.sum(~keep)))


def image_frames(
    anchors: Int64[np.ndarray, " N"], image_indices: Sequence[int], num_frames: int
) -> Int64[np.ndarray, "N I"]:
    """Frames of the images `image_indices` frames from each anchor, clipped to the episode."""
    offsets = np.array(image_indices, dtype=np.int64)
    return np.clip(anchors[:, None] + offsets, 0, num_frames - 1)


def parse_threshold(value: float | str, *, where: str = "still_threshold") -> float:
    """Read a threshold: a number in the field's own unit, or a number and a unit ("5 mm", "1 deg").

    Raises:
        ValueError: it is neither, or negative.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(\S*)\s*", value)
        if match is None or (match[2] and match[2] not in _UNITS):
            raise ValueError(f"{where} '{value}' is not a number with a unit. Units: {', '.join(_UNITS)}.")
        return float(match[1]) * _UNITS.get(match[2], 1.0)
    if not value >= 0:
        raise ValueError(f"{where} ({value}) must be at least 0.")
    return float(value)


def find_still_windows(
    fields: Mapping[str, Num[np.ndarray, "N T C"]],
    is_padding: Bool[np.ndarray, "N T"],
    thresholds: Mapping[str, float | str],
) -> Bool[np.ndarray, " N"]:
    """Find the windows in which nothing moves.

    A field moves in a window if, over the steps that are no padding, the standard deviation of one of its columns is
    above the field's threshold. (A column of a 6D rotation changes by no more than the angle, so radians serve.)

    Args:
        thresholds: field name or glob pattern -> threshold (see `parse_threshold`). Fields that no pattern names do not
            count; a field named by several must stay below the smallest.

    Returns:
        True where no named field moves.

    Raises:
        ValueError: a pattern names no field.
    """
    still = np.ones(len(is_padding), dtype=bool)
    weights = (~is_padding)[..., None].astype(np.float64)
    count = np.maximum(weights.sum(axis=1), 1)  # (N, 1)
    for pattern, threshold in thresholds.items():
        matching = [name for name in fields if name == pattern or fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(unknown_name_message("still_threshold: field", pattern, sorted(fields)))
        limit = parse_threshold(threshold, where=f"still_threshold of '{pattern}'")
        for name in matching:
            values = fields[name].astype(np.float64)
            # from the anchor-independent first step, so that large offsets cost no precision
            values = values - values[:, :1]
            mean = (values * weights).sum(axis=1) / count
            variance = (np.square(values - mean[:, None]) * weights).sum(axis=1) / count  # (N, C)
            still &= np.sqrt(variance.max(axis=-1)) <= limit
    return still


def compute_relative_fields(
    fields: Mapping[str, np.ndarray],
    groups: Sequence[PoseGroup],
    *,
    anchor: int,
    is_padding: Bool[np.ndarray, "*N T"] | None = None,
    padding: PaddingStrategy = "copy",
) -> dict[str, np.ndarray]:
    """Express each group's poses in the frame of its reference pose at the anchor: inv(T_ref) T_t.

    Args:
        fields: windows (*N, T, C) of the groups' fields and of their reference fields.
        anchor: the step that the reference pose is taken from.
        is_padding, padding: needed where padded steps hold zeros, which are no pose; they stay zeros.

    Returns:
        The `_relative` fields, float64.

    Raises:
        ValueError: a field is missing or holds what is not a pose.
    """
    hole = is_padding if padding == "zero" and is_padding is not None and is_padding.any() else None
    result = {}
    formats = dict.fromkeys(group.rotation_format for group in groups)
    for members in ([group for group in groups if group.rotation_format == name] for name in formats):
        # poses of one format at once: a window holds few, and each call costs the same for more of them
        if len(members) > 1 and _have_one_shape(fields, members):
            try:
                result |= _relative_poses(fields, members, anchor, hole)
                continue
            except ValueError:
                pass  # said again below, with the name of the group
        for group in members:
            result |= _relative_poses(fields, [group], anchor, hole)
    return result


def _have_one_shape(fields: Mapping[str, np.ndarray], groups: Sequence[PoseGroup]) -> bool:
    shapes = {fields[group.position_key].shape for group in groups if group.position_key in fields}
    return len(shapes) == 1


def _relative_poses(
    fields: Mapping[str, np.ndarray], groups: Sequence[PoseGroup], anchor: int, hole: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Return the relative fields of groups of one rotation format; `hole` are steps of zeros."""
    poses = [_group_fields(fields, group, (group.position_key, group.rotation_key)) for group in groups]
    references = [_group_fields(fields, group, group.reference_keys) for group in groups]
    # (groups, *N, T, C)
    position, rotation = (np.stack(parts) for parts in zip(*poses, strict=True))
    reference_position, reference_rotation = (
        np.stack([part[..., anchor : anchor + 1, :] for part in parts]) for parts in zip(*references, strict=True)
    )
    if hole is not None:
        # any pose will do where zeros are put back below
        position = np.where(hole[..., None], position[..., anchor : anchor + 1, :], position)
        rotation = np.where(hole[..., None], rotation[..., anchor : anchor + 1, :], rotation)
    relative = relative_pose(
        position,
        rotation,
        reference_position,
        reference_rotation,
        rotation_format=groups[0].rotation_format,
        field=f"pose group '{groups[0].name}'",
    )
    result = {}
    for number, group in enumerate(groups):
        for name, values in zip(group.relative_keys, relative, strict=True):
            result[name] = values[number] if hole is None else np.where(hole[..., None], 0.0, values[number])
    return result


def compute_absolute_fields(
    fields: Mapping[str, np.ndarray], references: Mapping[str, np.ndarray], groups: Sequence[PoseGroup]
) -> dict[str, np.ndarray]:
    """Bring predicted relative poses back to the world: the inverse of `compute_relative_fields`.

    Args:
        fields: the groups' `_relative` fields, (*N, T, C).
        references: the groups' reference fields at the anchor, (*N, C).

    Returns:
        The groups' absolute fields, float64.
    """
    result = {}
    for group in groups:
        position, rotation = _group_fields(fields, group, group.relative_keys)
        reference_position, reference_rotation = _group_fields(references, group, group.reference_keys)
        pose = absolute_pose(
            position,
            rotation,
            reference_position[..., None, :],
            reference_rotation[..., None, :],
            rotation_format=group.rotation_format,
            field=f"pose group '{group.name}'",
        )
        result.update(zip((group.position_key, group.rotation_key), pose, strict=True))
    return result


def _group_fields(fields: Mapping[str, Any], group: PoseGroup, keys: tuple[str, str]) -> list[np.ndarray]:
    for key in keys:
        if key not in fields:
            raise ValueError(unknown_name_message(f"pose group '{group.name}': field", key, sorted(fields)))
    return [fields[key] for key in keys]
