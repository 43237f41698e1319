"""Convert rigid poses to and from SE(3) and relative form, and compute joint and gripper deltas.

A transform T = [R t; 0 1] (4 x 4) maps points from the body frame to the world frame. A pose relative to a reference is
inv(T_ref) T: the pose as seen from the reference. All functions are batched and compute in float64.
"""

import numpy as np
from jaxtyping import Float, Float64

from vla_foundry.robotics.rotations import check_rotation_matrix, first_index, matrix_to_rotation, rotation_to_matrix


def pose_to_transform(
    position: Float[np.ndarray, "*B 3"],
    rotation: Float[np.ndarray, "*B R"],
    *,
    rotation_format: str,
    field: str = "pose",
) -> Float64[np.ndarray, "*B 4 4"]:
    """Build transforms.

    Args:
        position: metres.
        rotation_format: format of `rotation` (rotations.py).
        field: name of the values, for messages.

    Raises:
        ValueError: a value is not finite or not a rotation; the message names the field and the index.
    """
    transform = np.zeros((*position.shape[:-1], 4, 4))
    transform[..., :3, :3] = rotation_to_matrix(rotation, rotation_format, field=field)
    transform[..., :3, 3] = _finite_position(position, field)
    transform[..., 3, 3] = 1.0
    return transform


def transform_to_pose(
    transform: Float[np.ndarray, "*B 4 4"], *, rotation_format: str, field: str = "pose"
) -> tuple[Float64[np.ndarray, "*B 3"], Float64[np.ndarray, "*B R"]]:
    """Split transforms into (position, rotation). The inverse of `pose_to_transform`."""
    rotation = matrix_to_rotation(transform[..., :3, :3], rotation_format, field=field)
    return transform[..., :3, 3].astype(np.float64), rotation


def invert_transform(
    transform: Float[np.ndarray, "*B 4 4"], *, field: str = "transform"
) -> Float64[np.ndarray, "*B 4 4"]:
    """Invert rigid transforms: [R^T, -R^T t].

    Raises:
        ValueError: a transform is not rigid (bottom row other than 0 0 0 1, or not a rotation matrix).
    """
    transform = transform.astype(np.float64)
    if not np.array_equal(transform[..., 3, :], np.broadcast_to([0.0, 0.0, 0.0, 1.0], transform.shape[:-1])):
        raise ValueError(f"{field} has a transform whose bottom row is not 0 0 0 1.")
    check_rotation_matrix(transform[..., :3, :3], field=field)
    transposed = np.swapaxes(transform[..., :3, :3], -1, -2)
    inverse = np.zeros_like(transform)
    inverse[..., :3, :3] = transposed
    inverse[..., :3, 3] = -(transposed @ transform[..., :3, 3:])[..., 0]
    inverse[..., 3, 3] = 1.0
    return inverse


def relative_transform(
    transform: Float[np.ndarray, "*B 4 4"], reference: Float[np.ndarray, "*C 4 4"]
) -> Float64[np.ndarray, "*D 4 4"]:
    """Return inv(reference) @ transform; leading axes broadcast."""
    return invert_transform(reference, field="reference") @ transform.astype(np.float64)


def absolute_transform(
    relative: Float[np.ndarray, "*B 4 4"], reference: Float[np.ndarray, "*C 4 4"]
) -> Float64[np.ndarray, "*D 4 4"]:
    """Return reference @ relative: the inverse of `relative_transform`; leading axes broadcast."""
    return reference.astype(np.float64) @ relative.astype(np.float64)


def relative_pose(
    position: Float[np.ndarray, "*B 3"],
    rotation: Float[np.ndarray, "*B R"],
    reference_position: Float[np.ndarray, "*C 3"],
    reference_rotation: Float[np.ndarray, "*C R"],
    *,
    rotation_format: str,
    field: str = "pose",
) -> tuple[Float64[np.ndarray, "*D 3"], Float64[np.ndarray, "*D R"]]:
    """Express poses in the frame of a reference pose; leading axes broadcast.

    Returns:
        (position, rotation) relative to the reference, in the same rotation format.
    """
    # avoiding 4 x 4 transforms takes a fifth of the time, and this runs for every window of a dataset
    R, R_reference = _matrices_of(rotation, reference_rotation, rotation_format, field)
    R_inverse = np.swapaxes(R_reference, -1, -2)
    offset = _finite_position(position, field) - _finite_position(reference_position, f"reference of {field}")
    return (R_inverse @ offset[..., None])[..., 0], matrix_to_rotation(R_inverse @ R, rotation_format, field=field)


def _matrices_of(
    rotation: Float[np.ndarray, "*B R"], reference: Float[np.ndarray, "*C R"], rotation_format: str, field: str
) -> tuple[Float64[np.ndarray, "*B 3 3"], Float64[np.ndarray, "*C 3 3"]]:
    """Return the matrices of rotations and their references, in one call if the two can be stacked."""
    if rotation.ndim > 1 and rotation.shape[:-2] == reference.shape[:-2]:
        # for the few steps of a window, call overhead exceeds the computation
        num_steps = rotation.shape[-2]
        try:
            both = rotation_to_matrix(np.concatenate([rotation, reference], axis=-2), rotation_format, field=field)
            return both[..., :num_steps, :, :], both[..., num_steps:, :, :]
        except ValueError:
            pass  # raised again below, with the right name
    R = rotation_to_matrix(rotation, rotation_format, field=field)
    return R, rotation_to_matrix(reference, rotation_format, field=f"reference of {field}")


def absolute_pose(
    position: Float[np.ndarray, "*B 3"],
    rotation: Float[np.ndarray, "*B R"],
    reference_position: Float[np.ndarray, "*C 3"],
    reference_rotation: Float[np.ndarray, "*C R"],
    *,
    rotation_format: str,
    field: str = "pose",
) -> tuple[Float64[np.ndarray, "*D 3"], Float64[np.ndarray, "*D R"]]:
    """Convert relative poses back to the world frame: the inverse of `relative_pose`."""
    R = rotation_to_matrix(rotation, rotation_format, field=field)
    R_reference = rotation_to_matrix(reference_rotation, rotation_format, field=f"reference of {field}")
    turned = (R_reference @ _finite_position(position, field)[..., None])[..., 0]
    origin = _finite_position(reference_position, f"reference of {field}")
    return origin + turned, matrix_to_rotation(R_reference @ R, rotation_format, field=field)


def pose_steps(
    transforms: Float[np.ndarray, "*B T 4 4"], start: Float[np.ndarray, "*B 4 4"]
) -> Float64[np.ndarray, "*B T 4 4"]:
    """Express each pose in the frame of the previous one, and the first in the frame of `start`."""
    before = np.concatenate([start[..., None, :, :], transforms[..., :-1, :, :]], axis=-3)
    return relative_transform(transforms, before)


def integrate_pose_steps(
    steps: Float[np.ndarray, "*B T 4 4"], start: Float[np.ndarray, "*B 4 4"]
) -> Float64[np.ndarray, "*B T 4 4"]:
    """Chain steps to absolute poses: the inverse of `pose_steps`."""
    poses, current = [], start.astype(np.float64)
    for step in np.moveaxis(steps.astype(np.float64), -3, 0):
        current = current @ step
        poses.append(current)
    return np.stack(poses, axis=-3) if poses else np.zeros(steps.shape)


def joint_delta(
    values: Float[np.ndarray, "*B"], reference: Float[np.ndarray, "*C"], *, wraps: bool = False
) -> Float64[np.ndarray, "*D"]:
    """Return values - reference, for joints, grippers or any other scalar signal; axes broadcast.

    Args:
        wraps: the joint rotates continuously, so the difference is wrapped to [-pi, pi) radians.
    """
    delta = values.astype(np.float64) - reference.astype(np.float64)
    return np.remainder(delta + np.pi, 2 * np.pi) - np.pi if wraps else delta


def joint_from_delta(
    delta: Float[np.ndarray, "*B"], reference: Float[np.ndarray, "*C"], *, wraps: bool = False
) -> Float64[np.ndarray, "*D"]:
    """Return reference + delta, the inverse of `joint_delta` (for a joint that wraps, in [-pi, pi) radians)."""
    values = reference.astype(np.float64) + delta.astype(np.float64)
    return np.remainder(values + np.pi, 2 * np.pi) - np.pi if wraps else values


def gripper_delta(values: Float[np.ndarray, "*B"], reference: Float[np.ndarray, "*C"]) -> Float64[np.ndarray, "*D"]:
    """Return how far a gripper opens beyond the reference, in its own unit and sign."""
    return joint_delta(values, reference)


def gripper_from_delta(delta: Float[np.ndarray, "*B"], reference: Float[np.ndarray, "*C"]) -> Float64[np.ndarray, "*D"]:
    """Return the gripper's opening: the inverse of `gripper_delta`."""
    return joint_from_delta(delta, reference)


def _finite_position(position: Float[np.ndarray, "*B 3"], field: str) -> Float64[np.ndarray, "*B 3"]:
    is_finite = np.isfinite(position)
    if not is_finite.all():
        raise ValueError(f"{field}{first_index(~is_finite.all(axis=-1))} has a position that is not finite.")
    return position.astype(np.float64)
