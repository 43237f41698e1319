"""Field names, pose groups and windows."""

import subprocess
import sys

import numpy as np
import pytest

from vla_foundry.robotics.fields import (
    FieldName,
    Window,
    absolute_field,
    actual_field,
    image_names,
    is_relative_field,
    parse_field_name,
    parse_pose_groups,
    relative_field,
)

PUBLISHED = [
    "robot__actual__poses__left::panda__xyz",
    "robot__action__poses__right::panda__rot_6d_relative",
    "robot__desired__grippers__left::panda_hand",
    "robot__actual__joint_torque_external__right::panda",
    "robot__actual__external_wrench__left::panda",
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_parse(name: str) -> None:
    assert parse_field_name(name) is not None


def test_a_name_comes_apart_into_its_parts() -> None:
    assert parse_field_name("robot__action__poses__right::panda__rot_6d_relative") == FieldName(
        source="action", quantity="poses", side="right", body="panda", component="rot_6d", is_relative=True
    )
    gripper = parse_field_name("robot__actual__grippers__left::panda_hand")
    assert gripper is not None
    assert (gripper.body, gripper.component) == ("panda_hand", None)


@pytest.mark.parametrize("name", ["observation.state", "robot__version", "robot__wished__poses__left::panda__xyz"])
def test_other_names_have_no_parts(name: str) -> None:
    assert parse_field_name(name) is None


def test_relative_and_absolute_names_are_inverse() -> None:
    name = PUBLISHED[0]
    assert is_relative_field(relative_field(name))
    assert absolute_field(relative_field(name)) == name


def test_a_relative_of_a_relative_field_is_an_error() -> None:
    with pytest.raises(ValueError, match="already relative"):
        relative_field(PUBLISHED[1])


def test_the_actual_field_of_a_command_is_its_measurement() -> None:
    assert actual_field(PUBLISHED[1]) == "robot__actual__poses__right::panda__rot_6d"
    with pytest.raises(ValueError, match="reference_position_key"):
        actual_field("action.xyz")


def test_a_pose_group_refers_to_the_measured_pose_unless_told_otherwise() -> None:
    (group,) = parse_pose_groups(
        [{"name": "left", "position_key": PUBLISHED[0].replace("actual", "action"), "rotation_key": "robot__a__rot"}]
    )
    assert group.reference_keys == (PUBLISHED[0], "robot__actual__rot")
    (group,) = parse_pose_groups(
        [
            {
                "name": "tip",
                "position_key": "action.xyz",
                "rotation_key": "action.quat",
                "rotation_format": "quaternion_xyzw",
                "reference_position_key": "state.xyz",
                "reference_rotation_key": "state.quat",
            }
        ]
    )
    assert group.reference_keys == ("state.xyz", "state.quat")
    assert group.relative_keys == ("action.xyz_relative", "action.quat_relative")


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"name": "left", "position_key": "a"}], r"pose_groups\[0\] needs .* missing: rotation_key"),
        ([{"name": "l", "position_key": "a", "rotation_key": "b", "rot": "c"}], "'rot' is unknown"),
        ([{"name": "l", "position_key": "a_relative", "rotation_key": "b"}], "already relative. Give 'a'"),
        ([{"name": "l", "position_key": "a", "rotation_key": "b"}] * 2, "names group 'l' twice"),
    ],
)
def test_pose_groups_that_make_no_sense_are_named(groups: list[dict[str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_pose_groups(groups)


def test_a_smaller_window_is_cut_around_the_same_anchor() -> None:
    stored, inner = Window(3, 8), Window(1, 2)
    offsets = np.array(stored.offsets)[stored.crop(inner)]
    assert offsets.tolist() == list(inner.offsets)
    # past = 0 is a real choice, not "unset"
    assert np.array(stored.offsets)[stored.crop(Window(0, 0))].tolist() == [0]


def test_a_window_larger_than_the_stored_one_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\(4 past, 2 future steps\) is larger than the stored one \(3 past"):
        Window(3, 8).crop(Window(4, 2))
    with pytest.raises(ValueError, match=r"past \(-1\) >= 0"):
        Window(-1, 2)


def test_images_are_named_time_major() -> None:
    names = image_names(["observation.images.top", "wrist"], [-1, 0])
    assert names == ["observation.images.top_t-1", "wrist_t-1", "observation.images.top_t0", "wrist_t0"]


def test_the_package_imports_without_torch() -> None:
    modules = (
        "fields, rotations, transforms, windows, tdigest, statistics, accumulator, statistics_format, normalization"
    )
    code = f"from vla_foundry.robotics import {modules}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
