"""What a robot saw and did in the present episode, as the window that training would have made of it.

Steps before the episode's start are padded as the data was (a mirror would show the future there, so the nearest step
stands in for it). Images take the way of preprocessing, JPEG included: the model gets the pixels that it would have
got, had the episode been recorded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8

from vla_foundry.preprocessing.robotics.images import ImageOperations
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.fields import PoseGroup, Window
from vla_foundry.robotics.windows import PaddingStrategy, compute_relative_fields, create_windows, image_frames


@dataclass(frozen=True, kw_only=True, eq=False)
class RobotObservation:
    """What a robot senses at one control step, under the names of the data that the policy was trained on."""

    # camera -> picture as recorded, RGB, rows from the top; the whole name, or what comes after its last dot; none
    # are needed where Policy.needs_images says so
    images: Mapping[str, UInt8[np.ndarray, "_ _ 3"]]
    # field -> its numbers, in the data's unit; poses absolute
    fields: Mapping[str, Float[np.ndarray, " _"]]
    # what the robot is to do
    instruction: str = ""


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A camera as the data has it."""

    name: str
    # (W, H) of its pictures; None: any
    original_size: tuple[int, int] | None
    operations: ImageOperations


@dataclass(frozen=True, kw_only=True)
class InputPlan:
    """What of an episode makes a window."""

    window: Window
    padding: PaddingStrategy
    # in the order of the model
    cameras: tuple[Camera, ...]
    # frames from the anchor; images are time-major, cameras within a time
    image_indices: tuple[int, ...]
    # an image that is not there is black; false: it is an error
    pads_images: bool
    # {field that is sensed: type that the data holds it in}
    observed: dict[str, np.dtype]
    # {field that is commanded, poses absolute: type that the data holds it in}
    commanded: dict[str, np.dtype]
    # of which fields among these relative poses are made
    pose_groups: tuple[PoseGroup, ...]

    @property
    def num_steps_back(self) -> int:
        """How far back a window looks."""
        return max(self.window.past, -min(self.image_indices, default=0))


@dataclass(frozen=True, kw_only=True, eq=False)
class ObservedWindow:
    """The observed part of a window of T steps: P steps before the anchor, and the anchor."""

    # {field: (P + 1, C)}; commanded ones are there if some step of the past is, and mean nothing at the anchor
    fields: dict[str, np.ndarray]
    # bool (T,)
    past_mask: Bool[np.ndarray, " T"]
    future_mask: Bool[np.ndarray, " T"]
    is_padding: Bool[np.ndarray, " T"]
    # image files, time-major, cameras within a time; None: there is no such image
    images: list[bytes | None]


@dataclass
class _Frame:
    images: dict[str, np.ndarray]
    fields: dict[str, np.ndarray]
    actions: dict[str, np.ndarray] | None = None


class EpisodeHistory:
    """The last steps of an episode.

    Args:
        plan: what is kept of them.
    """

    def __init__(self, plan: InputPlan) -> None:
        self.plan = plan
        self.num_observed = 0
        self._frames: dict[int, _Frame] = {}

    def observe(self, observation: RobotObservation) -> None:
        """Add an observation, of the step after the last one.

        Raises:
            ValueError: a field is missing or not finite, or a picture is not what the camera gave in training.
        """
        fields = {name: self._read_field(name, dtype, observation) for name, dtype in self.plan.observed.items()}
        images = {}
        for camera in self.plan.cameras:
            name = find_name(camera.name, tuple(observation.images))
            if name is not None:
                _check_picture(camera, observation.images[name])
                # a client may draw into the same array again
                images[camera.name] = observation.images[name].copy()
        self._frames[self.num_observed] = _Frame(images, fields)
        self._frames.pop(self.num_observed - self.plan.num_steps_back - 1, None)
        self.num_observed += 1

    def command(self, actions: Mapping[str, np.ndarray]) -> None:
        """Say what the robot does after the last observation: {field: (C,)}."""
        frame = self._frames[self.num_observed - 1]
        frame.actions = {name: actions[name].astype(dtype) for name, dtype in self.plan.commanded.items()}

    def window(self) -> ObservedWindow:
        """Return the window around the last observation.

        Raises:
            ValueError: an image is missing, or a pose is none.
        """
        plan, now = self.plan, self.num_observed - 1
        # what comes is not known, but it is no padding
        num_frames = now + 1 + plan.window.future
        windows = create_windows(np.asarray([now]), num_frames, plan.window, padding=plan.padding)
        steps = slice(0, plan.window.anchor + 1)
        frames = np.minimum(windows.frames[0][steps], now).tolist()
        is_padding = windows.is_padding[0][steps]
        fields = {name: self._stack(name, frames, is_padding) for name in plan.observed}
        if windows.past_mask.any():
            fields |= {name: self._stack(name, frames, is_padding, is_commanded=True) for name in plan.commanded}
        groups = [group for group in plan.pose_groups if _fields_of(group) <= fields.keys()]
        fields |= compute_relative_fields(
            fields, groups, anchor=plan.window.anchor, is_padding=is_padding, padding=plan.padding
        )
        return ObservedWindow(
            fields=fields,
            past_mask=windows.past_mask[0],
            future_mask=windows.future_mask[0],
            is_padding=windows.is_padding[0],
            images=self._images(now),
        )

    def references(self) -> dict[str, np.ndarray]:
        """What was sensed last: {field: (C,)}."""
        return self._frames[self.num_observed - 1].fields

    def _read_field(self, name: str, dtype: np.dtype, observation: RobotObservation) -> np.ndarray:
        if name not in observation.fields:
            raise ValueError(unknown_name_message("observation: field", name, sorted(observation.fields)))
        values = np.asarray(observation.fields[name])
        if values.ndim != 1 or not np.isfinite(values).all():
            raise ValueError(f"observation: field '{name}' must be finite numbers, got {values.tolist()}.")
        return values.astype(dtype)

    def _stack(
        self, name: str, frames: Sequence[int], is_padding: np.ndarray, *, is_commanded: bool = False
    ) -> np.ndarray:
        if is_commanded:
            last = self.num_observed - 2
            commanded = [self._frames[min(frame, last)].actions for frame in frames]
            assert all(actions is not None for actions in commanded), "each observation is followed by an action"
            values = np.stack([actions[name] for actions in commanded if actions is not None])
        else:
            values = np.stack([self._frames[frame].fields[name] for frame in frames])
        if self.plan.padding == "zero":
            values[is_padding] = 0
        return values

    def _images(self, now: int) -> list[bytes | None]:
        encoded: list[bytes | None] = []
        for frame in image_frames(np.asarray([now]), self.plan.image_indices, now + 1)[0].tolist():
            for camera in self.plan.cameras:
                image = self._frames[frame].images.get(camera.name)
                if image is None and not self.plan.pads_images:
                    raise ValueError(
                        f"observation: the image of camera '{camera.name}' is missing, {now - frame} steps back. Give "
                        "it, or train with data.pad_missing_images."
                    )
                encoded.append(None if image is None else camera.operations.encode(image))
        return encoded


def find_name(name: str, known: Sequence[str]) -> str | None:
    """Return which of the known names is meant: the same, or the only one that ends alike after its last dot."""
    if name in known:
        return name
    last = name.rpartition(".")[2]
    found = [other for other in known if other.rpartition(".")[2] == last]
    return found[0] if len(found) == 1 else None


def _fields_of(group: PoseGroup) -> set[str]:
    return {group.position_key, group.rotation_key, *group.reference_keys}


def _check_picture(camera: Camera, image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"observation: camera '{camera.name}' gives {image.dtype} {image.shape}, not uint8 (H, W, 3).")
    size = (image.shape[1], image.shape[0])
    if camera.original_size not in (None, size):
        width, height = camera.original_size
        raise ValueError(
            f"observation: camera '{camera.name}' gives {size[0]} x {size[1]} pixels; in the data it had "
            f"{width} x {height}. Give pictures of that size."
        )
