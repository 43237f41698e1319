"""Windows around anchors: frames, masks, padding, still windows and relative poses."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from vla_foundry.robotics.fields import PoseGroup, Window, parse_pose_groups
from vla_foundry.robotics.windows import (
    PaddingStrategy,
    compute_absolute_fields,
    compute_relative_fields,
    create_windows,
    find_still_windows,
    image_frames,
    parse_threshold,
    select_anchors,
)

PAD_MODES: dict[PaddingStrategy, str] = {"copy": "edge", "zero": "constant", "reflect": "reflect"}


def naive_window(values: np.ndarray, anchor: int, window: Window, padding: PaddingStrategy) -> np.ndarray:
    """One window as the published data makes it: the valid slice, padded by numpy."""
    first, last = anchor - window.past, anchor + window.future
    valid = values[max(first, 0) : last + 1]
    left, right = max(0, -first), max(0, last - (len(values) - 1))
    return np.pad(valid, [(left, right)] + [(0, 0)] * (values.ndim - 1), mode=PAD_MODES[padding])  # pyright: ignore[reportCallIssue, reportArgumentType]


@pytest.mark.parametrize("padding", ["copy", "zero", "reflect"])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 7, 30])
@pytest.mark.parametrize("window", [Window(0, 0), Window(1, 14), Window(5, 2), Window(6, 20)], ids=str)
def test_windows_equal_numpy_padding_of_the_valid_slice(
    padding: PaddingStrategy, num_frames: int, window: Window
) -> None:
    values = np.random.default_rng(0).normal(size=(num_frames, 2))
    windows = create_windows(np.arange(num_frames), num_frames, window, padding=padding)
    expected = np.stack([naive_window(values, anchor, window, padding) for anchor in range(num_frames)])
    np.testing.assert_array_equal(windows.gather(values), expected)


def test_exactly_one_of_the_three_masks_is_true_at_every_step() -> None:
    windows = create_windows(np.arange(10), 10, Window(3, 4))
    masks = np.stack([windows.past_mask, windows.future_mask, windows.is_padding])
    assert (masks.sum(axis=0) == 1).all()


def test_the_anchor_counts_as_future_and_padding_as_neither() -> None:
    windows = create_windows(np.array([1, 9]), 10, Window(3, 2))
    np.testing.assert_array_equal(windows.past_mask, [[0, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(windows.future_mask, [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 0, 0]])
    np.testing.assert_array_equal(windows.is_padding, [[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]])


def test_gathering_leaves_the_episode_alone_and_keeps_its_type() -> None:
    values = np.arange(1, 11)
    taken = create_windows(np.array([0, 9]), 10, Window(2, 1), padding="zero").gather(values)
    assert taken.dtype == values.dtype
    assert taken.tolist() == [[0, 0, 1, 2], [8, 9, 10, 0]]
    assert values.tolist() == list(range(1, 11))


def test_an_anchor_outside_the_episode_is_an_error() -> None:
    with pytest.raises(ValueError, match="anchor 10 lies outside the episode of 10 frames"):
        create_windows(np.array([3, 10]), 10, Window(1, 1))


@pytest.mark.parametrize(("left", "right"), [(None, None), (0, 0), (1, 7), (3, 12)])
@pytest.mark.parametrize("stride", [1, 3])
def test_anchors_are_chosen_by_the_padding_they_need(left: int | None, right: int | None, stride: int) -> None:
    window, num_frames = Window(3, 14), 25
    selected = select_anchors(num_frames, window, stride=stride, max_padding_left=left, max_padding_right=right)
    expected = []
    for anchor in range(0, num_frames, stride):
        padding = create_windows(np.array([anchor]), num_frames, window).is_padding[0]
        num_left, num_right = int(padding[: window.anchor].sum()), int(padding[window.anchor :].sum())
        if (left is None or num_left <= left) and (right is None or num_right <= right):
            expected.append(anchor)
    assert selected.anchors.tolist() == expected
    assert selected.num_dropped == len(range(0, num_frames, stride)) - len(expected)


def test_bad_strides_and_limits_are_errors() -> None:
    with pytest.raises(ValueError, match=r"stride \(0\)"):
        select_anchors(5, Window(0, 0), stride=0)
    with pytest.raises(ValueError, match=r"max_padding_right \(-1\)"):
        select_anchors(5, Window(0, 0), max_padding_right=-1)


def test_image_indices_are_clipped_to_the_episode() -> None:
    frames = image_frames(np.array([0, 4, 9]), [-5, -1, 0, 3], 10)
    assert frames.tolist() == [[0, 0, 0, 3], [0, 3, 4, 7], [4, 8, 9, 9]]


def test_thresholds_have_units() -> None:
    assert parse_threshold("5 mm") == pytest.approx(0.005)
    assert parse_threshold("2deg") == pytest.approx(np.deg2rad(2))
    assert parse_threshold("1e-3") == parse_threshold(1e-3) == 1e-3
    with pytest.raises(ValueError, match="'5 furlongs' is not a number with a unit"):
        parse_threshold("5 furlongs")
    with pytest.raises(ValueError, match=r"\(-1.0\) must be at least 0"):
        parse_threshold(-1.0)


def test_a_window_is_still_only_if_no_named_field_moves() -> None:
    still, slow, fast = np.zeros(8), np.linspace(0, 0.008, 8), np.linspace(0, 0.8, 8)
    fields = {
        "arm__xyz": np.stack([still, slow, still, still])[..., None] + 1e3,
        "arm__joints": np.stack([[still, still], [still, still], [still, fast], [still, still]]).swapaxes(1, 2),
        "force": np.stack([still, still, still, 100 * fast])[..., None],
    }
    no_padding = np.zeros((4, 8), dtype=bool)
    found = find_still_windows(fields, no_padding, {"*xyz": "1 mm", "arm__joints": "1 deg"})
    assert found.tolist() == [True, False, False, True]
    # a wider threshold for positions, in its own unit, does not touch the joints'
    found = find_still_windows(fields, no_padding, {"*xyz": "5 mm", "arm__joints": "1 deg"})
    assert found.tolist() == [True, True, False, True]


def test_padding_does_not_make_a_window_move() -> None:
    values = np.zeros((1, 6, 1))
    values[0, 4:] = 9.0
    padding = np.array([[False] * 4 + [True] * 2])
    assert find_still_windows({"x": values}, padding, {"x": 0.01}).all()
    assert not find_still_windows({"x": values}, np.zeros_like(padding), {"x": 0.01}).any()


def test_a_still_pattern_that_names_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"field 'left__xy' is unknown. Did you mean 'left__xyz'"):
        find_still_windows({"left__xyz": np.zeros((1, 2, 3))}, np.zeros((1, 2), dtype=bool), {"left__xy": 0.1})


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
    fields = {name: windows.gather(values) for name, values in episode.items()}
    relative = compute_relative_fields(fields, [GROUP], anchor=1)
    assert sorted(relative) == sorted(GROUP.relative_keys)
    references = {name: values[windows.anchors] for name, values in episode.items() if "actual" in name}
    back = compute_absolute_fields(relative, references, [GROUP])
    np.testing.assert_allclose(back[GROUP.position_key], fields[GROUP.position_key], atol=1e-9)


def test_zero_padding_stays_zero_in_relative_fields_and_changes_no_other_step() -> None:
    episode = random_episode(6, seed=1)
    fields, windows = {}, {}
    for padding in ("copy", "zero"):
        windows[padding] = create_windows(np.arange(6), 6, Window(2, 3), padding=padding)
        gathered = {name: windows[padding].gather(values) for name, values in episode.items()}
        fields[padding] = compute_relative_fields(
            gathered, [GROUP], anchor=2, is_padding=windows[padding].is_padding, padding=padding
        )
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
        compute_relative_fields(fields, [GROUP], anchor=0)


@pytest.mark.shared_data
def test_published_masks_and_relative_poses_are_reproduced(shared_data: Path) -> None:
    groups = parse_pose_groups(
        [
            {
                "name": f"{source} {side}",
                "position_key": f"robot__{source}__poses__{side}::panda__xyz",
                "rotation_key": f"robot__{source}__poses__{side}::panda__rot_6d",
            }
            for source in ("action", "desired", "actual")
            for side in ("left", "right")
        ]
    )
    num_samples = 0
    with tarfile.open(shared_data / "small_lbm_dataset" / "shard_000000.tar") as tar:
        samples: dict[str, dict[str, bytes]] = {}
        for member in tar:
            key, _, suffix = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None
            samples.setdefault(key, {})[suffix] = file.read()
    for members in samples.values():
        arrays = dict(np.load(io.BytesIO(members["lowdim.npz"])))
        metadata = json.loads(members["metadata.json"])
        windows = create_windows(
            np.array([metadata["anchor_timestep"]]), metadata["original_episode_length"], Window(1, 14)
        )
        np.testing.assert_array_equal(windows.past_mask[0], arrays["past_mask"])
        np.testing.assert_array_equal(windows.future_mask[0], arrays["future_mask"])
        images = image_frames(windows.anchors, [-1, 0], metadata["original_episode_length"])
        assert images[0].tolist() == metadata["image_timesteps"]
        relative = compute_relative_fields(arrays, groups, anchor=metadata["anchor_relative_idx"])
        assert len(relative) == 12
        for name, values in relative.items():
            np.testing.assert_allclose(values, arrays[name], atol=1e-9, err_msg=name)
        num_samples += 1
    assert num_samples == 5
