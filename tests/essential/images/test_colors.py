"""Pixels are normalised and their colours changed as torchvision does it, for a whole batch at once."""

import pytest
import torch
from torchvision.transforms.v2 import functional as reference

from vla_foundry.images.colors import jitter_colors, normalize_images

MEAN, STD = (0.48, 0.45, 0.4), (0.27, 0.26, 0.28)
FACTORS = torch.tensor([[1.2, 0.7, 1.3, 0.05], [0.8, 1.4, 0.8, -0.05], [1, 1, 1, 0], [1.2, 1.4, 0, 0.4], [0, 1, 1, 0]])


def torchvision_jitter(image: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    brightness, contrast, saturation, hue = factors.tolist()
    image = reference.adjust_contrast(reference.adjust_brightness(image, brightness), contrast)
    return reference.adjust_hue(reference.adjust_saturation(image, saturation), hue)


def test_jitter_is_that_of_torchvision_with_other_factors_for_each_image() -> None:
    images = torch.rand(5, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    images[0, :, :4] = 0.5  # grey has no hue
    images[1, :, :4] = 0
    images[2, :, :4] = 1
    ours = jitter_colors(images.flatten(2), FACTORS).view_as(images)
    expected = torch.stack([torchvision_jitter(image, factors) for image, factors in zip(images, FACTORS, strict=True)])
    torch.testing.assert_close(ours, expected, atol=3e-6, rtol=0)


@pytest.mark.parametrize("is_channels_last", [False, True])
def test_normalisation_is_the_formula(is_channels_last: bool) -> None:
    images = torch.randint(0, 256, (2, 3, 8, 10), dtype=torch.uint8)
    if is_channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(normalize_images(images, MEAN, STD), (images / 255 - mean) / std, atol=2e-6, rtol=0)


def test_factors_of_one_change_nothing() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 10), dtype=torch.uint8)
    same = torch.tensor([[1.0, 1, 1, 0]] * 2)
    plain = normalize_images(images, MEAN, STD)
    torch.testing.assert_close(normalize_images(images, MEAN, STD, color_factors=same), plain, atol=1e-5, rtol=0)


def test_float_pixels_are_not_changed_in_place() -> None:
    images = torch.randint(0, 256, (1, 3, 4, 4)).float()
    before = images.clone()
    normalize_images(images, MEAN, STD)
    torch.testing.assert_close(images, before, rtol=0, atol=0)


def test_patches_get_what_their_image_gets() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    # [2, 3, 2, 4, 2, 4] -> four patches an image of [3, 4, 4]
    patches = images.view(2, 3, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(8, -1)
    index = torch.arange(2).repeat_interleave(4)
    ours = normalize_images(patches, MEAN, STD, color_factors=FACTORS[:2][index], image_index=index)
    whole = normalize_images(images, MEAN, STD, color_factors=FACTORS[:2])
    expected = whole.view(2, 3, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(8, -1)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
