"""What a robot observes becomes, bit for bit, what the policy was trained on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla_foundry.batch import Batch
from vla_foundry.data.pipelines.image_caption import create_image_processor
from vla_foundry.data.robotics import complete_params, load_normalizer, load_spec, save_robotics_files
from vla_foundry.images.processor import Processor
from vla_foundry.inference.observations import EpisodeHistory, ObservationEncoder, RobotObservation
from vla_foundry.params.data.images import (
    ColorJitterParams,
    CropParams,
    DataAugmentationParams,
    ImageAugmentationParams,
)
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.robotics.fit import WindowSpec, add_live_poses
from vla_foundry.robotics.spec import NamedSpec

AUGMENTATION = DataAugmentationParams(
    image=ImageAugmentationParams(
        crop=CropParams(enabled=True, shape=(0.9, 0.8)), color_jitter=ColorJitterParams(enabled=True)
    )
)


def create_spec(params: RoboticsDataParams, run: Path) -> WindowSpec:
    return params.create_window_spec(NamedSpec("the run", add_live_poses(load_spec(run), params.parse_groups() or ())))


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
    spec = create_spec(params, tmp_path / "run")
    encoder = ObservationEncoder(params, spec, load_normalizer(tmp_path / "run"), processor)
    assert spec.num_steps_back == 2
    expected = read_batch(params, 8, split="validation")
    windows = {}
    history = EpisodeHistory(spec, (), pads_images=False)
    for frame in range(recording.num_frames):
        history.observe(RobotObservation(images={}, fields={k: v[frame] for k, v in recording.fields.items()}))
        # the recorded files: a robot's images would be compressed once more
        images = [recording.frames[camera][max(0, frame + offset)] for offset in (-2, 0) for camera in spec.cameras]
        windows[frame] = replace(history.window(recording.instructions[0][2]["original"][0]), images=images)
    chosen = zip(expected["anchors"].tolist(), expected["instructions"], strict=True)
    found = encoder.encode(
        [replace(windows[anchor], instructions={"given": [instruction]}) for anchor, instruction in chosen]
    )
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
    spec, normalizer = create_spec(params, tmp_path), load_normalizer(tmp_path)
    encoder = ObservationEncoder(params, spec, normalizer)
    fields = {name: values[0] for name, values in recording.fields.items()}
    history = EpisodeHistory(spec, (), pads_images=False)
    history.observe(RobotObservation(images={}, fields=fields))
    images = [files[0] for _ in params.image_indices or [] for files in recording.frames.values()]
    window = replace(history.window("go"), images=images)
    assert encoder.encode([window])["proprioception"].shape == (1, 2, 9)
    with pytest.raises(
        ValueError, match=r"the policy needs the field 'robot__actual.*', but the observation has gripper"
    ):
        history.observe(RobotObservation(images={}, fields={"gripper": np.zeros(1)}))
    broken = {name: np.full_like(values, np.nan) for name, values in window.fields.items()}
    with pytest.raises(ValueError, match=r"cannot be used: not finite: field 'robot__actual"):
        encoder.encode([replace(window, fields=broken)])
    with pytest.raises(ValueError, match=r"image_indices \[0, 1\] are of the future"):
        ObservationEncoder(replace(params, image_indices=[0, 1]), replace(spec, image_indices=(0, 1)), normalizer)
