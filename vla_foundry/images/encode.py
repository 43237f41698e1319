"""Images and depth -> bytes of JPEG and PNG files; and what is done to a camera's images before they are stored."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8, UInt16
from PIL import Image
from torch import Tensor

from vla_foundry.images.decode import image_from_array
from vla_foundry.images.geometry import PixelMap, Size, rotate_map
from vla_foundry.images.resize import ResizeMethod, find_resize_map, resize_depth, resize_image
from vla_foundry.images.rotate import rotate_image


def image_to_array(image: UInt8[Tensor, "*batch 3 H W"]) -> UInt8[np.ndarray, "*batch H W 3"]:
    """View images as an RGB array [..., H, W, 3]; memory is shared."""
    return image.movedim(-3, -1).numpy()


def encode_jpeg(image: UInt8[Tensor, "3 H W"], *, quality: int = 95, full_colour: bool = False) -> bytes:
    """Encode an image as JPEG, without metadata.

    Args:
        image: RGB.
        quality: 1 .. 100.
        full_colour: keep colour at full resolution (4:4:4), not half (4:2:0): sharper coloured edges, larger files.
    """
    return _encode(image_to_array(image), "JPEG", quality=quality, subsampling="4:4:4" if full_colour else "4:2:0")


def encode_png(image: UInt8[Tensor, "3 H W"], *, compression: int = 6) -> bytes:
    """Encode an image as PNG, without loss; `compression` is 0 (fast) .. 9 (small)."""
    return _encode(image_to_array(image), "PNG", compress_level=compression)


def encode_depth(depth: UInt16[Tensor, "H W"], *, compression: int = 6) -> bytes:
    """Encode depth as a grey PNG of 16 bits, without loss; `compression` is 0 (fast) .. 9 (small)."""
    return _encode(depth.numpy(), "PNG", compress_level=compression)


def _encode(array: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, kind, **options)
    return buffer.getvalue()


@dataclass(frozen=True, kw_only=True)
class ImageOperations:
    """What is done to each image of a camera before it is stored, in this order; inference repeats it."""

    # quarter turns clockwise
    turns: int
    # (height, width) to resize to; None: as it is
    size: Size | None
    method: ResizeMethod
    jpeg_quality: int

    def pixel_map(self, source: Size) -> PixelMap:
        """Where the pixels of an image of (height, width) go."""
        turned = rotate_map(source, self.turns)
        if self.size is None:
            return turned
        return turned.then(find_resize_map(turned.target_size, self.size, method=self.method))

    def keeps(self, source: Size) -> bool:
        """True if images of (height, width) stay as they are."""
        return self.turns == 0 and self.size in (None, source)

    def encode(self, frame: np.ndarray) -> bytes:
        """Turn, resize and encode a frame: uint8 (H, W, 3) to JPEG, uint16 (H, W) to PNG."""
        if frame.ndim == 2:
            depth = torch.from_numpy(np.ascontiguousarray(frame))
            if self.turns:
                depth, _ = rotate_image(depth, self.turns)
            if self.size is not None:
                depth, _ = resize_depth(depth, self.size, method=self.method)
            return encode_depth(depth)
        image = image_from_array(frame)
        if self.turns:  # no turn would copy the image too
            image, _ = rotate_image(image, self.turns)
        if self.size is not None:
            image, _ = resize_image(image, self.size, method=self.method, interpolation="bicubic")
        return encode_jpeg(image, quality=self.jpeg_quality)
