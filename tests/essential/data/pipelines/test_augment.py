"""A draw holds for all images of a sample, depends on its key alone, and has a deterministic counterpart."""

import numpy as np
import pytest
import torch

from vla_foundry.data.pipelines.augment import (
    CENTRE,
    add_images,
    augment_image,
    draw_augmentation,
    draw_color_factors,
    prepare_images,
)
from vla_foundry.data.pipelines.stages import Dropped
from vla_foundry.images.codec import encode_depth
from vla_foundry.params.data.images import (
    ColorJitterParams,
    CropParams,
    DataAugmentationParams,
    HorizontalFlipParams,
    ImageAugmentationParams,
    RandomResizedCropParams,
)


def picture_of_places(height: int, width: int) -> torch.Tensor:
    """A picture whose first two colours are the row and the column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, rows * 0]).byte()


def crop(*shape: float, mode: str = "random") -> ImageAugmentationParams:
    return ImageAugmentationParams(crop=CropParams(enabled=True, shape=shape, mode=mode))


def test_defaults_leave_images_as_they_are() -> None:
    image = picture_of_places(20, 30)
    draw = draw_augmentation(seed=0, position=1)
    augmented, pixel_map = augment_image(image, ImageAugmentationParams(), draw)
    assert augmented is image
    np.testing.assert_array_equal(pixel_map.matrix, np.eye(3))
    np.testing.assert_array_equal(draw_color_factors(ColorJitterParams(), draw), [1, 1, 1, 0])


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    draws = {draw_augmentation(seed=seed, position=position) for seed in (0, 1) for position in range(50)}
    assert len(draws) == 100
    torch.rand(3)
    np.random.default_rng(0).random()
    assert draw_augmentation(seed=1, position=49) in draws


@pytest.mark.parametrize("shape", [(16, 24), (0.5, 0.75)])
def test_all_images_of_a_sample_share_the_crop(shape) -> None:
    params = crop(*shape)
    corners = set()
    for position in range(40):
        draw = draw_augmentation(seed=0, position=position)
        first, pixel_map = augment_image(picture_of_places(32, 32), params, draw)
        second, _ = augment_image(picture_of_places(32, 32), params, draw)
        assert tuple(first.shape) == (3, 16, 24)
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        top, left = first[0, 0, 0].item(), first[1, 0, 0].item()
        np.testing.assert_array_equal(pixel_map.map_points(np.array([[left, top]], float)), [[0, 0]])
        corners.add((top, left))
    assert len(corners) > 20


def test_cameras_of_other_sizes_are_cropped_at_the_same_relative_place() -> None:
    draw = draw_augmentation(seed=0, position=3)
    small, _ = augment_image(picture_of_places(40, 40), crop(0.5, 0.5), draw)
    large, _ = augment_image(picture_of_places(80, 80), crop(0.5, 0.5), draw)
    assert abs(large[:2, 0, 0].int() - 2 * small[:2, 0, 0].int()).max() <= 2


def test_every_place_of_a_crop_is_drawn() -> None:
    tops = [
        int(augment_image(picture_of_places(20, 20), crop(18, 18), draw_augmentation(seed=0, position=p))[0][0, 0, 0])
        for p in range(300)
    ]
    assert np.bincount(tops, minlength=3).min() > 70


@pytest.mark.parametrize("draw", [CENTRE, draw_augmentation(seed=0, position=0)], ids=["validation", "training"])
def test_the_centre_is_the_counterpart_of_validation_and_of_mode_center(draw) -> None:
    params = crop(16, 20, mode="random" if draw is CENTRE else "center")
    image, _ = augment_image(picture_of_places(32, 32), params, draw)
    assert image[:2, 0, 0].tolist() == [8, 6]


def test_an_image_smaller_than_the_crop_is_refused() -> None:
    with pytest.raises(ValueError, match=r"image of 30 x 20 pixels is smaller than the crop of 24 x 24\. Lower data\."):
        augment_image(picture_of_places(20, 30), crop(24, 24), CENTRE)


def test_images_that_are_too_large_together_are_refused() -> None:
    image = torch.zeros((3, 1, 1), dtype=torch.uint8).expand(3, 8192, 8192)
    prepare_images([image] * 2, DataAugmentationParams(), CENTRE)
    with pytest.raises(ValueError, match=r"its 3 images have more than 134,217,728 pixels together"):
        prepare_images([image] * 3, DataAugmentationParams(), CENTRE)


def test_random_resized_crop_keeps_the_size_and_its_map_is_exact() -> None:
    params = ImageAugmentationParams(
        random_resized_crop=RandomResizedCropParams(enabled=True, scale=(0.3, 0.9), ratio=(0.7, 1.4))
    )
    areas = []
    for position in range(60):
        image = picture_of_places(100, 120)
        part, pixel_map = augment_image(image, params, draw_augmentation(seed=2, position=position))
        assert part.shape == image.shape
        centre = pixel_map.inverse().map_points(np.array([[60.0, 50.0]]))[0]
        np.testing.assert_allclose(part[:2, 50, 60].tolist(), centre[::-1], atol=1.0)
        areas.append(1 / np.linalg.det(pixel_map.matrix[:2, :2]))
    assert min(areas) < 0.4
    assert 0.75 < max(areas) <= 0.92
    _, pixel_map = augment_image(picture_of_places(100, 120), params, CENTRE)
    assert 1 / np.linalg.det(pixel_map.matrix[:2, :2]) == pytest.approx(0.6, abs=0.01)
    np.testing.assert_allclose(pixel_map.map_points(np.array([[59.5, 49.5]])), [[59.5, 49.5]], atol=0.6)


def test_random_resized_crop_has_the_size_it_is_asked_for() -> None:
    params = ImageAugmentationParams(random_resized_crop=RandomResizedCropParams(enabled=True, size=(24, 32)))
    part, pixel_map = augment_image(picture_of_places(64, 64), params, CENTRE)
    assert tuple(part.shape[1:]) == pixel_map.target_size == (24, 32)


def test_about_the_asked_share_is_mirrored_and_none_in_validation() -> None:
    params = ImageAugmentationParams(horizontal_flip=HorizontalFlipParams(enabled=True, probability=0.25))
    image = picture_of_places(4, 8)
    are_mirrored = [
        bool(augment_image(image, params, draw_augmentation(seed=0, position=p))[0][1, 0, 0] == 7) for p in range(400)
    ]
    assert 70 < sum(are_mirrored) < 130
    always = ImageAugmentationParams(horizontal_flip=HorizontalFlipParams(enabled=True, probability=1.0))
    assert augment_image(image, always, CENTRE)[0] is image


def test_color_factors_fill_their_ranges() -> None:
    params = ColorJitterParams(enabled=True, brightness=0.2, contrast=0.4, saturation=1.5, hue=(-0.05, 0.1))
    factors = np.stack([draw_color_factors(params, draw_augmentation(seed=0, position=p)) for p in range(500)])
    np.testing.assert_allclose(factors.min(0), [0.8, 0.6, 0.0, -0.05], atol=0.02)
    np.testing.assert_allclose(factors.max(0), [1.2, 1.4, 2.5, 0.1], atol=0.02)
    assert abs(np.corrcoef(factors.T) - np.eye(4)).max() < 0.15
    np.testing.assert_array_equal(draw_color_factors(params, CENTRE), [1, 1, 1, 0])


def test_depth_becomes_grey_between_near_and_far_and_keeps_its_colours() -> None:
    depth = torch.tensor([[0, 400, 500], [1500, 2500, 60000]], dtype=torch.uint16)
    params = DataAugmentationParams(image=ImageAugmentationParams(color_jitter=ColorJitterParams(enabled=True)))
    sample = {"__seed__": 1, "__position__": 2, "__is_training__": True}
    picture = torch.full((3, 2, 3), 7, dtype=torch.uint8)
    made = add_images(sample, [encode_depth(depth), picture], params, [(0.5, 2.5), None])
    # 0 is not measured; 0.5 m is 1, 2.5 m is 255
    expected = torch.tensor([[0, 1, 1], [128, 255, 255]], dtype=torch.uint8)
    assert torch.equal(made["images"][0], expected.expand(3, 2, 3))
    assert torch.equal(made["images"][1], picture)
    factors = made["color_factors"]
    np.testing.assert_array_equal(factors[0], [1, 1, 1, 0])
    assert (factors[1] != factors[0]).all()
    with pytest.raises(Dropped, match="depth must be a 16-bit grey PNG"):
        add_images(sample, [b"\xff\xd8\xff"], params, [(0.5, 2.5)])


def test_random_resized_crops_never_mix_two_distances() -> None:
    depth = torch.where(torch.rand(24, 24, generator=torch.Generator().manual_seed(0)) < 0.5, 500, 2500)
    crop = RandomResizedCropParams(enabled=True, scale=(0.3, 0.6), size=(16, 16))
    params = DataAugmentationParams(image=ImageAugmentationParams(random_resized_crop=crop))
    sample = {"__seed__": 1, "__position__": 2, "__is_training__": True}
    made = add_images(sample, [encode_depth(depth.to(torch.uint16))], params, [(0.5, 2.5)])
    assert made["images"][0].shape == (3, 16, 16)
    assert made["images"][0].unique().tolist() == [1, 255]
