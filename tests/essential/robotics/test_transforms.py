"""Each transform stands beside its inverse: select fields, relative poses, normalize."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vla_foundry.robotics.fields import PaddingStrategy, PoseGroup, Window
from vla_foundry.robotics.rotations import matrix_to_rotation
from vla_foundry.robotics.transforms import RelativePoses, SelectFields
from vla_foundry.robotics.windows import create_windows


def test_a_layout_puts_fields_side_by_side_and_takes_them_apart() -> None:
    rng = np.random.default_rng(0)
    arrays = {"a": rng.normal(size=(5, 3)), "b": rng.normal(size=(5, 1)), "c": rng.normal(size=(5, 6))}
    layout = SelectFields.create(["c", "a"], {name: array.shape[-1] for name, array in arrays.items()})
    whole = layout.apply(arrays)[0]
    assert whole.shape == (5, layout.width) == (5, 9)
    assert np.array_equal(whole[:, :6], arrays["c"])
    parts = layout.invert(whole)
    assert list(parts) == ["c", "a"]
    assert all(np.array_equal(parts[name], arrays[name]) for name in parts)


def test_a_layout_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"data.action_fields 'grippr' is unknown. Did you mean 'gripper'"):
        SelectFields.create(["grippr"], {"gripper": 1}, what="data.action_fields")
    with pytest.raises(ValueError, match="lists 'a' twice"):
        SelectFields.create(["a", "a"], {"a": 1})
    with pytest.raises(ValueError, match="'a' has 2 columns, expected 3"):
        SelectFields(("a",), (3,)).apply({"a": np.zeros((4, 2))})


def random_episode(num_frames: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "robot__actual__poses__left::panda__xyz": rng.normal(size=(num_frames, 3)),
        "robot__actual__poses__left::panda__rot_6d": rng.normal(size=(num_frames, 6)),
        "robot__action__poses__left::panda__xyz": rng.normal(size=(num_frames, 3)),
        "robot__action__poses__left::panda__rot_6d": rng.normal(size=(num_frames, 6)),
    }


GROUP = PoseGroup(
    name="left",
    position_key="robot__action__poses__left::panda__xyz",
    rotation_key="robot__action__poses__left::panda__rot_6d",
)


def test_predicted_relative_poses_come_back_to_the_world() -> None:
    episode = random_episode(12)
    windows = create_windows(np.arange(12), 12, Window(1, 4))
    fields = {name: windows.apply(values) for name, values in episode.items()}
    relative = RelativePoses((GROUP,), 1).apply(fields)
    assert sorted(relative) == sorted(GROUP.relative_keys)
    references = {name: values[windows.anchors] for name, values in episode.items() if "actual" in name}
    back = RelativePoses((GROUP,), 1).invert(relative, references)
    np.testing.assert_allclose(back[GROUP.position_key], fields[GROUP.position_key], atol=1e-9)


def test_zero_padding_stays_zero_in_relative_fields_and_changes_no_other_step() -> None:
    episode = random_episode(6, seed=1)
    fields, windows = {}, {}
    paddings: tuple[PaddingStrategy, ...] = ("copy", "zero")
    for padding in paddings:
        windows[padding] = create_windows(np.arange(6), 6, Window(2, 3), padding=padding)
        gathered = {name: windows[padding].apply(values) for name, values in episode.items()}
        fields[padding] = RelativePoses((GROUP,), 2, padding).apply(gathered, windows[padding].is_padding)
    hole = windows["zero"].is_padding
    for name in GROUP.relative_keys:
        assert (fields["zero"][name][hole] == 0).all()
        np.testing.assert_allclose(fields["zero"][name][~hole], fields["copy"][name][~hole], atol=1e-12)


def test_a_pose_group_names_the_field_it_lacks() -> None:
    fields = {
        name: values[None]
        for name, values in random_episode(3).items()
        if "actual__poses__left::panda__xyz" not in name
    }
    with pytest.raises(
        ValueError, match=r"pose group 'left': field 'robot__actual__poses__left::panda__xyz' is unknown"
    ):
        RelativePoses((GROUP,), 0).apply(fields)


FORMATS = ["rot_6d_rows", "rot_6d_columns", "quaternion_wxyz", "axis_angle", "euler_xyz", "matrix"]


def random_transforms(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return rigid transforms (*shape, 4, 4)."""
    rng = np.random.default_rng(seed)
    transform = np.zeros((*shape, 4, 4))
    rotations = Rotation.from_quat(rng.normal(size=(int(np.prod(shape)), 4)))
    transform[..., :3, :3] = rotations.as_matrix().reshape(*shape, 3, 3)
    transform[..., :3, 3], transform[..., 3, 3] = 10 * rng.normal(size=(*shape, 3)), 1.0
    return transform


def pose_fields(prefix: str, transform: np.ndarray, rotation_format: str) -> dict[str, np.ndarray]:
    rotation = matrix_to_rotation(transform[..., :3, :3], rotation_format)
    return {f"{prefix}.xyz": transform[..., :3, 3], f"{prefix}.rotation": rotation}


def pose_group(rotation_format: str, reference: str) -> PoseGroup:
    return PoseGroup(
        name="hand",
        position_key="action.xyz",
        rotation_key="action.rotation",
        rotation_format=rotation_format,
        reference_position_key=f"{reference}.xyz",
        reference_rotation_key=f"{reference}.rotation",
    )


@pytest.mark.parametrize("rotation_format", FORMATS)
def test_relative_is_the_inverse_of_the_reference_times_the_pose(rotation_format: str) -> None:
    action, state = random_transforms((6, 16), 1), random_transforms((6, 16), 2)
    poses = RelativePoses((pose_group(rotation_format, "state"),), anchor=4)
    fields = pose_fields("action", action, rotation_format) | pose_fields("state", state, rotation_format)
    relative = poses.apply(fields)
    expected = pose_fields("action", np.linalg.inv(state[:, 4:5]) @ action, "matrix")
    matrix = expected["action.rotation"].reshape(6, 16, 3, 3)
    np.testing.assert_allclose(relative["action.xyz_relative"], expected["action.xyz"], atol=1e-9)
    np.testing.assert_allclose(
        relative["action.rotation_relative"], matrix_to_rotation(matrix, rotation_format), atol=1e-9
    )
    back = poses.invert(relative, {name: values[:, 4] for name, values in fields.items()})
    for name, values in back.items():
        np.testing.assert_allclose(values, fields[name], atol=1e-9)


def test_a_pose_relative_to_itself_is_the_identity() -> None:
    fields = pose_fields("action", random_transforms((10, 1), 5), "rot_6d_rows")
    relative = RelativePoses((pose_group("rot_6d_rows", "action"),), anchor=0).apply(fields)
    np.testing.assert_allclose(relative["action.xyz_relative"], 0.0, atol=1e-12)
    expected = np.broadcast_to([1.0, 0, 0, 0, 1, 0], (10, 1, 6))
    np.testing.assert_allclose(relative["action.rotation_relative"], expected, atol=1e-12)


def test_relative_poses_do_not_depend_on_the_world_frame() -> None:
    poses = RelativePoses((pose_group("matrix", "state"),), anchor=2)
    action, state, world = random_transforms((8, 3), 6), random_transforms((8, 3), 7), random_transforms((), 8)
    here = poses.apply(pose_fields("action", action, "matrix") | pose_fields("state", state, "matrix"))
    there = poses.apply(pose_fields("action", world @ action, "matrix") | pose_fields("state", world @ state, "matrix"))
    for name, values in here.items():
        np.testing.assert_allclose(there[name], values, atol=1e-9)


def test_what_is_no_pose_is_named_by_group_and_index() -> None:
    poses = RelativePoses((pose_group("rot_6d_rows", "state"),), anchor=0)
    fields = pose_fields("action", random_transforms((2, 3), 15), "rot_6d_rows")
    fields |= pose_fields("state", random_transforms((2, 3), 16), "rot_6d_rows")
    for key, index, message in (
        ("action.xyz", (1, 2, 2), r"^pose group 'hand' at index 1, 2 has a position that is not finite"),
        ("state.xyz", (1, 0, 2), r"^reference of pose group 'hand' at index 1, 0 has a position"),
        ("state.rotation", (0, 0), r"^reference of pose group 'hand' at index 0, 0 is not a rotation"),
    ):
        broken = {name: values.copy() for name, values in fields.items()}
        broken[key][index] = np.nan
        with pytest.raises(ValueError, match=message):
            poses.apply(broken)
