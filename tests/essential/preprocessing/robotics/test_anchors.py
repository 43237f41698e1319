"""Anchors and windows: stride, padding, still filter with units, and statistics that a brute force confirms."""

import json
from pathlib import Path

import numpy as np
import pytest

from vla_foundry.preprocessing.robotics.anchors import choose_anchors, find_still_windows
from vla_foundry.preprocessing.robotics.converters.converter import create_converter
from vla_foundry.preprocessing.robotics.recipe import Recipe, create_recipe
from vla_foundry.robotics.fields import Window
from vla_foundry.robotics.windows import create_windows


@pytest.fixture
def recipe(rig):
    """A function that makes a recipe of the rig."""

    def create(**options) -> Recipe:
        options = {"past_lowdim_steps": 2, "future_lowdim_steps": 5, **options}
        params = rig.RigParams(source_episodes=["raw"], output_dir="out", **options)
        return create_recipe(params, create_converter(params))

    return create


def still_then_moving(rig, num_frames: int) -> dict[str, np.ndarray]:
    """Fields of which the position moves from the middle on, by 2 mm a frame, and nothing else ever."""
    fields = {name: np.zeros((num_frames, field.width)) for name, field in rig.FIELDS.items()}
    for name in (rig.ACTUAL_ROTATION, rig.ACTION_ROTATION):
        fields[name][:, [0, 4]] = 1.0
    fields[rig.ACTION_XYZ][:, 0] = 0.002 * np.maximum(np.arange(num_frames) - num_frames // 2, 0)
    return fields


@pytest.mark.parametrize("threshold", ["1 mm", "0.001", "0.1 cm"])
def test_windows_in_which_nothing_moves_are_no_samples(rig, recipe, threshold):
    fields = still_then_moving(rig, 60)
    options = {"max_padding_left": 2, "max_padding_right": 5}
    chosen = choose_anchors(
        fields, 60, recipe(filter_still_samples=True, still_thresholds={"*__xyz": threshold}, **options)
    )
    moving = []
    for anchor in range(60):
        steps = [anchor + offset for offset in range(-2, 6) if 0 <= anchor + offset < 60]
        if fields[rig.ACTION_XYZ][steps].std(axis=0).max() > 0.001:
            moving.append(anchor)
    assert 0 < len(moving) < 60
    assert chosen.frames.tolist() == moving
    assert chosen.dropped == {"padding": 0, "still": 60 - len(moving)}


def test_a_field_with_a_threshold_of_its_own_does_not_count_for_another(rig, recipe):
    fields = still_then_moving(rig, 60)
    thresholds = {rig.GRIPPER: "1 mm", "*__rot_6d": "1 deg"}  # of what does not move
    chosen = choose_anchors(fields, 60, recipe(filter_still_samples=True, still_thresholds=thresholds))
    assert len(chosen.frames) == 0


def test_one_threshold_holds_for_the_fields_that_move(rig, recipe):
    fields = still_then_moving(rig, 60)
    few = choose_anchors(fields, 60, recipe(filter_still_samples=True, still_threshold=0.004))
    many = choose_anchors(fields, 60, recipe(filter_still_samples=True, still_threshold=0.001))
    assert 0 < len(few.frames) < len(many.frames) < 60


def brute_force_windows(arrays: dict, name: str, anchors: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Windows (N, 8, C) of a field, and where they lie within the episode."""
    length = len(arrays["timestamps"])
    steps = np.array(anchors)[:, None] + np.arange(-2, 6)
    return arrays[f"field|{name}"][steps.clip(0, length - 1)], (steps >= 0) & (steps < length)


@pytest.mark.parametrize("padding", ["copy", "zero", "reflect"])
def test_statistics_are_those_of_all_valid_steps_of_all_samples(
    padding, rig, tmp_path, write_episodes, preprocess, read_tars
):
    episodes = write_episodes(tmp_path / "raw", [14, 9, 25])
    folder = preprocess(tmp_path / "raw", tmp_path / "out", padding_strategy=padding, layout="samples")
    statistics = json.loads((Path(folder) / "stats.json").read_text(encoding="utf-8"))
    for name in (rig.ACTION_XYZ, rig.GRIPPER):
        parts = []
        for arrays in episodes.values():
            length = len(arrays["timestamps"])
            anchors = [t for t in range(length) if 2 - t <= 1 and t + 5 - (length - 1) <= 7]
            parts.append(brute_force_windows(arrays, name, anchors))
        values, valid = (np.concatenate(part) for part in zip(*parts, strict=True))
        _assert_equal(statistics[name], values.astype(np.float64), valid)
    # and of what is in the samples, relative fields too
    lowdims = [members["lowdim.npz"] for members in read_tars(folder).values()]
    valid = np.stack([lowdim["past_mask"] | lowdim["future_mask"] for lowdim in lowdims])
    assert statistics.keys() == lowdims[0].keys() - {
        "past_mask", "future_mask", "original_intrinsics.Front", "rescaled_intrinsics.Front", "extrinsics.Front",
    }  # fmt: skip
    for name, found in statistics.items():
        _assert_equal(found, np.stack([lowdim[name] for lowdim in lowdims]).astype(np.float64), valid)


def _assert_equal(found: dict, values: np.ndarray, valid: np.ndarray) -> None:
    assert found["anchor_index"] == 2
    assert found["count"] == valid.sum(axis=0).tolist()
    for step in range(values.shape[1]):
        column = values[valid[:, step], step]
        np.testing.assert_allclose(found["mean_per_timestep"][step], column.mean(axis=0), atol=1e-10)
        np.testing.assert_allclose(found["std_per_timestep"][step], column.std(axis=0, ddof=1), atol=1e-10)
        np.testing.assert_array_equal(found["min_per_timestep"][step], column.min(axis=0))
        np.testing.assert_array_equal(found["max_per_timestep"][step], column.max(axis=0))
        for percentile in (1, 5, 95):
            expected = np.percentile(column, percentile, axis=0)
            np.testing.assert_allclose(found[f"percentile_{percentile}_per_timestep"][step], expected, atol=1e-10)
    np.testing.assert_allclose(found["mean"], values[valid].mean(axis=0), atol=1e-10)
    np.testing.assert_array_equal(found["max"], values[valid].max(axis=0))


@pytest.mark.parametrize(("left", "right"), [(99, 99), (0, 0), (1, 7), (3, 12)])
@pytest.mark.parametrize("stride", [1, 3])
def test_anchors_are_chosen_by_the_padding_they_need(left: int, right: int, stride: int, recipe) -> None:
    window, num_frames = Window(3, 14), 25
    steps = {"past_lowdim_steps": window.past, "future_lowdim_steps": window.future}
    chosen = choose_anchors(
        {}, num_frames, recipe(stride=stride, max_padding_left=left, max_padding_right=right, **steps)
    )
    expected = []
    for anchor in range(0, num_frames, stride):
        padding = create_windows(np.array([anchor]), num_frames, window).is_padding[0]
        if padding[: window.anchor].sum() <= left and padding[window.anchor :].sum() <= right:
            expected.append(anchor)
    assert chosen.frames.tolist() == expected
    assert chosen.dropped == {"padding": len(range(0, num_frames, stride)) - len(expected), "still": 0}


def test_a_window_is_still_only_if_no_named_field_moves() -> None:
    still, slow, fast = np.zeros(8), np.linspace(0, 0.008, 8), np.linspace(0, 0.8, 8)
    fields = {
        "arm__xyz": np.stack([still, slow, still, still])[..., None] + 1e3,
        "arm__joints": np.stack([[still, still], [still, still], [still, fast], [still, still]]).swapaxes(1, 2),
        "force": np.stack([still, still, still, 100 * fast])[..., None],
    }
    no_padding = np.zeros((4, 8), dtype=bool)
    found = find_still_windows(fields, no_padding, {"arm__xyz": 0.001, "arm__joints": np.deg2rad(1)})
    assert found.tolist() == [True, False, False, True]
    # a wider threshold for positions, in its own unit, does not touch the joints'
    found = find_still_windows(fields, no_padding, {"arm__xyz": 0.005, "arm__joints": np.deg2rad(1)})
    assert found.tolist() == [True, True, False, True]


def test_padding_does_not_make_a_window_move() -> None:
    values = np.zeros((1, 6, 1))
    values[0, 4:] = 9.0
    padding = np.array([[False] * 4 + [True] * 2])
    assert find_still_windows({"x": values}, padding, {"x": 0.01}).all()
    assert not find_still_windows({"x": values}, np.zeros_like(padding), {"x": 0.01}).any()
