"""Stages that turn a window of a robot episode into images, tokens and normalized numbers.

Training and inference use the same stages. Field stages process a whole microbatch at once, the others one sample at a
time. Images are files in training and uint8 tensors [3, H, W] at inference.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_foundry.data.pipelines.image_caption import create_image_processor
from vla_foundry.data.pipelines.stages import BatchStage, Dropped, Sample
from vla_foundry.data.reader import EpisodeShard, SampleShard, Shard
from vla_foundry.images.augment import CENTRE, draw_augmentation, draw_color_factors, prepare_images
from vla_foundry.images.processor import Processor
from vla_foundry.images.resize import resize_image
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.randomness import draw_index
from vla_foundry.robotics.fit import WindowSpec
from vla_foundry.robotics.normalization import RoboticsNormalizer
from vla_foundry.robotics.transforms import FieldTransform, RelativePoses
from vla_foundry.robotics.windows import RobotWindow, read_episode_window, read_sample_window
from vla_foundry.text.chat_template import Turn, create_user_turn


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
            made = self._apply_to_some([samples[number] for number in numbers])
            results |= zip(numbers, made, strict=True)
        return [results[number] for number in range(len(samples))]

    def _apply_to_some(self, samples: Sequence[Sample]) -> list[Sample | ValueError]:
        """Apply the stage; if it fails, find the faulty samples by bisection."""
        try:
            return self.apply_to_dataset(samples)
        except ValueError as error:
            if len(samples) == 1:
                return [error]
            middle = len(samples) // 2
            return [*self._apply_to_some(samples[:middle]), *self._apply_to_some(samples[middle:])]

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


class NormalizeActions(_FieldStage):
    """A stage: `window` -> `actions` for all steps, and `action_dim_mask`.

    Args:
        params: the data params, which name the fields.
        normalizer: normalizer of these fields.
    """

    def __init__(self, params: RoboticsDataParams, normalizer: RoboticsNormalizer) -> None:
        self.transform = FieldTransform.create(params.action_fields, normalizer, anchor=params.window.anchor)

    def apply_to_dataset(self, samples: Sequence[Sample]) -> list[Sample | ValueError]:
        """Normalize; drop samples with values that are not finite.

        Raises:
            ValueError: a field has the wrong width, or the robot has none of the fields.
        """
        fields = _stack_fields([sample["window"] for sample in samples], self.transform.select.fields)
        actions, mask = self.transform.apply(fields)
        made = [
            {**sample, "actions": row, "action_dim_mask": mask} for sample, row in zip(samples, actions, strict=True)
        ]
        return _drop_infinite(made, actions, self.transform)


class NormalizeProprioception(_FieldStage):
    """A stage: `window` -> `proprioception` for the steps up to the anchor, if the params name such fields.

    Args:
        params: the data params, which name the fields.
        normalizer: normalizer of these fields.
    """

    def __init__(self, params: RoboticsDataParams, normalizer: RoboticsNormalizer) -> None:
        self.transform = FieldTransform.create(params.proprioception_fields, normalizer, anchor=params.window.anchor)

    def apply_to_dataset(self, samples: Sequence[Sample]) -> list[Sample | ValueError]:
        """Normalize; drop samples with values that are not finite.

        Raises:
            ValueError: a field has the wrong width, or the robot has none of the fields.
        """
        if not self.transform.select.fields:
            return list(samples)
        fields = _stack_fields([sample["window"] for sample in samples], self.transform.select.fields)
        # steps after the anchor have not been observed yet
        observed = {name: values[:, : self.transform.anchor + 1] for name, values in fields.items()}
        proprioception, _ = self.transform.apply(observed)
        made = [{**sample, "proprioception": row} for sample, row in zip(samples, proprioception, strict=True)]
        return _drop_infinite(made, proprioception, self.transform)


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
        drop = Dropped("not finite", f"field '{bad}' holds NaN or infinity")
        results.append(sample if bad is None else drop)
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
        num_images, fields = len(window.images), {"instruction": chosen}
        turn = create_user_turn(self.prompts, fields, num_images=num_images, seed=seed, position=position)
        return {**sample, "instruction": chosen, "turns": [turn]}


class PrepareCameraImages:
    """A stage: `window` -> `images`, `image_mask`, `image_maps`, and `color_factors` in training.

    Args:
        params: the data params, which define image augmentation and the handling of missing images.
    """

    def __init__(self, params: RoboticsDataParams) -> None:
        self.augmentation = params.augmentation.image if params.augmentation.enabled else None
        self.names = params.image_names
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
        is_training, draw = sample["__is_training__"], CENTRE
        if is_training and self.augmentation is not None:
            draw = draw_augmentation(seed=sample["__seed__"], position=sample["__position__"])
        files = [
            torch.zeros((3, *size), dtype=torch.uint8) if image is None else image
            for image, size in zip(window.images, spec.image_sizes, strict=True)
        ]
        try:
            images, maps = prepare_images(files, self.augmentation, draw)
        except ValueError as error:
            raise Dropped("bad image", str(error)) from None
        mask = is_there if self.masks else np.ones_like(is_there)
        sample = {**sample, "images": images, "image_maps": maps, "image_mask": mask}
        if is_training and self.augmentation is not None and self.augmentation.color_jitter.enabled:
            sample["color_factors"] = draw_color_factors(self.augmentation.color_jitter, draw)
        return sample


class EncodeRobot:
    """A stage: `images` and `turns` -> `inputs`, and `intrinsics` for the pixels the model gets.

    Args:
        params: the data params, which describe the processor.
        processor: the processor; None: load the one that the params describe.
    """

    def __init__(self, params: RoboticsDataParams, processor: Processor | None = None) -> None:
        self.params = params
        self.max_tokens = params.max_text_seq_len or params.seq_len
        self.camera_names = params.camera_names or []
        self._processor = processor

    def __getstate__(self) -> dict[str, object]:
        """Pickle without the processor, so that each loader process loads its own."""
        return {**self.__dict__, "_processor": None}

    def load(self) -> Processor | None:
        """Return the processor, loading it on first use; None without language.

        Raises:
            ValueError: the processor cannot be loaded.
        """
        if self._processor is None and self.params.use_language:
            self._processor = create_image_processor(self.params)
        return self._processor

    def __call__(self, sample: Sample) -> Sample:
        """Encode the sample.

        Raises:
            Dropped: the row is too long.
            ValueError: the sample cannot be encoded.
        """
        processor = self.load()
        if processor is None:
            encoded = resize_images(sample["images"], self.params)
        else:
            encoded = encode_prompt(sample["images"], sample["turns"], processor)
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


def resize_images(images: Sequence[Tensor], params: RoboticsDataParams) -> dict[str, list[Any]]:
    """Return the inputs of a model without language: resized images, uint8 [3, H, W], and their pixel maps."""
    assert params.image_size is not None, "resolve derives data.image_size"
    size, method = (params.image_size, params.image_size), params.image_resizing_method
    resized = [resize_image(image, size, method=method, interpolation=params.image_interpolation) for image in images]
    return {"pixel_values": [image for image, _ in resized], "pixel_maps": [pixel_map for _, pixel_map in resized]}


def encode_prompt(images: Sequence[Tensor], turns: Sequence[Turn], processor: Processor) -> dict[str, Any]:
    """Return the inputs of a model with language; no prompt token is supervised."""
    inputs = processor.encode(images, turns)
    return {name: value for name, value in inputs.items() if name != "target_mask"}
