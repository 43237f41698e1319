"""Turn images and turns into model inputs with our own lightweight processor, in training and inference alike.

A processor is saved as a folder: `config_processor.json` beside the files of its tokenizer (`load_processor` reads it).
What `encode` returns for a sample:

| key                | type                  | meaning                                                                 |
|--------------------|-----------------------|-------------------------------------------------------------------------|
| input_ids          | int32 [T]             | tokens, each image as the tokens that its features replace              |
| target_mask        | bool [T]              | True where the token is supervised: answers and their end tokens        |
| pixel_values       | uint8 [M, ...]        | images [N, 3, H, W], or patches (Qwen); see `colors.normalize_images`   |
| image_index        | int32 [M]             | number of the image, within the sample, of each row of pixel_values     |
| pixel_maps         | list of PixelMap      | from each image to its model input; absent if there is no single map    |
| (extras)           | Tensor                | further inputs of a Hugging Face model, e.g. image_grid_thw             |

TOKEN_KEYS have one value per token and are padded like the tokens; other tensors are concatenated along dimension 0.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from vla_foundry.images.geometry import Interpolation, PixelMap, ResizeMethod, resize_image
from vla_foundry.run_folder import PROCESSOR_CONFIG_NAME
from vla_foundry.storage.uri import read_object
from vla_foundry.text.chat import IMAGE_MARKER, Turn
from vla_foundry.text.interleaved import DocumentTokenizer
from vla_foundry.text.tokenizers import load_tokenizer, pad_token_id_of

TOKEN_KEYS = ("input_ids", "target_mask", "token_type_ids", "mm_token_type_ids")
NATIVE, HUGGING_FACE = "native", "hugging_face"


class Processor(ABC):
    """What training and inference use to turn images and turns into model inputs.

    Args:
        turns: tokenizes the turns.
        image_token_id: the token that image features replace; None: images do not use tokens.
        image_mean: mean of each colour, for pixels in 0 .. 1; subtracted on the device.
        image_std: divisor of each colour after that.
    """

    def __init__(
        self,
        turns: DocumentTokenizer,
        *,
        image_token_id: int | None,
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> None:
        self._turns = turns
        # Hugging Face tokenizer; its length is the number of tokens a model must know
        self.tokenizer = turns.tokenizer
        self.pad_token_id = pad_token_id_of(turns.tokenizer)
        self.image_token_id = image_token_id
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)

    @abstractmethod
    def encode(
        self,
        images: Sequence[UInt8[Tensor, "3 _ _"]],
        turns: Sequence[Turn],
        *,
        max_tokens: int | None = None,
        nearest: Sequence[bool] = (),
    ) -> dict[str, Any]:
        """Return a sample's model inputs, see the table above; a final user turn is followed by the answer prompt.

        Args:
            images: RGB.
            turns: a conversation.
            max_tokens: most tokens, see `ChatTokenizer.encode`.
            nearest: True for images whose pixels must not be mixed, such as depth; empty: none.

        Raises:
            ValueError: the sample cannot be encoded (see `ChatTokenizer.encode`); one line.
        """

    @abstractmethod
    def encode_document(
        self,
        images: Sequence[UInt8[Tensor, "3 _ _"]],
        parts: Sequence[str | None],
        *,
        max_tokens: int,
        is_whole: bool = True,
    ) -> dict[str, Any]:
        """Return the model inputs of a document of text and images in order; see `DocumentTokenizer.encode_document`.

        Raises:
            ValueError: the document cannot be encoded; one line.
        """

    def tokenize_ahead(self, conversations: Iterable[Sequence[Turn]]) -> None:  # noqa: B027 (optional)
        """Tokenize what `encode` will get next, where tokens do not depend on pixels; `encode` reports its errors."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the processor to a folder, creating it if necessary."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def stop_token_ids(self) -> list[int | tuple[int, ...]]:
        """Return the tokens that end an answer, see `ChatTokenizer.stop_token_ids`."""
        return self._turns.stop_token_ids()


class ImageTextProcessor(Processor):
    """Our own processor: images of one size, each represented by a fixed number of `<image>` tokens.

    Args:
        tokenizer: a Hugging Face fast tokenizer; `<image>` is added if missing.
        image_size: (height, width) of the model's images.
        img_num_tokens: tokens per image.
        resize_method: how images are brought to that size, see `resize`.
        interpolation: interpolation of scaled pixels.
        image_mean: subtracted from pixels in 0 .. 1, on the device.
        image_std: divisor applied after subtracting the mean.
        prompt_layout: how turns are formatted, see `ChatTokenizer`.

    Raises:
        ValueError: see `ChatTokenizer`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        image_size: Sequence[int],
        img_num_tokens: int,
        resize_method: ResizeMethod = "center_crop",
        interpolation: Interpolation = "bilinear",
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        prompt_layout: str = "chat",
    ) -> None:
        image_token_id = add_image_token(tokenizer)
        super().__init__(
            DocumentTokenizer(tokenizer, prompt_layout=prompt_layout),
            image_token_id=image_token_id,
            image_mean=image_mean,
            image_std=image_std,
        )
        self._image_tokens = [image_token_id] * img_num_tokens
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.img_num_tokens = img_num_tokens
        self.resize_method: ResizeMethod = resize_method
        self.interpolation: Interpolation = interpolation
        self.prompt_layout = prompt_layout
        # conversation -> number of images, and what `ChatTokenizer.encode` returns; see `tokenize_ahead`
        self._ahead: dict[tuple[Turn, ...], tuple[int, tuple[list[int], list[bool]]]] = {}

    def tokenize_ahead(self, conversations: Iterable[Sequence[Turn]]) -> None:
        """See `Processor.tokenize_ahead`; what was tokenized ahead before is forgotten."""
        self._ahead.clear()
        for turns in conversations:
            num_images = sum(turn.content.count(IMAGE_MARKER) for turn in turns)
            with suppress(ValueError):
                self._ahead[tuple(turns)] = (num_images, self._tokenize(turns, num_images))

    def _tokenize(
        self, turns: Sequence[Turn], num_images: int, max_tokens: int | None = None
    ) -> tuple[list[int], list[bool]]:
        return self._turns.encode(turns, [self._image_tokens] * num_images, max_tokens=max_tokens)

    def encode(
        self,
        images: Sequence[UInt8[Tensor, "3 _ _"]],
        turns: Sequence[Turn],
        *,
        max_tokens: int | None = None,
        nearest: Sequence[bool] = (),
    ) -> dict[str, Any]:
        """Return a sample's model inputs, see `Processor.encode`."""
        num_images, tokens = self._ahead.get(tuple(turns), (None, ([], [])))
        if num_images != len(images) or max_tokens is not None:
            tokens = self._tokenize(turns, len(images), max_tokens)
        return self._create_inputs(images, *tokens, nearest)

    def encode_document(
        self,
        images: Sequence[UInt8[Tensor, "3 _ _"]],
        parts: Sequence[str | None],
        *,
        max_tokens: int,
        is_whole: bool = True,
    ) -> dict[str, Any]:
        """Return a document's model inputs, see `Processor.encode_document`."""
        tokens = [self._image_tokens] * len(images)
        ids, mask, num_images = self._turns.encode_document(parts, tokens, max_tokens=max_tokens, is_whole=is_whole)
        return self._create_inputs(images[:num_images], ids, mask)

    def _create_inputs(
        self, images: Sequence[Tensor], ids: list[int], mask: list[bool], nearest: Sequence[bool] = ()
    ) -> dict[str, Any]:
        pixel_values, pixel_maps = self.resize(images, nearest)
        return {
            # via numpy: torch.tensor takes three times as long for a list
            "input_ids": torch.from_numpy(np.array(ids, dtype=np.int32)),
            "target_mask": torch.from_numpy(np.array(mask, dtype=np.bool_)),
            "pixel_values": pixel_values,
            "image_index": torch.from_numpy(np.arange(len(images), dtype=np.int32)),
            "pixel_maps": pixel_maps,
        }

    def resize(
        self, images: Sequence[UInt8[Tensor, "3 _ _"]], nearest: Sequence[bool] = ()
    ) -> tuple[UInt8[Tensor, "N 3 H W"], list[PixelMap]]:
        """Bring images to the model's size and stack them (channels-last in memory); see `encode` for `nearest`."""
        resized, maps = [], []
        for image, is_nearest in zip(images, nearest or [False] * len(images), strict=True):
            interpolation = "nearest" if is_nearest else self.interpolation
            pixels, pixel_map = resize_image(
                image, self.image_size, method=self.resize_method, interpolation=interpolation
            )
            resized.append(pixels.permute(1, 2, 0))
            maps.append(pixel_map)
        if len(resized) == 1:
            stacked = resized[0].contiguous()[None]  # no copy, unless it is a part of a larger image
        else:
            stacked = torch.stack(resized) if resized else torch.zeros((0, *self.image_size, 3), dtype=torch.uint8)
        return stacked.permute(0, 3, 1, 2), maps

    def save(self, folder: Path) -> None:
        """Write the tokenizer and `config_processor.json` to a folder."""
        self.tokenizer.save_pretrained(folder)
        write_config(
            folder,
            {
                "type": NATIVE,
                "image_size": list(self.image_size),
                "img_num_tokens": self.img_num_tokens,
                "resize_method": self.resize_method,
                "interpolation": self.interpolation,
                "image_mean": list(self.image_mean),
                "image_std": list(self.image_std),
                "prompt_layout": self.prompt_layout,
            },
        )


def add_image_token(tokenizer: Any) -> int:
    """Return the id of `<image>`, adding it to the tokenizer as a special token if missing."""
    if IMAGE_MARKER not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_MARKER], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(IMAGE_MARKER)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write `config_processor.json`, which says which processor this is."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / PROCESSOR_CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_processor(folder: str | Path) -> Processor:
    """Load a processor written by `save`.

    Raises:
        FileNotFoundError: the folder has no `config_processor.json`.
        ValueError: the file is malformed.
    """
    path = Path(folder) / PROCESSOR_CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} is not the folder of a processor.")
    config = read_object(str(path))
    kind = config.pop("type", None)
    if kind == HUGGING_FACE:
        from vla_foundry.images.processor_hf import load_hugging_face_processor

        return load_hugging_face_processor(str(folder), **config)
    if kind != NATIVE:
        raise ValueError(f"{path} is of type '{kind}', which must be {NATIVE} or {HUGGING_FACE}.")
    return ImageTextProcessor(load_tokenizer(str(folder)), **config)
