"""A projected point's pixel moves as the image content does, under every operation and any sequence of them."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vla_foundry.images.geometry import (
    PixelMap,
    crop_image,
    crop_map,
    flip_image,
    identity_map,
    resize_image,
    resize_map,
    rotate_image,
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
