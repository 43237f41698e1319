"""Decode image files to images and depth, the same on every machine, and encode JPEG and PNG.

torchvision's operator decodes JPEG where it exists, else Pillow does: both use libjpeg-turbo and give the same pixels,
but Pillow takes 1.6 times as long. (torchvision deprecated its Python wrapper in 0.29, so it may disappear.) Decoding
at half size saves nothing: most of the work is entropy decoding, and only Pillow can do it.

- The orientation is applied as Pillow's `exif_transpose` does: that of EXIF data, in a PNG also of a text chunk with
  EXIF data; without one, that of XMP data.
- Grey, palette, CMYK and 16-bit pictures become 8-bit RGB (16 bits by rounding, v / 257).
- Transparent pixels are composited over white.
- An animation, or a file of several pages, yields its first picture.

A truncated or malformed file raises an error. A JPEG with altered compressed data may decode to wrong pixels, as with
any decoder: shard checksums catch that.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8, UInt16
from PIL import Image
from torch import Tensor

# (height, width) in pixels
Size = tuple[int, int]
# larger pictures are refused before memory is allocated: 64 million pixels take 192 MB
MAX_PIXELS = 1 << 26
# the images of one sample together
MAX_SAMPLE_PIXELS = 2 * MAX_PIXELS

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
# first bytes -> Pillow's name of the format; only these decoders ever see a file
_FORMATS = {
    _JPEG: "JPEG",
    _PNG: "PNG",
    b"RIFF": "WEBP",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"P5": "PPM",
    b"P6": "PPM",
    b"\0\0\0\x0cjP  ": "JPEG2000",
}
# what Pillow raises on broken bytes, found by fuzzing
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
# torchvision.io.ImageReadMode.RGB
_RGB_MODE = 3
# the first bytes of a JPEG's segment: 0xFF, its marker, its length
_SEGMENT = struct.Struct(">BBH")
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# start of a JPEG's EXIF and XMP segments; the tag of the orientation, and the numbers it may be
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_ORIENTATION, _EXIF_NUMBERS = 0x0112, {3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I"}
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
# orientation -> how to turn pixels (3, H, W) upright
_TURNS: dict[int, Callable[[Tensor], Tensor]] = {
    2: lambda image: image.flip(-1),
    3: lambda image: image.flip(-1, -2),
    4: lambda image: image.flip(-2),
    5: lambda image: image.mT,
    6: lambda image: image.mT.flip(-1),
    7: lambda image: image.mT.flip(-1, -2),
    8: lambda image: image.mT.flip(-2),
}


def image_from_array(array: UInt8[np.ndarray, "*batch H W 3"]) -> UInt8[Tensor, "*batch 3 H W"]:
    """View an RGB array [..., H, W, 3] as images; a writable contiguous array shares its memory."""
    writable = array if array.flags.writeable and array.flags.c_contiguous else array.copy()
    return torch.from_numpy(writable).movedim(-1, -3)


def image_to_array(image: UInt8[Tensor, "*batch 3 H W"]) -> UInt8[np.ndarray, "*batch H W 3"]:
    """View images as an RGB array [..., H, W, 3]; memory is shared."""
    return image.movedim(-3, -1).numpy()


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> UInt8[Tensor, "3 H W"]:
    """Decode a JPEG, PNG, WebP, GIF, BMP, TIFF, PPM or JPEG 2000 file to RGB.

    Raises:
        ValueError: another format, a malformed or truncated file, or more than max_pixels pixels; one line.
    """
    decode_jpeg = _jpeg_operator() if data.startswith(_JPEG) else None
    if decode_jpeg is None:
        return _image_of(_open(data, max_pixels))
    size, orientation = _read_jpeg_header(data)
    check_size(size, max_pixels=max_pixels)
    try:
        # torch needs writable memory, hence the bytearray; the operator looks for EXIF data in the first segment only
        pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), _RGB_MODE, False)
    except RuntimeError as error:
        raise _broken("JPEG", data, str(error).splitlines()[0].rpartition(", ")[2]) from None
    return _turn_upright(pixels, orientation)


@lru_cache(maxsize=1)
def _jpeg_operator() -> Callable[[Tensor, int, bool], Tensor] | None:
    """Return torchvision's decoder (encoded bytes, colour mode, apply EXIF orientation), or None if it has none.

    Only its library is loaded: importing torchvision imports all its models, which takes seconds.
    """
    package = find_spec("torchvision")
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        for library in sorted(Path(folder).glob("image*.so")):
            try:
                torch.ops.load_library(library)
            except OSError:
                continue  # built for another torch, or its own libraries are missing
    return getattr(torch.ops.image, "decode_jpeg", None)


def decode_depth(data: bytes) -> UInt16[Tensor, "H W"]:
    """Decode a 16-bit grey PNG, unchanged.

    Raises:
        ValueError: not such a file, a malformed file, or more than MAX_PIXELS pixels; one line.
    """
    if not data.startswith(_PNG):
        raise ValueError(f"depth must be a 16-bit grey PNG, got {len(data)} bytes that begin with {data[:4]!r}.")
    picture = _open(data)
    if not picture.mode.startswith("I"):
        raise ValueError(f"depth must be a 16-bit grey PNG, got a PNG of Pillow's mode {picture.mode}.")
    return torch.from_numpy(np.array(picture).astype(np.uint16))


def depth_to_grey(depth: UInt16[Tensor, "H W"], near: float, far: float) -> UInt8[Tensor, "3 H W"]:
    """Map millimetres to grey: `near` metres and less are 1, `far` and more are 255; 0, not measured, stays 0."""
    values = depth.numpy()
    share = np.clip((values / 1000 - near) / (far - near), 0, 1)
    grey = np.where(values == 0, 0, np.rint(1 + 254 * share)).astype(np.uint8)
    return image_from_array(np.repeat(grey[..., None], 3, axis=2))


def _open(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open and load a file of at most max_pixels pixels."""
    kind = next((kind for start, kind in _FORMATS.items() if data.startswith(start)), None)
    if kind is None:
        known = ", ".join(dict.fromkeys(_FORMATS.values()))
        raise ValueError(f"image of {len(data)} bytes is none of {known} (it begins with {data[:4]!r}).")
    try:
        picture = Image.open(io.BytesIO(data), formats=[kind])
        size = (picture.height, picture.width)
        if size[0] * size[1] <= max_pixels:
            picture.load()
    except _PILLOW_ERRORS as error:
        text = re.sub(r" <\S+ object at \w+>", "", str(error))
        raise _broken(kind, data, " ".join(text.split()) or type(error).__name__) from None
    check_size(size, max_pixels=max_pixels)
    return picture


def _broken(kind: str, data: bytes, reason: str) -> ValueError:
    return ValueError(f"{kind} of {len(data)} bytes is broken: {reason}")


def check_size(size: Size, name: str = "image", *, max_pixels: int = MAX_PIXELS) -> None:
    """Check that a picture is not too large to decode.

    Raises:
        ValueError: it has more than max_pixels pixels.
    """
    if size[0] * size[1] > max_pixels:
        raise ValueError(f"{name} of {size[1]} x {size[0]} pixels is too large: the limit is {max_pixels} pixels.")


def _read_jpeg_header(data: bytes) -> tuple[Size, int]:
    """Return the size and the orientation from the segments before the pixels, in any order."""
    position, size, exif, xmp = 2, None, b"", b""
    last = len(data) - 4
    while 0 <= position <= last:
        mark, marker, length = _SEGMENT.unpack_from(data, position)
        if mark != 0xFF:
            position = data.find(b"\xff", position)  # bytes between segments are skipped
            continue
        if marker in (0xD9, 0xDA):  # end of image, or pixels
            break
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # fill byte, or a marker without a length
            position += 1 if marker == 0xFF else 2
            continue
        end = position + 2 + length
        if marker == 0xE1:
            content = data[position + 4 : end]
            if content.startswith(_EXIF):
                exif += content.removeprefix(_EXIF)  # one directory may fill several segments
            elif content.startswith(_XMP):
                xmp = content
        elif size is None and marker in _FRAME_MARKERS and min(end, len(data)) - position >= 9:
            height, width = struct.unpack_from(">HH", data, position + 5)
            size = (height, width)
        position = end
    if size is None:
        raise _broken("JPEG", data, "it has no frame header")
    return size, _read_orientation(exif, xmp) if exif or xmp else 1


def _image_of(picture: Image.Image) -> UInt8[Tensor, "3 H W"]:
    """Rotate a loaded picture upright and convert it to 8-bit RGB."""
    return _turn_upright(_convert_to_rgb(picture), _orientation_of(picture))


def _orientation_of(picture: Image.Image) -> int:
    """Return a loaded picture's orientation, 1 (upright) for a TIFF, which Pillow turns itself."""
    if picture.format == "TIFF":
        return 1
    profile = str(picture.info.get("Raw profile type exif", ""))
    try:
        text_exif = bytes.fromhex("".join(profile.split("\n")[3:]))
    except ValueError:
        text_exif = b""
    xmp = picture.info.get("XML:com.adobe.xmp") or picture.info.get("xmp", b"")
    return _read_orientation(picture.info.get("exif", text_exif), xmp.encode() if isinstance(xmp, str) else xmp)


def _turn_upright(image: UInt8[Tensor, "3 _ _"], orientation: int) -> UInt8[Tensor, "3 _ _"]:
    if orientation not in _TURNS:
        return image
    # channels stay last in memory
    return _TURNS[orientation](image).permute(1, 2, 0).contiguous().permute(2, 0, 1)


def _convert_to_rgb(picture: Image.Image) -> UInt8[Tensor, "3 H W"]:
    if picture.mode.startswith(("I", "F")):
        values = np.array(picture)
        if picture.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("picture has fractions or more than 16 bits, of which nothing says what is white.")
        grey = (values.astype(np.uint32) + 128) // 257
        return image_from_array(np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2))
    if picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        paper = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(paper, layer)
    return image_from_array(np.array(picture.convert("RGB")))


def _read_orientation(exif: bytes, xmp: bytes) -> int:
    """Return the orientation of EXIF data or, where it has none, of XMP data; 1 (upright) without either."""
    exif = exif.removeprefix(_EXIF)
    byte_order = ">" if exif.startswith(b"MM") else "<"
    try:
        (directory,) = struct.unpack_from(f"{byte_order}I", exif, 4)
        (num_entries,) = struct.unpack_from(f"{byte_order}H", exif, directory)
        for entry in range(directory + 2, directory + 2 + 12 * num_entries, 12):
            tag, kind, count, offset = struct.unpack_from(f"{byte_order}HHII", exif, entry)
            if tag == _ORIENTATION and 1 <= kind <= 13 and count:
                number = _EXIF_NUMBERS.get(kind)
                if number is None:
                    return 1
                is_inline = count * struct.calcsize(number) <= 4  # of several, the first counts
                return struct.unpack_from(byte_order + number, exif, entry + 8 if is_inline else offset)[0]
    except struct.error:
        pass  # broken EXIF data is ignored
    found = _XMP_ORIENTATION.search(xmp)
    return int(found[1]) if found is not None else 1


def is_upright(data: bytes) -> bool:
    """True if a JPEG, PNG or WebP file, which `decode_image` accepts, has no orientation to apply."""
    orientation = _read_jpeg_header(data)[1] if data.startswith(_JPEG) else _orientation_of(_open(data))
    return orientation not in _TURNS


def encode_jpeg(image: UInt8[Tensor, "3 H W"], *, quality: int = 95) -> bytes:
    """Encode an RGB image as JPEG (4:2:0) without metadata; `quality` is 1 .. 100."""
    return _encode(image_to_array(image), "JPEG", quality=quality, subsampling="4:2:0")


def encode_png(image: UInt8[Tensor, "3 H W"]) -> bytes:
    """Encode an RGB image as lossless PNG."""
    return _encode(image_to_array(image), "PNG", compress_level=6)


def encode_depth(depth: UInt16[Tensor, "H W"]) -> bytes:
    """Encode depth as a 16-bit grey PNG."""
    return _encode(depth.numpy(), "PNG", compress_level=6)


def _encode(array: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, kind, **options)
    return buffer.getvalue()
