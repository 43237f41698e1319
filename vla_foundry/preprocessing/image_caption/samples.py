"""Make the members of a sample from image files and captions, checked so that training can use them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vla_foundry.preprocessing.image_caption.failures import Unusable
from vla_foundry.preprocessing.image_caption.sources import Item
from vla_foundry.storage.uri import read_bytes

_CONVERSATION_KEYS = ("conversations", "messages")


def read_item(item: Item, *, caption_key: str, max_side: int | None, jpeg_quality: int) -> dict[str, bytes]:
    """Read the files of an item and return the members of its sample.

    Raises:
        Unusable: a file can not be read, an image can not be decoded, or there is no caption.
    """
    images = [_read(uri) for uri in item.images]
    txt = _read(item.txt) if item.txt is not None else None
    values = _read(item.json) if item.json is not None else None
    if item.caption is not None:
        txt = item.caption.encode("utf-8", errors="replace")
    if item.values:
        values = json.dumps(item.values, ensure_ascii=False, default=str).encode("utf-8")
    texts = create_texts(txt, values, caption_key=caption_key)
    return {**create_images(images, max_side=max_side, jpeg_quality=jpeg_quality), **texts}


def _read(uri: str) -> bytes:
    try:
        return read_bytes(uri)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise Unusable("missing file", f"{uri}: {type(error).__name__}") from None


def create_texts(txt: bytes | None, values: bytes | None, *, caption_key: str) -> dict[str, bytes]:
    """Return the text members: txt, stripped, and json, as it is.

    Raises:
        Unusable: they say nothing about the image, or are no text.
    """
    members: dict[str, bytes] = {}
    caption = ""
    if txt is not None:
        caption = _decode(txt).strip()
        if caption:
            members["txt"] = caption.encode("utf-8")
    if values is not None:
        facts = _parse_object(_decode(values))
        members["json"] = values
        caption = caption or _find_text(facts, caption_key)
    if not caption:
        raise Unusable("no caption")
    return members


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable("caption is not UTF-8", f"byte {error.start}") from None


def _parse_object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise Unusable("bad JSON")
    return values


def _find_text(values: Mapping[str, Any], caption_key: str) -> str:
    if any(isinstance(values.get(key), list) and values[key] for key in _CONVERSATION_KEYS):
        return "conversation"
    caption = values.get(caption_key)
    return caption.strip() if isinstance(caption, str) else ""


def create_images(images: Sequence[bytes], *, max_side: int | None, jpeg_quality: int) -> dict[str, bytes]:
    """Return the image members: one named by its format, or several with `image_<number>.` before.

    Raises:
        Unusable: an image can not be decoded.
    """
    files = [_check_image(data, max_side=max_side, jpeg_quality=jpeg_quality) for data in images]
    if len(files) == 1:
        return dict(files)
    return {f"image_{number}.{suffix}": data for number, (suffix, data) in enumerate(files)}


def _check_image(data: bytes, *, max_side: int | None, jpeg_quality: int) -> tuple[str, bytes]:
    """Decode an image, and scale it down if it is too large."""
    from vla_foundry.images.codec import decode_image, encode_jpeg
    from vla_foundry.images.resize import resize_image

    try:
        image = decode_image(data)
    except ValueError as error:
        raise Unusable("bad image", str(error)) from None
    height, width = image.shape[1:]
    if max_side is None or max(height, width) <= max_side:
        return _suffix_of(data), data
    scale = max_side / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    small, _ = resize_image(image, size, method="resize_no_crop", interpolation="bicubic")
    return "jpg", encode_jpeg(small, quality=jpeg_quality)


def _suffix_of(data: bytes) -> str:
    if data.startswith(b"\x89PNG"):
        return "png"
    return "jpg" if data.startswith(b"\xff\xd8") else "webp"
