"""The normalizer of a run: statistics of several datasets, and what it takes to have none."""

import io
import json
import logging
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vla_foundry.batch import Batch
from vla_foundry.config.loading import to_plain
from vla_foundry.data import create_dataloader
from vla_foundry.data.robotics import (
    Normalization,
    complete_params,
    create_normalization,
    load_normalizer,
    load_spec,
    read_specs,
    save_robotics_files,
)
from vla_foundry.params.data.robotics import NormalizationParams, RoboticsDataParams
from vla_foundry.params.experiment import load_params_from_yaml
from vla_foundry.robotics.accumulator import StatisticsAccumulator
from vla_foundry.robotics.statistics_format import format_statistics
from vla_foundry.world import World

Write = Callable[..., Path]
Create = Callable[..., Any]
Params = Callable[..., RoboticsDataParams]
ReadBatch = Callable[..., Batch]

XYZ = "robot__actual__poses__right::panda__xyz"
GRIPPER = "robot__action__grippers__left::panda_hand"
PER_STEP = NormalizationParams(scope="per_timestep", method="min_max", centered_norm=True)


def create(params: RoboticsDataParams) -> Normalization:
    params = complete_params(params)
    return create_normalization(params, read_specs(params.dataset_manifest))


def test_statistics_count_windows_or_follow_the_mixture(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params
) -> None:
    few, many = create_recording(0, 10), create_recording(1, 30)
    window = {"lowdim_past_timesteps": 0, "lowdim_future_timesteps": 0}
    manifests = [
        write_robot_data(tmp_path / "few", [few], window=(0, 0)),
        write_robot_data(tmp_path / "many", [many], window=(0, 0)),
    ]
    means = [part.fields[XYZ].mean(axis=0) for part in (few, many)]
    for weighting, shares in (("count", (0.25, 0.75)), ("mixture", (0.8, 0.2))):
        params = create_params(*manifests, dataset_weighting=[4.0, 1.0], statistics_weighting=weighting, **window)
        mean = create(params).statistics[XYZ].mean
        assert np.allclose(mean, shares[0] * means[0] + shares[1] * means[1], atol=1e-6), weighting


def test_a_field_that_one_dataset_lacks_takes_the_statistics_of_the_others(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params
) -> None:
    whole, part = create_recording(0), create_recording(1)
    del part.fields[GRIPPER]
    manifests = [write_robot_data(tmp_path / "whole", [whole]), write_robot_data(tmp_path / "part", [part])]
    both = create(create_params(*manifests, pad_missing_fields=True)).statistics
    alone = create(create_params(manifests[0])).statistics
    assert np.array_equal(both[GRIPPER].mean, alone[GRIPPER].mean)
    assert not np.array_equal(both[XYZ].mean, alone[XYZ].mean)
    # not used: no error, though the datasets differ in it
    create(create_params(*manifests, action_fields=[XYZ]))


def test_windows_of_other_lengths_are_aligned_by_their_anchors(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params
) -> None:
    """Five steps each, but the anchor is the second of one and the fourth of the other."""
    recordings = create_recording(0, 12), create_recording(1, 12)
    manifests = [
        write_robot_data(tmp_path / "early", [recordings[0]], window=(1, 3)),
        write_robot_data(tmp_path / "late", [recordings[1]], window=(3, 1)),
    ]
    params = complete_params(create_params(*manifests, action_fields=[XYZ], normalization=PER_STEP))
    assert (params.lowdim_past_timesteps, params.lowdim_future_timesteps) == (1, 1)
    transform = create(params).normalizer.scales[XYZ]
    assert transform.anchor_index == 1
    # a step before the anchor holds all frames but the last, of either dataset
    before = np.concatenate([recording.fields[XYZ][:-1] for recording in recordings])
    assert np.allclose(transform.center[0] - transform.scale[0], before.min(axis=0), atol=1e-6)


def test_normalized_steps_are_aligned_with_their_statistics(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params, read_batch: ReadBatch
) -> None:
    manifest = write_robot_data(tmp_path, [create_recording(0, 20)], window=(2, 3))
    params = create_params(manifest, normalization=PER_STEP, lowdim_past_timesteps=0, lowdim_future_timesteps=2)
    batch = read_batch(params, 20)
    inside = batch["actions"][~batch["is_padding"]]
    assert inside.abs().max() <= 1 + 1e-5
    for step in range(3):  # the extremes of every step are reached at that very step
        values = batch["actions"][:, step][~batch["is_padding"][:, step]]
        assert torch.allclose(values[:, :3].amax(dim=0), torch.ones(3), atol=1e-4)
        assert torch.allclose(values[:, :3].amin(dim=0), -torch.ones(3), atol=1e-4)


def test_validation_is_normalized_as_training_is(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params, read_batch: ReadBatch
) -> None:
    training = write_robot_data(tmp_path / "train", [create_recording(0)])
    recording = create_recording(1)
    held_out = write_robot_data(tmp_path / "validation", [recording])
    params = create_params(training, val_dataset_manifest=[str(held_out)], val_dataset_statistics=["not read"])
    batch = read_batch(params, 9, split="validation")
    normalizer = create(create_params(training)).normalizer
    row, anchor = 4, int(batch["anchors"][4])
    expected = np.concatenate([recording.fields[name][anchor] for name in params.proprioception_fields])
    expected = normalizer.normalize(expected[None].astype(np.float64), params.proprioception_fields, anchor=0)
    assert np.allclose(batch["proprioception"][row, -1].numpy(), expected[0], atol=1e-6)


def test_published_statistics_take_their_anchor_from_the_spec(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params
) -> None:
    manifest = write_robot_data(tmp_path, [create_recording(0)])
    expected = create(create_params(manifest, normalization=PER_STEP)).normalizer.state()
    values = json.loads((tmp_path / "stats.json").read_text(encoding="utf-8"))
    for field in values.values():
        del field["anchor_index"]
    (tmp_path / "stats.json").write_text(json.dumps(values), encoding="utf-8")
    assert create(create_params(manifest, normalization=PER_STEP)).normalizer.state() == expected


def test_without_normalization_there_need_be_no_statistics(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params
) -> None:
    manifest = write_robot_data(tmp_path, [create_recording(0)])
    (tmp_path / "stats.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*stats\.json\. Make it with `vla-foundry stats FOLDER`"):
        create(create_params(manifest))
    normalizer = create(create_params(manifest, normalization=NormalizationParams(enabled=False))).normalizer
    values = np.random.default_rng(0).normal(size=(5, 3))
    assert np.array_equal(normalizer.normalize(values, XYZ, anchor=1), values)


def test_a_field_without_statistics_is_named(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params
) -> None:
    manifest = write_robot_data(tmp_path, [create_recording(0)])
    values = json.loads((tmp_path / "stats.json").read_text(encoding="utf-8"))
    del values[XYZ]
    (tmp_path / "stats.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"stats\.json: field '{XYZ}' is unknown"):
        create(create_params(manifest))


def test_dimensions_that_hardly_vary_are_named(
    tmp_path: Path,
    create_recording: Create,
    write_robot_data: Write,
    create_params: Params,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recording = create_recording(0)
    recording.fields[GRIPPER][:] = 0.5
    manifest = write_robot_data(tmp_path, [recording])
    with caplog.at_level(logging.WARNING):
        normalizer = create(create_params(manifest)).normalizer
    assert normalizer.near_constant == (f"{GRIPPER}[0]",)
    assert GRIPPER in caplog.text


def test_a_run_keeps_what_undoes_normalization(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params, read_batch: ReadBatch
) -> None:
    recording = create_recording(0)
    manifest = write_robot_data(tmp_path / "data", [recording])
    (manifest.parent / "preprocessing_config.yaml").write_text("resize_images_size: [16, 16]\n", encoding="utf-8")
    params = complete_params(create_params(manifest, camera_names=["wrist"], normalization=PER_STEP))
    run = tmp_path / "run"
    save_robotics_files(params, run)
    batch = read_batch(params, 9)
    values = load_normalizer(run).denormalize(
        batch["proprioception"].double().numpy(), params.proprioception_fields, anchor=1
    )
    for row, anchor in enumerate(batch["anchors"].tolist()):
        expected = np.concatenate([recording.fields[name][anchor] for name in params.proprioception_fields])
        assert np.allclose(values[row, -1], expected, atol=1e-5)
    spec = load_spec(run)
    assert list(spec.cameras) == ["wrist"]
    assert (spec.past_lowdim_steps, spec.future_lowdim_steps, spec.fps) == (1, 3, 10.0)
    # also what relative poses refer to, and how they are written
    assert "robot__actual__poses__left::panda__rot_6d" in spec.fields
    assert "robot__action__poses__left::panda" in [group.name for group in spec.pose_groups]
    assert "robot__action__poses__right::panda" not in [group.name for group in spec.pose_groups]
    assert "resize_images_size" in (run / "preprocessing_config.yaml").read_text(encoding="utf-8")


def test_a_run_does_not_go_on_with_another_normalizer(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params
) -> None:
    manifest = write_robot_data(tmp_path / "data", [create_recording(0)])
    save_robotics_files(create_params(manifest), tmp_path / "run")
    save_robotics_files(create_params(manifest), tmp_path / "run")
    write_robot_data(tmp_path / "data", [create_recording(1)])
    with pytest.raises(ValueError, match=r"data\.dataset_statistics or data\.normalization are not those that"):
        save_robotics_files(create_params(manifest), tmp_path / "run")
    save_robotics_files(create_params(manifest, accept_changed_data=True), tmp_path / "run")


def test_statistics_that_lack_steps_are_an_error_of_the_config(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params, monkeypatch
) -> None:
    from vla_foundry.main import main

    manifest = write_robot_data(tmp_path / "a", [create_recording(0)], window=(1, 3))
    words = ["--data.type", "robotics", "--data.dataset_manifest", str(manifest), "--total_train_samples", "512"]
    words += ["--data.action_fields", f"[{GRIPPER}]", "--data.image_size", "16", "--hparams.warmup", "0.0"]
    words += ["--model.type", "diffusion_policy", "--model.vision_language_backbone.type", "vit_backbone"]
    words += [
        "--model.vision_language_backbone.vit.img_size",
        "16",
        "--data.allow_multiple_epochs",
    ]
    words += ["--data.normalization.scope", "per_timestep", "--resolve_configs"]
    monkeypatch.setattr("sys.stdout", io.StringIO())
    main(words)
    message = r"its statistics cover 1 past and 3 future steps, not 1 and 200\. Use --data\.lowdim_past_timesteps 1"
    with pytest.raises(ValueError, match=message):
        main([*words, "--data.lowdim_future_timesteps", "200"])


CAMERAS = [
    "scene_right_0",
    "scene_left_0",
    "wrist_left_minus",
    "wrist_left_plus",
    "wrist_right_minus",
    "wrist_right_plus",
]


@pytest.fixture
def published_dataset(shared_data: Path, tmp_path: Path) -> Path:
    """The published dataset, with statistics, which were not published with it."""
    for path in (shared_data / "small_lbm_dataset").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    statistics = StatisticsAccumulator(1)
    for sample in read_samples(tmp_path):
        arrays = sample["lowdim.npz"]
        values = {name: array[None] for name, array in arrays.items() if array.ndim == 2 and name.startswith("robot")}
        statistics.update(values, (arrays["past_mask"] | arrays["future_mask"])[None])
    (tmp_path / "stats.json").write_text(format_statistics(statistics.finish()), encoding="utf-8")
    return tmp_path


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The samples of the shard, by tarfile, NumPy, json and Pillow."""
    samples: dict[str, dict[str, Any]] = {}
    with tarfile.open(folder / "shard_000000.tar") as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None
            content: Any = io.BytesIO(file.read())
            if suffix.endswith("npz"):
                with np.load(content) as arrays:
                    content = {name: arrays[name] for name in arrays if arrays[name].dtype.kind != "U"}
            elif suffix.endswith("json"):
                content = json.load(content)
            else:
                content = np.asarray(Image.open(content))
            samples.setdefault(key, {})[suffix] = content
    return list(samples.values())


@pytest.mark.shared_data
@pytest.mark.parametrize("window", [(1, 14), (0, 7), (1, 0)])
@pytest.mark.parametrize("cameras", [CAMERAS, ["wrist_left_plus", "scene_right_0"]])
def test_the_published_shard_loads(published_dataset: Path, window: tuple[int, int], cameras: list[str]) -> None:
    config = load_params_from_yaml(RoboticsDataParams, str(published_dataset / "test_lbm_data_params.yaml"))
    values = {name: getattr(config, name) for name in to_plain(config) if name != "type"}
    params = RoboticsDataParams(
        **values
        | {
            "dataset_manifest": [str(published_dataset / "manifest.jsonl")],
            "camera_names": cameras,
            "lowdim_past_timesteps": window[0],
            "lowdim_future_timesteps": window[1],
            "image_size": 224,
            "num_workers": 0,
            "shuffle": False,
            "intrinsics_fields": [f"intrinsics.{camera}" for camera in cameras],
            "extrinsics_fields": [f"extrinsics.{camera}" for camera in cameras],
            "normalization": NormalizationParams(method="std", epsilon=0.1),
        }
    )
    loader = create_dataloader(params, World(), global_batch_size=5, per_gpu_batch_size=5, seed=0)
    batch = next(loader.microbatches(0))
    statistics = json.loads((published_dataset / "stats.json").read_text(encoding="utf-8"))
    steps = slice(1 - window[0], 2 + window[1])
    for row, sample in enumerate(read_samples(published_dataset)):
        arrays = sample["lowdim.npz"]

        def normalize(names: list[str], part: slice, arrays: dict[str, np.ndarray] = arrays) -> np.ndarray:
            columns = [
                (arrays[name][part] - statistics[name]["mean"]) / np.maximum(statistics[name]["std"], 0.1)
                for name in names
            ]
            return np.concatenate(columns, axis=1)

        assert np.allclose(batch["actions"][row].numpy(), normalize(config.action_fields, steps), atol=1e-5)
        observed = normalize(config.proprioception_fields, slice(1 - window[0], 2))
        assert np.allclose(batch["proprioception"][row].numpy(), observed, atol=1e-5)
        for mask in ("past_mask", "future_mask"):
            assert batch[mask][row].tolist() == arrays[mask][steps].tolist()
        is_padding = ~(arrays["past_mask"] | arrays["future_mask"])
        assert batch["is_padding"][row].tolist() == is_padding[steps].tolist()
        images = np.stack([sample[f"{camera}_t{offset}.jpg"] for offset in (-1, 0) for camera in cameras])
        of_row = batch["pixel_values"].unflatten(0, (5, -1))[row]
        assert np.array_equal(of_row.permute(0, 2, 3, 1).numpy(), images)
        for number, camera in enumerate(cameras):
            for kind, array in (("intrinsics", "rescaled_intrinsics"), ("extrinsics", "extrinsics")):
                assert np.allclose(batch[kind][row, number].numpy(), arrays[f"{array}.{camera}"][1], rtol=1e-6)
        assert batch["episode_ids"][row] == sample["metadata.json"]["episode_id"]
        assert batch["anchors"][row] == sample["metadata.json"]["anchor_timestep"]
    assert batch["pixel_values"].dtype == torch.uint8
