"""A projected point's pixel moves as the image content does, under every operation and any sequence of them."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vla_foundry.images.codec import image_to_array
from vla_foundry.images.geometry import (
    PixelMap,
    crop_image,
    crop_map,
    flip_image,
    identity_map,
    resize_depth,
    resize_image,
    resize_map,
    rotate_image,
    scale_image,
)

INTRINSICS = np.array([[150.0, 0.0, 78.3], [0.0, 140.0, 55.1], [0.0, 0.0, 1.0]])
HEIGHT, WIDTH = 120, 160


def draw_steps(rng: np.random.Generator) -> list[tuple[str, Any]]:
    """One to four operations of any kind."""
    steps: list[tuple[str, Any]] = []
    for _ in range(rng.integers(1, 5)):
        name = rng.choice(["rotate", "flip", "crop", "center_crop", "resize_no_crop", "resize_fit"])
        if name == "rotate":
            steps.append((name, int(rng.integers(-4, 5))))
        else:
            low, high = (0, 9) if name == "crop" else (90, 201)
            steps.append((name, (int(rng.integers(low, high)), int(rng.integers(low, high)))))
    return steps


def draw_marker(x: float, y: float) -> Tensor:
    """A picture of a soft dot whose centre of mass is (x, y)."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    dot = 255 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 4.0**2))
    return torch.from_numpy(np.repeat(dot.round().astype(np.uint8)[None], 3, axis=0))


def find_marker(image: Tensor) -> np.ndarray:
    weights = image[0].double().numpy()
    rows, columns = np.mgrid[: image.shape[1], : image.shape[2]]
    return np.array([(weights * columns).sum(), (weights * rows).sum()]) / weights.sum()


def apply(image: Tensor, name: str, value: Any) -> tuple[Tensor, PixelMap]:
    if name == "rotate":
        return rotate_image(image, value)
    if name == "flip":
        return flip_image(image)
    if name == "crop":
        return crop_image(image, value[0], value[1], (image.shape[1] - 10, image.shape[2] - 10))
    return resize_image(image, value, method=name)


@pytest.mark.parametrize("seed", range(60))
def test_intrinsics_follow_the_pixels_of_a_point(seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps = draw_steps(rng)
    point = np.array([*rng.uniform(-0.06, 0.06, 2), 1.0])
    image = draw_marker(*(INTRINSICS @ point)[:2])
    pixel_map = identity_map((HEIGHT, WIDTH))
    for name, value in steps:
        image, step = apply(image, name, value)
        pixel_map = pixel_map.then(step)
    assert pixel_map.target_size == tuple(image.shape[1:])
    projected = pixel_map.map_intrinsics(INTRINSICS) @ point
    np.testing.assert_allclose(projected[:2] / projected[2], find_marker(image), atol=0.15)
    np.testing.assert_allclose(pixel_map.map_points((INTRINSICS @ point)[None, :2])[0], projected[:2], atol=1e-9)


def test_a_clockwise_turn_brings_the_top_left_to_the_top_right() -> None:
    image = torch.zeros((3, 4, 6), dtype=torch.uint8)
    image[:, 0, 0] = 9
    turned, pixel_map = rotate_image(image, 1)
    assert turned.shape == (3, 6, 4)
    assert turned[0, 0, 3] == 9
    np.testing.assert_array_equal(pixel_map.map_points(np.zeros((1, 2))), [[3.0, 0.0]])


def test_inverse_undoes_the_map() -> None:
    pixel_map = resize_map((HEIGHT, WIDTH), (50, 70)).then(crop_map((50, 70), 3, -5, (40, 90)))
    points = np.array([[0.0, 0.0], [13.5, 77.0]])
    np.testing.assert_allclose(pixel_map.inverse().map_points(pixel_map.map_points(points)), points, atol=1e-9)
    assert pixel_map.inverse().target_size == (HEIGHT, WIDTH)


def test_the_corners_of_an_image_stay_its_corners_when_it_is_scaled() -> None:
    # half a pixel outside the centres of the corner pixels lies the edge
    edges = np.array([[-0.5, -0.5], [WIDTH - 0.5, HEIGHT - 0.5]])
    np.testing.assert_allclose(
        resize_map((HEIGHT, WIDTH), (30, 50)).map_points(edges), [[-0.5, -0.5], [49.5, 29.5]], atol=1e-12
    )


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
