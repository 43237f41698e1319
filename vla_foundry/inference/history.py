"""What a robot saw and did in the present episode, as far back as a window looks.

Images take the way of preprocessing, JPEG included: the model gets the pixels that it would have got, had the episode
been recorded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from vla_foundry.images.resize import ImageOperations
from vla_foundry.inference.observations import Observation
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.fields import PoseGroup, Window
from vla_foundry.robotics.windows import compute_relative_fields, image_frames


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
    """What of an episode is kept."""

    window: Window
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

    def observation(self, instruction: str) -> Observation:
        """Return what has been observed, as far back as a window looks."""
        now = self.num_observed - 1
        frames = sorted(self._frames)
        # only these are looked at, and encoding takes time
        used = set(image_frames(np.asarray([now]), self.plan.image_indices, now + 1)[0].tolist())
        images = {}
        for camera in self.plan.cameras:
            missing = [now - frame for frame in used if camera.name not in self._frames[frame].images]
            if missing and not self.plan.pads_images:
                raise ValueError(
                    f"observation: the image of camera '{camera.name}' is missing, {max(missing)} steps back. Give it, "
                    "or train with data.pad_missing_images."
                )
            if not missing:
                images[camera.name] = [
                    camera.operations.encode(self._frames[frame].images[camera.name]) if frame in used else b""
                    for frame in frames
                ]
        fields = {name: np.stack([self._frames[frame].fields[name] for frame in frames]) for name in self.plan.observed}
        # how many steps there are is told by fields, of which a policy may need none
        fields = fields or {"frame": np.asarray(frames, np.float32)[:, None]}
        return Observation(images=images, fields=fields, instruction=instruction)

    def past_actions(self) -> dict[str, np.ndarray] | None:
        """Return what was done in the steps before the anchor, as action fields of a window: {field: (P + 1, C)}.

        Numbers at the anchor, and before the episode's start, mean nothing. None: nothing was done yet.
        """
        plan, now = self.plan, self.num_observed - 1
        if now == 0 or plan.window.past == 0:
            return None
        frames = np.clip(now + np.arange(-plan.window.past, 1), 0, now).tolist()
        done = [self._frames[min(frame, now - 1)].actions for frame in frames]
        assert all(actions is not None for actions in done), "each observation is followed by an action"
        fields = {name: np.stack([actions[name] for actions in done if actions is not None]) for name in plan.commanded}
        for group in plan.pose_groups:
            for name in group.reference_keys:
                fields[name] = np.stack([self._frames[frame].fields[name] for frame in frames])
        groups = [group for group in plan.pose_groups if group.position_key in plan.commanded]
        return fields | compute_relative_fields(fields, groups, anchor=plan.window.past)

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


def find_name(name: str, known: Sequence[str]) -> str | None:
    """Return which of the known names is meant: the same, or the only one that ends alike after its last dot."""
    if name in known:
        return name
    last = name.rpartition(".")[2]
    found = [other for other in known if other.rpartition(".")[2] == last]
    return found[0] if len(found) == 1 else None


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
