"""Each transform stands beside its inverse: select fields, relative poses, normalize."""

import numpy as np
import pytest

from vla_foundry.robotics.fields import PaddingStrategy, PoseGroup, Window
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
