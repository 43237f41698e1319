"""Modality `robotics`: windows of robot episodes, stored as single windows (the published layout) or whole episodes.

Only the parts of a sample that the params need are read: the fields, their steps, and the images of the cameras and
times. Then the stages of robotics_stages.py run. Each sample is one row, padded to the longest in the microbatch.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from vla_foundry.batch import Batch
from vla_foundry.data.pipelines.image_caption import ROW_MULTIPLE, join_samples
from vla_foundry.data.pipelines.robotics_stages import (
    ChooseInstruction,
    ComputeRelativePoses,
    EncodeRobot,
    NormalizeActions,
    NormalizeProprioception,
    PrepareCameraImages,
    ReadWindow,
    encode_prompt,
    resize_images,
)
from vla_foundry.data.pipelines.stages import Rows, Sample, Stage, register_pipeline
from vla_foundry.data.reader import ShardReader
from vla_foundry.data.robotics import complete_params, create_normalization, read_specs, save_robotics_files
from vla_foundry.images.processor import Processor
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.robotics.windows import RobotWindow
from vla_foundry.text.chat_template import IMAGE_MARKER, Turn


class RoboticsPipeline:
    """Makes batches of robot samples.

    Args:
        params: the data params; unresolved values are taken from the training datasets.
        stages: stages that turn windows into `inputs` and `actions`, ending with `EncodeRobot`; None: the default ones.
    """

    rows_per_message = 1

    def __init__(self, params: RoboticsDataParams, stages: Sequence[Stage] | None = None) -> None:
        self.params = complete_params(params)
        self.normalizer = create_normalization(self.params, read_specs(self.params.dataset_manifest)).normalizer
        self.encode = EncodeRobot(self.params)
        self.actions = NormalizeActions(self.params, self.normalizer)
        self.proprioception = NormalizeProprioception(self.params, self.normalizer)
        default: tuple[Stage, ...] = (ComputeRelativePoses(), self.actions, self.proprioception)
        if self.params.use_language:
            default = (*default, ChooseInstruction(self.params))
        default = (*default, PrepareCameraImages(self.params), self.encode)
        self.stages = default if stages is None else tuple(stages)
        self.read = ReadWindow([])

    def check(self, reader: ShardReader) -> None:
        """See Pipeline. Load the processor, and check the params against the specs of the datasets."""
        self.encode.load()
        datasets = read_specs([dataset.manifest for dataset in reader.datasets])
        self.params.check_specs(datasets)
        self.read = ReadWindow([self.params.create_window_spec(dataset) for dataset in datasets])

    def save_files(self, folder: Path) -> None:
        """Write the normalizer, its statistics and the spec of fields and cameras."""
        save_robotics_files(self.params, folder)

    def create_batch(self, rows: Rows) -> Batch:
        """See Pipeline."""
        return self._join(rows.read_samples(self.stages, read=self.read))

    def create_empty_batch(self) -> Batch:
        """See Pipeline. The batch has one sample with black images, whose steps are all padding."""
        window, num_images = self.params.window, len(self.params.image_names)
        black = [torch.zeros((3, 8, 8), dtype=torch.uint8)] * num_images
        processor = self.encode.load()
        turns = [Turn("user", IMAGE_MARKER * num_images + "a")]
        num_actions, num_observed = self.actions.transform.select.width, self.proprioception.transform.select.width
        is_padding = np.ones(window.num_steps, dtype=bool)
        empty = RobotWindow(
            episode_id="",
            anchor=0,
            fields={},
            past_mask=~is_padding,
            future_mask=~is_padding,
            is_padding=is_padding,
            images=[],
            instructions={},
        )
        sample: Sample = {
            "__url__": "",
            "instruction": "",
            "inputs": resize_images(black, self.params)
            if processor is None
            else encode_prompt(black, turns, processor),
            "image_mask": np.ones(num_images, dtype=bool),
            "actions": np.zeros((window.num_steps, num_actions), dtype=np.float32),
            "action_dim_mask": np.ones(num_actions, dtype=bool),
            "window": empty,
        }
        if num_observed:
            sample["proprioception"] = np.zeros((window.anchor + 1, num_observed), dtype=np.float32)
        if self.params.intrinsics_fields:
            sample["intrinsics"] = np.stack([np.eye(3, dtype=np.float32)] * len(self.params.intrinsics_fields))
        if self.params.extrinsics_fields:
            sample["extrinsics"] = np.stack([np.eye(4, dtype=np.float32)] * len(self.params.extrinsics_fields))
        return self._join([sample])

    def _join(self, samples: Sequence[Sample]) -> Batch:
        return join_robot_samples(samples, self.encode.load(), self.params)


def join_robot_samples(samples: Sequence[Sample], processor: Processor | None, params: RoboticsDataParams) -> Batch:
    """Join samples into a batch, one row each.

    Args:
        samples: output of the stages.
        processor: the processor that encoded the samples; None without language.
        params: the data params.
    """
    if processor is None:
        images = [image for sample in samples for image in sample["inputs"]["pixel_values"]]
        batch: Batch = {"pixel_values": _stack_images(images, params)}
        batch["image_mean"], batch["image_std"] = tuple(params.image_mean), tuple(params.image_std)
        if "color_factors" in samples[0]:
            factors = np.stack([sample["color_factors"] for sample in samples])
            batch["color_factors"] = np.repeat(factors, len(params.image_names), axis=0)
    else:
        longest = max(len(sample["inputs"]["input_ids"]) for sample in samples)
        rows = [[number] for number in range(len(samples))]
        batch = join_samples(samples, rows, -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE, processor=processor)
    windows: list[RobotWindow] = [sample["window"] for sample in samples]
    for name in ("actions", "proprioception", "action_dim_mask", "image_mask", "intrinsics", "extrinsics"):
        if name in samples[0]:
            batch[name] = np.stack([sample[name] for sample in samples])
    for name in ("past_mask", "future_mask", "is_padding"):
        batch[name] = np.stack([getattr(window, name) for window in windows])
    batch["episode_ids"] = [window.episode_id for window in windows]
    batch["anchors"] = np.asarray([window.anchor for window in windows], dtype=np.int64)
    batch["shards"] = [sample["__url__"] for sample in samples]
    batch["instructions"] = [sample.get("instruction", "") for sample in samples]
    return batch


def _stack_images(images: Sequence[UInt8[Tensor, "3 H W"]], params: RoboticsDataParams) -> UInt8[Tensor, "N 3 H W"]:
    """Stack images of one size in a single copy, keeping channels last in memory."""
    if not images:
        assert params.image_size is not None, "resolve derives data.image_size"
        return torch.zeros((0, 3, params.image_size, params.image_size), dtype=torch.uint8)
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


@register_pipeline("robotics")
def create_robotics_pipeline(params: DataParams) -> RoboticsPipeline:
    """Create the pipeline for robot data."""
    assert isinstance(params, RoboticsDataParams), "modality robotics needs data.type robotics"
    return RoboticsPipeline(params)
