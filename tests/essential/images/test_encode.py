"""What is encoded decodes to what it was."""

import torch

from vla_foundry.images.decode import decode_depth, decode_image
from vla_foundry.images.encode import encode_depth, encode_jpeg, encode_png


def test_png_is_without_loss(create_image) -> None:
    image = create_image(31, 45)
    torch.testing.assert_close(decode_image(encode_png(image)), image, rtol=0, atol=0)


def test_depth_keeps_all_its_bits() -> None:
    depth = torch.arange(48 * 64, dtype=torch.int32).mul(21).view(48, 64).to(torch.uint16)
    assert depth.to(torch.int32).max() > 64000
    torch.testing.assert_close(decode_depth(encode_depth(depth)), depth, rtol=0, atol=0)


def test_jpeg_is_close_and_smaller_with_less_quality(create_image) -> None:
    image = create_image(64, 80)
    fine, coarse = encode_jpeg(image, quality=95), encode_jpeg(image, quality=50)
    assert len(coarse) < len(fine)
    assert (decode_image(fine).int() - image.int()).abs().float().mean() < 2


def test_full_colour_keeps_coloured_edges(create_image) -> None:
    image = torch.zeros((3, 32, 32), dtype=torch.uint8)
    image[0, :, ::2] = 255
    image[2, :, 1::2] = 255
    half, full = encode_jpeg(image), encode_jpeg(image, full_colour=True)
    error = [(decode_image(data).int() - image.int()).abs().float().mean() for data in (half, full)]
    assert error[1] < error[0] / 3


def test_memory_layout_does_not_matter(create_image) -> None:
    image = create_image(32, 40)
    assert encode_jpeg(image) == encode_jpeg(image.contiguous())
