"""Transforms, relative poses and deltas, and their inverses."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vla_foundry.robotics import pose
from vla_foundry.robotics.rotations import matrix_to_rotation

FORMATS = ["rot_6d_rows", "rot_6d_columns", "quaternion_wxyz", "axis_angle", "euler_xyz", "matrix"]


def random_rotations(count: int, seed: int) -> Rotation:
    return Rotation.from_quat(np.random.default_rng(seed).normal(size=(count, 4)))


def random_poses(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions (*shape, 3) and matrices (*shape, 3, 3)."""
    matrix = random_rotations(int(np.prod(shape)), seed).as_matrix().reshape(*shape, 3, 3)
    return np.random.default_rng(seed).normal(size=(*shape, 3)), matrix


def random_transforms(shape: tuple[int, ...], seed: int) -> np.ndarray:
    position, matrix = random_poses(shape, seed)
    transform = np.zeros((*shape, 4, 4))
    transform[..., :3, :3], transform[..., :3, 3], transform[..., 3, 3] = matrix, position, 1.0
    return transform


@pytest.mark.parametrize("rotation_format", FORMATS)
def test_a_transform_comes_apart_into_the_same_pose(rotation_format: str) -> None:
    position, matrix = random_poses((4, 5), 0)
    rotation = matrix_to_rotation(matrix, rotation_format)
    transform = pose.pose_to_transform(position, rotation, rotation_format=rotation_format)
    np.testing.assert_allclose(transform, random_transforms((4, 5), 0), atol=1e-12)
    back = pose.transform_to_pose(transform, rotation_format=rotation_format)
    np.testing.assert_allclose(back[0], position, atol=1e-12)
    np.testing.assert_allclose(back[1], rotation, atol=1e-9)


@pytest.mark.parametrize("rotation_format", FORMATS)
def test_relative_is_the_inverse_of_the_reference_times_the_pose(rotation_format: str) -> None:
    position, matrix = random_poses((6, 16), 1)
    reference_position, reference_matrix = random_poses((6, 1), 2)
    relative = pose.relative_pose(
        position,
        matrix_to_rotation(matrix, rotation_format),
        reference_position,
        matrix_to_rotation(reference_matrix, rotation_format),
        rotation_format=rotation_format,
    )
    expected = np.linalg.inv(random_transforms((6, 1), 2)) @ random_transforms((6, 16), 1)
    transform = pose.pose_to_transform(*relative, rotation_format=rotation_format)
    np.testing.assert_allclose(transform, expected, atol=1e-9)


@pytest.mark.parametrize("rotation_format", FORMATS)
def test_absolute_undoes_relative(rotation_format: str) -> None:
    position, matrix = random_poses((6, 16), 3)
    reference_position, reference_matrix = random_poses((6, 1), 4)
    rotation = matrix_to_rotation(matrix, rotation_format)
    reference = (reference_position * 10, matrix_to_rotation(reference_matrix, rotation_format))
    relative = pose.relative_pose(position, rotation, *reference, rotation_format=rotation_format)
    back = pose.absolute_pose(*relative, *reference, rotation_format=rotation_format)
    np.testing.assert_allclose(back[0], position, atol=1e-9)
    np.testing.assert_allclose(back[1], rotation, atol=1e-9)


def test_a_pose_relative_to_itself_is_the_identity() -> None:
    position, matrix = random_poses((10,), 5)
    rotation = matrix_to_rotation(matrix, "rot_6d_rows")
    relative = pose.relative_pose(position, rotation, position, rotation, rotation_format="rot_6d_rows")
    np.testing.assert_allclose(relative[0], 0.0, atol=1e-12)
    np.testing.assert_allclose(relative[1], np.broadcast_to([1.0, 0, 0, 0, 1, 0], (10, 6)), atol=1e-12)


def test_relative_poses_do_not_depend_on_the_world_frame() -> None:
    poses, reference, world = random_transforms((8,), 6), random_transforms((8,), 7), random_transforms((), 8)
    np.testing.assert_allclose(
        pose.relative_transform(world @ poses, world @ reference),
        pose.relative_transform(poses, reference),
        atol=1e-12,
    )


def test_relative_and_absolute_transforms_are_inverse() -> None:
    poses, reference = random_transforms((8, 3), 9), random_transforms((8, 1), 10)
    back = pose.absolute_transform(pose.relative_transform(poses, reference), reference)
    np.testing.assert_allclose(back, poses, atol=1e-12)


def test_inversion_agrees_with_linear_algebra_and_refuses_what_is_not_rigid() -> None:
    transforms = random_transforms((20,), 11)
    np.testing.assert_allclose(pose.invert_transform(transforms), np.linalg.inv(transforms), atol=1e-12)
    transforms[3, 3, 0] = 1e-3
    with pytest.raises(ValueError, match="bottom row"):
        pose.invert_transform(transforms)
    transforms[3] = np.diag([2.0, 1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="gripper at index 3 is not a rotation"):
        pose.invert_transform(transforms, field="gripper")


def test_steps_chain_back_to_the_poses() -> None:
    poses, start = random_transforms((5, 40), 12), random_transforms((5,), 13)
    steps = pose.pose_steps(poses, start)
    np.testing.assert_allclose(steps[:, 0], np.linalg.inv(start) @ poses[:, 0], atol=1e-12)
    np.testing.assert_allclose(pose.integrate_pose_steps(steps, start), poses, atol=1e-9)


def test_joint_deltas_go_the_short_way_round_where_a_joint_wraps() -> None:
    values, reference = np.array([3.1, 0.5]), np.array([-3.1, 0.2])
    np.testing.assert_allclose(pose.joint_delta(values, reference), [6.2, 0.3])
    short = pose.joint_delta(values, reference, wraps=True)
    np.testing.assert_allclose(short, [6.2 - 2 * np.pi, 0.3])
    np.testing.assert_allclose(pose.joint_from_delta(short, reference, wraps=True), values, atol=1e-12)
    np.testing.assert_allclose(pose.joint_from_delta(values - reference, reference), values)


def test_gripper_deltas_are_plain_and_reversible() -> None:
    opening = np.random.default_rng(14).random((4, 16, 1))
    delta = pose.gripper_delta(opening, opening[:, :1])
    np.testing.assert_allclose(pose.gripper_from_delta(delta, opening[:, :1]), opening, atol=1e-15)


def test_what_is_no_pose_is_named_by_field_and_index() -> None:
    position, matrix = random_poses((2, 3), 15)
    rotation = matrix_to_rotation(matrix, "rot_6d_rows")
    broken = position.copy()
    broken[1, 0, 2] = np.nan
    with pytest.raises(ValueError, match=r"^hand at index 1, 0 has a position that is not finite"):
        pose.pose_to_transform(broken, rotation, rotation_format="rot_6d_rows", field="hand")
    with pytest.raises(ValueError, match=r"^reference of hand at index 1, 0 has a position"):
        pose.relative_pose(position, rotation, broken, rotation, rotation_format="rot_6d_rows", field="hand")
