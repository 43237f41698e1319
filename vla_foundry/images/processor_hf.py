"""Wrap the processors of Hugging Face models (Qwen3-VL, PaliGemma, SmolVLM2, Idefics3, ...) in our interface.

The model's own image processor resizes and tiles, but does not rescale or normalise: pixels stay uint8 and are
normalised on the device. The model's own rule determines the tokens of an image. Our code tokenizes the turns, so that
the supervised tokens are known exactly.

With `split_images`, SmolVLM and Idefics3 scale an image's longer side to `size.longest_edge` (2048 for SmolVLM2-256M,
**up** if the image is smaller), cut the result into tiles of `max_image_size` (512), and append the whole image scaled
to one tile: 17 tiles and 17 x 64 tokens for a square image. A camera frame of 256 pixels has too little detail to
benefit. Without `split_images` (our default) an image is scaled once, to one tile; the original processor, asked for a
single tile, first scales up to 2048 and then down.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from vla_foundry.images.colors import normalize_images
from vla_foundry.images.geometry import PixelMap, resize_map
from vla_foundry.images.processor import HUGGING_FACE, TOKEN_KEYS, Processor, write_config
from vla_foundry.storage.hub import loading_published
from vla_foundry.text.chat import CHAT_TEMPLATE, IMAGE_MARKER, Turn
from vla_foundry.text.interleaved import DocumentTokenizer

# Pillow's number of the method that takes the nearest pixel
_NEAREST = 0
# an input of SmolVLM and Idefics3 that says what is padding; our tiles have none
_NOT_INPUTS = {"pixel_attention_mask"}


def _tile_options(image_processor: Any, split_images: bool) -> dict[str, Any]:
    """Return options for SmolVLM and Idefics3. All tiles have one size, so nothing needs padding or masking."""
    options: dict[str, Any] = {"return_row_col_info": True, "do_pad": False, "do_image_splitting": split_images}
    if not split_images:
        side = image_processor.max_image_size["longest_edge"]
        options["size"] = {"height": side, "width": side}
    return options


def _crop_options(image_processor: Any, split_images: bool) -> dict[str, Any]:
    return {"crop_to_patches": split_images}


def _no_options(image_processor: Any, split_images: bool) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Family:
    """What is special about a model family; its processor provides the rest."""

    # prompt layout if the processor has no chat template
    prompt_layout: str = "chat"
    # True if the beginning-of-sequence token comes after the images
    has_bos_after_images: bool = False
    # token_type_ids are 1 from the first answer on (attention is causal only there); else they mark image tokens
    marks_answers: bool = False
    # True if an unsplit image is only scaled, so that its pixel map follows from the two sizes
    is_plain_resize: bool = False
    # further options of the image processor: (image processor, split_images) -> options
    options: Callable[[Any, bool], dict[str, Any]] = field(default=_no_options)


_QWEN = Family(is_plain_resize=True)
_TILES = Family(options=_tile_options, is_plain_resize=True)
_PATCHES = Family(options=_crop_options)
FAMILIES: dict[str, Family] = {
    "Qwen2VLProcessor": _QWEN,
    "Qwen2_5_VLProcessor": _QWEN,
    "Qwen3VLProcessor": _QWEN,
    "PaliGemmaProcessor": Family(
        prompt_layout="plain", has_bos_after_images=True, marks_answers=True, is_plain_resize=True
    ),
    "SmolVLMProcessor": _TILES,
    "Idefics3Processor": _TILES,
    "InternVLProcessor": _PATCHES,
    "AyaVisionProcessor": _PATCHES,
    "Cohere2VisionProcessor": _PATCHES,
}


class HuggingFaceProcessor(Processor):
    """A Hugging Face processor behind the interface of `processor.Processor`.

    Args:
        processor: a processor from AutoProcessor.
        prompt_layout: how turns are formatted, see `ChatTokenizer`; None: the chat template, else the family's layout.
        processor_kwargs: options of its image processor, e.g. {"size": {...}}.
        split_images: cut images into tiles if the family does so (see the module docstring).

    Raises:
        ValueError: the processor has no tokenizer or no image processor, or gives images in a form that we cannot pass
            on; also see `ChatTokenizer`.
    """

    def __init__(
        self,
        processor: Any,
        *,
        prompt_layout: str | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        split_images: bool = False,
    ) -> None:
        name = type(processor).__name__
        for part in ("tokenizer", "image_processor"):
            if getattr(processor, part, None) is None:
                raise ValueError(
                    f"data.processor is a {name} without {part}. Use the processor of an image-text model."
                )
        self.family = FAMILIES.get(name, Family())
        self.prompt_layout = prompt_layout or (CHAT_TEMPLATE if processor.chat_template else self.family.prompt_layout)
        image_token_ids = getattr(processor, "image_token_ids", None) or [getattr(processor, "image_token_id", None)]
        image_token: str | None = getattr(processor, "image_token", None)
        if image_token_ids[0] is None and image_token is not None:
            image_token_ids = [processor.tokenizer.convert_tokens_to_ids(image_token)]
        with _passing_on(name):
            mean, std = _read_normalization(processor.image_processor, processor_kwargs or {})
        super().__init__(
            DocumentTokenizer(
                processor.tokenizer,
                prompt_layout=self.prompt_layout,
                render=self._render if processor.chat_template else None,
                image_marker=image_token or IMAGE_MARKER,
            ),
            image_token_id=image_token_ids[0],
            image_mean=mean,
            image_std=std,
        )
        self.processor = processor
        self.processor_kwargs = dict(processor_kwargs or {})
        self.split_images = split_images
        # names of inputs that tell kinds of tokens apart
        self._token_types: list[str] = []
        with _passing_on(name):
            self._compare_with_original()

    def _compare_with_original(self) -> None:
        """Check that a prompt with two images of different sizes becomes what the processor itself makes of it.

        Raises:
            ValueError: it does not.
        """
        images = [torch.arange(3 * h * w).reshape(3, h, w).to(torch.uint8) for h, w in ((40, 56), (48, 32))]
        turns = [Turn("user", f"{IMAGE_MARKER}{IMAGE_MARKER}a")]
        if len({self._process_images([image])[0]["pixel_values"].shape[1:] for image in images}) > 1:
            raise ValueError("images of different sizes do not fit into one batch")
        text = (getattr(self.processor, "image_token", None) or "") * len(images) + "a"
        text = self._render(turns, True) if self.prompt_layout == CHAT_TEMPLATE else text
        with warnings.catch_warnings(action="ignore"):
            theirs = self.processor(images=[images], text=[text], **self._own_options(), return_tensors="pt")
        self._token_types = [key for key in ("mm_token_type_ids", "token_type_ids") if key in theirs]
        ours = self.encode(images, turns)
        if self.image_token_id is not None and not (ours["input_ids"] == self.image_token_id).any():
            raise ValueError("its text has no image token")
        for key, value in theirs.items():
            if not self._is_same(key, value, ours):
                raise ValueError(f"{key} would not be the processor's own")

    def _is_same(self, key: str, theirs: Tensor, ours: Mapping[str, Any]) -> bool:
        if key in ("attention_mask", "labels", *_NOT_INPUTS):
            return True
        if key not in ours:
            return False
        if key == "pixel_values":  # up to the rounding of resized pixels
            own = normalize_images(ours[key], self.image_mean, self.image_std).flatten()
            return len(own) == theirs.numel() and bool(
                ((own - theirs.flatten()).abs() <= 1.01 / 255 / min(self.image_std)).all()
            )
        if key in TOKEN_KEYS and self.prompt_layout != CHAT_TEMPLATE:  # only the number of image tokens is comparable
            counts = [ids.flatten().tolist().count(self.image_token_id) for ids in (theirs, ours["input_ids"])]
            return key != "input_ids" or counts[0] == counts[1]
        return torch.equal(theirs.flatten().float(), ours[key].flatten().float())

    def encode(
        self,
        images: Sequence[UInt8[Tensor, "3 _ _"]],
        turns: Sequence[Turn],
        *,
        max_tokens: int | None = None,
        nearest: Sequence[bool] = (),
    ) -> dict[str, Any]:
        """See Processor."""
        inputs, image_tokens = self._process_images(images, nearest)
        if image_tokens and self.family.has_bos_after_images:
            image_tokens[-1] = [*image_tokens[-1], self.tokenizer.bos_token_id]
        ids, mask = self._turns.encode(turns, image_tokens, max_tokens=max_tokens)
        return self._create_sample(inputs, ids, mask)

    def encode_document(
        self,
        images: Sequence[UInt8[Tensor, "3 _ _"]],
        parts: Sequence[str | None],
        *,
        max_tokens: int,
        is_whole: bool = True,
    ) -> dict[str, Any]:
        """See Processor."""
        inputs, image_tokens = self._process_images(images)
        ids, mask, num_images = self._turns.encode_document(
            parts,
            image_tokens,
            max_tokens=max_tokens,
            is_whole=is_whole,
            begins_after_images=self.family.has_bos_after_images,
        )
        if num_images < len(images):
            inputs, _ = self._process_images(images[:num_images])
        return self._create_sample(inputs, ids, mask)

    def _create_sample(self, inputs: dict[str, Any], ids: list[int], mask: list[bool]) -> dict[str, Any]:
        sample = {
            "input_ids": torch.tensor(ids, dtype=torch.int32),
            "target_mask": torch.tensor(mask, dtype=torch.bool),
            **inputs,
        }
        marks = sample["target_mask"].cummax(0).values if self.family.marks_answers else None
        for key in self._token_types:
            sample[key] = (sample["input_ids"] == self.image_token_id if marks is None else marks).int()
        return sample

    def save(self, folder: Path) -> None:
        """Write the Hugging Face processor and `config_processor.json` to a folder."""
        self.processor.save_pretrained(folder)
        write_config(
            folder,
            {
                "type": HUGGING_FACE,
                "prompt_layout": self.prompt_layout,
                "processor_kwargs": self.processor_kwargs,
                "split_images": self.split_images,
            },
        )

    def _process_images(
        self, images: Sequence[Tensor], nearest: Sequence[bool] = ()
    ) -> tuple[dict[str, Any], list[list[int]]]:
        """Return the model inputs from images, and the tokens that represent each image."""
        if not images:
            return {}, []
        options = {**self._own_options(), "do_rescale": False, "do_normalize": False}
        processed = self.processor.image_processor(list(images), **options, return_tensors="pt")
        names = set(self.processor.model_input_names) - _NOT_INPUTS
        inputs = {key: value for key, value in processed.items() if key in names}
        pixel_values = inputs["pixel_values"]
        if pixel_values.ndim == 5:  # [1, N, 3, H, W]
            inputs["pixel_values"] = pixel_values = pixel_values.flatten(0, 1)
        rows_per_image = self._rows_per_image(processed, len(images))
        inputs["image_index"] = torch.repeat_interleave(torch.arange(len(images), dtype=torch.int32), rows_per_image)
        if len(inputs["image_index"]) != len(pixel_values):
            raise ValueError("which rows of pixel_values belong to an image is not known")
        if any(nearest):
            again = self.processor.image_processor(
                list(images), **options | {"resample": _NEAREST}, return_tensors="pt"
            )
            rows = torch.tensor(nearest)[inputs["image_index"]]
            pixel_values[rows] = again["pixel_values"].view_as(pixel_values)[rows]
        if self.family.is_plain_resize and not (pixel_values.ndim == 4 and bool((rows_per_image > 1).any())):
            inputs["pixel_maps"] = self._pixel_maps(images, inputs)
        return inputs, [self._image_tokens(processed, number) for number in range(len(images))]

    def _own_options(self) -> dict[str, Any]:
        options = self.family.options(self.processor.image_processor, self.split_images)
        return {**options, **self.processor_kwargs, "input_data_format": "channels_first"}

    def _rows_per_image(self, processed: Any, num_images: int) -> Tensor:
        """Return how many rows of pixel_values each image has: patches, tiles or one."""
        if "image_grid_thw" in processed:
            return processed["image_grid_thw"].prod(dim=1)
        if "rows" in processed:
            tiles = torch.tensor(processed["rows"][0]) * torch.tensor(processed["cols"][0])
            return tiles + 1
        if "num_patches" in processed:
            return torch.as_tensor(processed["num_patches"])
        return (
            torch.as_tensor(processed["num_crops"]) + 1 if "num_crops" in processed else torch.ones(num_images).long()
        )

    def _pixel_maps(self, images: Sequence[Tensor], inputs: Mapping[str, Any]) -> list[PixelMap]:
        sources = [(image.shape[1], image.shape[2]) for image in images]
        if "image_grid_thw" in inputs:
            patch = self.processor.image_processor.patch_size
            targets = [(int(h) * patch, int(w) * patch) for _, h, w in inputs["image_grid_thw"]]
        else:
            targets = [(inputs["pixel_values"].shape[-2], inputs["pixel_values"].shape[-1])] * len(images)
        return [resize_map(source, target) for source, target in zip(sources, targets, strict=True)]

    def _image_tokens(self, processed: Any, number: int) -> list[int]:
        if self.image_token_id is None:
            return []
        text = self.processor.replace_image_token(processed, number)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _render(self, turns: Sequence[Turn], announces: bool) -> str:
        messages = [{"role": turn.role, "content": _content_parts(turn.content)} for turn in turns]
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=announces)


def _passing_on(name: str) -> AbstractContextManager[None]:
    what = f"data.processor: images of a {name}"
    return loading_published(what, "cannot be passed on; use a model of another family")


def _read_normalization(image_processor: Any, options: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Return the mean and divisor of each colour, for pixels in 0 .. 1 whatever the image processor scales them to."""

    def read(name: str) -> Any:
        return options[name] if name in options else getattr(image_processor, name)

    mean, std = (read("image_mean"), read("image_std")) if read("do_normalize") else ([0.0] * 3, [1.0] * 3)
    scale = 255 * read("rescale_factor") if read("do_rescale") else 255
    return [value / scale for value in mean], [value / scale for value in std]


def _content_parts(content: str) -> list[dict[str, str]]:
    """Split a turn into the text and image parts that chat templates of image-text models take."""
    parts: list[dict[str, str]] = []
    for number, text in enumerate(content.split(IMAGE_MARKER)):
        if number:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def load_hugging_face_processor(name: str, **options: Any) -> HuggingFaceProcessor:
    """Load the processor of a Hugging Face model, from a folder or by name.

    Args:
        name: folder, or name on the hub.
        options: options of `HuggingFaceProcessor`.

    Raises:
        ValueError: the processor does not exist, or one of its packages is missing; one line.
    """
    from transformers import AutoProcessor

    with loading_published(f"data.processor '{name}'", name=name):
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    return HuggingFaceProcessor(processor, **options)
