"""Rotation formats against scipy.spatial.transform, their inverses, and what is no rotation."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vla_foundry.robotics import rotations
from vla_foundry.robotics.rotations import matrix_to_rotation, rotation_to_matrix

EULER_ORDERS = rotations._EULER_ORDERS
FORMATS = [name for name in rotations._WIDTHS if not name.startswith("euler")] + ["euler_xyz", "euler_ZYX", "euler_zxz"]


def random_rotations(count: int, seed: int) -> Rotation:
    return Rotation.from_quat(np.random.default_rng(seed).normal(size=(count, 4)))


def special_matrices() -> np.ndarray:
    """Random rotations and the awkward ones: none, tiny, half turns, quarter turns."""
    vectors = [[0, 0, 0], [1e-9, 0, 0], [0, 1e-5, 1e-6], [np.pi, 0, 0], [0, np.pi, 0], [0, 0, np.pi]]
    vectors += [[np.pi / np.sqrt(2), 0, np.pi / np.sqrt(2)], [0, np.pi / 2, 0], [0, 0, -np.pi / 2], [3.1415, 1e-3, 0]]
    awkward = Rotation.from_rotvec(vectors).as_matrix()
    return np.concatenate([awkward, random_rotations(500, 0).as_matrix()])


@pytest.mark.parametrize("rotation_format", FORMATS)
def test_every_format_gives_the_matrix_back(rotation_format: str) -> None:
    matrix = special_matrices()
    values = matrix_to_rotation(matrix, rotation_format)
    assert values.shape[-1] == rotations.rotation_width(rotation_format)
    np.testing.assert_allclose(rotation_to_matrix(values, rotation_format), matrix, atol=1e-9)


@pytest.mark.parametrize("rotation_format", FORMATS)
def test_leading_axes_are_kept(rotation_format: str) -> None:
    matrix = special_matrices()[:6]
    grid = matrix_to_rotation(matrix.reshape(2, 3, 3, 3), rotation_format)
    one = matrix_to_rotation(matrix[4], rotation_format)
    assert grid.shape == (2, 3, rotations.rotation_width(rotation_format))
    np.testing.assert_allclose(grid[1, 1], one, atol=1e-15)
    np.testing.assert_allclose(rotation_to_matrix(one, rotation_format), matrix[4], atol=1e-9)


def test_quaternions_agree_with_scipy() -> None:
    matrix = special_matrices()
    expected = Rotation.from_matrix(matrix).as_quat()
    ours = matrix_to_rotation(matrix, "quaternion_xyzw")
    assert (ours[:, 3] >= 0).all()
    # the sign of a quaternion is free
    np.testing.assert_allclose(np.abs(np.sum(ours * expected, axis=-1)), 1.0, atol=1e-12)
    np.testing.assert_array_equal(matrix_to_rotation(matrix, "quaternion_wxyz"), np.roll(ours, 1, axis=-1))


def test_quaternion_orders_differ_where_it_matters() -> None:
    quarter_turn_about_z = np.array([0.0, 0.0, np.sqrt(0.5), np.sqrt(0.5)])
    expected = [[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    np.testing.assert_allclose(rotation_to_matrix(quarter_turn_about_z, "quaternion_xyzw"), expected, atol=1e-15)
    np.testing.assert_allclose(
        rotation_to_matrix(quarter_turn_about_z[[3, 0, 1, 2]], "quaternion_wxyz"), expected, atol=1e-15
    )


def test_axis_angles_agree_with_scipy() -> None:
    vectors = random_rotations(500, 1).as_rotvec()
    matrix = Rotation.from_rotvec(vectors).as_matrix()
    np.testing.assert_allclose(rotation_to_matrix(vectors, "axis_angle"), matrix, atol=1e-12)
    np.testing.assert_allclose(matrix_to_rotation(matrix, "axis_angle"), vectors, atol=1e-9)


@pytest.mark.parametrize("order", EULER_ORDERS)
def test_euler_angles_agree_with_scipy_in_every_order(order: str) -> None:
    rotation = random_rotations(100, 2)
    angles = rotation.as_euler(order)
    np.testing.assert_allclose(matrix_to_rotation(rotation.as_matrix(), f"euler_{order}"), angles, atol=1e-7)
    np.testing.assert_allclose(rotation_to_matrix(angles, f"euler_{order}"), rotation.as_matrix(), atol=1e-12)


@pytest.mark.parametrize("order", EULER_ORDERS)
def test_gimbal_lock_still_gives_the_matrix_back(order: str) -> None:
    is_proper = order[0] == order[2]
    middles = [0.0, np.pi] if is_proper else [-np.pi / 2, np.pi / 2]
    angles = np.array([[0.3, middle, -1.1] for middle in middles])
    matrix = rotation_to_matrix(angles, f"euler_{order}")
    back = rotation_to_matrix(matrix_to_rotation(matrix, f"euler_{order}"), f"euler_{order}")
    np.testing.assert_allclose(back, matrix, atol=1e-7)


def test_6d_rows_and_columns_are_what_they_say() -> None:
    matrix = special_matrices()
    np.testing.assert_array_equal(matrix_to_rotation(matrix, "rot_6d_rows"), matrix[:, :2, :].reshape(-1, 6))
    columns = np.concatenate([matrix[:, :, 0], matrix[:, :, 1]], axis=-1)
    np.testing.assert_array_equal(matrix_to_rotation(matrix, "rot_6d_columns"), columns)


@pytest.mark.parametrize("scale", [1e-200, 1e-6, 1e6, 1e200])
def test_the_length_of_6d_vectors_does_not_matter(scale: float) -> None:
    matrix = special_matrices()
    values = matrix_to_rotation(matrix, "rot_6d_rows") * np.repeat([scale, 3.0], 3)
    np.testing.assert_allclose(rotation_to_matrix(values, "rot_6d_rows"), matrix, atol=1e-12)


def test_a_noisy_6d_output_becomes_the_nearest_by_gram_schmidt() -> None:
    values = np.random.default_rng(3).normal(size=(200, 6))
    matrix = rotation_to_matrix(values, "rot_6d_rows")
    np.testing.assert_allclose(matrix @ matrix.swapaxes(-1, -2), np.broadcast_to(np.eye(3), matrix.shape), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(matrix), 1.0, atol=1e-12)
    first = values[:, :3] / np.linalg.norm(values[:, :3], axis=-1, keepdims=True)
    np.testing.assert_allclose(matrix[:, 0], first, atol=1e-12)
    # the third row is normal to the plane of the two given vectors
    np.testing.assert_allclose(np.sum(matrix[:, 2] * values[:, 3:], axis=-1), 0.0, atol=1e-12)


def test_nearly_parallel_6d_vectors_still_give_an_orthonormal_matrix() -> None:
    matrix = rotation_to_matrix(np.array([1.0, 0.0, 0.0, 1.0, 2e-7, 0.0]), "rot_6d_rows")
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-14)


@pytest.mark.parametrize(
    ("rotation_format", "bad", "reason"),
    [
        ("rot_6d_rows", [0, 0, 0, 1, 0, 0], "zero"),
        ("rot_6d_columns", [1, 2, 3, -2, -4, -6], "parallel"),
        ("rot_6d_rows", [1, 0, 0, 0, np.nan, 0], "not finite"),
        ("quaternion_xyzw", [0, 0, 0, 0], "zero"),
        ("quaternion_wxyz", [1, 0, 0, np.inf], "not finite"),
        ("axis_angle", [np.nan, 0, 0], "not finite"),
        ("euler_xyz", [np.inf, 0, 0], "not finite"),
        ("matrix", [1, 0, 0, 0, 1, 0, 0, 0, -1], "matrix"),
        ("matrix", [1.1, 0, 0, 0, 1, 0, 0, 0, 1], "matrix"),
    ],
)
def test_what_is_no_rotation_is_named_by_field_and_index(rotation_format: str, bad: list[float], reason: str) -> None:
    values = matrix_to_rotation(special_matrices()[:6], rotation_format).reshape(2, 3, -1)
    values[1, 2] = bad
    with pytest.raises(ValueError, match=rf"^wrist at index 1, 2 is not a rotation: .*{reason}") as caught:
        rotation_to_matrix(values, rotation_format, field="wrist")
    assert "\n" not in str(caught.value)


def test_unknown_formats_and_wrong_widths_are_errors() -> None:
    with pytest.raises(ValueError, match=r"'rot6d_rows' is unknown. Did you mean 'rot_6d_rows'"):
        rotation_to_matrix(np.zeros((1, 6)), "rot6d_rows")
    with pytest.raises(ValueError, match="wrist has 6 columns, but quaternion_xyzw needs 4"):
        rotation_to_matrix(np.ones((1, 6)), "quaternion_xyzw", field="wrist")


def test_float32_input_is_computed_in_float64() -> None:
    values = matrix_to_rotation(special_matrices(), "rot_6d_rows").astype(np.float32)
    matrix = rotation_to_matrix(values, "rot_6d_rows")
    assert matrix.dtype == np.float64
    np.testing.assert_allclose(matrix @ matrix.swapaxes(-1, -2), np.broadcast_to(np.eye(3), matrix.shape), atol=1e-14)
