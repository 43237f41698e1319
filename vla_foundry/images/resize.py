"""Resize images and depth by one of three methods, with the exact map of their pixels.

| method         | what it does                                                           |
|----------------|------------------------------------------------------------------------|
| center_crop    | cut the largest centred part of the wanted aspect, then scale it       |
| resize_no_crop | scale height and width each to what is wanted: shapes are distorted    |
| resize_fit     | scale the whole image into the wanted size, centred on black           |

Cuts are at whole pixels, so that the scales of x and y may differ by less than a pixel over the image; the map that
is returned holds the scales that were used. Images are averaged when they shrink (antialias); depth takes the nearest
pixel, because the mean of two distances is the distance of nothing.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from jaxtyping import Shaped, UInt8, UInt16
from torch import Tensor

from vla_foundry.images.geometry import PixelMap, Size, crop_map, identity_map, resize_map

ResizeMethod = Literal["center_crop", "resize_no_crop", "resize_fit"]
Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class _Plan:
    """Cut the source at (top, left) to `cut`, scale that to `scaled`, put it at `offset` of a black `target`."""

    source: Size
    cut: Size
    scaled: Size
    target: Size

    @property
    def top_left(self) -> tuple[int, int]:
        return (self.source[0] - self.cut[0]) // 2, (self.source[1] - self.cut[1]) // 2

    @property
    def offset(self) -> tuple[int, int]:
        return (self.target[0] - self.scaled[0]) // 2, (self.target[1] - self.scaled[1]) // 2

    @cached_property
    def pixel_map(self) -> PixelMap:
        top, left = self.top_left
        cut = crop_map(self.source, top, left, self.cut)
        placed = crop_map(self.scaled, -self.offset[0], -self.offset[1], self.target)
        return cut.then(resize_map(self.cut, self.scaled)).then(placed)


def _round_up_to_one(value: float) -> int:
    return max(1, round(value))


@lru_cache(maxsize=1024)
def _plan_resize(source: Size, target: Size, method: ResizeMethod) -> _Plan:
    height, width = source
    target_height, target_width = target
    is_wide = width * target_height > height * target_width
    cut, scaled = source, target
    if method == "center_crop" and is_wide:
        cut = (height, _round_up_to_one(height * target_width / target_height))
    elif method == "center_crop":
        cut = (_round_up_to_one(width * target_height / target_width), width)
    elif method == "resize_fit" and is_wide:
        scaled = (_round_up_to_one(height * target_width / width), target_width)
    elif method == "resize_fit":
        scaled = (target_height, _round_up_to_one(width * target_height / height))
    return _Plan(source, cut, scaled, target)


def scale_image(
    image: UInt8[Tensor, "*batch 3 H W"], size: Size, *, interpolation: Interpolation = "bilinear"
) -> UInt8[Tensor, "*batch 3 H2 W2"]:
    """Scale whole images to a size, antialiased; an image that has it is returned as it is."""
    *batch, channels, height, width = image.shape
    if (height, width) == size:
        return image
    scaled = torch.nn.functional.interpolate(
        image.reshape(-1, channels, height, width), size, mode=interpolation, antialias=True
    )
    return scaled.reshape(*batch, channels, *size)


def crop_image(
    image: Shaped[Tensor, "*batch H W"], top: int, left: int, size: Size
) -> tuple[Shaped[Tensor, "*batch H2 W2"], PixelMap]:
    """Cut a part, whose top-left pixel is (left, top), out of images or depth; no copy is made."""
    source = (image.shape[-2], image.shape[-1])
    assert 0 <= top <= source[0] - size[0], (source, top, size)
    assert 0 <= left <= source[1] - size[1], (source, left, size)
    return image[..., top : top + size[0], left : left + size[1]], crop_map(source, top, left, size)


def resize_image(
    image: UInt8[Tensor, "*batch 3 H W"],
    size: Size,
    *,
    method: ResizeMethod = "center_crop",
    interpolation: Interpolation = "bilinear",
) -> tuple[UInt8[Tensor, "*batch 3 H2 W2"], PixelMap]:
    """Resize images to (height, width).

    Returns:
        The images, and the map of their pixels. An image that has the size is returned as it is.
    """
    source = (image.shape[-2], image.shape[-1])
    if source == size:
        return image, identity_map(size)
    plan = _plan_resize(source, size, method)
    cut, _ = crop_image(image, *plan.top_left, plan.cut)
    scaled = scale_image(cut, plan.scaled, interpolation=interpolation)
    if plan.scaled != size:
        top, left = plan.offset
        canvas = torch.zeros((*image.shape[:-3], *size, 3), dtype=torch.uint8).movedim(-1, -3)
        canvas[..., top : top + plan.scaled[0], left : left + plan.scaled[1]] = scaled
        scaled = canvas
    return scaled, plan.pixel_map


def find_resize_map(source: Size, size: Size, *, method: ResizeMethod = "center_crop") -> PixelMap:
    """Return the map of pixels that `resize_image` and `resize_depth` make, without an image."""
    return identity_map(size) if source == size else _plan_resize(source, size, method).pixel_map


def resize_depth(
    depth: UInt16[Tensor, "*batch H W"], size: Size, *, method: ResizeMethod = "center_crop"
) -> tuple[UInt16[Tensor, "*batch H2 W2"], PixelMap]:
    """Resize depth by its nearest pixels, along the very map of `resize_image`; padding is 0, "not measured"."""
    source = (depth.shape[-2], depth.shape[-1])
    plan = _plan_resize(source, size, method)
    rows = _nearest(plan.cut[0], plan.scaled[0]) + plan.top_left[0]
    columns = _nearest(plan.cut[1], plan.scaled[1]) + plan.top_left[1]
    # indexing is not there for uint16 on every device; its bits as int16 are
    taken = depth.view(torch.int16)[..., rows[:, None], columns]
    result = torch.zeros((*depth.shape[:-2], *size), dtype=torch.int16)
    top, left = plan.offset
    result[..., top : top + plan.scaled[0], left : left + plan.scaled[1]] = taken
    return result.view(torch.uint16), plan.pixel_map


def _nearest(source: int, target: int) -> Tensor:
    """For each of `target` pixels, the one of `source` that its centre falls in."""
    return (2 * torch.arange(target) + 1) * source // (2 * target)
