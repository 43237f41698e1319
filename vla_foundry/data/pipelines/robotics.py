"""Modality `robotics`: windows of robot episodes, from single windows (published) or whole episodes alike.

A sample is read as far as the params ask for it: the arrays of the fields, their steps, and the images of the cameras
and times. Then come the stages below. Every sample is a row of its own, filled up to the longest of the microbatch.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vla_foundry.batch import Batch
from vla_foundry.data.pipelines.image_caption import ROW_MULTIPLE, create_image_processor, join_samples
from vla_foundry.data.pipelines.stages import Dropped, Rows, Sample, Stage, register_pipeline
from vla_foundry.data.reader import EpisodeShard, SampleShard, Shard, ShardReader
from vla_foundry.data.robotics import inputs
from vla_foundry.data.robotics.datasets import complete_params, read_specs
from vla_foundry.data.robotics.field_stages import (
    ComputeRelativePoses,
    NormalizeActions,
    NormalizeProprioception,
    make_fields_at_once,
)
from vla_foundry.data.robotics.files import save_robotics_files
from vla_foundry.data.robotics.normalizer import create_normalization
from vla_foundry.data.robotics.windows import (
    RobotWindow,
    WindowRequest,
    create_request,
    read_episode_window,
    read_published_window,
)
from vla_foundry.images.augment import CENTRE, draw_augmentation, draw_color_factors
from vla_foundry.images.processor import Processor
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.text.chat_template import IMAGE_MARKER, Turn


class ReadWindow:
    """Reads what the stages begin with: `window`, a RobotWindow, and `request`, what was asked of its dataset.

    Args:
        requests: what is read of each dataset.
    """

    def __init__(self, requests: Sequence[WindowRequest]) -> None:
        self.requests = tuple(requests)

    def __call__(self, dataset: int, shard: Shard, row: int) -> Sample:
        """Read a row of a shard.

        Raises:
            ValueError: it lacks what is asked for, or is broken.
        """
        request = self.requests[dataset]
        if isinstance(shard, EpisodeShard):
            return {"window": read_episode_window(shard, row, request), "request": request}
        if isinstance(shard, SampleShard):
            return {"window": read_published_window(shard, row, request), "request": request}
        raise ValueError("it holds tokens, not robot samples")


class ChooseInstruction:
    """A stage: `window` -> `instruction`, and `turns`, a prompt around it.

    Args:
        params: kinds of instructions and prompts.
        types: the kinds; those of params if not given.
    """

    def __init__(self, params: RoboticsDataParams, types: Sequence[str] | None = None) -> None:
        self.types = tuple(params.language_instruction_types if types is None else types)
        self.prompts = tuple(params.prompts)

    def __call__(self, sample: Sample) -> Sample:
        """Draw both by the sample's position.

        Raises:
            Dropped: the sample has no instruction of these kinds.
        """
        window: RobotWindow = sample["window"]
        seed, position = sample["__seed__"], sample["__position__"]
        try:
            chosen = inputs.choose_instruction(window.instructions, self.types, seed=seed, position=position)
        except ValueError as error:
            raise Dropped("no instruction", str(error)) from None
        turns = inputs.create_instruction_turns(
            chosen, self.prompts, num_images=len(window.images), seed=seed, position=position
        )
        return {**sample, "instruction": chosen, "turns": turns}


class PrepareCameraImages:
    """A stage: `window` -> `images`, `image_mask`, `image_maps`, and `color_factors` while training.

    Args:
        params: what is done to images, and to missing ones.
    """

    def __init__(self, params: RoboticsDataParams) -> None:
        self.augmentation = params.augmentation.image if params.augmentation.enabled else None
        self.names = params.image_names
        self.pads, self.masks = params.pad_missing_images, params.mask_padded_images

    def __call__(self, sample: Sample) -> Sample:
        """Decode and augment: one draw for all cameras and times.

        Raises:
            Dropped: an image is missing or can not be used.
        """
        window: RobotWindow = sample["window"]
        request: WindowRequest = sample["request"]
        is_there = np.asarray([image is not None for image in window.images], dtype=bool)
        if not self.pads and not is_there.all():
            missing = self.names[int(np.argmin(is_there))]
            raise Dropped("missing image", f"it has no image {missing}; data.pad_missing_images would make it black")
        is_training, draw = sample["__is_training__"], CENTRE
        if is_training and self.augmentation is not None:
            draw = draw_augmentation(seed=sample["__seed__"], position=sample["__position__"])
        try:
            images, maps = inputs.prepare_camera_images(window.images, request.image_sizes, self.augmentation, draw)
        except ValueError as error:
            raise Dropped("bad image", str(error)) from None
        mask = is_there if self.masks else np.ones_like(is_there)
        sample = {**sample, "images": images, "image_maps": maps, "image_mask": mask}
        if is_training and self.augmentation is not None and self.augmentation.color_jitter.enabled:
            sample["color_factors"] = draw_color_factors(self.augmentation.color_jitter, draw)
        return sample


class EncodeRobot:
    """A stage: `images` and `turns` -> `inputs`, and `intrinsics` of the images as the model gets them.

    Args:
        params: of the processor.
        processor: the processor; loaded as params say if it is not given.
    """

    def __init__(self, params: RoboticsDataParams, processor: Processor | None = None) -> None:
        self.params = params
        self.max_tokens = params.max_text_seq_len or params.seq_len
        self.camera_names = params.camera_names or []
        self._processor = processor

    def __getstate__(self) -> dict[str, object]:
        """Let each loader process load its own processor."""
        return {**self.__dict__, "_processor": None}

    def load(self) -> Processor | None:
        """Return the processor, loaded when it is first asked for; None without language.

        Raises:
            ValueError: it can not be loaded.
        """
        if self._processor is None and self.params.use_language:
            self._processor = create_image_processor(self.params)
        return self._processor

    def __call__(self, sample: Sample) -> Sample:
        """Encode.

        Raises:
            Dropped: the row is too long.
            ValueError: it can not be encoded.
        """
        processor = self.load()
        if processor is None:
            pixels, maps = inputs.resize_images(sample["images"], self.params)
            encoded = {"pixel_values": pixels, "pixel_maps": maps}
        else:
            encoded = inputs.encode_prompt(sample["images"], sample["turns"], processor)
            if len(encoded["input_ids"]) > self.max_tokens:
                raise Dropped("too long", f"{len(encoded['input_ids'])} tokens do not fit into {self.max_tokens}")
        sample = {**sample, "inputs": encoded}
        window: RobotWindow = sample["window"]
        for key, names in (
            ("intrinsics", self.params.intrinsics_fields),
            ("extrinsics", self.params.extrinsics_fields),
        ):
            if names:
                values = [self._place(name, window.calibration[name], sample) for name in names]
                sample[key] = np.stack(values).astype(np.float32)
        return sample

    def _place(self, name: str, values: np.ndarray, sample: Sample) -> np.ndarray:
        """Let the intrinsics of a stored image follow what was done to it since."""
        kind, _, camera = name.partition(".")
        if kind not in ("intrinsics", "rescaled_intrinsics") or camera not in self.camera_names:
            return values
        if "pixel_maps" not in sample["inputs"]:
            raise ValueError(f"data.intrinsics_fields: '{name}' can not follow how data.processor cuts images")
        # the last time; all images of a camera went the same way
        number = len(sample["images"]) - len(self.camera_names) + self.camera_names.index(camera)
        return inputs.follow_images(values, sample["image_maps"][number], sample["inputs"]["pixel_maps"][number])


class RoboticsPipeline:
    """Makes batches of robot samples.

    Args:
        params: the data's params; what is not resolved is taken from the training datasets.
        stages: what turns windows into `inputs` and `actions`; the default ones if not given: those of
            robotics/field_stages.py and of this file. Give `EncodeRobot` last.
    """

    rows_per_message = 1

    def __init__(self, params: RoboticsDataParams, stages: Sequence[Stage] | None = None) -> None:
        self.params = complete_params(params)
        self.normalizer = create_normalization(self.params, read_specs(self.params.dataset_manifest)).normalizer
        self.encode = EncodeRobot(self.params)
        self.make_fields = (
            ComputeRelativePoses(),
            NormalizeActions(self.params, self.normalizer),
            NormalizeProprioception(self.params, self.normalizer),
        )
        self.make_inputs: tuple[Stage, ...] = (PrepareCameraImages(self.params), self.encode)
        if self.params.use_language:
            self.make_inputs = (ChooseInstruction(self.params), *self.make_inputs)
        # None: the default ones, of which those of fields are applied to a whole microbatch at once
        self.stages = None if stages is None else tuple(stages)
        self.read = ReadWindow([])

    def check(self, reader: ShardReader) -> None:
        """See Pipeline: load the processor, and compare what is asked for with what the datasets say of themselves."""
        self.encode.load()
        datasets = read_specs([dataset.manifest for dataset in reader.datasets])
        self.params.check_specs(datasets)
        self.read = ReadWindow([create_request(self.params, dataset) for dataset in datasets])

    def save_files(self, folder: Path) -> None:
        """Write the normalizer, its statistics and what the fields and cameras mean."""
        save_robotics_files(self.params, folder)

    def create_batch(self, rows: Rows) -> Batch:
        """See Pipeline."""
        if self.stages is None:
            samples = rows.read_samples(self.make_inputs, read=self.read)
            try:
                return self._join(make_fields_at_once(samples, *self.make_fields))
            except ValueError:
                # one of them is bad: which, and what stands in for it, is found sample by sample
                rows.drops.forget()
        stages = self.stages or (*self.make_fields, *self.make_inputs)
        return self._join(rows.read_samples(stages, read=self.read))

    def create_empty_batch(self) -> Batch:
        """See Pipeline. One sample of black images, of which every step is padding."""
        window, num_images = self.params.window, len(self.params.image_names)
        black = [torch.zeros((3, 8, 8), dtype=torch.uint8)] * num_images
        processor = self.encode.load()
        turns = [Turn("user", IMAGE_MARKER * num_images + "a")]
        actions = self.normalizer.layout(self.params.action_fields)
        proprioception = self.normalizer.layout(self.params.proprioception_fields)
        is_padding = np.ones(window.num_steps, dtype=bool)
        sample: Sample = {
            "__url__": "",
            "instruction": "",
            "inputs": (
                {"pixel_values": inputs.resize_images(black, self.params)[0]}
                if processor is None
                else inputs.encode_prompt(black, turns, processor)
            ),
            "image_mask": np.ones(num_images, dtype=bool),
            "actions": np.zeros((window.num_steps, actions.width), dtype=np.float32),
            "action_dim_mask": np.ones(actions.width, dtype=bool),
            "window": RobotWindow(
                episode_id="",
                anchor=0,
                fields={},
                past_mask=~is_padding,
                future_mask=~is_padding,
                is_padding=is_padding,
                images=[],
                instructions={},
            ),
        }
        if proprioception.fields:
            sample["proprioception"] = np.zeros((window.anchor + 1, proprioception.width), dtype=np.float32)
        if self.params.intrinsics_fields:
            sample["intrinsics"] = np.stack([np.eye(3, dtype=np.float32)] * len(self.params.intrinsics_fields))
        if self.params.extrinsics_fields:
            sample["extrinsics"] = np.stack([np.eye(4, dtype=np.float32)] * len(self.params.extrinsics_fields))
        return self._join([sample])

    def _join(self, samples: Sequence[Sample]) -> Batch:
        return join_robot_samples(samples, self.encode.load(), self.params)


def join_robot_samples(samples: Sequence[Sample], processor: Processor | None, params: RoboticsDataParams) -> Batch:
    """Put samples side by side, each a row.

    Args:
        samples: what the stages made.
        processor: what encoded them; None without language.
        params: of the data.
    """
    if processor is None:
        images = [image for sample in samples for image in sample["inputs"]["pixel_values"]]
        batch: Batch = {"pixel_values": inputs.stack_images(images, params)}
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


@register_pipeline("robotics")
def create_robotics_pipeline(params: DataParams) -> RoboticsPipeline:
    """Create the pipeline of robot data."""
    assert isinstance(params, RoboticsDataParams), "modality robotics needs data.type robotics"
    return RoboticsPipeline(params)
