"""Convert the rotation formats of robot data to and from matrices: batched, float64, with explicit conventions.

A matrix R acts on column vectors: v_world = R v_body. The formats, as named in a config:

| format            | width  | meaning                                                                            |
|-------------------|--------|------------------------------------------------------------------------------------|
| rot_6d_rows       | 6      | first two rows of R, one after the other (the published data)                      |
| rot_6d_columns    | 6      | first two columns of R, one after the other (Zhou et al. 2019, arXiv:1812.07035)    |
| quaternion_xyzw   | 4      | scalar last (SciPy, ROS)                                                           |
| quaternion_wxyz   | 4      | scalar first (MuJoCo)                                                              |
| axis_angle        | 3      | axis times angle, radians                                                          |
| euler_<order>     | 3      | radians; `xyz` about fixed axes (R = Rz Ry Rx), `XYZ` about moving ones (R = Rx Ry Rz) |
| matrix            | 9      | R, row by row                                                                      |

A value that is not a rotation (zero quaternion, parallel 6D vectors, NaN) raises a ValueError with the field and index.
"""

import itertools

import numpy as np
from jaxtyping import Bool, Float, Float64

from vla_foundry.registry import unknown_name_message

# the two vectors of a 6D rotation count as parallel if the sine of their angle is below this
_PARALLEL_LIMIT = 1e-7
# largest deviation of R R^T from the identity that counts as rounding error (float32 data)
_ORTHONORMAL_LIMIT = 1e-4

# the next two axes after each axis, for the cross product
_NEXT, _AFTER = [1, 2, 0], [2, 0, 1]

_EULER_ORDERS = tuple(
    "".join(order)
    for letters in ("xyz", "XYZ")
    for order in itertools.product(letters, repeat=3)
    if order[0] != order[1] and order[1] != order[2]
)
_WIDTHS = {
    "rot_6d_rows": 6,
    "rot_6d_columns": 6,
    "quaternion_xyzw": 4,
    "quaternion_wxyz": 4,
    "axis_angle": 3,
    "matrix": 9,
    **{f"euler_{order}": 3 for order in _EULER_ORDERS},
}


def rotation_width(rotation_format: str) -> int:
    """Return the number of columns of a rotation format.

    Raises:
        ValueError: the format is unknown.
    """
    if rotation_format not in _WIDTHS:
        raise ValueError(unknown_name_message("rotation format", rotation_format, list(_WIDTHS)))
    return _WIDTHS[rotation_format]


def rotation_to_matrix(
    values: Float[np.ndarray, "*B R"], rotation_format: str, *, field: str = "rotation"
) -> Float64[np.ndarray, "*B 3 3"]:
    """Convert rotations of any format to matrices.

    Args:
        field: name of the values, for messages.

    Raises:
        ValueError: unknown format, wrong width, or a value that is not a rotation.
    """
    width = rotation_width(rotation_format)
    if values.shape[-1] != width:
        raise ValueError(f"{field} has {values.shape[-1]} columns, but {rotation_format} needs {width}.")
    values = values.astype(np.float64)
    is_finite = np.isfinite(values)
    if not is_finite.all():
        _fail_where(~is_finite.all(axis=-1), field, "a value is not finite")
    kind, _, detail = rotation_format.rpartition("_")
    if kind == "rot_6d":
        rows = _orthonormalize(values, field)
        return rows if detail == "rows" else np.swapaxes(rows, -1, -2)
    if kind == "quaternion":
        return _matrix_from_quaternion(values if detail == "xyzw" else np.roll(values, -1, axis=-1), field)
    if kind == "euler":
        return _matrix_from_euler(values, detail)
    if rotation_format == "axis_angle":
        return _matrix_from_axis_angle(values)
    matrix = values.reshape(*values.shape[:-1], 3, 3)
    _check_rotation_matrix(matrix, field)
    return matrix


def matrix_to_rotation(
    matrix: Float[np.ndarray, "*B 3 3"], rotation_format: str, *, field: str = "rotation"
) -> Float64[np.ndarray, "*B R"]:
    """Convert matrices to rotations of any format. The inverse of `rotation_to_matrix`.

    Raises:
        ValueError: unknown format, or a matrix that is not a rotation.
    """
    rotation_width(rotation_format)
    matrix = matrix.astype(np.float64)
    kind, _, detail = rotation_format.rpartition("_")
    if kind == "rot_6d":
        rows = matrix if detail == "rows" else np.swapaxes(matrix, -1, -2)
        return np.ascontiguousarray(rows[..., :2, :]).reshape(*matrix.shape[:-2], 6)
    if rotation_format == "matrix":
        return matrix.reshape(*matrix.shape[:-2], 9)
    _check_rotation_matrix(matrix, field)
    quaternion = _quaternion_from_matrix(matrix)
    if kind == "quaternion":
        return quaternion if detail == "xyzw" else np.roll(quaternion, 1, axis=-1)
    return _euler_from_quaternion(quaternion, detail) if kind == "euler" else _axis_angle_from_quaternion(quaternion)


def mean_rotation(
    values: Float[np.ndarray, "N R"], weights: Float[np.ndarray, " N"], rotation_format: str
) -> Float64[np.ndarray, " R"]:
    """Return the weighted mean of rotations: that of their matrices, projected onto a rotation."""
    U, _, V = np.linalg.svd(np.tensordot(weights, rotation_to_matrix(values, rotation_format), 1))
    # no reflection
    return matrix_to_rotation(U @ np.diag([1.0, 1.0, np.linalg.det(U @ V)]) @ V, rotation_format)


def _orthonormalize(values: Float64[np.ndarray, "*B 6"], field: str) -> Float64[np.ndarray, "*B 3 3"]:
    """Orthonormalize by Gram-Schmidt: keep the first vector's direction and the plane; the third is the cross product.

    The lengths of the vectors do not matter, so network outputs are accepted.

    Raises:
        ValueError: a vector is zero, or the two are parallel.
    """
    pairs = values.reshape(*values.shape[:-1], 2, 3)
    length = np.sqrt(_dot(pairs, pairs))
    if not (length > 1e-100).all() or not (length < 1e100).all():
        # divide by the largest entry first, because the square of 1e-200 underflows to zero
        largest = np.abs(pairs).max(axis=-1, keepdims=True)
        _fail_where(np.any(largest[..., 0] == 0, axis=-1), field, "a vector of the 6D rotation is zero")
        pairs = pairs / largest
        length = np.sqrt(_dot(pairs, pairs))
    pairs = pairs / length[..., None]
    first, second = pairs[..., 0, :], pairs[..., 1, :]
    second = second - _dot(first, second)[..., None] * first
    length = np.sqrt(_dot(second, second))
    _fail_where(length < _PARALLEL_LIMIT, field, "the two vectors of the 6D rotation are parallel")
    second = second / length[..., None]
    # repeat, because nearly parallel vectors leave a residual after one pass
    second = second - _dot(first, second)[..., None] * first
    second = second / np.sqrt(_dot(second, second))[..., None]
    rows = np.empty((*values.shape[:-1], 3, 3))
    rows[..., 0, :], rows[..., 1, :] = first, second
    # the cross product; numpy.cross takes five times as long for the few rows of a window
    rows[..., 2, :] = first[..., _NEXT] * second[..., _AFTER] - first[..., _AFTER] * second[..., _NEXT]
    return rows


def _matrix_from_quaternion(quaternion: Float64[np.ndarray, "*B 4"], field: str) -> Float64[np.ndarray, "*B 3 3"]:
    """Convert quaternions (xyzw) of any nonzero norm to matrices.

    Raises:
        ValueError: a quaternion is zero.
    """
    largest = np.abs(quaternion).max(axis=-1, keepdims=True)
    _fail_where(largest[..., 0] == 0, field, "the quaternion is zero")
    quaternion = quaternion / largest
    x, y, z, w = np.moveaxis(quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _quaternion_from_matrix(R: Float64[np.ndarray, "*B 3 3"]) -> Float64[np.ndarray, "*B 4"]:
    """Convert matrices to unit quaternions (xyzw) with w >= 0.

    Of the four possible divisions (Shepperd 1978), each matrix uses the one with the largest divisor.
    """
    R_transposed, trace = np.swapaxes(R, -1, -2), np.trace(R, axis1=-2, axis2=-1)[..., None, None]
    # 4 q q^T: row i is 4 q_i times q
    outer = np.empty((*R.shape[:-2], 4, 4))
    outer[..., :3, :3] = R + R_transposed + (1 - trace) * np.eye(3)
    outer[..., 3, :3] = outer[..., :3, 3] = (R - R_transposed)[..., _AFTER, _NEXT]
    outer[..., 3:, 3:] = 1 + trace
    largest = np.argmax(np.diagonal(outer, axis1=-2, axis2=-1), axis=-1)
    quaternion = np.take_along_axis(outer, largest[..., None, None], axis=-2)[..., 0, :]
    quaternion = quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True)
    return np.where(quaternion[..., 3:] < 0, -quaternion, quaternion)


def _matrix_from_axis_angle(vector: Float64[np.ndarray, "*B 3"]) -> Float64[np.ndarray, "*B 3 3"]:
    """Convert axis times angle (radians) to matrices; zero gives the identity."""
    half = np.linalg.norm(vector, axis=-1, keepdims=True) / 2
    # sin(half) / (2 half), smooth at zero
    factor = np.sinc(half / np.pi) / 2
    return _matrix_from_quaternion(np.concatenate([vector * factor, np.cos(half)], axis=-1), "rotation")


def _axis_angle_from_quaternion(quaternion: Float64[np.ndarray, "*B 4"]) -> Float64[np.ndarray, "*B 3"]:
    """Convert unit quaternions (xyzw) to axis times angle, with the angle in [0, pi] radians."""
    sine = np.linalg.norm(quaternion[..., :3], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, quaternion[..., 3:])
    safe = np.where(sine > 1e-12, sine, 1.0)
    return quaternion[..., :3] * np.where(sine > 1e-12, angle / safe, 2.0)


def _matrix_from_euler(angles: Float64[np.ndarray, "*B 3"], order: str) -> Float64[np.ndarray, "*B 3 3"]:
    """Convert Euler angles (radians) to matrices; order in lower case: fixed axes, in upper case: moving axes."""
    matrix = np.broadcast_to(np.eye(3), (*angles.shape[:-1], 3, 3))
    for axis, angle in zip(order, np.moveaxis(angles, -1, 0), strict=True):
        turn = _turn_about("xyz".index(axis.lower()), np.asarray(angle))
        matrix = matrix @ turn if order.isupper() else turn @ matrix
    return np.ascontiguousarray(matrix)


def _euler_from_quaternion(quaternion: Float64[np.ndarray, "*B 4"], order: str) -> Float64[np.ndarray, "*B 3"]:
    """Convert unit quaternions (xyzw) to Euler angles; in gimbal lock, where two axes coincide, the third is zero.

    Bernardes and Viollet 2022, doi:10.1371/journal.pone.0276302.
    """
    fixed = order.lower() if order.islower() else order.lower()[::-1]
    i, j, k = ("xyz".index(axis) for axis in fixed)
    is_proper = i == k
    if is_proper:
        k = 3 - i - j
    sign = (i - j) * (j - k) * (k - i) // 2
    x, y, z, w = quaternion[..., i], quaternion[..., j], sign * quaternion[..., k], quaternion[..., 3]
    a, b, c, d = (w, x, y, z) if is_proper else (w - y, x + z, y + w, z - x)
    middle = 2 * np.arctan2(np.hypot(c, d), np.hypot(a, b))
    half_sum, half_difference = np.arctan2(b, a), np.arctan2(d, c)
    first, last = half_sum - half_difference, half_sum + half_difference
    # gimbal lock: only the sum or difference is determined; assign all of it to the first rotation
    near_zero, near_pi = middle < 1e-9, np.pi - middle < 1e-9
    first = np.where(near_zero, 2 * half_sum, np.where(near_pi, -2 * half_difference, first))
    last = np.where(near_zero | near_pi, 0.0, last)
    if not is_proper:
        last, middle = sign * last, middle - np.pi / 2
    angles = np.stack([first, middle, last], axis=-1)
    angles[..., [0, 2]] = np.remainder(angles[..., [0, 2]] + np.pi, 2 * np.pi) - np.pi
    return angles if order.islower() else angles[..., ::-1].copy()


def _check_rotation_matrix(matrix: Float64[np.ndarray, "*B 3 3"], field: str) -> None:
    """Check that each matrix is a rotation to the precision of float32.

    Raises:
        ValueError: a matrix is not orthonormal, is a reflection, or holds NaN.
    """
    deviation = np.abs(matrix @ np.swapaxes(matrix, -1, -2) - np.eye(3)).max(axis=(-1, -2))
    mirrors = np.sum(np.cross(matrix[..., 0, :], matrix[..., 1, :]) * matrix[..., 2, :], axis=-1) < 0
    # negated comparison, so that NaN fails too
    _fail_where(~(deviation < _ORTHONORMAL_LIMIT) | mirrors, field, "the matrix is not a rotation")


def _turn_about(axis: int, angle: Float64[np.ndarray, "*B"]) -> Float64[np.ndarray, "*B 3 3"]:
    cos, sin, zero, one = np.cos(angle), np.sin(angle), np.zeros_like(angle), np.ones_like(angle)
    rows = [[one, zero, zero], [zero, cos, -sin], [zero, sin, cos]]
    turn = np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)
    return np.roll(turn, axis, axis=(-1, -2))


def _dot(a: Float64[np.ndarray, "*B 3"], b: Float64[np.ndarray, "*B 3"]) -> Float64[np.ndarray, "*B"]:
    # einsum: three times as fast here as a sum over the last axis
    return np.asarray(np.einsum("...i,...i->...", a, b))


def _fail_where(bad: "Bool[np.ndarray, '*B'] | np.bool_", field: str, reason: str) -> None:
    if np.any(bad):
        raise ValueError(f"{field}{first_index(bad)} is not a rotation: {reason}.")


def first_index(bad: "Bool[np.ndarray, '*B'] | np.bool_") -> str:
    """Return the position of the first True, for a message: ' at index 3, 1', or '' for a scalar."""
    index = [str(i) for i in np.argwhere(bad)[0]]
    return f" at index {', '.join(index)}" if index else ""
