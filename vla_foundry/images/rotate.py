"""Turn and mirror images and depth without resampling."""

import torch
from jaxtyping import Shaped
from torch import Tensor

from vla_foundry.images.geometry import PixelMap, flip_map, rotate_map


def rotate_image(
    image: Shaped[Tensor, "*batch H W"], quarter_turns_clockwise: int
) -> tuple[Shaped[Tensor, "*batch H2 W2"], PixelMap]:
    """Turn images or depth clockwise by quarter turns; negative values turn the other way."""
    size = (image.shape[-2], image.shape[-1])
    return torch.rot90(image, -quarter_turns_clockwise, (-2, -1)), rotate_map(size, quarter_turns_clockwise)


def flip_image(image: Shaped[Tensor, "*batch H W"]) -> tuple[Shaped[Tensor, "*batch H W"], PixelMap]:
    """Mirror images or depth left and right."""
    return image.flip(-1), flip_map((image.shape[-2], image.shape[-1]))
