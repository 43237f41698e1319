"""Map source pixels to target pixels exactly, so that intrinsics, points and boxes can follow an image operation.

Convention: a pixel's integer coordinates (x, y) are its **centre** (as in OpenCV), x to the right and y down. The
centre of the top-left pixel is (0, 0), the outer corner of the image is (-0.5, -0.5). So a resize by s sends x to
s (x + 0.5) - 0.5.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float

# (height, width) in pixels
Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class PixelMap:
    """An affine map of pixel coordinates from a source image to a target image."""

    # float64 [3, 3] on homogeneous (x, y, 1), last row (0, 0, 1); read-only
    matrix: np.ndarray
    source_size: Size
    target_size: Size

    def then(self, following: "PixelMap") -> "PixelMap":
        """Return the map that applies this one first and `following` after it."""
        assert self.target_size == following.source_size, (self.target_size, following.source_size)
        return PixelMap(following.matrix @ self.matrix, self.source_size, following.target_size)

    def inverse(self) -> "PixelMap":
        """Return the map from target to source pixels."""
        return PixelMap(np.linalg.inv(self.matrix), self.target_size, self.source_size)

    def map_points(self, points: Float[np.ndarray, "*batch 2"]) -> Float[np.ndarray, "*batch 2"]:
        """Return where the points (x, y) of the source lie in the target; they may lie outside it."""
        return points @ self.matrix[:2, :2].T + self.matrix[:2, 2]

    def map_boxes(self, boxes: Float[np.ndarray, "*batch 4"]) -> Float[np.ndarray, "*batch 4"]:
        """Return boxes (x_min, y_min, x_max, y_max) in the target, not clipped to it."""
        corners = self.map_points(boxes.reshape(*boxes.shape[:-1], 2, 2))
        return np.concatenate([corners.min(axis=-2), corners.max(axis=-2)], axis=-1)

    def map_intrinsics(self, intrinsics: Float[np.ndarray, "*batch 3 3"]) -> Float[np.ndarray, "*batch 3 3"]:
        """Return the matrix that projects the same points of the same camera frame into the target.

        Exact for every operation. After a quarter turn the matrix is not upper triangular, and after a flip its focal
        length in x is negative, because the camera frame does not move; see `turn_camera`.
        """
        return self.matrix @ intrinsics

    def turn_camera(
        self, intrinsics: Float[np.ndarray, "*batch 3 3"]
    ) -> tuple[Float[np.ndarray, "*batch 3 3"], Float[np.ndarray, "3 3"]]:
        """Return upper triangular intrinsics, and the rotation R of the camera frame that they require.

        A point p in the old camera frame is R p in the new one, so camera poses in the world become
        `world_from_camera @ R.T`. R rotates about the optical axis by quarter turns; `intrinsics` must have no skew.

        Raises:
            ValueError: the map mirrors the image, which no camera rotation can do.
        """
        linear = self.matrix[:2, :2]
        if np.linalg.det(linear) < 0:
            raise ValueError("A flipped image has no camera. Use map_intrinsics, or do not flip images with a camera.")
        rotation = np.eye(3)
        rotation[:2, :2] = np.rint(linear / np.abs(linear).max(axis=1, keepdims=True))
        return self.map_intrinsics(intrinsics) @ rotation.T, rotation


def _from_axes(scale: tuple[float, float], shift: tuple[float, float], source: Size, target: Size) -> PixelMap:
    """Map x to scale[0] x + shift[0], and y likewise."""
    matrix = np.array([[scale[0], 0.0, shift[0]], [0.0, scale[1], shift[1]], [0.0, 0.0, 1.0]])
    matrix.flags.writeable = False
    return PixelMap(matrix, source, target)


# a run uses few maps, and creating one takes longer than cropping an image
@lru_cache(maxsize=1024)
def identity_map(size: Size) -> PixelMap:
    """Map an image onto itself."""
    return _from_axes((1.0, 1.0), (0.0, 0.0), size, size)


@lru_cache(maxsize=4096)
def crop_map(source: Size, top: int, left: int, target: Size) -> PixelMap:
    """Map an image onto the part of it whose top-left pixel is (left, top); negative values pad."""
    return _from_axes((1.0, 1.0), (float(-left), float(-top)), source, target)


@lru_cache(maxsize=1024)
def resize_map(source: Size, target: Size) -> PixelMap:
    """Map an image onto the whole of another size."""
    scale_y, scale_x = target[0] / source[0], target[1] / source[1]
    return _from_axes((scale_x, scale_y), (0.5 * scale_x - 0.5, 0.5 * scale_y - 0.5), source, target)


def flip_map(source: Size) -> PixelMap:
    """Mirror left and right."""
    return _from_axes((-1.0, 1.0), (source[1] - 1.0, 0.0), source, source)


def rotate_map(source: Size, quarter_turns_clockwise: int) -> PixelMap:
    """Turn an image clockwise by quarter turns; negative values turn it the other way."""
    result = identity_map(source)
    for _ in range(quarter_turns_clockwise % 4):
        height, width = result.target_size
        turn = np.array([[0.0, -1.0, height - 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        result = result.then(PixelMap(turn, (height, width), (width, height)))
    return result
