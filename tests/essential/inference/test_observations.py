"""What a robot observes becomes, bit for bit, what the policy was trained on."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vla_foundry.batch import Batch
from vla_foundry.data.pipelines.image_caption import create_image_processor
from vla_foundry.data.robotics import complete_params, load_normalizer, load_spec, save_robotics_files
from vla_foundry.images.codec import image_from_array
from vla_foundry.images.processor import Processor
from vla_foundry.inference.observations import ObservationEncoder, ObservedSteps
from vla_foundry.params.data.images import (
    ColorJitterParams,
    CropParams,
    DataAugmentationParams,
    ImageAugmentationParams,
)
from vla_foundry.params.data.robotics import RoboticsDataParams

AUGMENTATION = DataAugmentationParams(
    image=ImageAugmentationParams(
        crop=CropParams(enabled=True, shape=(0.9, 0.8)), color_jitter=ColorJitterParams(enabled=True)
    )
)
RELATIVE = "robot__action__poses__left::panda__xyz_relative"


@pytest.mark.parametrize(
    ("layout", "padding", "has_language"),
    [("episodes", "copy", True), ("episodes", "zero", False), ("samples", "copy", False)],
)
def test_a_robot_sees_what_training_saw(
    tmp_path: Path,
    create_recording: Callable[..., Any],
    write_robot_data: Callable[..., Path],
    create_params: Callable[..., RoboticsDataParams],
    read_batch: Callable[..., Batch],
    tokenizer_folder: Path,
    layout: str,
    padding: str,
    has_language: bool,
) -> None:
    recording = create_recording(3, 8)
    manifest = write_robot_data(
        tmp_path / "data", [recording], layout=layout, padding=padding, window=(2, 3), image_indices=[-2, 0]
    )
    fields = ["robot__actual__poses__right::panda__xyz", "robot__actual__poses__left::panda__rot_6d_relative"]
    options = {"tokenizer": str(tokenizer_folder)} if has_language else {}
    params = create_params(
        manifest,
        val_dataset_manifest=[str(manifest)],
        proprioception_fields=fields,
        augmentation=AUGMENTATION,
        **options,
    )
    params = complete_params(params)
    save_robotics_files(params, tmp_path / "run")
    processor: Processor | None = create_image_processor(params) if has_language else None
    encoder = ObservationEncoder(params, load_spec(tmp_path / "run"), load_normalizer(tmp_path / "run"), processor)
    assert encoder.num_steps == 3
    expected = read_batch(params, 8, split="validation")
    observations = []
    for anchor, instruction in zip(expected["anchors"].tolist(), expected["instructions"], strict=True):
        seen = slice(max(0, anchor - 2), anchor + 1)
        observations.append(
            ObservedSteps(
                images={
                    camera: [image_from_array(np.array(Image.open(io.BytesIO(file)))) for file in files[seen]]
                    for camera, files in recording.frames.items()
                },
                fields={name: values[seen] for name, values in recording.fields.items()},
                instruction=instruction,
            )
        )
    found = encoder.encode(observations)
    names = ["pixel_values", "image_mask", "proprioception", "past_mask", "action_dim_mask"]
    for name in [*names, "input_ids"] if has_language else names:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name]), name
    # everything from now on is to be predicted
    assert torch.equal(found["future_mask"], (torch.arange(6) >= 2).expand(8, 6))
    assert torch.equal(found["is_padding"], ~(found["past_mask"] | found["future_mask"]))


def test_what_an_observation_lacks_is_named(
    tmp_path: Path,
    create_recording: Callable[..., Any],
    write_robot_data: Callable[..., Path],
    create_params: Callable[..., RoboticsDataParams],
) -> None:
    recording = create_recording(3, 8)
    params = complete_params(create_params(write_robot_data(tmp_path / "data", [recording])))
    save_robotics_files(params, tmp_path)
    spec, normalizer = load_spec(tmp_path), load_normalizer(tmp_path)
    encoder = ObservationEncoder(params, spec, normalizer)
    images = {camera: files[:1] for camera, files in recording.frames.items()}
    fields = {name: values[:1] for name, values in recording.fields.items()}
    assert encoder.encode([ObservedSteps(images=images, fields=fields)])["proprioception"].shape == (1, 2, 9)
    with pytest.raises(ValueError, match=r"observation: camera 'wrist' is unknown"):
        encoder.encode([ObservedSteps(images={"Scene.Left": images["Scene.Left"]}, fields=fields)])
    with pytest.raises(ValueError, match=r"observation: field 'robot__actual.*' is unknown"):
        encoder.encode([ObservedSteps(images=images, fields={"gripper": np.zeros((1, 1))})])
    fields["robot__actual__poses__right::panda__xyz"] = np.full((1, 3), np.nan)
    with pytest.raises(ValueError, match=r"cannot be used: not finite: field 'robot__actual"):
        encoder.encode([ObservedSteps(images=images, fields=fields)])
    with pytest.raises(ValueError, match=r"image_indices \[0, 1\] are of the future"):
        ObservationEncoder(replace(params, image_indices=[0, 1]), spec, normalizer)
