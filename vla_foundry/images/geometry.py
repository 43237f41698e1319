"""Resize, crop, rotate and flip images and depth; every operation returns the exact map of the pixels.

| method         | what it does                                                           |
|----------------|------------------------------------------------------------------------|
| center_crop    | crop the largest centred part with the target's aspect, then scale it  |
| resize_no_crop | scale height and width independently: shapes are distorted             |
| resize_fit     | scale the whole image to fit the target, centred on black              |

Crops start and end at whole pixels, so the x and y scales may differ slightly (less than a pixel over the image); the
returned map holds the scales that were used, so that intrinsics and points can follow. Shrinking an image averages
(antialias). Depth takes the nearest pixel, because the mean of two distances measures nothing.

Convention: a pixel's integer coordinates (x, y) are its **centre** (as in OpenCV), x to the right and y down. The
centre of the top-left pixel is (0, 0), the outer corner of the image is (-0.5, -0.5). So a resize by s sends x to
s (x + 0.5) - 0.5.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8, UInt16
from torch import Tensor

from vla_foundry.images.codec import Size, encode_depth, encode_jpeg, image_from_array

ResizeMethod = Literal["center_crop", "resize_no_crop", "resize_fit"]
Interpolation = Literal["bilinear", "bicubic", "nearest"]


@dataclass(frozen=True, eq=False)
class PixelMap:
    """An affine map of pixel coordinates from a source image to a target image."""

    # float64 [3, 3] on homogeneous (x, y, 1), last row (0, 0, 1); read-only
    matrix: np.ndarray
    source_size: Size
    target_size: Size

    def then(self, following: "PixelMap") -> "PixelMap":
        """Return the map that applies this one first and `following` after it."""
        assert self.target_size == following.source_size, (self.target_size, following.source_size)
        return PixelMap(following.matrix @ self.matrix, self.source_size, following.target_size)

    def inverse(self) -> "PixelMap":
        """Return the map from target to source pixels."""
        return PixelMap(np.linalg.inv(self.matrix), self.target_size, self.source_size)

    def map_points(self, points: Float[np.ndarray, "*batch 2"]) -> Float[np.ndarray, "*batch 2"]:
        """Return where the points (x, y) of the source lie in the target; they may lie outside it."""
        return points @ self.matrix[:2, :2].T + self.matrix[:2, 2]

    def map_intrinsics(self, intrinsics: Float[np.ndarray, "*batch 3 3"]) -> Float[np.ndarray, "*batch 3 3"]:
        """Return the matrix that projects the same points of the same camera frame into the target.

        Exact for every operation. After a quarter turn the matrix is not upper triangular, and after a flip its focal
        length in x is negative, because the camera frame does not move.
        """
        return self.matrix @ intrinsics


def _from_axes(scale: tuple[float, float], shift: tuple[float, float], source: Size, target: Size) -> PixelMap:
    """Map x to scale[0] x + shift[0], and y likewise."""
    matrix = np.array([[scale[0], 0.0, shift[0]], [0.0, scale[1], shift[1]], [0.0, 0.0, 1.0]])
    matrix.flags.writeable = False
    return PixelMap(matrix, source, target)


# a run uses few maps, and creating one takes longer than cropping an image
@lru_cache(maxsize=1024)
def identity_map(size: Size) -> PixelMap:
    """Map an image onto itself."""
    return _from_axes((1.0, 1.0), (0.0, 0.0), size, size)


@lru_cache(maxsize=4096)
def crop_map(source: Size, top: int, left: int, target: Size) -> PixelMap:
    """Map an image onto the part of it whose top-left pixel is (left, top); negative values pad."""
    return _from_axes((1.0, 1.0), (float(-left), float(-top)), source, target)


@lru_cache(maxsize=1024)
def resize_map(source: Size, target: Size) -> PixelMap:
    """Map an image onto the whole of another size."""
    scale_y, scale_x = target[0] / source[0], target[1] / source[1]
    return _from_axes((scale_x, scale_y), (0.5 * scale_x - 0.5, 0.5 * scale_y - 0.5), source, target)


def flip_map(source: Size) -> PixelMap:
    """Mirror left and right."""
    return _from_axes((-1.0, 1.0), (source[1] - 1.0, 0.0), source, source)


def rotate_map(source: Size, quarter_turns_clockwise: int) -> PixelMap:
    """Turn an image clockwise by quarter turns; negative values turn it the other way."""
    result = identity_map(source)
    for _ in range(quarter_turns_clockwise % 4):
        height, width = result.target_size
        turn = np.array([[0.0, -1.0, height - 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        result = result.then(PixelMap(turn, (height, width), (width, height)))
    return result


@dataclass(frozen=True)
class _Steps:
    """Cut the source at `top_left` to `cut`, scale to `scaled`, place at `offset` on a black `target`."""

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
def _resize_steps(source: Size, target: Size, method: ResizeMethod) -> _Steps:
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
    return _Steps(source, cut, scaled, target)


def scale_image(
    image: UInt8[Tensor, "*batch 3 H W"], size: Size, *, interpolation: Interpolation = "bilinear"
) -> UInt8[Tensor, "*batch 3 H2 W2"]:
    """Scale whole images to a size, antialiased unless `nearest`; an image of that size is returned unchanged."""
    *batch, channels, height, width = image.shape
    if (height, width) == size:
        return image
    if interpolation == "nearest":
        return image[..., _nearest(height, size[0])[:, None], _nearest(width, size[1])]
    scaled = torch.nn.functional.interpolate(
        image.reshape(-1, channels, height, width), size, mode=interpolation, antialias=True
    )
    return scaled.reshape(*batch, channels, *size)


def crop_image(
    image: Shaped[Tensor, "*batch H W"], top: int, left: int, size: Size
) -> tuple[Shaped[Tensor, "*batch H2 W2"], PixelMap]:
    """Crop images or depth to a part whose top-left pixel is (left, top); returns a view."""
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
        The images, and the map of their pixels. An image of that size is returned unchanged.
    """
    source = (image.shape[-2], image.shape[-1])
    if source == size:
        return image, identity_map(size)
    steps = _resize_steps(source, size, method)
    cut, _ = crop_image(image, *steps.top_left, steps.cut)
    scaled = scale_image(cut, steps.scaled, interpolation=interpolation)
    if steps.scaled != size:
        top, left = steps.offset
        canvas = torch.zeros((*image.shape[:-3], *size, 3), dtype=torch.uint8).movedim(-1, -3)
        canvas[..., top : top + steps.scaled[0], left : left + steps.scaled[1]] = scaled
        scaled = canvas
    return scaled, steps.pixel_map


def find_resize_map(source: Size, size: Size, *, method: ResizeMethod = "center_crop") -> PixelMap:
    """Return the pixel map of `resize_image` and `resize_depth`, without an image."""
    return identity_map(size) if source == size else _resize_steps(source, size, method).pixel_map


def resize_depth(
    depth: UInt16[Tensor, "*batch H W"], size: Size, *, method: ResizeMethod = "center_crop"
) -> tuple[UInt16[Tensor, "*batch H2 W2"], PixelMap]:
    """Resize depth to its nearest pixels, with the same map as `resize_image`; padding is 0, "not measured"."""
    source = (depth.shape[-2], depth.shape[-1])
    steps = _resize_steps(source, size, method)
    rows = _nearest(steps.cut[0], steps.scaled[0]) + steps.top_left[0]
    columns = _nearest(steps.cut[1], steps.scaled[1]) + steps.top_left[1]
    # not every device can index uint16, so index its bits as int16
    taken = depth.view(torch.int16)[..., rows[:, None], columns]
    result = torch.zeros((*depth.shape[:-2], *size), dtype=torch.int16)
    top, left = steps.offset
    result[..., top : top + steps.scaled[0], left : left + steps.scaled[1]] = taken
    return result.view(torch.uint16), steps.pixel_map


def _nearest(source: int, target: int) -> Tensor:
    """Return, for each of `target` pixels, the `source` pixel that contains its centre."""
    return (2 * torch.arange(target) + 1) * source // (2 * target)


def rotate_image(
    image: Shaped[Tensor, "*batch H W"], quarter_turns_clockwise: int
) -> tuple[Shaped[Tensor, "*batch H2 W2"], PixelMap]:
    """Rotate images or depth clockwise by quarter turns; negative values rotate counter-clockwise."""
    size = (image.shape[-2], image.shape[-1])
    return torch.rot90(image, -quarter_turns_clockwise, (-2, -1)), rotate_map(size, quarter_turns_clockwise)


def flip_image(image: Shaped[Tensor, "*batch H W"]) -> tuple[Shaped[Tensor, "*batch H W"], PixelMap]:
    """Mirror images or depth left to right."""
    return image.flip(-1), flip_map((image.shape[-2], image.shape[-1]))


@dataclass(frozen=True, kw_only=True)
class ImageOperations:
    """How preprocessing changes each image of a camera before it is stored, in this order; inference repeats it."""

    # quarter turns clockwise
    turns: int
    # (height, width) to resize to; None: unchanged
    size: Size | None
    method: ResizeMethod
    jpeg_quality: int

    def pixel_map(self, source: Size) -> PixelMap:
        """Return where the pixels of an image of (height, width) go."""
        turned = rotate_map(source, self.turns)
        if self.size is None:
            return turned
        return turned.then(find_resize_map(turned.target_size, self.size, method=self.method))

    def keeps(self, source: Size) -> bool:
        """True if images of (height, width) stay unchanged."""
        return self.turns == 0 and self.size in (None, source)

    def encode(self, frame: np.ndarray) -> bytes:
        """Rotate, resize and encode a frame: uint8 (H, W, 3) to JPEG, uint16 (H, W) to PNG."""
        if frame.ndim == 2:
            depth = torch.from_numpy(np.ascontiguousarray(frame))
            if self.turns:
                depth, _ = rotate_image(depth, self.turns)
            if self.size is not None:
                depth, _ = resize_depth(depth, self.size, method=self.method)
            return encode_depth(depth)
        image = image_from_array(frame)
        if self.turns:  # rotating by nothing would still copy the image
            image, _ = rotate_image(image, self.turns)
        if self.size is not None:
            image, _ = resize_image(image, self.size, method=self.method, interpolation="bicubic")
        return encode_jpeg(image, quality=self.jpeg_quality)
