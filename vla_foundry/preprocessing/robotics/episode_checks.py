"""Check an episode after its converter read it; any fault is a one-line error, and none of the episode is written."""

import json
from collections.abc import Mapping

import numpy as np

from vla_foundry.preprocessing.robotics.converters.converter import Episode
from vla_foundry.preprocessing.robotics.recipe import Recipe
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.episode_blocks import InstructionSpan
from vla_foundry.robotics.rotations import rotation_to_matrix
from vla_foundry.robotics.spec import FieldDescription

# largest relative difference between the rate of the timestamps and the stated one; clocks differ by far less
_RATE_TOLERANCE = 0.02


class Left(Exception):
    """Raised for an episode that the params say to leave out, which is not a failure.

    Args:
        reason: a few words; left-out episodes are counted by reason.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def check_episode(episode: Episode, recipe: Recipe) -> None:
    """Check an episode as it was recorded.

    Raises:
        Left: it lacks a camera or holds NaN, and the params say to leave such episodes out.
        ValueError: the episode has a fault.
    """
    _check_times(episode, recipe)
    num_frames = len(episode.timestamps)
    _check_fields(episode.fields, recipe.fields, num_frames)
    _check_finite(episode, recipe)
    _check_rotations(episode, recipe)
    _check_cameras(episode, recipe, num_frames)
    _check_calibration(episode, num_frames)
    for span in episode.instructions:
        _check_instructions(span, num_frames)
    try:
        json.dumps(episode.metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"its metadata are not JSON values ({error}).") from None


def _check_times(episode: Episode, recipe: Recipe) -> None:
    times, fps = episode.timestamps, episode.fps
    if times.ndim != 1 or times.dtype != np.float64:
        raise ValueError(f"timestamps must be float64 (L,), got {times.dtype} {times.shape}.")
    if not len(times):
        raise ValueError("it has no frames.")
    if not (np.isfinite(fps) and fps > 0):
        raise ValueError(f"fps ({fps:g}) must be above 0.")
    if not np.isfinite(times).all():
        raise ValueError(f"the timestamp of frame {int(np.argmin(np.isfinite(times)))} is not finite.")
    steps = np.diff(times)
    if (steps <= 0).any():
        frame = int(np.argmax(steps <= 0)) + 1
        what = "repeats that of" if steps[frame - 1] == 0 else "lies before"
        raise ValueError(f"the timestamp of frame {frame} ({times[frame]:g} s) {what} the frame before it.")
    if recipe.params.target_fps is None and len(steps):
        _check_steps(steps * fps, fps, recipe.params.timestamp_tolerance)


def _check_steps(steps: np.ndarray, fps: float, tolerance: float) -> None:
    """Check that the steps in time, in frames at this rate, are even."""
    worst = int(np.argmax(np.abs(steps - 1)))
    if abs(steps[worst] - 1) > tolerance:
        raise ValueError(
            f"frame {worst + 1} comes {steps[worst]:.2f} frames after the one before it at {fps:g} fps. Make the steps "
            f"even by --target_fps {fps:g}, or allow it by --timestamp_tolerance."
        )
    rate = fps / float(np.median(steps))
    if abs(rate / fps - 1) > _RATE_TOLERANCE:
        raise ValueError(f"its timestamps are at {rate:.4g} frames per second, but it says {fps:g}. Give --target_fps.")


def _check_fields(fields: Mapping[str, np.ndarray], described: Mapping[str, FieldDescription], num_frames: int) -> None:
    for name in fields:
        if name not in described:
            raise ValueError(unknown_name_message("field", name, sorted(described)))
    for name, description in described.items():
        if name not in fields:
            raise ValueError(f"field '{name}' is missing.")
        values = fields[name]
        expected = (num_frames, *description.shape)
        if values.shape != expected or str(values.dtype) != description.dtype:
            raise ValueError(
                f"field '{name}' is {values.dtype} {values.shape}, expected {description.dtype} {expected}."
            )


def _check_finite(episode: Episode, recipe: Recipe) -> None:
    for name, values in episode.fields.items():
        is_finite = np.isfinite(values)
        if is_finite.all():
            continue
        frame, column = (int(index) for index in np.argwhere(~is_finite)[0])
        if not recipe.params.fail_on_nan:
            raise Left("not finite")
        where = f"frame {frame}, column {recipe.fields[name].label(column)}"
        raise ValueError(f"field '{name}' holds {values[frame, column]} at {where}.")


def _check_rotations(episode: Episode, recipe: Recipe) -> None:
    formats = {name: description.rotation for name, description in recipe.fields.items() if description.rotation}
    for group in recipe.pose_groups:
        formats |= {group.rotation_key: group.rotation_format, group.reference_keys[1]: group.rotation_format}
    for name, rotation_format in formats.items():
        if recipe.fields[name].representation == "absolute":
            rotation_to_matrix(episode.fields[name], rotation_format, field=f"field '{name}'")


def _check_cameras(episode: Episode, recipe: Recipe, num_frames: int) -> None:
    for name in recipe.cameras:
        if not name.isprintable() or name != name.strip(" .") or not name or "/" in name or "\\" in name:
            raise ValueError(f"camera {name!r}: its name must be printable, without slashes and outer spaces or dots.")
        if name not in episode.cameras:
            if recipe.params.skip_episodes_missing_cameras:
                raise Left("missing camera")
            has = ", ".join(sorted(episode.cameras)) or "none"
            raise ValueError(
                f"camera '{name}' is missing (it has {has}). Leave such episodes out with "
                "--skip_episodes_missing_cameras true."
            )
        frames = episode.cameras[name]
        if frames.num_frames != num_frames:
            raise ValueError(f"camera '{name}' has {frames.num_frames} frames, the episode {num_frames}.")
        if min(frames.size) < 1:
            raise ValueError(f"camera '{name}' has images of {frames.size[0]} x {frames.size[1]} pixels.")


def _check_calibration(episode: Episode, num_frames: int) -> None:
    for what, matrices, side in (("intrinsics", episode.intrinsics, 3), ("extrinsics", episode.extrinsics, 4)):
        for camera, values in matrices.items():
            if values.shape not in ((side, side), (num_frames, side, side)):
                raise ValueError(f"{what} of camera '{camera}' must be {side} x {side}, got {values.shape}.")
            if values.dtype.kind != "f" or not np.isfinite(values).all():
                raise ValueError(f"{what} of camera '{camera}' are not finite numbers.")


def _check_instructions(span: InstructionSpan, num_frames: int) -> None:
    if not 0 <= span.start < span.end <= num_frames:
        raise ValueError(f"an instruction spans frames {span.start} to {span.end} of {num_frames} frames.")
    for kind, texts in span.texts.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"its '{kind}' instructions are not a list of texts.")
