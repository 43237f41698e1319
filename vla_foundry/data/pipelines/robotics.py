"""Modality `robotics`: windows of robot episodes, stored as single windows (the published layout) or whole episodes.

Only the parts of a sample that the params need are read: the fields, their steps, and the images of the cameras and
times. Then stages turn a window into images, tokens and normalized numbers. Training and inference use the same stages.
Field stages process a whole microbatch at once, the others one sample at a time. Each sample is one row, padded to the
longest in the microbatch. Images are files in training; at inference they may also be uint8 tensors [3, H, W].
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_foundry.batch import Batch
from vla_foundry.data.pipelines.augment import add_images
from vla_foundry.data.pipelines.image_caption import Encode
from vla_foundry.data.pipelines.rows import ROW_MULTIPLE, join_samples
from vla_foundry.data.pipelines.stages import BatchStage, Dropped, Pipeline, Rows, Sample, Stage, register_pipeline
from vla_foundry.data.reader import EpisodeShard, SampleShard, Shard, ShardReader
from vla_foundry.data.robotics import complete_params, create_normalization, read_specs, save_robotics_files
from vla_foundry.images.geometry import Interpolation, resize_image
from vla_foundry.images.processor import Processor
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.randomness import draw_index
from vla_foundry.robotics.fields import Window
from vla_foundry.robotics.fit import WindowSpec
from vla_foundry.robotics.normalization import RoboticsNormalizer
from vla_foundry.robotics.transforms import FieldTransform, RelativePoses
from vla_foundry.robotics.windows import RobotWindow, read_episode_window, read_sample_window
from vla_foundry.text.chat import IMAGE_MARKER, Turn, create_user_turn


class ReadWindow:
    """Reads the input of the first stage: `window`, a RobotWindow, and `window_spec`, the WindowSpec of its dataset.

    Args:
        specs: what to read from each dataset.
    """

    def __init__(self, specs: Sequence[WindowSpec]) -> None:
        self.specs = tuple(specs)

    def __call__(self, dataset: int, shard: Shard, row: int) -> Sample:
        """Read one row of a shard.

        Raises:
            ValueError: the row lacks something the spec requires, or is malformed.
        """
        spec = self.specs[dataset]
        if isinstance(shard, EpisodeShard):
            number, anchor = shard.locate(row)
            episode = shard.episode(number)

            def read_frame(camera: str, frame: int) -> bytes | None:
                return shard.read_frame(number, camera, frame)

            window = read_episode_window(episode.info, episode.arrays, anchor, read_frame, spec)
        elif isinstance(shard, SampleShard):
            window = read_sample_window(shard.members(row), shard.read_member, spec)
        else:
            raise ValueError("it holds tokens, not robot samples")
        return {"window": window, "window_spec": spec}


class _FieldStage(BatchStage):
    """A stage on the fields of windows that processes all samples of a dataset at once.

    A window is so small that NumPy's call overhead exceeds the computation: batching takes a fifth of the time. The
    results are bit-identical.
    """

    def apply(self, samples: Sequence[Sample]) -> list[Sample | ValueError]:
        """See BatchStage."""
        results: dict[int, Sample | ValueError] = {}
        for key in dict.fromkeys(id(sample["window_spec"]) for sample in samples):
            numbers = [number for number, sample in enumerate(samples) if id(sample["window_spec"]) == key]
            results |= zip(numbers, self.apply_to_dataset([samples[number] for number in numbers]), strict=True)
        return [results[number] for number in range(len(samples))]

    @abstractmethod
    def apply_to_dataset(self, samples: Sequence[Sample]) -> list[Sample | ValueError]:
        """Return the result for each sample of one dataset.

        Raises:
            ValueError: one of the samples cannot be used.
        """


class ComputeRelativePoses(_FieldStage):
    """A stage: adds the relative fields that are not stored to `window`."""

    def apply_to_dataset(self, samples: Sequence[Sample]) -> list[Sample | ValueError]:
        """Compute the relative fields.

        Raises:
            ValueError: a field does not hold a pose.
        """
        spec: WindowSpec = samples[0]["window_spec"]
        if not spec.pose_groups:
            return list(samples)
        windows: list[RobotWindow] = [sample["window"] for sample in samples]
        fields = _stack_fields(windows, spec.stored)
        # at inference the fields end at the anchor: the steps to predict have no values
        num_steps = fields[spec.pose_groups[0].position_key].shape[-2]
        is_padding = np.stack([window.is_padding for window in windows])[:, :num_steps]
        relative = RelativePoses(spec.pose_groups, spec.window.anchor, spec.padding).apply(fields, is_padding)
        return [
            {
                **sample,
                "window": replace(
                    window, fields=window.fields | {name: values[row] for name, values in relative.items()}
                ),
            }
            for row, (sample, window) in enumerate(zip(samples, windows, strict=True))
        ]


class NormalizeFields(_FieldStage):
    """A stage: `window` -> one array of normalized fields.

    Args:
        key: where the array goes.
        fields: the fields, in column order; none: nothing is added.
        normalizer: normalizer of these fields.
        window: the steps to keep; later ones are cut off.
        mask_key: where the mask of the columns that the robot has goes; None: nowhere.
        width: columns of the array, the last of which are padding; None: those of the fields.
    """

    def __init__(
        self,
        key: str,
        fields: Sequence[str],
        normalizer: RoboticsNormalizer,
        window: Window,
        *,
        mask_key: str | None = None,
        width: int | None = None,
    ) -> None:
        self.key, self.mask_key = key, mask_key
        self.num_steps = window.num_steps
        self.transform = FieldTransform.create(fields, normalizer, anchor=window.anchor, width=width)

    def apply_to_dataset(self, samples: Sequence[Sample]) -> list[Sample | ValueError]:
        """Normalize; drop samples with values that are not finite.

        Raises:
            ValueError: a field has the wrong width, or the robot has none of the fields.
        """
        if not self.transform.select.fields and self.mask_key is None:
            padding = self.transform.select.padding
            zeros = np.zeros((self.num_steps, padding), np.float32)
            return [{**sample, self.key: zeros} for sample in samples] if padding else list(samples)
        fields = _stack_fields([sample["window"] for sample in samples], self.transform.select.fields)
        used = {name: values[:, : self.num_steps] for name, values in fields.items()}
        normalized, mask = self.transform.apply(used)
        masks = {} if self.mask_key is None else {self.mask_key: mask}
        made = [{**sample, self.key: row, **masks} for sample, row in zip(samples, normalized, strict=True)]
        return _drop_infinite(made, normalized, self.transform)


def _stack_fields(windows: Sequence[RobotWindow], names: Iterable[str]) -> dict[str, np.ndarray]:
    """Stack each field over the windows: (N, T, C)."""
    there = [name for name in names if name in windows[0].fields]
    return {name: np.stack([window.fields[name] for window in windows]) for name in there}


def _drop_infinite(
    samples: Sequence[Sample], values: np.ndarray, transform: FieldTransform
) -> list[Sample | ValueError]:
    """Return the samples, dropping those with a value (N, T, C) that is not finite."""
    if np.isfinite(values).all():
        return list(samples)
    results: list[Sample | ValueError] = []
    for sample, row in zip(samples, values, strict=True):
        finite = transform.select.invert(np.isfinite(row).all(axis=0))
        bad = next((name for name, columns in finite.items() if not columns.all()), None)
        results.append(sample if bad is None else Dropped("not finite", f"field '{bad}' holds NaN or infinity"))
    return results


class ChooseInstruction:
    """A stage: `window` -> `instruction`, and `turns`, a prompt that contains it.

    Args:
        params: the data params, which give the instruction types and prompts.
        types: instruction types; None: those of the params.
    """

    def __init__(self, params: RoboticsDataParams, types: Sequence[str] | None = None) -> None:
        self.types = tuple(params.language_instruction_types if types is None else types)
        self.prompts = tuple(params.prompts)

    def __call__(self, sample: Sample) -> Sample:
        """Draw both, keyed by the sample's position; every instruction is equally likely.

        Raises:
            Dropped: the sample has no instruction of these types.
        """
        window: RobotWindow = sample["window"]
        seed, position = sample["__seed__"], sample["__position__"]
        found = [text for name in self.types for text in window.instructions.get(name, ())]
        chosen = ""
        if self.types:
            if not found:
                known = ", ".join(sorted(window.instructions)) or "none"
                kinds = ", ".join(self.types)
                raise Dropped("no instruction", f"it has no instruction of the types {kinds}, but {known}")
            chosen = found[draw_index(len(found), seed=seed, position=position, purpose="robotics.instruction")]
            if "\0" in chosen:
                raise Dropped("damaged text", "its instruction has NUL characters")
        num_images, fields = len(window.images), {"instruction": chosen}
        turn = create_user_turn(self.prompts, fields, num_images=num_images, seed=seed, position=position)
        return {**sample, "instruction": chosen, "turns": [turn]}


class PrepareCameraImages:
    """A stage: `window` -> `images`, `image_mask`, `image_maps`, and `color_factors` in training.

    Args:
        params: the data params, which define image augmentation and the handling of missing images.
    """

    def __init__(self, params: RoboticsDataParams) -> None:
        self.augmentation = params.augmentation
        self.names = params.image_names
        self.depth = params.depth_ranges
        self.pads, self.masks = params.pad_missing_images, params.mask_padded_images

    def __call__(self, sample: Sample) -> Sample:
        """Decode and augment, with one draw for all cameras and times.

        Raises:
            Dropped: an image is missing or cannot be used.
        """
        window: RobotWindow = sample["window"]
        spec: WindowSpec = sample["window_spec"]
        is_there = np.asarray([image is not None for image in window.images], dtype=bool)
        if not self.pads and not is_there.all():
            missing = self.names[int(np.argmin(is_there))]
            raise Dropped("missing image", f"it has no image {missing}; data.pad_missing_images would make it black")
        files = [
            torch.zeros((3, *size), dtype=torch.uint8) if image is None else image
            for image, size in zip(window.images, spec.image_sizes, strict=True)
        ]
        mask = is_there if self.masks else np.ones_like(is_there)
        return {**add_images(sample, files, self.augmentation, self.depth), "image_mask": mask}


class EncodeRobot(Encode):
    """A stage: `images` and `turns` -> `inputs`, and `intrinsics` for the pixels the model gets.

    Args:
        params: the data params, which describe the processor.
        processor: the processor; None: load the one that the params describe.
    """

    def __init__(self, params: RoboticsDataParams, processor: Processor | None = None) -> None:
        super().__init__(params, max_tokens=params.max_text_seq_len or params.seq_len, processor=processor)
        self.params = params
        self.camera_names = params.camera_names or []

    def processor(self) -> Processor | None:
        """Return the processor, loading it on first use; None without language."""
        return self.load() if self.params.use_language else None

    def __call__(self, sample: Sample) -> Sample:
        """Encode the sample.

        Raises:
            Dropped: the row is too long.
            ValueError: the sample cannot be encoded.
        """
        encoded = encode_window(sample["images"], sample.get("turns", ()), self.processor(), self.params)
        if len(encoded.get("input_ids", ())) > self.max_tokens:
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
        # decoded images are large: they must not wait for the rest of the microbatch
        return {**sample, "images": None}

    def _place(self, name: str, values: np.ndarray, sample: Sample) -> np.ndarray:
        """Return a stored image's intrinsics after augmentation and resizing to the model's input size."""
        kind, _, camera = name.partition(".")
        if kind not in ("intrinsics", "rescaled_intrinsics") or camera not in self.camera_names:
            return values
        if "pixel_maps" not in sample["inputs"]:
            raise ValueError(f"data.intrinsics_fields: '{name}' cannot follow how data.processor cuts images")
        # the camera's image at the last time; all its images share one pixel map
        number = len(sample["images"]) - len(self.camera_names) + self.camera_names.index(camera)
        augmented, encoded = sample["image_maps"][number], sample["inputs"]["pixel_maps"][number]
        return augmented.then(encoded).map_intrinsics(values)


def encode_window(
    images: Sequence[Tensor], turns: Sequence[Turn], processor: Processor | None, params: RoboticsDataParams
) -> dict[str, Any]:
    """Return the model's inputs, without language only images, uint8 [3, H, W], and their pixel maps.

    No prompt token is supervised. The nearest pixel is taken of depth, because a mean of distances measures nothing.
    """
    nearest = [limits is not None for limits in params.depth_ranges]
    if processor is not None:
        inputs = processor.encode(images, turns, nearest=nearest)
        return {name: value for name, value in inputs.items() if name != "target_mask"}
    assert params.image_size is not None, "resolve derives data.image_size"
    size, method = (params.image_size, params.image_size), params.image_resizing_method
    kinds: list[Interpolation] = ["nearest" if is_depth else params.image_interpolation for is_depth in nearest]
    resized = [
        resize_image(each, size, method=method, interpolation=kind) for each, kind in zip(images, kinds, strict=True)
    ]
    return {"pixel_values": [image for image, _ in resized], "pixel_maps": [pixel_map for _, pixel_map in resized]}


def create_proprioception_stage(params: RoboticsDataParams, normalizer: RoboticsNormalizer) -> NormalizeFields:
    """Create the stage for the observed steps: those after the anchor are still to come."""
    observed, width = Window(params.window.past, 0), params.padded_proprioception_dim
    return NormalizeFields("proprioception", params.proprioception_fields, normalizer, observed, width=width)


class RoboticsPipeline(Pipeline):
    """Makes batches of robot samples.

    Args:
        params: the data params; unresolved values are taken from the training datasets.
        stages: stages that turn windows into `inputs` and `actions`, ending with `EncodeRobot`; None: the default ones.
    """

    def __init__(self, params: RoboticsDataParams, stages: Sequence[Stage] | None = None) -> None:
        self.params = complete_params(params)
        self.normalizer = create_normalization(self.params, read_specs(self.params.dataset_manifest)).normalizer
        self.encode = EncodeRobot(self.params)
        window, normalizer = self.params.window, self.normalizer
        fields, width = self.params.action_fields, self.params.padded_action_dim
        self.actions = NormalizeFields("actions", fields, normalizer, window, mask_key="action_dim_mask", width=width)
        self.proprioception = create_proprioception_stage(self.params, normalizer)
        default: tuple[Stage, ...] = (ComputeRelativePoses(), self.actions, self.proprioception)
        if self.params.use_language:
            default = (*default, ChooseInstruction(self.params))
        default = (*default, PrepareCameraImages(self.params), self.encode)
        self.stages = self.name_stages(self.params, default) if stages is None else stages
        self.read = ReadWindow([])

    def check(self, reader: ShardReader) -> None:
        """See Pipeline. Load the processor, and check the params against the specs of the datasets."""
        self.encode.processor()
        datasets = read_specs([dataset.manifest for dataset in reader.datasets])
        self.params.check_specs(datasets)
        self.read = ReadWindow([self.params.create_window_spec(dataset) for dataset in datasets])
        self.images_of_windows = [(spec.cameras, spec.image_indices) for spec in self.read.specs]

    def save_files(self, folder: Path) -> None:
        """Write the normalizer, its statistics and the spec of fields and cameras."""
        save_robotics_files(self.params, folder)

    def create_batch(self, rows: Rows) -> Batch:
        """See Pipeline."""
        samples = rows.read_samples(self.stages, read=self.read)
        return join_robot_samples(samples, self.encode.processor(), self.params)

    def create_empty_batch(self) -> Batch:
        """See Pipeline. The batch has one sample with black images, whose steps are all padding."""
        window, num_images, processor = self.params.window, len(self.params.image_names), self.encode.processor()
        black = [torch.zeros((3, 8, 8), dtype=torch.uint8)] * num_images
        turns = [Turn("user", IMAGE_MARKER * num_images + "a")]
        num_actions, num_observed = self.actions.transform.select.width, self.proprioception.transform.select.width
        all_steps = np.ones(window.num_steps, dtype=bool)
        sample: Sample = {
            "__url__": "",
            "inputs": encode_window(black, turns, processor, self.params),
            "image_mask": np.ones(num_images, dtype=bool),
            "actions": np.zeros((window.num_steps, num_actions), dtype=np.float32),
            "action_dim_mask": np.ones(num_actions, dtype=bool),
            "window": RobotWindow(
                episode_id="",
                anchor=0,
                fields={},
                past_mask=~all_steps,
                future_mask=~all_steps,
                is_padding=all_steps,
                images=[],
                instructions={},
            ),
        }
        if num_observed:
            sample["proprioception"] = np.zeros((window.anchor + 1, num_observed), dtype=np.float32)
        for key, names, side in (
            ("intrinsics", self.params.intrinsics_fields, 3),
            ("extrinsics", self.params.extrinsics_fields, 4),
        ):
            if names:
                sample[key] = np.stack([np.eye(side, dtype=np.float32)] * len(names))
        return join_robot_samples([sample], processor, self.params)


def join_robot_samples(samples: Sequence[Sample], processor: Processor | None, params: RoboticsDataParams) -> Batch:
    """Join samples into a batch, one row each.

    Args:
        samples: output of the stages.
        processor: the processor that encoded the samples; None without language.
        params: the data params.
    """
    if processor is None:
        assert params.image_size is not None, "resolve derives data.image_size"
        images = [image.permute(1, 2, 0) for sample in samples for image in sample["inputs"]["pixel_values"]]
        none = torch.zeros((0, params.image_size, params.image_size, 3), dtype=torch.uint8)
        # a single copy, which keeps channels last in memory
        batch: Batch = {"pixel_values": (torch.stack(images) if images else none).permute(0, 3, 1, 2)}
        batch["image_mean"], batch["image_std"] = params.colors
        if "color_factors" in samples[0]:
            shape = (len(params.image_names), 4)
            factors = [np.broadcast_to(sample["color_factors"], shape) for sample in samples]
            batch["color_factors"] = np.concatenate(factors)
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
    """Create the pipeline for robot data."""
    assert isinstance(params, RoboticsDataParams), "modality robotics needs data.type robotics"
    return RoboticsPipeline(params)
