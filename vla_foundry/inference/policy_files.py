"""Read a policy's run folder: params, normalization, cameras and fields."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_foundry.client.observation import RobotObservation
from vla_foundry.data.kept import check_kept_inputs
from vla_foundry.data.robotics import find_dataset_folder, load_normalizer, load_spec
from vla_foundry.images.geometry import ImageOperations
from vla_foundry.inference.loading import (
    choose_device,
    find_run_folder,
    load_run_model,
    load_run_processor,
    with_run_files,
)
from vla_foundry.inference.observations import Camera, find_name
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.mixture import MixtureDataParams
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.experiment import TrainExperimentParams, load_experiment_params_from_yaml
from vla_foundry.params.models.policy import RobotPolicyParams
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.fit import WindowSpec, add_live_poses, find_contradictions
from vla_foundry.robotics.normalization import RoboticsNormalizer
from vla_foundry.robotics.rotations import matrix_to_rotation
from vla_foundry.robotics.spec import DatasetSpec, NamedSpec
from vla_foundry.robotics.transforms import ActionTransform, FieldTransform, RelativePoses
from vla_foundry.run_folder import CONFIG_NAME, PREPROCESSING_CONFIG_NAME
from vla_foundry.storage.uri import exists, join_uri, read_yaml

if TYPE_CHECKING:
    from torch import nn

    from vla_foundry.images.processor import Processor

# preprocessing's image options and their defaults
_IMAGE_OPTIONS: dict[str, Any] = {
    "camera_rotations": {},
    "resize_images_size": None,
    "image_resizing_method": "center_crop",
    "jpeg_quality": 95,
}


@dataclass(frozen=True, eq=False, kw_only=True)
class PolicyFiles:
    """A policy's run, without its weights."""

    run_folder: str
    # with one prompt; see load_policy_files
    params: TrainExperimentParams
    data: RoboticsDataParams
    normalizer: RoboticsNormalizer
    spec: DatasetSpec
    # the parts of an episode that the model observes and commands
    window_spec: WindowSpec
    # in the model's order
    cameras: tuple[Camera, ...]
    actions: ActionTransform
    # None if the model takes no text
    processor: "Processor | None"

    def load_model(self, checkpoint: str, *, device: str, use_ema: bool | None) -> "nn.Module":
        """Load the model; see `load_run_model`."""
        return load_run_model(self.params.model, self.run_folder, checkpoint, use_ema, choose_device(device))

    def imagine_observation(self) -> RobotObservation:
        """Return an observation with black images and a robot at rest."""
        fields, images = {}, {}
        for name, field in self.window_spec.observed.items():
            turn = field.rotation
            fields[name] = np.zeros(field.width) if turn is None else matrix_to_rotation(np.eye(3), turn)
        for camera in self.cameras:
            width, height = camera.original_size or self.spec.cameras[camera.name].size
            shape, kind = ((height, width), np.uint16) if camera.is_depth else ((height, width, 3), np.uint8)
            images[camera.name] = np.zeros(shape, kind)
        return RobotObservation(images=images, fields=fields, instruction="warm up")

    def check_robot(self, robot: NamedSpec) -> None:
        """See Policy.check_robot."""
        known = robot.spec
        names = (*self.window_spec.observed, *self.window_spec.commanded)
        missing = [name for name in names if name not in known.fields]
        found = {camera: find_name(camera.name, list(known.cameras)) for camera in self.cameras}
        blind = [] if self.data.pad_missing_images else [camera.name for camera in self.cameras if not found[camera]]
        lacks = [
            f"no {kind} {' or '.join(map(repr, absent))} (it has {', '.join(sorted(has)) or 'none'})"
            for kind, absent, has in (("camera", blind, known.cameras), ("field", missing, known.fields))
            if absent
        ]
        if lacks:
            raise ValueError(f"{robot.name} has {' and '.join(lacks)}, which the policy was trained on.")
        for camera, name in found.items():
            if name is not None and known.cameras[name].is_depth != camera.is_depth:
                kinds = ("depth", "colours") if camera.is_depth else ("colours", "depth")
                raise ValueError(
                    f"camera '{camera.name}': the policy was trained on {kinds[0]}, and {robot.name} gives {kinds[1]}."
                )
            size = None if name is None else known.cameras[name].original_size
            if size is not None and camera.original_size not in (None, size):
                raise ValueError(
                    f"camera '{camera.name}' of {robot.name} gives images of {size}, but the policy was trained on "
                    f"{camera.original_size}. Give images of that size."
                )
        own = {name: self.spec.fields[name] for name in names if name in self.spec.fields}
        contradictions = find_contradictions([(NamedSpec(self.run_folder, self.spec), own), (robot, known.fields)])
        if contradictions:
            raise ValueError(contradictions[0])

    def choose_open_loop_steps(self, steps: int | None) -> int:
        """Return how many actions of each chunk to execute; None: half of them, rounded up.

        Raises:
            ValueError: the model predicts fewer.
        """
        num_predicted = self.window_spec.window.future + 1
        if steps is not None and not 1 <= steps <= num_predicted:
            raise ValueError(f"open_loop_steps ({steps}) must be 1 .. {num_predicted}, the predicted steps.")
        return steps or (num_predicted + 1) // 2


def load_policy_files(checkpoint: str, *, dataset: int | str | None = None) -> PolicyFiles:
    """Read the files of a checkpoint's run.

    Args:
        dataset: see Policy.from_run.

    Raises:
        FileNotFoundError: the run does not exist or lacks a file.
        ValueError: it is not a policy's run, or a file is broken.
    """
    run_folder = find_run_folder(checkpoint)
    params = load_experiment_params_from_yaml(join_uri(run_folder, CONFIG_NAME))
    model, data = params.model, params.data
    if not isinstance(model, RobotPolicyParams):
        raise ValueError(f"checkpoint {checkpoint} holds a model of type '{model.type}', which is not a policy.")
    folder = run_folder
    if isinstance(data, MixtureDataParams):
        data, folder, dataset = _choose_robot(data, run_folder, dataset)
    if not isinstance(data, RoboticsDataParams):
        raise ValueError(f"checkpoint {checkpoint} was trained on data of type '{data.type}', not on robotics.")
    # use one prompt, so that the same instruction gives the same behavior
    data = dataclasses.replace(data, prompts=data.prompts[:1])
    check_kept_inputs(run_folder, checkpoint)
    processor = load_run_processor(run_folder) if data.use_language else None
    spec, normalizer = load_spec(folder), load_normalizer(folder)
    options = _read_image_options(folder, dataset)
    window_spec = data.create_window_spec(NamedSpec("the run", add_live_poses(spec, data.parse_groups() or ())))
    return PolicyFiles(
        run_folder=run_folder,
        params=dataclasses.replace(params, data=data, model=with_run_files(model, run_folder)),
        data=data,
        normalizer=normalizer,
        spec=spec,
        window_spec=window_spec,
        cameras=tuple(_create_camera(name, spec, options) for name in data.camera_names or []),
        actions=create_action_transform(data, window_spec, normalizer),
        processor=processor,
    )


def _choose_robot(
    data: MixtureDataParams, run_folder: str, name: int | str | None
) -> tuple[DataParams, str, int | str | None]:
    """Return the params of one robot of a mixture, the folder of its files, and the index of its dataset."""
    robots = [robot for robot, part in data.datasets.items() if isinstance(part, RoboticsDataParams)]
    if name is None or str(name).isdigit():
        return data.main(), run_folder, name
    if name not in robots:
        raise ValueError(unknown_name_message("dataset", str(name), robots))
    return data.datasets[str(name)], find_dataset_folder(data, run_folder, str(name)), None


def create_action_transform(
    data: RoboticsDataParams, spec: WindowSpec, normalizer: RoboticsNormalizer
) -> ActionTransform:
    """Create the transform between robot commands and model actions.

    Raises:
        ValueError: a relative pose cannot be turned into a command.
    """
    for group in spec.actions.pose_groups:
        for name, partner in (group.relative_keys, group.relative_keys[::-1]):
            if name in data.action_fields and partner not in data.action_fields:
                raise ValueError(f"data.action_fields has '{name}' without '{partner}': both are needed to command it.")
    rotations = {
        name: described.rotation
        for name, described in spec.commanded.items()
        if described.rotation is not None and described.representation != "delta"
    }
    anchor = spec.window.anchor
    return ActionTransform(
        poses=RelativePoses(spec.actions.pose_groups, anchor),
        fields=FieldTransform.create(data.action_fields, normalizer, anchor=anchor, width=data.padded_action_dim),
        rotations=rotations,
    )


def _create_camera(name: str, spec: DatasetSpec, options: dict[str, Any]) -> Camera:
    described = spec.cameras[name]
    turns = {key.rpartition(".")[2]: value for key, value in options["camera_rotations"].items()}
    is_resized = options["resize_images_size"] is not None
    return Camera(
        name=name,
        original_size=described.original_size,
        is_depth=described.is_depth,
        operations=ImageOperations(
            turns=turns.get(name.rpartition(".")[2], 0) % 4,
            size=(described.size[1], described.size[0]) if is_resized else None,
            method=options["image_resizing_method"],
            jpeg_quality=options["jpeg_quality"],
        ),
    )


def _read_image_options(run_folder: str, dataset: int | str | None) -> dict[str, Any]:
    location = join_uri(run_folder, PREPROCESSING_CONFIG_NAME)
    config = (read_yaml(location) if exists(location) else None) or {}
    if 0 not in config:
        if str(dataset or 0) != "0":
            raise ValueError(f"dataset ({dataset}) names one of several, but the run has one. Leave it out.")
        return _choose_options(config)
    if dataset is not None:
        number = int(dataset) if str(dataset).isdigit() else -1
        if number not in config:
            raise ValueError(f"dataset ({dataset}) must be one of the run's: {', '.join(map(str, config))}.")
        return _choose_options(config[number])
    first, *others = (_choose_options(each) for each in config.values())
    for number, other in enumerate(others, start=1):
        changed = next((key for key in first if first[key] != other[key]), None)
        if changed is not None:
            raise ValueError(
                f"{location}: {changed} is {first[changed]} in dataset 0 and {other[changed]} in dataset {number}. "
                "Name the robot's dataset with `dataset`."
            )
    return first


def _choose_options(given: dict[str, Any]) -> dict[str, Any]:
    return {key: default if given.get(key) is None else given[key] for key, default in _IMAGE_OPTIONS.items()}
