"""Augment images: crop, flip and draw a colour jitter.

A sample's draw is a function of (seed, position). It applies to all images of the sample (cameras and times), and its
units suit images of any size. Crops and flips run here, on the CPU. Colours are only drawn here: the device applies
them while it normalises (`colors.normalize_images`), at almost no cost.

Validation and inference use `CENTRE`, the deterministic counterpart: a centred crop of mean size, no flip, unchanged
colours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from vla_foundry.data.pipelines.stages import Dropped, Sample
from vla_foundry.images.codec import MAX_SAMPLE_PIXELS, decode_depth, decode_image, depth_to_grey
from vla_foundry.images.geometry import (
    Interpolation,
    PixelMap,
    crop_image,
    flip_image,
    identity_map,
    resize_image,
)
from vla_foundry.params.data.images import (
    ColorJitterParams,
    CropParams,
    DataAugmentationParams,
    ImageAugmentationParams,
    RandomResizedCropParams,
)
from vla_foundry.randomness import draw_uniforms


@dataclass(frozen=True, kw_only=True)
class AugmentationDraw:
    """The random numbers of a sample, each in [0, 1), shared by all its images."""

    # where the crop lies within the free range: 0 is left and top, 1 right and bottom
    x: float
    y: float
    # where its area and its aspect ratio lie between their bounds
    area: float
    ratio: float
    # the image is flipped if this is below the probability
    flip: float
    # where brightness, contrast, saturation and hue lie between their bounds; None: colours stay unchanged
    colors: tuple[float, float, float, float] | None


CENTRE = AugmentationDraw(x=0.5, y=0.5, area=0.5, ratio=0.5, flip=1.0, colors=None)


def draw_augmentation(*, seed: int, position: int) -> AugmentationDraw:
    """Draw the augmentation of the sample at a position of the plan."""
    x, y, area, ratio, flip, *colors = draw_uniforms(9, seed=seed, position=position, purpose="images.augment").tolist()
    return AugmentationDraw(x=x, y=y, area=area, ratio=ratio, flip=flip, colors=(*colors,))


def augment_image(
    image: UInt8[Tensor, "3 H W"],
    params: ImageAugmentationParams,
    draw: AugmentationDraw,
    *,
    interpolation: Interpolation = "bilinear",
) -> tuple[UInt8[Tensor, "3 H2 W2"], PixelMap]:
    """Crop and flip one image of a sample.

    Returns:
        The result (a view where nothing is resampled), and the map of its pixels.

    Raises:
        ValueError: the image is smaller than the crop.
    """
    pixel_map = identity_map((image.shape[1], image.shape[2]))
    if params.crop.enabled:
        image, pixel_map = _crop(image, params.crop, draw)
    elif params.random_resized_crop.enabled:
        image, pixel_map = _crop_and_resize(image, params.random_resized_crop, draw, interpolation)
    if params.horizontal_flip.enabled and draw.flip < params.horizontal_flip.probability:
        image, step = flip_image(image)
        pixel_map = pixel_map.then(step)
    return image, pixel_map


def draw_color_factors(params: ColorJitterParams, draw: AugmentationDraw) -> Float[np.ndarray, " 4"]:
    """Return a sample's brightness, contrast and saturation factors and its hue shift, as `jitter_colors` takes them.

    Returns:
        float32 [4]; (1, 1, 1, 0) leaves the colours unchanged.
    """
    if not params.enabled or draw.colors is None:
        return np.array([1, 1, 1, 0], np.float32)
    brightness, contrast, saturation, hue = draw.colors
    return np.array(
        [
            _between(max(0.0, 1 - params.brightness), 1 + params.brightness, brightness),
            _between(max(0.0, 1 - params.contrast), 1 + params.contrast, contrast),
            _between(max(0.0, 1 - params.saturation), 1 + params.saturation, saturation),
            _between(*params.hue, hue),
        ],
        np.float32,
    )


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share


def _crop(image: Tensor, params: CropParams, draw: AugmentationDraw) -> tuple[Tensor, PixelMap]:
    source = (image.shape[1], image.shape[2])
    if max(params.shape) <= 1:
        size = (max(1, round(source[0] * params.shape[0])), max(1, round(source[1] * params.shape[1])))
    else:
        size = (int(params.shape[0]), int(params.shape[1]))
    if size[0] > source[0] or size[1] > source[1]:
        raise ValueError(
            f"image of {source[1]} x {source[0]} pixels is smaller than the crop of {size[1]} x {size[0]}. "
            "Lower data.augmentation.image.crop.shape, or give it as fractions of the image."
        )
    where = draw if params.mode == "random" else CENTRE
    return crop_image(image, *_place(source, size, where), size)


def _place(source: tuple[int, int], size: tuple[int, int], draw: AugmentationDraw) -> tuple[int, int]:
    """Return (top, left): every whole pixel where the crop fits is equally likely."""
    return int(draw.y * (source[0] - size[0] + 1)), int(draw.x * (source[1] - size[1] + 1))


def _crop_and_resize(
    image: Tensor, params: RandomResizedCropParams, draw: AugmentationDraw, interpolation: Interpolation
) -> tuple[Tensor, PixelMap]:
    source = (image.shape[1], image.shape[2])
    area = _between(*params.scale, draw.area)
    aspect = math.exp(_between(math.log(params.ratio[0]), math.log(params.ratio[1]), draw.ratio))
    # a crop that is too long for the image ends at its edge
    size = (
        max(1, min(source[0], round(source[0] * math.sqrt(area / aspect)))),
        max(1, min(source[1], round(source[1] * math.sqrt(area * aspect)))),
    )
    part, cut = crop_image(image, *_place(source, size, draw), size)
    resized, scaled = resize_image(part, params.size or source, method="resize_no_crop", interpolation=interpolation)
    return resized, cut.then(scaled)


def prepare_images(
    images: Sequence[bytes | Tensor],
    params: DataAugmentationParams,
    draw: AugmentationDraw,
    depth: Sequence[tuple[float, float] | None] = (),
) -> tuple[list[Tensor], list[PixelMap]]:
    """Decode and augment a sample's images: the same in training, validation and inference.

    Args:
        images: JPEG, PNG or WebP files, or uint8 [3, H, W].
        params: the augmentation.
        draw: the sample's draw; `CENTRE` for validation and inference.
        depth: nearest and farthest distance of each image, metres, where it is depth: see `depth_to_grey`. Its pixels
            are never mixed. None: an image of colour; empty: all are.

    Returns:
        uint8 [3, H, W] each, and the maps of their pixels.

    Raises:
        ValueError: a file cannot be decoded, an image is smaller than the crop, or all are too large together.
    """
    prepared, maps = [], []
    num_pixels = 0
    for image, limits in zip(images, depth or [None] * len(images), strict=True):
        if isinstance(image, Tensor):
            pixels = image
        else:
            pixels = decode_image(image) if limits is None else depth_to_grey(decode_depth(image), *limits)
        num_pixels += pixels.shape[1] * pixels.shape[2]
        if num_pixels > MAX_SAMPLE_PIXELS:
            raise ValueError(f"its {len(images)} images have more than {MAX_SAMPLE_PIXELS:,} pixels together")
        pixel_map = identity_map((pixels.shape[1], pixels.shape[2]))
        if params.enabled:
            interpolation = "bilinear" if limits is None else "nearest"
            pixels, pixel_map = augment_image(pixels, params.image, draw, interpolation=interpolation)
        prepared.append(pixels)
        maps.append(pixel_map)
    return prepared, maps


def add_images(
    sample: Sample,
    images: Sequence[bytes | Tensor],
    params: DataAugmentationParams,
    depth: Sequence[tuple[float, float] | None] = (),
) -> Sample:
    """Return the sample with `images`, `image_maps` and, in training with colour jitter, `color_factors`.

    See `prepare_images` for `depth`; colours of depth do not change.

    Raises:
        Dropped: an image cannot be used.
    """
    kinds = params.image.crop, params.image.random_resized_crop, params.image.horizontal_flip, params.image.color_jitter
    is_augmented = params.enabled and sample["__is_training__"] and any(kind.enabled for kind in kinds)
    draw = draw_augmentation(seed=sample["__seed__"], position=sample["__position__"]) if is_augmented else CENTRE
    try:
        prepared, maps = prepare_images(images, params, draw, depth)
    except ValueError as error:
        raise Dropped("bad image", str(error)) from None
    sample = {**sample, "images": prepared, "image_maps": maps}
    if is_augmented and params.image.color_jitter.enabled:
        factors = draw_color_factors(params.image.color_jitter, draw)
        if any(depth):
            unchanged = draw_color_factors(params.image.color_jitter, CENTRE)
            factors = np.stack([factors if limits is None else unchanged for limits in depth])
        sample["color_factors"] = factors
    return sample
