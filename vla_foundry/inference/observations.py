"""Turn a robot's observations into the batch that its policy acts on, with the stages of training.

Images take the path of preprocessing, JPEG included, so the model gets the pixels that it would have got from a
recording of the episode.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vla_foundry.batch import Batch
from vla_foundry.client.chunks import Schedule
from vla_foundry.client.observation import RobotObservation as RobotObservation
from vla_foundry.client.observation import RobotSteps, to_millimetres
from vla_foundry.data.pipelines.robotics import (
    ChooseInstruction,
    ComputeRelativePoses,
    EncodeRobot,
    PrepareCameraImages,
    create_proprioception_stage,
    join_robot_samples,
)
from vla_foundry.data.pipelines.stages import Failure, Sample, Stage, apply_stages
from vla_foundry.images.geometry import ImageOperations
from vla_foundry.images.processor import Processor
from vla_foundry.inference.image_features import Memory
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.robotics.fields import Window
from vla_foundry.robotics.fit import FieldSources, WindowSpec
from vla_foundry.robotics.normalization import RoboticsNormalizer
from vla_foundry.robotics.spec import FieldDescription
from vla_foundry.robotics.windows import RobotWindow, create_windows, image_frames

# the type of an instruction that is given, not drawn
_GIVEN = "given"


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A camera of the training data."""

    name: str
    # (W, H) of its images as recorded; None: any
    original_size: tuple[int, int] | None
    operations: ImageOperations
    # its images are uint16 (H, W) in millimetres or float32 (H, W) in metres, not uint8 (H, W, 3)
    is_depth: bool = False


@dataclass(kw_only=True)
class _Frame:
    # {camera of the policy: image}
    images: dict[str, np.ndarray]
    # names of the images in the observation, for messages
    given: list[str]
    fields: dict[str, np.ndarray]
    actions: dict[str, np.ndarray] | None = None


class EpisodeHistory:
    """What a robot observed and did in the current episode, as far back as a window reaches.

    Args:
        spec: the window.
        cameras: in the order of the model.
        pads_images: a missing image is black; false: an error.
    """

    def __init__(self, spec: WindowSpec, cameras: Sequence[Camera], *, pads_images: bool) -> None:
        self.spec = spec
        self.cameras = tuple(cameras)
        self.pads_images = pads_images
        # observed or skipped steps
        self.num_observed = 0
        self._first_step = 0
        self._frames: dict[int, _Frame] = {}
        self._num_steps_back = spec.num_steps_back

    def count_skipped(self, step: int) -> int:
        """Return how many steps lie between the last observation and step `step`; the first observation skips none.

        Raises:
            ValueError: the step has passed.
        """
        if self.num_observed == 0:
            self._first_step = step
        skipped = step - self._first_step - self.num_observed
        if skipped < 0:
            raise ValueError(
                f"observation: step {step} has passed, the next is {self._first_step + self.num_observed}. Count one "
                "step for each action, and reset at the start of an episode."
            )
        return skipped

    def observe(
        self,
        observation: RobotObservation,
        *,
        num_skipped: int = 0,
        skipped: Sequence[Mapping[str, np.ndarray]] = (),
    ) -> None:
        """Add the observation of the next step.

        Args:
            observation: what the robot senses.
            num_skipped: steps before it that were not observed; it stands for them.
            skipped: the actions of the first of these steps; later ones repeat the last action.

        Raises:
            ValueError: a field is missing or not finite, or an image is not like the camera's images in training.
        """
        fields = {
            name: _read_field(name, described, observation.fields) for name, described in self.spec.observed.items()
        }
        images = {}
        for camera in self.cameras:
            name = find_name(camera.name, tuple(observation.images))
            if name is not None:
                image = observation.images[name]
                if camera.is_depth and image.dtype == np.float32:
                    image = to_millimetres(image)
                _check_image(camera, image)
                # a client may reuse the array for its next image
                images[camera.name] = image.copy()
        frame = _Frame(images=images, given=sorted(observation.images), fields=fields)
        oldest = self.num_observed + num_skipped - self._num_steps_back - 1
        last = None if self.num_observed == 0 else self._frames[self.num_observed - 1].actions
        planned = [self._cast(actions) for actions in skipped] or [last]
        for number in range(max(0, oldest - self.num_observed), num_skipped):
            actions = planned[min(number, len(planned) - 1)]
            self._frames[self.num_observed + number] = replace(frame, actions=actions)
        self.num_observed += num_skipped + 1
        self._frames[self.num_observed - 1] = frame
        # `retract` needs one more than a window reaches back
        self._frames = {step: kept for step, kept in self._frames.items() if step >= oldest}

    def replay(self, robot: RobotSteps) -> None:
        """Take in the latest steps of an episode; nothing must have been observed before.

        Raises:
            ValueError: steps are missing, or one of them lacks something.
        """
        num_needed, num_given = min(robot.step, self._num_steps_back) + 1, len(robot.observations)
        if not num_needed <= num_given <= robot.step + 1 or len(robot.actions) != num_given - 1:
            raise ValueError(
                f"step {robot.step} needs the last {num_needed} observations and the actions between them, got "
                f"{num_given} and {len(robot.actions)}."
            )
        for action in (*robot.actions, *robot.rest):
            for name, described in self.spec.commanded.items():
                _read_field(name, described, action, what="action")
        for number, observation in enumerate(robot.observations):
            self.observe(observation, num_skipped=0 if number else robot.step - len(robot.actions))
            if number < len(robot.actions):
                self.command(robot.actions[number])

    def retract(self) -> None:
        """Discard the last observation."""
        self.num_observed -= 1
        del self._frames[self.num_observed]

    def command(self, actions: Mapping[str, np.ndarray] | None) -> None:
        """Record what the robot does after the last observation: {field: (C,)}; None: what it did before."""
        now = self.num_observed - 1
        self._frames[now].actions = self._frames[now - 1].actions if actions is None else self._cast(actions)

    def _cast(self, actions: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: actions[name].astype(described.dtype) for name, described in self.spec.commanded.items()}

    def window(self, instruction: str) -> RobotWindow:
        """Return the window that ends at the last observation; steps before the episode are padded as in training.

        Raises:
            ValueError: an image is missing.
        """
        window, now = self.spec.window, self.num_observed - 1
        frames = image_frames(np.asarray([now]), self.spec.image_indices, now + 1)[0].tolist()
        images = {frame: [self._encode_image(camera, frame) for camera in self.cameras] for frame in set(frames)}
        seen = [self._frames[frame].fields for frame in sorted(self._frames)]
        steps = create_windows(
            np.asarray([len(seen) - 1]), len(seen), Window(window.past, 0), padding=self.spec.padding
        )
        future = np.ones(window.future, dtype=bool)
        return RobotWindow(
            episode_id="",
            anchor=now,
            fields={
                name: steps.apply(np.stack([fields[name] for fields in seen]))[0]
                for name in self.spec.proprioception.stored
            },
            past_mask=np.concatenate([steps.past_mask[0], ~future]),
            future_mask=np.concatenate([steps.future_mask[0], future]),
            is_padding=np.concatenate([steps.is_padding[0], ~future]),
            images=[image for frame in frames for image in images[frame]],
            instructions={_GIVEN: [instruction]},
        )

    def past_actions(self) -> dict[str, np.ndarray] | None:
        """Return the actions before the anchor, poses absolute, and the reference poses: {field: (P + 1, C)}.

        Values at the anchor and before the episode's start are meaningless. None: there are no actions yet.
        """
        spec, now = self.spec, self.num_observed - 1
        if now == 0 or spec.window.past == 0:
            return None
        frames = np.clip(now + np.arange(-spec.window.past, 1), 0, now).tolist()
        done = [self._frames[min(frame, now - 1)].actions for frame in frames]
        assert all(actions is not None for actions in done), "each observation is followed by an action"
        fields = {name: np.stack([actions[name] for actions in done if actions is not None]) for name in spec.commanded}
        references = [name for group in spec.actions.pose_groups for name in group.reference_keys]
        return fields | {name: np.stack([self._frames[frame].fields[name] for frame in frames]) for name in references}

    def references(self) -> dict[str, np.ndarray]:
        """Return the fields of the last observation: {field: (C,)}."""
        return self._frames[self.num_observed - 1].fields

    def _encode_image(self, camera: Camera, frame: int) -> bytes | None:
        found = self._frames[frame].images.get(camera.name)
        if found is not None:
            return camera.operations.encode(found)
        if self.pads_images:
            return None
        given = ", ".join(self._frames[frame].given) or "none"
        raise ValueError(
            f"observation: the image of camera '{camera.name}' is missing, {self.num_observed - 1 - frame} steps back; "
            f"the images given were: {given}. Give it under that name, or train with data.pad_missing_images."
        )


class RobotEpisode:
    """One robot's episode."""

    def __init__(self, seed: int, history: EpisodeHistory, schedule: Schedule) -> None:
        self.seed = seed
        self.history = history
        self.schedule = schedule
        self.instruction = ""
        self.image_features: Memory = {}

    @property
    def step(self) -> int:
        """The last observation's step."""
        return self.history.num_observed - 1

    def may_predict(self, indices: Sequence[int]) -> bool:
        """Return whether a chunk may begin where the next observation is one of its steps, counted from its start."""
        return any(self.schedule.may_predict_at(self.step + 1 - index) for index in indices)


def _read_field(
    name: str, described: FieldDescription, fields: Mapping[str, np.ndarray], *, what: str = "observation"
) -> np.ndarray:
    if name not in fields:
        raise ValueError(
            f"{what}: the policy needs the field '{name}', but the {what} has "
            f"{', '.join(sorted(fields)) or 'no fields'}. Give it under that name."
        )
    values = np.asarray(fields[name])
    if values.shape != (described.width,) or not np.isfinite(values).all():
        found = values.tolist() if values.size <= described.width else f"an array {values.shape}"
        raise ValueError(f"{what}: field '{name}' must be {described.width} finite numbers, got {found}.")
    return values.astype(described.dtype)


def find_name(name: str, known: Sequence[str]) -> str | None:
    """Return the name among `known` that is equal, or else the only one with the same part after its last dot."""
    if name in known:
        return name
    last = name.rpartition(".")[2]
    found = [other for other in known if other.rpartition(".")[2] == last]
    return found[0] if len(found) == 1 else None


def _check_image(camera: Camera, image: np.ndarray) -> None:
    is_picture = image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
    is_depth = image.ndim == 2 and image.dtype == np.uint16
    if not (is_depth if camera.is_depth else is_picture):
        wanted = "uint8 (H, W, 3)"
        if camera.is_depth:
            wanted = "depth: uint16 (H, W) in millimetres or float32 (H, W) in metres"
        raise ValueError(f"observation: camera '{camera.name}' gives {image.dtype} {image.shape}, not {wanted}.")
    size = (image.shape[1], image.shape[0])
    if camera.original_size not in (None, size):
        width, height = camera.original_size
        raise ValueError(
            f"observation: camera '{camera.name}' gives {size[0]} x {size[1]} pixels; in the data it had "
            f"{width} x {height}. Give images of that size."
        )


class ObservationEncoder:
    """Makes batches of observations, with the stages of training.

    Args:
        params: resolved params of the policy's training data.
        spec: the window of the policy.
        normalizer: normalizer of the run.
        processor: processor of the run; None without language.

    Raises:
        ValueError: the policy looks at future images.
    """

    def __init__(
        self,
        params: RoboticsDataParams,
        spec: WindowSpec,
        normalizer: RoboticsNormalizer,
        processor: Processor | None = None,
    ) -> None:
        if max(spec.image_indices, default=0) > 0:
            raise ValueError(f"data.image_indices {params.image_indices} are of the future, which no robot sees.")
        # no model takes calibration yet
        params = replace(params, intrinsics_fields=[], extrinsics_fields=[])
        self.params, self.processor = params, processor
        # actions are the output
        self._spec = replace(spec, actions=FieldSources(stored={}, pose_groups=(), fields={}), calibration=())
        num_actions = sum(normalizer.widths[name] for name in params.action_fields)
        # a model of several robots has more columns
        self._action_dim_mask = np.arange(params.padded_action_dim or num_actions) < num_actions
        stages: list[Stage] = [
            ComputeRelativePoses(),
            create_proprioception_stage(params, normalizer),
            PrepareCameraImages(params),
            EncodeRobot(params, processor),
        ]
        if params.use_language:
            stages.insert(0, ChooseInstruction(params, types=(_GIVEN,) if params.language_instruction_types else ()))
        self._stages = stages

    def encode(self, windows: Sequence[RobotWindow]) -> Batch:
        """Return the batch of several robots' windows, with everything that training has except actions.

        Raises:
            ValueError: an observation cannot be encoded.
        """
        given = {"__url__": "", "__seed__": 0, "__position__": 0, "__is_training__": False, "window_spec": self._spec}
        samples: list[Sample] = []
        for made in apply_stages([{**given, "window": window} for window in windows], self._stages):
            if isinstance(made, Failure):
                if made.error is not None and not isinstance(made.error, ValueError):
                    raise made.error  # not the observation's fault
                raise ValueError(f"the observation cannot be used: {made.description}.") from None
            samples.append(made)
        batch = join_robot_samples(samples, self.processor, self.params)
        batch["action_dim_mask"] = np.tile(self._action_dim_mask, (len(samples), 1))
        return {
            key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in batch.items()
        }

    @staticmethod
    def group(robots: Sequence[Any], batch_size: int | None) -> list[Sequence[Any]]:
        """Return groups of at most batch_size robots with one instruction; other lengths would change a batch's shape.

        Args:
            robots: those that need a prediction.
            batch_size: None: one group of all.
        """
        if batch_size is None:
            return [robots] if robots else []
        groups: list[Sequence[Any]] = []
        for instruction in dict.fromkeys(robot.instruction for robot in robots):
            alike = [robot for robot in robots if robot.instruction == instruction]
            groups += [alike[start : start + batch_size] for start in range(0, len(alike), batch_size)]
        return groups
