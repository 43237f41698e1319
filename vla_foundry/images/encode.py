"""Images and depth -> bytes of JPEG and PNG files."""

import io
from typing import Any

import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image
from torch import Tensor


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
