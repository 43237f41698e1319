"""Modality robotics: batches of windows, the same for every layout, rank, worker and restart; and what is refused."""

import io
import tarfile
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vla_foundry.batch import Batch
from vla_foundry.data import create_dataloader, reader
from vla_foundry.data.pipelines.robotics import RoboticsPipeline
from vla_foundry.data.pipelines.stages import BatchStage, Sample, Stage, name_of_stage
from vla_foundry.data.ranges import LocalBytes, RemoteBytes
from vla_foundry.images.processor import load_tokenizer
from vla_foundry.params.data.base import DatasetCacheParams
from vla_foundry.params.data.images import (
    ColorJitterParams,
    CropParams,
    DataAugmentationParams,
    ImageAugmentationParams,
)
from vla_foundry.params.data.robotics import FieldNormalizationParams, NormalizationParams, RoboticsDataParams
from vla_foundry.world import World

Write = Callable[..., Path]
Create = Callable[..., Any]
Params = Callable[..., RoboticsDataParams]
ReadBatch = Callable[..., Batch]

NOT_NORMALIZED = NormalizationParams(enabled=False)
CROP = ImageAugmentationParams(
    crop=CropParams(enabled=True, shape=(10, 12)), color_jitter=ColorJitterParams(enabled=True)
)


def assert_same_batch(one: Batch, other: Batch, *, but: tuple[str, ...] = ()) -> None:
    assert one.keys() == other.keys()
    for name in one.keys() - set(but):
        if isinstance(one[name], torch.Tensor):
            assert one[name].dtype == other[name].dtype
            assert torch.equal(one[name], other[name]), name
        elif name == "documents":
            assert np.array_equal(one[name].lengths, other[name].lengths)
        else:
            assert one[name] == other[name], name


@pytest.mark.parametrize("padding", ["copy", "zero"])
def test_both_layouts_give_equal_batches(
    tmp_path: Path,
    create_recording: Create,
    write_robot_data: Write,
    create_params: Params,
    read_batch: ReadBatch,
    tokenizer_folder: Path,
    padding: str,
) -> None:
    recordings = [create_recording(number, 6) for number in range(4)]
    batches = []
    for layout in ("episodes", "samples"):
        manifest = write_robot_data(tmp_path / layout, recordings, layout=layout, padding=padding)
        params = create_params(
            manifest,
            tokenizer=str(tokenizer_folder),
            intrinsics_fields=["intrinsics.wrist"],
            augmentation=DataAugmentationParams(image=CROP),
        )
        batches.append(read_batch(params, 24))
    assert_same_batch(*batches, but=("shards",))
    assert sorted(batches[0]["anchors"].tolist()) == sorted(list(range(6)) * 4)


def test_what_windows_need_of_a_remote_episode_is_fetched_before_they_are_read(
    tmp_path: Path,
    create_recording: Create,
    write_robot_data: Write,
    create_params: Params,
    read_batch: ReadBatch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits = []

    class Far(RemoteBytes):
        """A local file that stands for a remote one."""

        def __init__(self, uri: str) -> None:
            self._uri, self.version, self._ahead = uri, "1", {}
            with open(uri, "rb") as file:
                self._file = LocalBytes(file)
            self.num_bytes = self._file.num_bytes

        def _fetch(self, offset: int, size: int) -> bytes:
            if threading.current_thread() is threading.main_thread():
                waits.append(size)
            return self._file.read(offset, size)

    manifest = write_robot_data(tmp_path / "d", [create_recording(number, 9) for number in range(6)])
    params = create_params(manifest, intrinsics_fields=["intrinsics.wrist"], image_indices=[-1, 0])
    expected = read_batch(params, 8, first_batch=1)
    monkeypatch.setattr(reader, "RemoteBytes", Far)
    monkeypatch.setattr(reader, "is_remote", lambda uri: True)
    cache = DatasetCacheParams(mode="ranges")
    assert_same_batch(read_batch(replace(params, dataset_cache=cache), 8, first_batch=1), expected)
    assert set(waits) == {tarfile.BLOCKSIZE}  # the index is checked


def _one_by_one(stage: Stage) -> Stage:
    def apply(sample: Sample) -> Sample | None:
        if not isinstance(stage, BatchStage):
            return stage(sample)
        (result,) = stage.apply([sample])
        if isinstance(result, ValueError):
            raise result
        return result

    apply.__name__ = name_of_stage(stage)
    return apply


def test_a_microbatch_at_once_is_what_its_samples_are_one_by_one(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params
) -> None:
    """Of two datasets, one of which lacks a field; and a sample that no pose can be made of is replaced alone."""
    whole, part, other = create_recording(0, 8), create_recording(1, 8), create_recording(2, 8)
    del part.fields["robot__action__grippers__left::panda_hand"]
    manifests = [
        write_robot_data(tmp_path / "a", [whole, other], padding="zero"),
        write_robot_data(tmp_path / "b", [part]),
    ]

    def read(params: RoboticsDataParams, *, at_once: bool) -> list[Batch]:
        loader = create_dataloader(params, World(), global_batch_size=8, per_gpu_batch_size=8, seed=0)
        pipeline = loader._pipeline
        assert isinstance(pipeline, RoboticsPipeline)
        if not at_once:
            pipeline.stages = [_one_by_one(stage) for stage in pipeline.stages]
        batches = list(islice(loader.microbatches(0), 6))
        loader.close()
        return batches

    params = create_params(*manifests, pad_missing_fields=True, allow_multiple_epochs=True)
    for one, each in zip(read(params, at_once=True), read(params, at_once=False), strict=True):
        assert_same_batch(one, each)
        assert not one["dropped"]
    whole.fields["robot__actual__poses__left::panda__rot_6d"][3] = 0
    write_robot_data(tmp_path / "a", [whole, other], padding="zero", statistics_of=[other])
    params = create_params(*manifests, pad_missing_fields=True, allow_multiple_epochs=True, max_bad_fraction=1.0)
    found = read(params, at_once=True)
    for one, each in zip(found, read(params, at_once=False), strict=True):
        assert_same_batch(one, each)
    dropped = [batch["dropped"] for batch in found if batch["dropped"]]
    assert dropped
    assert all(set(reasons) == {"ComputeRelativePoses: ValueError"} for reasons in dropped)


def test_a_batch_is_as_the_spec_says(
    tmp_path: Path,
    create_recording: Create,
    write_robot_data: Write,
    create_params: Params,
    read_batch: ReadBatch,
    tokenizer_folder: Path,
) -> None:
    manifest = write_robot_data(tmp_path, [create_recording(0), create_recording(1)])
    batch = read_batch(create_params(manifest, tokenizer=str(tokenizer_folder)), 5)
    shapes = {name: (value.dtype, tuple(value.shape)) for name, value in batch.items() if torch.is_tensor(value)}
    rows = batch["input_ids"].shape[1]
    assert rows % 16 == 0
    assert shapes == {
        "positions": (torch.int64, (5,)),
        "input_ids": (torch.int32, (5, rows)),
        "pixel_values": (torch.uint8, (20, 3, 16, 16)),
        "image_mask": (torch.bool, (5, 4)),
        "actions": (torch.float32, (5, 5, 10)),
        "action_dim_mask": (torch.bool, (5, 10)),
        "proprioception": (torch.float32, (5, 2, 9)),
        "past_mask": (torch.bool, (5, 5)),
        "future_mask": (torch.bool, (5, 5)),
        "is_padding": (torch.bool, (5, 5)),
        "anchors": (torch.int64, (5,)),
    }
    masks = torch.stack([batch["past_mask"], batch["future_mask"], batch["is_padding"]]).int()
    assert (masks.sum(dim=0) == 1).all()
    assert batch["future_mask"][:, 1].all()
    assert all(name in ("episode_000", "episode_001") for name in batch["episode_ids"])
    assert all(shard == str(tmp_path / "shard_000000.tar") for shard in batch["shards"])
    assert all(text for text in batch["instructions"])


def test_the_prompt_is_the_instruction_with_its_images(
    tmp_path: Path,
    create_recording: Create,
    write_robot_data: Write,
    create_params: Params,
    read_batch: ReadBatch,
    tokenizer_folder: Path,
) -> None:
    manifest = write_robot_data(tmp_path, [create_recording(0)])
    params = create_params(
        manifest, tokenizer=str(tokenizer_folder), prompt_layout="plain", prompts=["<image>Now {instruction}!"]
    )
    batch = read_batch(params, 4)
    tokenizer = load_tokenizer(str(tokenizer_folder))
    for row, text in enumerate(batch["instructions"]):
        first = int(np.flatnonzero(~batch["documents"].is_padding)[row])
        ids = batch["input_ids"][row, : int(batch["documents"].lengths[first])]
        image_tokens = int((ids >= len(tokenizer)).sum())
        assert image_tokens == 4 * 2  # four images of two tokens
        assert tokenizer.decode(ids[image_tokens:]) == f"Now {text}!\n"


def test_images_are_time_major_in_the_order_of_the_names(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params, read_batch: ReadBatch
) -> None:
    """Upper-case names are found although members are in lower case."""
    recording = create_recording(2, 6, cameras={"Scene.Left": (16, 16), "wrist": (16, 16)})
    for layout in ("episodes", "samples"):
        manifest = write_robot_data(tmp_path / layout, [recording], layout=layout)
        for names in (["wrist", "Scene.Left"], ["Left", "wrist"]):
            batch = read_batch(create_params(manifest, camera_names=names), 3)
            cameras = ["Scene.Left" if name == "Left" else name for name in names]
            expected = [
                recording.frames[camera][int(np.clip(anchor + offset, 0, 5))]
                for anchor in batch["anchors"].tolist()
                for offset in (-1, 0)
                for camera in cameras
            ]
            pixels = [np.asarray(Image.open(io.BytesIO(data))) for data in expected]
            assert np.array_equal(batch["pixel_values"].permute(0, 2, 3, 1).numpy(), np.stack(pixels))


def test_proprioception_ends_at_the_anchor_when_there_is_no_past(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params, read_batch: ReadBatch
) -> None:
    """Zero past steps are none, not "as many as the statistics have"."""
    recording = create_recording(3, 7)
    manifest = write_robot_data(tmp_path, [recording], window=(2, 3))
    params = create_params(manifest, lowdim_past_timesteps=0, normalization=NOT_NORMALIZED)
    batch = read_batch(params, 7)
    assert batch["proprioception"].shape == (7, 1, 9)
    for row, anchor in enumerate(batch["anchors"].tolist()):
        expected = np.concatenate([recording.fields[name][anchor] for name in params.proprioception_fields])
        assert np.array_equal(batch["proprioception"][row, 0].numpy(), expected)
    assert batch["actions"].shape == (7, 4, 10)
    assert batch["future_mask"][:, 0].all()


def test_padded_steps_are_neither_observed_nor_predicted(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params, read_batch: ReadBatch
) -> None:
    manifest = write_robot_data(tmp_path, [create_recording(3, 4)], window=(2, 3))
    batch = read_batch(create_params(manifest), 4)
    steps = batch["anchors"][:, None] + torch.arange(-2, 4)
    is_inside = (steps >= 0) & (steps < 4)
    assert torch.equal(batch["is_padding"], ~is_inside)
    assert torch.equal(batch["past_mask"], is_inside & (torch.arange(6) < 2))
    assert torch.equal(batch["future_mask"], is_inside & (torch.arange(6) >= 2))


def test_a_missing_camera_is_an_error_or_black_and_masked_by_choice(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params, read_batch: ReadBatch
) -> None:
    whole = write_robot_data(tmp_path / "whole", [create_recording(0)])
    part = write_robot_data(tmp_path / "part", [create_recording(1, cameras={"wrist": (16, 16)})])
    names = ["Scene.Left", "wrist"]
    with pytest.raises(ValueError, match=r"camera 'Scene\.Left' is unknown.*pad_missing_images"):
        read_batch(create_params(whole, part, camera_names=names))
    for masks in (False, True):
        params = create_params(whole, part, camera_names=names, pad_missing_images=True, mask_padded_images=masks)
        batch = read_batch(params, 8)
        images = batch["pixel_values"].reshape(8, 4, -1)
        for row, episode in enumerate(batch["episode_ids"]):
            is_part = episode == "episode_001"
            assert (images[row, ::2] == 0).all().item() is is_part
            assert batch["image_mask"][row].tolist() == [not (is_part and masks), True] * 2
        assert {"episode_000", "episode_001"} == set(batch["episode_ids"])
        assert batch["pixel_values"].dtype == torch.uint8


def test_augmentation_is_one_draw_for_all_cameras_and_times_and_none_for_validation(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params, read_batch: ReadBatch
) -> None:
    cameras = {"a": (20, 24), "b": (20, 24)}
    recording = create_recording(0, 5, cameras=cameras)
    # both cameras and all times see the same picture: so do their crops
    recording.frames = {camera: [recording.frames["a"][0]] * 5 for camera in cameras}
    manifest = write_robot_data(tmp_path, [recording])
    params = create_params(
        manifest,
        val_dataset_manifest=[str(manifest)],
        image_size=12,
        image_resizing_method="resize_no_crop",
        augmentation=DataAugmentationParams(image=CROP),
    )
    batch = read_batch(params, 4)
    images = batch["pixel_values"].reshape(4, 4, -1)
    assert (images == images[:, :1]).all()
    assert len({row.numpy().tobytes() for row in images[:, 0]}) > 1
    factors = batch["color_factors"].view(4, 4, 4)
    assert (factors == factors[:, :1]).all()
    assert len(factors[:, 0].unique(dim=0)) == 4
    again = read_batch(params, 4)
    assert torch.equal(again["pixel_values"], batch["pixel_values"])
    validation = read_batch(params, 4, split="validation")
    assert len({row.numpy().tobytes() for row in validation["pixel_values"]}) == 1
    assert "color_factors" not in validation


def test_intrinsics_follow_the_crop_and_the_resizing(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params, read_batch: ReadBatch
) -> None:
    recording = create_recording(0, 5)
    manifest = write_robot_data(tmp_path, [recording])
    params = create_params(
        manifest,
        val_dataset_manifest=[str(manifest)],
        image_size=5,
        intrinsics_fields=["intrinsics.wrist"],
        augmentation=DataAugmentationParams(
            image=ImageAugmentationParams(crop=CropParams(enabled=True, shape=(10, 10)))
        ),
    )
    intrinsics = read_batch(params, 2, split="validation")["intrinsics"]
    # the middle 10 of 16 pixels, at half size; pixels are named by their centres
    expected = np.asarray([[10, 0, (8 - 3 + 0.5) / 2 - 0.5], [0, 10.5, (8 - 3 + 0.5) / 2 - 0.5], [0, 0, 1]])
    assert intrinsics.shape == (2, 1, 3, 3)
    assert np.allclose(intrinsics[0, 0].numpy(), expected)


# torch warns of more workers than cores
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_samples_depend_on_neither_ranks_nor_workers_nor_restarts(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params, num_workers: int
) -> None:
    manifests = [
        write_robot_data(tmp_path / name, [create_recording(first + n, 8) for n in range(3)])
        for name, first in (("a", 0), ("b", 10))
    ]
    params = create_params(
        *manifests,
        allow_multiple_epochs=True,
        num_workers=num_workers,
        augmentation=DataAugmentationParams(image=CROP),
    )

    def read(world: World, first: int, count: int) -> list[Batch]:
        loader = create_dataloader(params, world, global_batch_size=8, per_gpu_batch_size=2, seed=5)
        batches = loader.microbatches(first)
        found = [next(batches) for _ in range(count)]
        loader.close()
        return found

    alone = read(World(), 0, 16)
    if num_workers == 0:
        both = [read(World(rank=rank, local_rank=rank, world_size=2), 1, 6) for rank in range(2)]
        shared = [batch for pair in zip(*both, strict=True) for batch in pair]
        for one, other in zip(alone[4:], shared, strict=True):
            assert_same_batch(one, other)
    else:
        for one, other in zip(alone[4:8], read(World(), 1, 4), strict=True):
            assert_same_batch(one, other)
        params = create_params(
            *manifests, allow_multiple_epochs=True, num_workers=0, augmentation=DataAugmentationParams(image=CROP)
        )
        for one, other in zip(alone, read(World(), 0, 16), strict=True):
            assert_same_batch(one, other)


def test_bad_samples_are_replaced_and_counted_by_reason(
    tmp_path: Path,
    create_recording: Create,
    write_robot_data: Write,
    create_params: Params,
    read_batch: ReadBatch,
    tokenizer_folder: Path,
) -> None:
    recordings = [create_recording(number, 8) for number in range(6)]
    recordings[1].frames["wrist"][5] = b"\xff\xd8\xff rubbish"
    recordings[4].instructions = [(0, 6, {"original": ["first part"]})]
    recordings[2].fields["robot__action__grippers__left::panda_hand"][7] = np.inf
    manifest = write_robot_data(tmp_path, recordings, image_indices=[0], statistics_of=recordings[3:])
    params = create_params(manifest, max_bad_fraction=1.0, tokenizer=str(tokenizer_folder), shuffle=False)
    batch = read_batch(params, 48)
    dropped = batch["dropped"]
    # one frame is broken, the last two have no words, and the windows of frames 4 to 7 reach frame 7
    assert dropped["bad image"] >= 1
    assert dropped["no instruction"] >= 2
    assert dropped["not finite"] >= 4
    assert sum(dropped.values()) < 14  # replacements may be bad too
    assert torch.isfinite(batch["actions"]).all()
    assert len(batch["anchors"]) == 48
    names = set(zip(batch["episode_ids"], batch["anchors"].tolist(), strict=True))
    assert not names & {("episode_001", 5), ("episode_004", 6), ("episode_002", 4)}
    strict = create_params(manifest, max_bad_fraction=0.0, tokenizer=str(tokenizer_folder), shuffle=False)
    with pytest.raises(
        ValueError, match=r"data\.max_bad_fraction \(0\) allows; the last one: .*episode_00\d_t00000\d \("
    ):
        read_batch(strict, 48)
    without = create_params(
        manifest, language_instruction_types=[], tokenizer=str(tokenizer_folder), max_bad_fraction=1.0
    )
    assert read_batch(without, 48)["instructions"] == [""] * 48


def test_an_action_that_a_robot_lacks_is_masked_by_choice(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params, read_batch: ReadBatch
) -> None:
    two_arms, one_arm = create_recording(0), create_recording(1)
    for name in [name for name in one_arm.fields if "panda_hand" in name]:
        del one_arm.fields[name]
    manifests = [
        write_robot_data(tmp_path / "two", [two_arms]),
        write_robot_data(tmp_path / "one", [one_arm]),
    ]
    with pytest.raises(ValueError, match=r"data\.action_fields: field 'robot__action__grippers__left::panda_hand'"):
        read_batch(create_params(*manifests))
    batch = read_batch(create_params(*manifests, pad_missing_fields=True), 8)
    for row, episode in enumerate(batch["episode_ids"]):
        is_there = episode == "episode_000"
        assert batch["action_dim_mask"][row].tolist() == [True] * 9 + [is_there]
        assert (batch["actions"][row, :, 9] == 0).all().item() is not is_there
    # what no dataset's field list misses is no error, though one of them has more
    fields = ["robot__action__poses__left::panda__xyz_relative"]
    batch = read_batch(create_params(*manifests, action_fields=fields), 8)
    assert batch["action_dim_mask"].all()


def test_without_a_text_processor_there_are_images_and_numbers_alone(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params, read_batch: ReadBatch
) -> None:
    batch = read_batch(create_params(write_robot_data(tmp_path, [create_recording(0)])), 4)
    assert "input_ids" not in batch
    assert "documents" not in batch
    assert batch["pixel_values"].shape == (16, 3, 16, 16)
    assert batch["image_mean"] == (0.5, 0.5, 0.5)


def test_a_rank_without_samples_gets_a_row_of_padding(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params, tokenizer_folder: Path
) -> None:
    manifest = write_robot_data(tmp_path, [create_recording(0)])
    for options in ({}, {"tokenizer": str(tokenizer_folder)}):
        batch = RoboticsPipeline(create_params(manifest, **options)).create_empty_batch()
        assert batch["is_padding"].all()
        assert not batch["future_mask"].any()
        assert batch["actions"].shape == (1, 5, 10)
        assert batch["pixel_values"].shape == (4, 3, 16, 16)


def test_rules_of_fields_match_whole_names_or_patterns(
    tmp_path: Path, create_recording: Create, write_robot_data: Write, create_params: Params, read_batch: ReadBatch
) -> None:
    """A part of a name is no pattern, so that the order of rules decides nothing."""
    manifest = write_robot_data(tmp_path, [create_recording(0)])
    off = FieldNormalizationParams(enabled=False)

    def read(pattern: str) -> torch.Tensor:
        normalization = NormalizationParams(field_configs={pattern: off})
        return read_batch(create_params(manifest, normalization=normalization), 8)["actions"]

    with pytest.raises(ValueError, match=r"field_configs: field 'panda__xyz' is unknown"):
        read("panda__xyz")
    plain = read_batch(create_params(manifest, normalization=NOT_NORMALIZED), 8)["actions"]
    changed = read("*__xyz_relative")
    assert torch.equal(changed[..., :3], plain[..., :3])
    assert not torch.allclose(changed[..., 3:], plain[..., 3:])
