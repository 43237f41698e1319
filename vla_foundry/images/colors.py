"""Normalise uint8 pixels to floats on the device, applying each sample's colour jitter on the way.

Pixels are transferred as uint8, a quarter of the bytes, and converted to float on the model's device. A row is an image
or an image patch (Qwen), with colour channels first: [3, ...] or flattened [3 * n].
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

# weights of red, green and blue in brightness (ITU-R BT.601), as torchvision has them
_GREY = (0.2989, 0.587, 0.114)


def normalize_images(
    pixel_values: Shaped[Tensor, "M ..."],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    color_factors: Float[Tensor, "M 4"] | None = None,
    image_index: Int[Tensor, " M"] | None = None,
) -> Float[Tensor, "M ..."]:
    """Return (pixels / 255 - mean) / std as float32, in the shape of the pixels.

    Args:
        pixel_values: uint8 [M, 3, H, W] images, or [M, 3 * n] patches; floats in 0 .. 255 also work.
        mean: of each colour, for pixels in 0 .. 1.
        std: of each colour.
        color_factors: colour jitter of each row, see `jitter_colors`; None: no jitter.
        image_index: the image that each row belongs to; None: each row is an image.
    """
    shape = pixel_values.shape
    # contiguous first: channels-last rows would be scaled three numbers at a time
    pixels = pixel_values.contiguous().view(shape[0], 3, -1).to(torch.float32, copy=True)
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), pixels.device)
    if color_factors is not None:
        pixels = jitter_colors(pixels.div_(255), color_factors, image_index).mul_(255)
    return pixels.mul_(scale).add_(shift).view(shape)


@lru_cache(maxsize=32)
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the factors that normalise 0 .. 255, cached on the device so that a step copies nothing to it."""
    means, stds = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    return (1 / (255 * stds)).float().view(3, 1).to(device), (-means / stds).float().view(3, 1).to(device)


def jitter_colors(
    pixels: Float[Tensor, "M 3 N"], factors: Float[Tensor, "M 4"], image_index: Int[Tensor, " M"] | None = None
) -> Float[Tensor, "M 3 N"]:
    """Change brightness, contrast, saturation and hue, in this order, as torchvision does for one image.

    Args:
        pixels: colours in 0 .. 1.
        factors: brightness, contrast and saturation factors (1: unchanged), and hue shift in turns (0: unchanged).
        image_index: the image that each row belongs to, needed for contrast; None: each row is an image.
    """
    brightness, contrast, saturation, hue = factors[:, :, None, None].unbind(1)
    pixels = (pixels * brightness).clamp_(0, 1)
    mean = _grey(pixels).mean(2, keepdim=True)
    if image_index is not None:
        mean = _mean_of_images(mean, image_index)
    pixels = torch.lerp(mean, pixels, contrast).clamp_(0, 1)
    pixels = torch.lerp(_grey(pixels), pixels, saturation).clamp_(0, 1)
    return _shift_hue(pixels, hue)


def _grey(pixels: Tensor) -> Tensor:
    red, green, blue = pixels.unbind(1)
    return (_GREY[0] * red + _GREY[1] * green + _GREY[2] * blue)[:, None]


def _mean_of_images(means: Tensor, image_index: Tensor) -> Tensor:
    """Return, for each row, the mean over all rows (of equal size) of its image."""
    index = image_index.long()
    # integer sums, because float sums depend on the order, which is not fixed on a GPU
    whole = (means.view(-1).double() * 2**32).long()
    sums = torch.zeros_like(whole).index_add_(0, index, whole)  # there are at most as many images as rows
    counts = torch.zeros_like(whole).index_add_(0, index, torch.ones_like(whole))
    return (sums.double() / counts.clamp(min=1) / 2**32).float()[index].view(-1, 1, 1)


def _shift_hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """Rotate the HSV hue and keep saturation and value, without the six-sector conversion to HSV and back."""
    red, green, blue = pixels.unbind(1)
    value, lowest = pixels.amax(1), pixels.amin(1)
    chroma = value - lowest
    divisor = torch.where(chroma == 0, 1, chroma)
    # where the largest colour is red, green or blue, the hue is near 0, 2 or 4 sixths of a turn
    sixths = torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    sixths = torch.where(value == red, (green - blue) / divisor, sixths).add_(6 * shift[:, 0])
    # red, green and blue are the same wave of the hue, a third of a turn apart
    return torch.stack([value - chroma * _wave(sixths + offset) for offset in (5, 3, 1)], dim=1)


def _wave(sixths: Tensor) -> Tensor:
    """Return how far a colour is below the largest one, 0 .. 1, in units of the chroma; period 6."""
    phase = sixths.sub_((sixths / 6).floor_().mul_(6))
    return torch.minimum(phase, 4 - phase).clamp_(0, 1)
