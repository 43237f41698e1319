"""The published shard loads to the tensors that a reader written here makes of it."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vla_foundry.config.loading import to_plain
from vla_foundry.data import create_dataloader
from vla_foundry.params.data.robotics import NormalizationParams, RoboticsDataParams
from vla_foundry.params.experiment import load_params_from_yaml
from vla_foundry.robotics.accumulator import StatisticsAccumulator
from vla_foundry.robotics.statistics_format import format_statistics
from vla_foundry.world import World

pytestmark = pytest.mark.shared_data

CAMERAS = [
    "scene_right_0",
    "scene_left_0",
    "wrist_left_minus",
    "wrist_left_plus",
    "wrist_right_minus",
    "wrist_right_plus",
]


@pytest.fixture
def dataset(shared_data: Path, tmp_path: Path) -> Path:
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


@pytest.mark.parametrize("window", [(1, 14), (0, 7), (1, 0)])
@pytest.mark.parametrize("cameras", [CAMERAS, ["wrist_left_plus", "scene_right_0"]])
def test_the_published_shard_loads(dataset: Path, window: tuple[int, int], cameras: list[str]) -> None:
    config = load_params_from_yaml(RoboticsDataParams, str(dataset / "test_lbm_data_params.yaml"))
    values = {name: getattr(config, name) for name in to_plain(config) if name != "type"}
    params = RoboticsDataParams(
        **values
        | {
            "dataset_manifest": [str(dataset / "manifest.jsonl")],
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
    statistics = json.loads((dataset / "stats.json").read_text(encoding="utf-8"))
    steps = slice(1 - window[0], 2 + window[1])
    for row, sample in enumerate(read_samples(dataset)):
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
