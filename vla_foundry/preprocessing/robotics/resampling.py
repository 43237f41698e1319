"""Resample an episode to another rate: interpolate continuous fields, hold discrete ones, take the nearest images.

Rotations are interpolated at constant speed along the shortest path (slerp) in any format, positions and other
continuous fields linearly. Discrete fields and instructions keep the last recorded value. Images and calibration come
from the frame nearest in time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Float64, Int64

from vla_foundry.preprocessing.robotics.converters.converter import Episode
from vla_foundry.robotics.episode_blocks import InstructionSpan
from vla_foundry.robotics.fields import PoseGroup
from vla_foundry.robotics.rotations import matrix_to_rotation, rotation_to_matrix
from vla_foundry.robotics.spec import FieldDescription

# a new frame may lie this far behind the last recorded one, in new frames, because timestamps are rounded
_ROUNDING = 1e-3


@dataclass(frozen=True, eq=False)
class _Timeline:
    """New times, relative to the recorded ones."""

    # float64 (N,) seconds
    times: np.ndarray
    # int64 (N,), the recorded frame at or before each new time
    before: np.ndarray
    # float64 (N,), position between that frame and the next, 0 .. 1
    share: np.ndarray
    # int64 (N,), the recorded frame nearest in time; the earlier of two
    nearest: np.ndarray


def resample_episode(
    episode: Episode, fps: float, described: Mapping[str, FieldDescription], groups: tuple[PoseGroup, ...]
) -> tuple[Episode, Int64[np.ndarray, " N"]]:
    """Resample everything but the images of an episode, from its first frame on.

    Args:
        episode: a checked episode: its timestamps ascend, and its fields are absolute (see create_recipe).
        fps: new frames per second.
        described: its fields.
        groups: its poses, whose rotations have no format of their own in `described`.

    Returns:
        The episode with its cameras unchanged, and the recorded frame of each new frame's images.
    """
    line = _create_timeline(episode.timestamps, fps)
    formats = {name: field.rotation for name, field in described.items() if field.rotation}
    formats |= {group.rotation_key: group.rotation_format for group in groups}
    fields = {}
    for name, values in episode.fields.items():
        if described[name].is_discrete:
            fields[name] = values[line.before]
        elif name in formats:
            fields[name] = _turn(values, formats[name], line)
        else:
            fields[name] = _mix(values, line)
    starts = (np.searchsorted(line.before, [span.start, span.end]) for span in episode.instructions)
    instructions = [
        InstructionSpan(start=int(start), end=int(end), texts=span.texts)
        for span, (start, end) in zip(episode.instructions, starts, strict=True)
        if start < end
    ]
    resampled = replace(
        episode,
        fps=fps,
        timestamps=line.times,
        fields=fields,
        instructions=instructions,
        intrinsics=_pick(episode.intrinsics, line),
        extrinsics=_pick(episode.extrinsics, line),
    )
    return resampled, line.nearest


def _pick(matrices: Mapping[str, np.ndarray], line: _Timeline) -> dict[str, np.ndarray]:
    return {name: values[line.nearest] if values.ndim == 3 else values for name, values in matrices.items()}


def _create_timeline(recorded: Float64[np.ndarray, " L"], fps: float) -> _Timeline:
    num_frames = int((recorded[-1] - recorded[0]) * fps + _ROUNDING) + 1
    times = recorded[0] + np.arange(num_frames) / fps
    before = np.clip(np.searchsorted(recorded, times, side="right") - 1, 0, len(recorded) - 1)
    after = np.minimum(before + 1, len(recorded) - 1)
    span = recorded[after] - recorded[before]
    share = np.divide(times - recorded[before], span, out=np.zeros(num_frames), where=span > 0)
    # a time within rounding of a recorded one is that frame
    is_next = share > 1 - _ROUNDING
    before = np.where(is_next, after, before)
    share = np.where(is_next | (share < _ROUNDING), 0.0, share)
    nearest = np.where(share > 0.5, np.minimum(before + 1, len(recorded) - 1), before)
    return _Timeline(times, before, share, nearest)


def _mix(values: Float[np.ndarray, "L C"], line: _Timeline) -> Float[np.ndarray, "N C"]:
    first = values[line.before].astype(np.float64)
    second = values[np.minimum(line.before + 1, len(values) - 1)].astype(np.float64)
    mixed = first + line.share[:, None] * (second - first)
    return mixed.astype(values.dtype)


def _turn(values: Float[np.ndarray, "L R"], rotation_format: str, line: _Timeline) -> Float[np.ndarray, "N R"]:
    matrices = rotation_to_matrix(values, rotation_format)
    first = matrices[line.before]
    second = matrices[np.minimum(line.before + 1, len(values) - 1)]
    turn = matrix_to_rotation(np.swapaxes(first, -1, -2) @ second, "axis_angle")
    between = first @ rotation_to_matrix(turn * line.share[:, None], "axis_angle")
    turned = matrix_to_rotation(between, rotation_format).astype(values.dtype)
    # a recorded rotation stays as it was written, including its sign
    return np.where(line.share[:, None] == 0, values[line.before], turned)
