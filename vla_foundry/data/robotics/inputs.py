"""From what a robot saw and did to model inputs: pure functions that training and inference share.

Images: bytes of files while training, uint8 tensors [3, H, W] at inference; both take the same way from there on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt8
from torch import Tensor

from vla_foundry.images.augment import AugmentationDraw, ImageAugmentation, augment_image
from vla_foundry.images.codec import decode_image
from vla_foundry.images.geometry import PixelMap, identity_map
from vla_foundry.images.processor import Processor
from vla_foundry.images.resize import resize_image
from vla_foundry.params.data.images import ImageProcessorParams
from vla_foundry.randomness import draw_index
from vla_foundry.robotics.layout import FieldLayout
from vla_foundry.robotics.normalization import RoboticsNormalizer
from vla_foundry.text.chat_template import Turn, create_user_turn


def choose_instruction(
    instructions: Mapping[str, Sequence[str]], types: Sequence[str], *, seed: int, position: int
) -> str:
    """Draw one of a sample's instructions of the chosen types, each as likely; "" where no types are chosen.

    Raises:
        ValueError: the sample has no instruction of these types.
    """
    if not types:
        return ""
    found = [text for name in types for text in instructions.get(name, ())]
    if not found:
        known = ", ".join(sorted(instructions)) or "none"
        raise ValueError(f"it has no instruction of the types {', '.join(types)}, but {known}")
    return found[draw_index(len(found), seed=seed, position=position, purpose="robotics.instruction")]


def create_instruction_turns(
    instruction: str, prompts: Sequence[str], *, num_images: int, seed: int, position: int
) -> list[Turn]:
    """Return the one turn of a robot's user: a drawn prompt around the instruction, and a marker per image."""
    fields = {"instruction": instruction}
    return [create_user_turn(prompts, fields, num_images=num_images, seed=seed, position=position)]


def prepare_camera_images(
    images: Sequence[bytes | Tensor | None],
    sizes: Sequence[tuple[int, int]],
    augmentation: ImageAugmentation | None,
    draw: AugmentationDraw,
) -> tuple[list[Tensor], list[PixelMap]]:
    """Decode a sample's images and take the same drawn part of each.

    Args:
        images: files, or uint8 [3, H, W]; None: a missing one, which becomes black.
        sizes: (height, width) that each missing image stands in.
        augmentation: what may be done to images; None: nothing.
        draw: the same for all images; `augment.CENTRE` for validation and inference.

    Returns:
        uint8 [3, H, W] each, and the map of its pixels.

    Raises:
        ValueError: a file can not be decoded, or an image is smaller than the crop.
    """
    prepared, maps = [], []
    for image, size in zip(images, sizes, strict=True):
        if image is None:
            pixels = torch.zeros((3, *size), dtype=torch.uint8)
        else:
            pixels = image if isinstance(image, Tensor) else decode_image(image)
        pixel_map = identity_map((pixels.shape[1], pixels.shape[2]))
        if augmentation is not None:
            pixels, pixel_map = augment_image(pixels, augmentation, draw)
        prepared.append(pixels)
        maps.append(pixel_map)
    return prepared, maps


def resize_images(
    images: Sequence[UInt8[Tensor, "3 _ _"]], params: ImageProcessorParams
) -> tuple[list[Tensor], list[PixelMap]]:
    """Bring images to the size of a model without language; uint8 [3, H, W] each, and the map of its pixels."""
    assert params.image_size is not None, "resolve derives data.image_size"
    size = (params.image_size, params.image_size)
    resized = [
        resize_image(image, size, method=params.image_resizing_method, interpolation=params.image_interpolation)
        for image in images
    ]
    return [image for image, _ in resized], [pixel_map for _, pixel_map in resized]


def stack_images(images: Sequence[UInt8[Tensor, "3 H W"]], params: ImageProcessorParams) -> UInt8[Tensor, "N 3 H W"]:
    """Put images of one size side by side: one copy, channels last in memory as they are."""
    if not images:
        assert params.image_size is not None, "resolve derives data.image_size"
        return torch.zeros((0, 3, params.image_size, params.image_size), dtype=torch.uint8)
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def encode_prompt(
    images: Sequence[UInt8[Tensor, "3 _ _"]], turns: Sequence[Turn], processor: Processor
) -> dict[str, Any]:
    """Return the inputs of a model with language, as its processor makes them; nothing in a prompt is supervised."""
    inputs = processor.encode(images, turns)
    return {name: value for name, value in inputs.items() if name != "target_mask"}


def normalize_fields(
    fields: Mapping[str, Float[np.ndarray, "*N T _"]],
    layout: FieldLayout,
    normalizer: RoboticsNormalizer,
    *,
    anchor: int,
) -> tuple[Float32[np.ndarray, "*N T C"], Bool[np.ndarray, " C"]]:
    """Put fields side by side and normalize them, in float64.

    Args:
        fields: {field: (*N, T, its columns)}; fields that this robot lacks are absent.
        layout: the fields in their order.
        anchor: which of the T steps is the anchor.

    Returns:
        The values, 0 in columns that are not there, and which columns are.

    Raises:
        ValueError: a field has another width, or all fields are missing.
    """
    if not any(name in fields for name in layout.fields):
        raise ValueError(f"it has none of the fields {', '.join(layout.fields)}")
    shape = next(fields[name].shape[:-1] for name in layout.fields if name in fields)
    values, is_there = np.zeros((*shape, layout.width)), np.zeros(layout.width, dtype=bool)
    for name, columns in layout.slices():
        if name in fields:
            if fields[name].shape[-1] != columns.stop - columns.start:
                raise ValueError(
                    f"field '{name}' has {fields[name].shape[-1]} columns, not {columns.stop - columns.start}"
                )
            values[..., columns] = fields[name]
            is_there[columns] = True
    normalized = normalizer.normalize(values, layout.fields, anchor=anchor)
    if not is_there.all():
        normalized[..., ~is_there] = 0
    return normalized.astype(np.float32), is_there


def follow_images(
    intrinsics: Float[np.ndarray, "3 3"], augmented: PixelMap, encoded: PixelMap
) -> Float[np.ndarray, "3 3"]:
    """Return the intrinsics of an image after it was augmented and brought to the model's size."""
    return augmented.then(encoded).map_intrinsics(intrinsics)
