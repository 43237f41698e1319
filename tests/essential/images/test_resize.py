"""Resizing has the wanted size, content and map, for images and depth alike."""

import numpy as np
import pytest
import torch
from PIL import Image

from vla_foundry.images.codec import image_to_array
from vla_foundry.images.geometry import resize_depth, resize_image, scale_image

METHODS = ["center_crop", "resize_no_crop", "resize_fit"]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_scaling_is_that_of_pillow(create_image, interpolation: str) -> None:
    image = create_image(90, 70)
    expected = Image.fromarray(image_to_array(image)).resize((32, 40), Image.Resampling[interpolation.upper()])
    ours = image_to_array(scale_image(image, (40, 32), interpolation=interpolation)).astype(int)
    assert abs(ours - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("source", [(48, 64), (64, 48), (50, 50), (7, 300)])
@pytest.mark.parametrize("target", [(32, 32), (64, 100), (1, 5)])
def test_every_method_gives_the_size_it_is_asked_for(create_image, method: str, source, target) -> None:
    image, pixel_map = resize_image(create_image(*source), target, method=method)
    assert tuple(image.shape) == (3, *target)
    assert (pixel_map.source_size, pixel_map.target_size) == (source, target)


def test_center_crop_cuts_the_long_side_evenly() -> None:
    image = torch.zeros((3, 20, 40), dtype=torch.uint8)
    image[:, :, :10] = 200
    image[:, :, 30:] = 100
    cut, _ = resize_image(image, (10, 10), method="center_crop")
    assert cut.max() == 0


def test_resize_fit_shows_the_whole_image_on_black() -> None:
    image = torch.full((3, 20, 40), 200, dtype=torch.uint8)
    fitted, pixel_map = resize_image(image, (40, 40), method="resize_fit")
    assert (fitted[:, 10:30] == 200).all()
    assert fitted[:, :10].max() == 0
    assert fitted[:, 30:].max() == 0
    np.testing.assert_allclose(pixel_map.map_points(np.array([[0.0, 0.0]])), [[0.0, 10.0]])


def test_resize_no_crop_shows_the_whole_image_distorted() -> None:
    image = torch.zeros((3, 20, 40), dtype=torch.uint8)
    image[:, :, :20] = 200
    distorted, _ = resize_image(image, (20, 20), method="resize_no_crop")
    assert (distorted[:, :, :9] == 200).all()
    assert (distorted[:, :, 11:] == 0).all()


def test_an_image_of_the_wanted_size_is_not_copied(create_image) -> None:
    image = create_image(24, 32)
    resized, _ = resize_image(image, (24, 32))
    assert resized.data_ptr() == image.data_ptr()


def test_a_stack_of_frames_is_resized_as_its_frames_are(create_image) -> None:
    frames = [create_image(40, 30, seed) for seed in range(3)]
    stacked, _ = resize_image(torch.stack(frames), (16, 16), method="resize_fit")
    for frame, resized in zip(frames, stacked, strict=True):
        torch.testing.assert_close(resize_image(frame, (16, 16), method="resize_fit")[0], resized, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_depth_takes_values_of_the_source_alone(method: str) -> None:
    depth = torch.randint(1, 65536, (37, 53), dtype=torch.int32).to(torch.uint16)
    resized, pixel_map = resize_depth(depth, (24, 40), method=method)
    values = {0} if method == "resize_fit" else set()
    assert set(resized.numpy().ravel().tolist()) <= set(depth.numpy().ravel().tolist()) | values
    # each pixel comes from the source pixel that its centre falls in
    rows, columns = np.mgrid[:24, :40]
    where = pixel_map.inverse().map_points(np.stack([columns, rows], -1).reshape(-1, 2).astype(float))
    nearest = np.floor(where + 0.5 + 1e-9).astype(int)
    inside = ((nearest >= 0) & (nearest < [53, 37])).all(-1)
    expected = np.where(inside, depth.numpy()[nearest[:, 1].clip(0, 36), nearest[:, 0].clip(0, 52)], 0)
    np.testing.assert_array_equal(resized.numpy().ravel(), expected)


def test_depth_and_image_share_their_map() -> None:
    for method in METHODS:
        _, of_image = resize_image(torch.zeros((3, 37, 53), dtype=torch.uint8), (24, 40), method=method)
        _, of_depth = resize_depth(torch.zeros((37, 53), dtype=torch.uint16), (24, 40), method=method)
        np.testing.assert_array_equal(of_image.matrix, of_depth.matrix)
