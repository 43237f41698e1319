"""Files of every kind decode to the same upright RGB everywhere, and broken ones are refused in one line."""

import io
import struct
import zlib

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageOps

from vla_foundry.images import codec
from vla_foundry.images.codec import (
    decode_depth,
    decode_image,
    encode_depth,
    encode_jpeg,
    image_from_array,
    image_to_array,
    is_upright,
)

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
ORIENTED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


def save(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(params=["operator", "pillow"])
def jpeg_decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both of the ways to decode JPEG."""
    if request.param == "pillow":
        monkeypatch.setattr(codec, "_jpeg_operator", lambda: None)
    else:
        assert codec._jpeg_operator() is not None
    return request.param


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": "4:4:4"}], ids=str)
def test_jpeg_decodes_to_the_pixels_of_pillow(jpeg_decoder: str, mode: str, options: dict) -> None:
    data = save(Image.fromarray(PICTURE).convert(mode), "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(image_to_array(decode_image(data)), expected)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_files_keep_every_pixel(kind: str) -> None:
    data = save(Image.fromarray(PICTURE), kind, lossless=True)
    image = decode_image(data)
    np.testing.assert_array_equal(image_to_array(image), PICTURE)
    assert image.permute(1, 2, 0).is_contiguous()


@pytest.mark.parametrize("orientation", ORIENTED)
def test_exif_orientation_is_found_behind_other_segments(jpeg_decoder: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = save(Image.fromarray(PICTURE), "JPEG")
    segment = exif.tobytes()

    def app(number: int, content: bytes) -> bytes:
        return bytes([0xFF, 0xE0 + number]) + (len(content) + 2).to_bytes(2, "big") + content

    xmp, comment = app(1, b"http://ns.adobe.com/xap/1.0/\0<x/>"), b"\xff\xfe\0\4hi"
    expected = ORIENTED[orientation](image_to_array(decode_image(plain)))
    for before in (xmp, comment, app(2, b"ICC_PROFILE\0\1\1" + bytes(64)), xmp + comment + b"\xff"):
        data = plain[:2] + before + app(1, segment) + plain[2:]
        np.testing.assert_array_equal(image_to_array(decode_image(data)), expected)
        assert is_upright(data) is (orientation == 1)
    # behind the frame header, too, and as a 32-bit number
    start = plain.index(b"\xff\xc0")
    frame_end = start + 2 + int.from_bytes(plain[start + 2 : start + 4], "big")
    wide = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\4\0\0\0\1" + orientation.to_bytes(4, "big") + bytes(4)
    data = plain[:frame_end] + app(1, wide) + plain[frame_end:]
    np.testing.assert_array_equal(image_to_array(decode_image(data)), expected)


@pytest.mark.parametrize("orientation", ORIENTED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_turns_the_picture_upright(jpeg_decoder: str, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(PICTURE)
    options = {"quality": 90} if kind == "JPEG" else {"lossless": True}
    plain = image_to_array(decode_image(save(picture, kind, **options)))
    turned = image_to_array(decode_image(save(picture, kind, exif=exif, **options)))
    np.testing.assert_array_equal(turned, ORIENTED[orientation](plain))


def _exif(*entries: tuple[int, int, int, int]) -> bytes:
    """EXIF data of entries (tag, type, count, 32 bits of value)."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4)


def _xmp(orientation: int) -> bytes:
    return b'<rdf:Description tiff:Orientation="%d"/>' % orientation


_EXIF_1, _EXIF_6, _NO_ORIENTATION = (_exif((tag, 3, 1, value)) for tag, value in ((274, 1), (274, 6), (271, 6)))
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_PROFILE = b"\nexif\n      38\n" + (b"Exif\0\0" + _EXIF_6).hex().encode() + b"\n"


def _jpeg_with(*segments: bytes, between: bytes = b"") -> bytes:
    plain = save(Image.fromarray(PICTURE), "JPEG")
    added = (b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment for segment in segments)
    return plain[:20] + between.join((b"", *added)) + plain[20:]


def _png_with(*chunks: tuple[bytes, bytes], at: int = 33) -> bytes:
    plain = save(Image.fromarray(PICTURE), "PNG")
    added = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return plain[:at] + b"".join(added) + plain[at:]


@pytest.mark.parametrize(
    ("data", "orientation"),
    [
        (_jpeg_with(b"Exif\0\0" + _EXIF_1, b"Exif\0\0" + _EXIF_6), 1),
        (_jpeg_with(b"Exif\0\0" + _EXIF_6[:14], b"Exif\0\0" + _EXIF_6[14:]), 6),
        pytest.param(
            _jpeg_with(b"Exif\0\0" + _exif((274, 3, 0, 0), (274, 4, 1, 6), (274, 3, 1, 3))),
            6,
            marks=pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="earlier ones take another entry"),
        ),
        (_jpeg_with(b"Exif\0\0" + _exif((274, 3, 2, 0x30006))), 6),
        (_jpeg_with(b"Exif\0\0" + _exif((274, 1, 1, 6)), _XMP + _xmp(3)), 1),
        (_jpeg_with(b"Exif\0\0" + _EXIF_6, between=b"junk"), 6),
        (_jpeg_with(b"Exif\0\0" + _EXIF_6, between=b"\xff\0\xff\xff"), 6),
        (_jpeg_with(_XMP + _xmp(6)), 6),
        (_jpeg_with(_XMP + b"<tiff:Orientation>6</tiff:Orientation>", b"Exif\0\0" + _NO_ORIENTATION), 6),
        (_jpeg_with(_XMP + _xmp(6), b"Exif\0\0" + _EXIF_1), 1),
        (_jpeg_with(_XMP + _xmp(3), _XMP + _xmp(6)), 6),
        (_png_with((b"eXIf", _EXIF_6), at=-12), 6),
        (_png_with((b"tEXt", b"Raw profile type exif\0" + _PROFILE)), 6),
        (_png_with((b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(_PROFILE)), (b"eXIf", _EXIF_1)), 1),
        (_png_with((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + _xmp(6))), 6),
        (save(Image.fromarray(PICTURE), "WEBP", lossless=True, xmp=_xmp(6)), 6),
        (save(Image.fromarray(PICTURE), "WEBP", lossless=True, xmp=_xmp(6), exif=_EXIF_1), 1),
    ],
)
@pytest.mark.filterwarnings("ignore:Metadata Warning")
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_the_orientation_is_the_one_of_pillow(
    jpeg_decoder: str, capfd: pytest.CaptureFixture[str], data: bytes, orientation: int
) -> None:
    with Image.open(io.BytesIO(data)) as picture:
        plain = np.array(picture.convert("RGB"))
        expected = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    np.testing.assert_array_equal(ORIENTED[orientation](plain), expected)
    np.testing.assert_array_equal(image_to_array(decode_image(data)), expected)
    assert is_upright(data) is (orientation == 1)
    capfd.readouterr()  # libjpeg warns of bytes between segments


def test_grey_becomes_three_equal_colours() -> None:
    image = decode_image(save(Image.fromarray(PICTURE[..., 0]), "PNG"))
    np.testing.assert_array_equal(image.numpy(), np.repeat(PICTURE[None, ..., 0], 3, axis=0))


def test_16_bit_grey_is_rounded_to_8_bits_not_clipped() -> None:
    grey = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    image = decode_image(save(Image.fromarray(grey), "PNG"))
    np.testing.assert_array_equal(image[0].numpy(), [[0, 0, 1, 1, 128, 255]])


def test_a_palette_is_looked_up() -> None:
    flat = np.repeat(PICTURE[:4, :4], 4, axis=0)
    palette = Image.fromarray(flat).convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_array_equal(
        image_to_array(decode_image(save(palette, "PNG"))), np.asarray(palette.convert("RGB"))
    )


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparent_pixels_lie_on_white(kind: str) -> None:
    layer = np.dstack([PICTURE, np.full((40, 56), 255, np.uint8)])
    layer[:, :10, 3] = 0
    layer[:, 10:20] = (0, 0, 0, 128)
    image = image_to_array(decode_image(save(Image.fromarray(layer), kind, lossless=True, exact=True)))
    assert (image[:, :10] == 255).all()
    assert (abs(image[:, 10:20].astype(int) - 127) <= 1).all()
    np.testing.assert_array_equal(image[:, 20:], PICTURE[:, 20:])


def test_a_transparent_palette_colour_lies_on_white() -> None:
    indices = Image.fromarray(np.array([[0, 1]], np.uint8), mode=None).convert("P")
    indices.putpalette([10, 20, 30, 40, 50, 60])
    data = save(indices, "PNG", transparency=0)
    np.testing.assert_array_equal(image_to_array(decode_image(data)), [[[255, 255, 255], [40, 50, 60]]])


def test_the_first_picture_of_an_animation_is_taken() -> None:
    frames = [Image.fromarray(PICTURE), Image.fromarray(255 - PICTURE)]
    data = save(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(image_to_array(decode_image(data)), PICTURE)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.98])
def test_a_file_cut_short_is_refused(jpeg_decoder: str, kind: str, share: float) -> None:
    data = save(Image.fromarray(PICTURE), kind)
    with pytest.raises(ValueError, match=f"^{kind} of .* bytes is broken: [^\n<]+$"):
        decode_image(data[: int(len(data) * share)])


@pytest.mark.parametrize("data", [b"", b"abc", b"PK\3\4" + bytes(50), b"<html>not found</html>"])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="is none of JPEG, PNG, WEBP, GIF, BMP"):
        decode_image(data)
    with pytest.raises(ValueError, match=r"^GIF of 56 bytes is broken"):
        decode_image(b"GIF89a" + bytes(50))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_other_kinds_decode_to_the_pixels_of_pillow(kind: str) -> None:
    data = save(Image.fromarray(PICTURE), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(image_to_array(decode_image(data)), expected)
    with pytest.raises(ValueError, match=f"^{kind} of .* bytes is broken: [^\n<]+$"):
        decode_image(data[: len(data) // 2])


def test_only_the_first_page_of_a_tiff_is_read_and_fractions_are_refused() -> None:
    pages = [Image.fromarray(PICTURE), Image.fromarray(255 - PICTURE)]
    for kind in ("TIFF", "GIF"):
        data = save(pages[0], kind, save_all=True, append_images=pages[1:])
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(image_to_array(decode_image(data)), expected)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = image_to_array(decode_image(save(pages[0], "TIFF", exif=exif)))
    np.testing.assert_array_equal(turned, np.rot90(PICTURE, -1))
    grey = PICTURE[..., 0].astype(np.uint16) * 257
    np.testing.assert_array_equal(
        image_to_array(decode_image(save(Image.fromarray(grey), "TIFF")))[..., 1], PICTURE[..., 0]
    )
    with pytest.raises(ValueError, match="picture has fractions or more than 16 bits"):
        decode_image(save(Image.fromarray(PICTURE[..., 0].astype(np.float32) / 255), "TIFF"))


def _png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))


def test_an_absurd_size_is_refused_before_memory_is_taken() -> None:
    jpeg = bytearray(save(Image.fromarray(PICTURE), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65000, 65000)
    with pytest.raises(ValueError, match="65000 x 65000 pixels is too large"):
        decode_image(bytes(jpeg))
    with pytest.raises(ValueError, match=r"too large|is broken: Image size .* exceeds limit"):
        decode_image(_png_header(60000, 60000))
    for kind in ("WEBP", "JPEG"):
        with pytest.raises(ValueError, match="56 x 40 pixels is too large: the limit is 2000"):
            decode_image(save(Image.fromarray(PICTURE), kind), max_pixels=2000)


def test_altered_bytes_give_a_picture_or_one_line(jpeg_decoder: str, capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a maker"
    files = {
        "jpeg": save(Image.fromarray(PICTURE), "JPEG", **({"exif": exif} if jpeg_decoder == "operator" else {})),
        "png": save(Image.fromarray(PICTURE), "PNG", exif=exif),
        "palette": save(Image.fromarray(PICTURE).convert("P"), "PNG", transparency=3),
        "depth": save(Image.fromarray(PICTURE[..., 0].astype(np.uint16) * 200), "PNG"),
        "webp": save(Image.fromarray(PICTURE), "WEBP", exif=exif),
    }
    messages: dict[str, list[str]] = {name: [] for name in files}
    for name, data in files.items():
        for number in range(150):
            altered = bytearray(data)
            for _ in range(rng.integers(1, 6)):
                altered[rng.integers(0, 80 if number % 2 else len(data))] = rng.integers(0, 256)
            for decoder in (decode_image, decode_depth):
                try:
                    decoder(bytes(altered))
                except ValueError as error:
                    messages[name].append(str(error))
    assert all(messages.values())
    assert not any("\n" in message for name in files for message in messages[name])
    capfd.readouterr()  # libjpeg writes its own warnings


def test_depth_must_be_16_bit_grey() -> None:
    with pytest.raises(ValueError, match="depth must be a 16-bit grey PNG, got a PNG of Pillow's mode RGB"):
        decode_depth(save(Image.fromarray(PICTURE), "PNG"))
    with pytest.raises(ValueError, match="depth must be a 16-bit grey PNG, got"):
        decode_depth(save(Image.fromarray(PICTURE), "JPEG"))


def test_an_array_becomes_an_image_without_a_copy_where_it_can() -> None:
    array = PICTURE.copy()
    image = image_from_array(array)
    image[:, 0, 0] = 7
    assert (array[0, 0] == 7).all()
    frozen = PICTURE.copy()
    frozen.flags.writeable = False
    torch.testing.assert_close(image_from_array(frozen).permute(1, 2, 0).numpy(), PICTURE)
    assert image_from_array(PICTURE[:, ::-1]).shape == (3, 40, 56)


def test_depth_keeps_all_its_bits() -> None:
    depth = torch.arange(48 * 64, dtype=torch.int32).mul(21).view(48, 64).to(torch.uint16)
    assert depth.to(torch.int32).max() > 64000
    torch.testing.assert_close(decode_depth(encode_depth(depth)), depth, rtol=0, atol=0)


def test_jpeg_is_close_and_smaller_with_less_quality(create_image) -> None:
    image = create_image(64, 80)
    fine, coarse = encode_jpeg(image, quality=95), encode_jpeg(image, quality=50)
    assert len(coarse) < len(fine)
    assert (decode_image(fine).int() - image.int()).abs().float().mean() < 2


def test_memory_layout_does_not_matter(create_image) -> None:
    image = create_image(32, 40)
    assert encode_jpeg(image) == encode_jpeg(image.contiguous())
