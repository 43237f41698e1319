"""From what a robot observes to the batch that its policy acts on: the episode so far, then the stages of training.

Images take the way of preprocessing, JPEG included: the model gets the pixels that it would have got, had the episode
been recorded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from vla_foundry.batch import Batch
from vla_foundry.data.pipelines.robotics import join_robot_samples
from vla_foundry.data.pipelines.robotics_stages import (
    ChooseInstruction,
    ComputeRelativePoses,
    EncodeRobot,
    NormalizeProprioception,
    PrepareCameraImages,
)
from vla_foundry.data.pipelines.stages import Failure, Sample, Stage, apply_stages
from vla_foundry.data.robotics import load_normalizer, load_spec
from vla_foundry.data.worker import pack
from vla_foundry.images.processor import Processor, load_processor
from vla_foundry.images.resize import ImageOperations
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.experiment import load_experiment_params_from_yaml
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.fields import Window
from vla_foundry.robotics.fit import FieldSources, WindowSpec, add_live_poses
from vla_foundry.robotics.normalization import RoboticsNormalizer
from vla_foundry.robotics.spec import DatasetSpec, NamedSpec
from vla_foundry.robotics.windows import RobotWindow, create_windows, image_frames
from vla_foundry.run_folder import CONFIG_NAME, PROCESSOR_FOLDER

# the kind of instruction that is given, not drawn
_GIVEN = "given"


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


def create_robot_window(params: RoboticsDataParams, spec: DatasetSpec) -> WindowSpec:
    """Return what a policy takes of an episode.

    Args:
        params: of the data that it was trained on, resolved.
        spec: of its run.
    """
    return params.create_window_spec(NamedSpec("the run", add_live_poses(spec, params.parse_groups() or ())))


@dataclass(frozen=True, eq=False, kw_only=True)
class ObservedSteps:
    """The last steps that a robot observed in an episode, as an encoder takes them.

    Fewer than its `num_steps` mean that the episode has just begun; what is missing is padded as in training data.
    """

    # {camera: images, the newest last}; uint8 [3, H, W] of the size that the training data have, or files
    images: Mapping[str, Sequence[Tensor | bytes]]
    # {field: (steps, C)}, the newest last; absolute poses
    fields: Mapping[str, np.ndarray]
    # what is to be done
    instruction: str = ""


@dataclass
class _Frame:
    images: dict[str, np.ndarray]
    fields: dict[str, np.ndarray]
    actions: dict[str, np.ndarray] | None = None


class EpisodeHistory:
    """What a robot saw and did in the present episode, as far back as a window looks.

    Args:
        spec: what is kept of it.
        cameras: in the order of the model.
        pads_images: an image that is not there is black; false: it is an error.
    """

    def __init__(self, spec: WindowSpec, cameras: Sequence[Camera], *, pads_images: bool) -> None:
        self.spec = spec
        self.cameras = tuple(cameras)
        self.pads_images = pads_images
        self.num_observed = 0
        self._frames: dict[int, _Frame] = {}

    def observe(self, observation: RobotObservation) -> None:
        """Add an observation, of the step after the last one.

        Raises:
            ValueError: a field is missing or not finite, or a picture is not what the camera gave in training.
        """
        fields = {
            name: self._read_field(name, np.dtype(described.dtype), observation)
            for name, described in self.spec.observed.items()
        }
        images = {}
        for camera in self.cameras:
            name = find_name(camera.name, tuple(observation.images))
            if name is not None:
                _check_picture(camera, observation.images[name])
                # a client may draw into the same array again
                images[camera.name] = observation.images[name].copy()
        self._frames[self.num_observed] = _Frame(images, fields)
        self._frames.pop(self.num_observed - self.spec.num_steps_back - 1, None)
        self.num_observed += 1

    def command(self, actions: Mapping[str, np.ndarray]) -> None:
        """Say what the robot does after the last observation: {field: (C,)}."""
        frame = self._frames[self.num_observed - 1]
        frame.actions = {name: actions[name].astype(described.dtype) for name, described in self.spec.commanded.items()}

    def observation(self, instruction: str) -> ObservedSteps:
        """Return what has been observed, as far back as a window looks."""
        now = self.num_observed - 1
        frames = sorted(self._frames)
        # only these are looked at, and encoding takes time
        used = set(image_frames(np.asarray([now]), self.spec.image_indices, now + 1)[0].tolist())
        images = {}
        for camera in self.cameras:
            missing = [now - frame for frame in used if camera.name not in self._frames[frame].images]
            if missing and not self.pads_images:
                raise ValueError(
                    f"observation: the image of camera '{camera.name}' is missing, {max(missing)} steps back. Give it, "
                    "or train with data.pad_missing_images."
                )
            if not missing:
                images[camera.name] = [
                    camera.operations.encode(self._frames[frame].images[camera.name]) if frame in used else b""
                    for frame in frames
                ]
        fields = {name: np.stack([self._frames[frame].fields[name] for frame in frames]) for name in self.spec.observed}
        # fields give the number of steps, but a policy may need no fields
        fields = fields or {"frame": np.asarray(frames, np.float32)[:, None]}
        return ObservedSteps(images=images, fields=fields, instruction=instruction)

    def past_actions(self) -> dict[str, np.ndarray] | None:
        """Return what was done in the steps before the anchor, poses absolute, and references: {field: (P + 1, C)}.

        Numbers at the anchor, and before the episode's start, mean nothing. None: nothing was done yet.
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


class ObservationEncoder:
    """Makes batches of observations, by the stages that training uses.

    Args:
        params: of the data that the policy was trained on, resolved.
        spec: of the run.
        normalizer: of the run.
        processor: of the run; None where it has no language.

    Raises:
        ValueError: the policy looks at images of the future.
    """

    def __init__(
        self,
        params: RoboticsDataParams,
        spec: DatasetSpec,
        normalizer: RoboticsNormalizer,
        processor: Processor | None = None,
    ) -> None:
        if max(params.image_indices or [0]) > 0:
            raise ValueError(f"data.image_indices {params.image_indices} are of the future, which no robot sees.")
        # no model takes them yet
        params = replace(params, intrinsics_fields=[], extrinsics_fields=[])
        self.params, self.processor = params, processor
        nothing = FieldSources(stored={}, pose_groups=(), fields={})
        self._spec = replace(create_robot_window(params, spec), actions=nothing)
        self._num_actions = sum(normalizer.widths[name] for name in params.action_fields)
        stages: list[Stage] = [
            ComputeRelativePoses(),
            NormalizeProprioception(params, normalizer),
            PrepareCameraImages(params),
            EncodeRobot(params, processor),
        ]
        if params.use_language:
            stages.insert(0, ChooseInstruction(params, types=(_GIVEN,) if params.language_instruction_types else ()))
        self._stages = stages

    @classmethod
    def from_run(cls, folder: Path) -> "ObservationEncoder":
        """Load the encoder of a run folder.

        Raises:
            FileNotFoundError: the run lacks a file.
            ValueError: it was not trained on robot data, or a file is broken.
        """
        params = load_experiment_params_from_yaml(str(folder / CONFIG_NAME)).data
        if not isinstance(params, RoboticsDataParams):
            raise ValueError(f"{folder} was trained on data of type {params.type}, not robotics.")
        processor = load_processor(folder / PROCESSOR_FOLDER) if params.use_language else None
        return cls(params, load_spec(folder), load_normalizer(folder), processor)

    @property
    def num_steps(self) -> int:
        """Steps that it looks at, the newest one included."""
        return 1 + self._spec.num_steps_back

    def encode(self, observations: Sequence[ObservedSteps]) -> Batch:
        """Return the batch of what several robots observe: all that training has but actions.

        Raises:
            ValueError: an observation lacks a camera or a field, or cannot be encoded.
        """
        given = {"__url__": "", "__seed__": 0, "__position__": 0, "__is_training__": False, "window_spec": self._spec}
        begun = [{**given, "window": self._create_window(each)} for each in observations]
        samples: list[Sample] = []
        for made in apply_stages(begun, self._stages):
            if isinstance(made, Failure):
                if made.error is not None and not isinstance(made.error, ValueError):
                    raise made.error  # not the observation's fault
                raise ValueError(f"the observation cannot be used: {made.description}.") from None
            samples.append(made)
        batch = join_robot_samples(samples, self.processor, self.params)
        batch["action_dim_mask"] = np.ones((len(samples), self._num_actions), dtype=bool)
        return pack(batch, None, for_transport=False).unpack()

    def _create_window(self, observation: ObservedSteps) -> RobotWindow:
        spec, window = self._spec, self.params.window
        images = [
            self._find_image(observation, camera, offset)
            for offset in spec.image_indices
            for camera in self.params.camera_names or []
        ]
        lengths = {len(values) for values in observation.fields.values()}
        if len(lengths) > 1:
            raise ValueError(f"the observation has fields of {' and '.join(map(str, sorted(lengths)))} steps.")
        num_seen = max(lengths, default=1)
        observed = Window(window.past, 0)
        steps = create_windows(np.asarray([num_seen - 1]), num_seen, observed, padding=spec.padding)
        fields = {}
        for name in spec.stored:
            if name not in observation.fields:
                raise ValueError(unknown_name_message("observation: field", name, sorted(observation.fields)))
            fields[name] = steps.apply(np.asarray(observation.fields[name]))[0]
        future = np.ones(window.future, dtype=bool)
        return RobotWindow(
            episode_id="",
            anchor=num_seen - 1,
            fields=fields,
            past_mask=np.concatenate([steps.past_mask[0], ~future]),
            future_mask=np.concatenate([steps.future_mask[0], future]),
            is_padding=np.concatenate([steps.is_padding[0], ~future]),
            images=images,
            instructions={_GIVEN: [observation.instruction]},
        )

    def _find_image(self, observation: ObservedSteps, camera: str, offset: int) -> Tensor | bytes | None:
        frames = observation.images.get(camera)
        if not frames:
            if self.params.pad_missing_images:
                return None
            raise ValueError(unknown_name_message("observation: camera", camera, sorted(observation.images)))
        return frames[int(image_frames(np.asarray([len(frames) - 1]), [offset], len(frames))[0, 0])]
