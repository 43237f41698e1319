"""From what a robot observes to the batch that its policy acts on, by the very stages that training uses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from vla_foundry.batch import Batch
from vla_foundry.data.pipelines.robotics import (
    ChooseInstruction,
    EncodeRobot,
    PrepareCameraImages,
    join_robot_samples,
)
from vla_foundry.data.pipelines.stages import Dropped, Sample, Stage
from vla_foundry.data.robotics.field_stages import ComputeRelativePoses, NormalizeProprioception
from vla_foundry.data.robotics.files import load_normalizer, load_spec
from vla_foundry.data.robotics.windows import RobotWindow, create_request
from vla_foundry.data.worker import pack
from vla_foundry.images.processor import Processor, load_processor
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.experiment import load_experiment_params_from_yaml
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.fields import Window
from vla_foundry.robotics.normalization import RoboticsNormalizer
from vla_foundry.robotics.spec import DatasetSpec, NamedSpec
from vla_foundry.robotics.windows import create_windows, image_frames
from vla_foundry.run_folder import CONFIG_NAME, PROCESSOR_FOLDER

# the kind of instruction that is given, not drawn
_GIVEN = "given"


@dataclass(frozen=True, eq=False, kw_only=True)
class Observation:
    """What a robot has observed in an episode, or the last of it: as many steps as `num_steps`, if there were so many.

    Fewer steps mean that the episode has just begun; what is missing is padded as training data are.
    """

    # {camera: images, the newest last}; uint8 [3, H, W] of the size that the training data have, or files
    images: Mapping[str, Sequence[Tensor | bytes]]
    # {field: (steps, C)}, the newest last; absolute poses
    fields: Mapping[str, np.ndarray]
    # what is to be done
    instruction: str = ""


class ObservationEncoder:
    """Makes batches of observations.

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
        self.params, self.spec, self.processor = params, spec, processor
        run = NamedSpec("the run", spec)
        plan = params.plan_fields("proprioception_fields", run)
        self._request = replace(create_request(params, run), fields=plan.stored, pose_groups=plan.groups)
        self._num_actions = normalizer.layout(params.action_fields).width
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
        return 1 + max(self.params.window.past, -min(self.params.image_indices or [0]))

    def encode(self, observations: Sequence[Observation]) -> Batch:
        """Return the batch of what several robots observe: all that training has but actions.

        Raises:
            ValueError: an observation lacks a camera or a field, or can not be encoded.
        """
        samples = [self._encode(observation) for observation in observations]
        batch = join_robot_samples(samples, self.processor, self.params)
        batch["action_dim_mask"] = np.ones((len(samples), self._num_actions), dtype=bool)
        return pack(batch, None, for_transport=False).unpack()

    def _encode(self, observation: Observation) -> Sample:
        sample: Sample | None = {
            "__url__": "",
            "__seed__": 0,
            "__position__": 0,
            "__is_training__": False,
            "window": self._create_window(observation),
            "request": self._request,
        }
        for stage in self._stages:
            try:
                sample = stage(sample)
            except Dropped as drop:
                raise ValueError(f"the observation can not be used ({drop.reason}): {drop}.") from None
            assert sample is not None, "no stage of these drops a sample silently"
        return sample

    def _create_window(self, observation: Observation) -> RobotWindow:
        request, window = self._request, self.params.window
        images = [
            self._find_image(observation, camera, offset)
            for offset in request.image_indices
            for camera in self.params.camera_names or []
        ]
        lengths = {len(values) for values in observation.fields.values()}
        if len(lengths) > 1:
            raise ValueError(f"the observation has fields of {' and '.join(map(str, sorted(lengths)))} steps.")
        num_seen = max(lengths, default=1)
        observed = Window(window.past, 0)
        steps = create_windows(np.asarray([num_seen - 1]), num_seen, observed, padding=request.padding)
        fields = {}
        for name in request.fields:
            if name not in observation.fields:
                raise ValueError(unknown_name_message("observation: field", name, sorted(observation.fields)))
            fields[name] = steps.gather(np.asarray(observation.fields[name]))[0]
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

    def _find_image(self, observation: Observation, camera: str, offset: int) -> Tensor | bytes | None:
        frames = observation.images.get(camera)
        if not frames:
            if self.params.pad_missing_images:
                return None
            raise ValueError(unknown_name_message("observation: camera", camera, sorted(observation.images)))
        return frames[int(image_frames(np.asarray([len(frames) - 1]), [offset], len(frames))[0, 0])]
