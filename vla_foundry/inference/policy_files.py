"""What the folder of a policy's run says: its params, how fields are normalized, what cameras and fields mean."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from vla_foundry.data.robotics.files import load_normalizer, load_spec
from vla_foundry.images.resize import ImageOperations
from vla_foundry.inference.history import Camera, InputPlan, find_name
from vla_foundry.inference.loading import (
    choose_device,
    find_run_folder,
    load_run_model,
    load_run_processor,
    with_run_files,
)
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.experiment import TrainExperimentParams, load_experiment_params_from_yaml
from vla_foundry.params.models.diffusion_policy import DiffusionPolicyParams
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.fields import PoseGroup, absolute_field, is_relative_field
from vla_foundry.robotics.fit import find_contradictions
from vla_foundry.robotics.normalization import RoboticsNormalizer
from vla_foundry.robotics.spec import DatasetSpec, NamedSpec
from vla_foundry.run_folder import CONFIG_NAME, PREPROCESSING_CONFIG_NAME
from vla_foundry.storage.uri import exists, join_uri, read_text

if TYPE_CHECKING:
    from torch import nn

    from vla_foundry.images.processor import Processor

# what preprocessing did to images, with what it does unless told
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
    # with one prompt, see load_policy_files
    params: TrainExperimentParams
    data: RoboticsDataParams
    normalizer: RoboticsNormalizer
    spec: DatasetSpec
    plan: InputPlan
    # None: the model takes no text
    processor: "Processor | None"

    def load_model(self, checkpoint: str, *, device: str, use_ema: bool | None) -> "nn.Module":
        """Load the model; see `load_run_model`."""
        return load_run_model(self.params.model, self.run_folder, checkpoint, use_ema, choose_device(device))

    def check_robot(self, robot: NamedSpec) -> None:
        """See Policy.check_robot."""
        known = robot.spec
        for camera in self.plan.cameras:
            name = find_name(camera.name, list(known.cameras))
            if name is None and not self.plan.pads_images:
                raise ValueError(unknown_name_message(f"camera of {robot.name}", camera.name, list(known.cameras)))
            size = None if name is None else known.cameras[name].original_size
            if size is not None and camera.original_size not in (None, size):
                raise ValueError(
                    f"camera '{camera.name}' of {robot.name} gives pictures of {size}, but the policy was trained on "
                    f"{camera.original_size}. Give these."
                )
        for field in (*self.plan.observed, *self.plan.commanded):
            if field not in known.fields:
                raise ValueError(unknown_name_message(f"field of {robot.name}", field, sorted(known.fields)))
        both = {
            name: (self.spec.fields[name], known.fields[name])
            for name in (*self.plan.observed, *self.plan.commanded)
            if name in self.spec.fields
        }
        found = find_contradictions(NamedSpec(self.run_folder, self.spec), robot, both)
        if found:
            raise ValueError(found[0])


def load_policy_files(checkpoint: str, *, dataset: int | None = None) -> PolicyFiles:
    """Read what the run of a checkpoint says.

    Args:
        dataset: see Policy.from_run.

    Raises:
        FileNotFoundError: there is no such run, or it lacks a file.
        ValueError: it is no run of a policy, or a file is broken.
    """
    run_folder = find_run_folder(checkpoint)
    params = load_experiment_params_from_yaml(join_uri(run_folder, CONFIG_NAME))
    model, data = params.model, params.data
    if not isinstance(model, DiffusionPolicyParams):
        raise ValueError(f"checkpoint {checkpoint} holds a model of type '{model.type}', which is no policy.")
    if not isinstance(data, RoboticsDataParams):
        raise ValueError(f"checkpoint {checkpoint} was trained on data of type '{data.type}', not on robotics.")
    # a robot is to do the same when it is told the same
    data = dataclasses.replace(data, prompts=data.prompts[:1])
    processor = load_run_processor(run_folder) if data.use_language else None
    spec = load_spec(run_folder)
    options = _read_image_options(run_folder, dataset)
    return PolicyFiles(
        run_folder=run_folder,
        params=dataclasses.replace(params, data=data, model=with_run_files(model, run_folder)),
        data=data,
        normalizer=load_normalizer(run_folder),
        spec=spec,
        plan=create_input_plan(data, spec, options),
        processor=processor,
    )


def create_input_plan(data: RoboticsDataParams, spec: DatasetSpec, options: dict[str, Any]) -> InputPlan:
    """Work out what of an episode the model gets, and what it commands.

    Args:
        options: what preprocessing did to images, see above.

    Raises:
        ValueError: a relative pose can not be made, or not be undone.
    """
    groups = data.parse_groups() or ()
    observed: dict[str, np.dtype] = {}
    commanded: dict[str, np.dtype] = {}
    used: list[PoseGroup] = []

    def add(fields: dict[str, np.dtype], *names: str) -> None:
        for name in names:
            known = spec.fields.get(name)
            fields[name] = np.dtype("float32" if known is None else known.dtype)

    for name in data.proprioception_fields:
        if is_relative_field(name):
            group = _find_group(name, groups)
            used.append(group)
            add(observed, group.position_key, group.rotation_key, *group.reference_keys)
        else:
            add(observed, name)
    for name in data.action_fields:
        if is_relative_field(name):
            group = _find_group(name, groups)
            partner = next(key for key in group.relative_keys if key != name)
            if partner not in data.action_fields:
                raise ValueError(f"data.action_fields has '{name}' without '{partner}': both are needed to command it.")
            used.append(group)
            add(observed, *group.reference_keys)
        add(commanded, absolute_field(name))
    return InputPlan(
        window=data.window,
        cameras=tuple(_create_camera(name, spec, options) for name in data.camera_names or []),
        image_indices=tuple(data.image_indices or []),
        pads_images=data.pad_missing_images,
        observed=observed,
        commanded=commanded,
        pose_groups=tuple(dict.fromkeys(used)),
    )


def _find_group(name: str, groups: tuple[PoseGroup, ...]) -> PoseGroup:
    for group in groups:
        if name in group.relative_keys:
            return group
    raise ValueError(f"the run's data.pose_groups have no group of '{name}'.")


def _create_camera(name: str, spec: DatasetSpec, options: dict[str, Any]) -> Camera:
    described = spec.cameras[name]
    turns = {key.rpartition(".")[2]: value for key, value in options["camera_rotations"].items()}
    is_resized = options["resize_images_size"] is not None
    return Camera(
        name=name,
        original_size=described.original_size,
        operations=ImageOperations(
            turns=turns.get(name.rpartition(".")[2], 0) % 4,
            size=(described.size[1], described.size[0]) if is_resized else None,
            method=options["image_resizing_method"],
            jpeg_quality=options["jpeg_quality"],
        ),
    )


def _read_image_options(run_folder: str, dataset: int | None) -> dict[str, Any]:
    location = join_uri(run_folder, PREPROCESSING_CONFIG_NAME)
    if not exists(location):
        return _IMAGE_OPTIONS
    config = yaml.safe_load(read_text(location))
    if 0 not in config:
        return _choose_options(config)
    if dataset is not None:
        if dataset not in config:
            raise ValueError(f"dataset ({dataset}) must be one of the run's: {', '.join(map(str, config))}.")
        return _choose_options(config[dataset])
    first, *others = (_choose_options(each) for each in config.values())
    for number, other in enumerate(others, start=1):
        changed = next((key for key in first if first[key] != other[key]), None)
        if changed is not None:
            raise ValueError(
                f"{location}: {changed} is {first[changed]} in dataset 0 and {other[changed]} in dataset {number}. "
                "Say with `dataset` which of them the robot is that of."
            )
    return first


def _choose_options(config: dict[str, Any] | None) -> dict[str, Any]:
    given = config or {}
    return {key: default if given.get(key) is None else given[key] for key, default in _IMAGE_OPTIONS.items()}
