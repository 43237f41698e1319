"""Which episodes go where: a pure function of ids, tasks and the seed."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vla_foundry.preprocessing.robotics.converters.converter import EpisodeRef, create_converter
from vla_foundry.preprocessing.robotics.recipe import (
    Recipe,
    check_refs,
    choose_anchors,
    create_recipe,
    find_still_windows,
    group_episodes,
    parse_threshold,
    split_refs,
)
from vla_foundry.robotics.fields import PoseGroup, Window
from vla_foundry.robotics.spec import FieldDescription
from vla_foundry.robotics.windows import create_windows


def refs(num_episodes: int, num_tasks: int = 4, frames: int | None = 50) -> list[EpisodeRef]:
    return [EpisodeRef(f"run_{i:03d}", f"raw/{i}", f"task {i % num_tasks}", frames) for i in range(num_episodes)]


@pytest.fixture
def params(rig):
    return lambda **options: rig.RigParams(source_episodes=["raw"], output_dir="out", **options)


def ids(episodes) -> set[str]:
    return {ref.episode_id for ref in episodes}


def test_validation_by_episode_has_its_share_of_every_task(params):
    split = split_refs(refs(80), params(validation_fraction=0.1))
    assert Counter(ref.task for ref in split["validation"]) == {f"task {i}": 2 for i in range(4)}
    assert ids(split["train"]) | ids(split["validation"]) == ids(refs(80))
    assert not ids(split["train"]) & ids(split["validation"])


def test_tasks_of_few_episodes_have_their_share_of_validation_together(params):
    # instructions in many words are tasks of one or two episodes each
    split = split_refs(refs(60, num_tasks=30), params(validation_fraction=0.2))
    assert len(split["validation"]) == 12
    assert max(Counter(ref.task for ref in split["validation"]).values()) == 1


def test_validation_by_task_holds_out_whole_tasks(params):
    split = split_refs(refs(80), params(validation_fraction=0.25, validation_by="task"))
    tasks = {name: {ref.task for ref in part} for name, part in split.items()}
    assert len(tasks["validation"]) == 1
    assert not tasks["train"] & tasks["validation"]


def test_the_split_depends_on_the_seed_and_hardly_on_what_is_added(params):
    chosen = ids(split_refs(refs(200), params(validation_fraction=0.1))["validation"])
    assert chosen == ids(split_refs(refs(200)[::-1], params(validation_fraction=0.1))["validation"])
    assert chosen != ids(split_refs(refs(200), params(validation_fraction=0.1, seed=1))["validation"])
    grown = ids(split_refs(refs(220), params(validation_fraction=0.1))["validation"])
    assert len(chosen & grown) >= 0.8 * len(chosen)


def test_a_small_share_of_few_episodes_is_one_episode(params):
    assert len(split_refs(refs(6, num_tasks=3), params(validation_fraction=0.05))["validation"]) == 1


def test_a_split_that_leaves_nothing_is_refused(params):
    with pytest.raises(ValueError, match="leaves no episode of 8 to train on"):
        split_refs(refs(8), params(validation_fraction=1.0))
    with pytest.raises(ValueError, match="leaves no episode of 8 to validate with"):
        split_refs(refs(8), params(validation_fraction=0.01, validation_by="task"))
    with pytest.raises(ValueError, match="'walk_\\*' names none of the 8 episodes"):
        split_refs(refs(8), params(validation_episodes=["walk_*"]))


def test_shards_hold_every_episode_once_in_an_order_of_the_seed(params):
    shards = group_episodes(refs(300), params(frames_per_shard=500))
    flat = [ref.episode_id for shard in shards for ref in shard]
    assert sorted(flat) == sorted(ids(refs(300)))
    assert flat != sorted(flat)
    assert {len(shard) for shard in shards} == {10}
    assert shards == group_episodes(refs(300), params(frames_per_shard=500))
    assert shards != group_episodes(refs(300), params(frames_per_shard=500, seed=1))


@pytest.mark.parametrize("frames", [50, None])
def test_few_frames_still_make_shards_for_all_workers(params, frames):
    assert len(group_episodes(refs(32, frames=frames), params())) == 16


def test_ids_must_be_unique_and_plain():
    with pytest.raises(ValueError, match="raw/a and raw/b have one episode id, 'x'"):
        check_refs([EpisodeRef("x", "raw/a"), EpisodeRef("x", "raw/b")], -1)
    with pytest.raises(ValueError, match=r"episode id 'a\.b' must be letters"):
        check_refs([EpisodeRef("a.b", "raw/a")], -1)
    with pytest.raises(ValueError, match="has no episodes"):
        check_refs([], -1)


def test_cameras_are_checked_by_name(rig, params):
    wanted = params(camera_names=["depth", "Front"])
    assert create_recipe(wanted, create_converter(wanted)).cameras == ("depth", "Front")
    unknown = params(camera_names=["front"])
    with pytest.raises(ValueError, match=r"camera 'front' is unknown\. Did you mean 'Front'"):
        create_recipe(unknown, create_converter(unknown))


def test_the_last_part_of_a_camera_is_enough_as_in_training(params, rig, monkeypatch):
    cameras = ["observation.images.front", "observation.images.wrist", "left.wrist"]
    monkeypatch.setattr(rig.RigConverter, "discover_cameras", lambda self: cameras)
    wanted = params(camera_names=["front", "left.wrist"], camera_rotations={"front": 1})
    recipe = create_recipe(wanted, create_converter(wanted))
    assert recipe.cameras == ("observation.images.front", "left.wrist")
    # converters and workers see the whole names
    assert recipe.params.camera_names == ["observation.images.front", "left.wrist"]
    assert recipe.params.camera_rotations == {"observation.images.front": 1}
    for names, message in (
        (["wrist"], r"camera_names: 'wrist' can be observation\.images\.wrist or left\.wrist\. Give the whole name"),
        (["front", "observation.images.front"], "camera_names names a camera twice"),
        (["images.front"], r"camera_names: camera 'images\.front' is unknown\. Did you mean"),
    ):
        with pytest.raises(ValueError, match=message):
            create_recipe(params(camera_names=names), create_converter(params()))


def test_cameras_that_differ_by_case_alone_are_refused(rig, params, monkeypatch):
    monkeypatch.setattr(rig.RigConverter, "discover_cameras", lambda self: ["Top", "top"])
    with pytest.raises(ValueError, match="two cameras named 'top' differ only in upper and lower case"):
        create_recipe(params(), create_converter(params()))


def test_fields_and_pose_groups_are_checked(rig, params, monkeypatch):
    group = PoseGroup(name="arm", position_key="robot__action__xyz", rotation_key=rig.ACTION_ROTATION)
    monkeypatch.setattr(rig.RigConverter, "pose_groups", lambda self: (group,))
    with pytest.raises(ValueError, match="pose group 'arm': field 'robot__action__xyz' is unknown"):
        create_recipe(params(), create_converter(params()))
    monkeypatch.setattr(rig.RigConverter, "describe_fields", lambda self: {"a_relative": FieldDescription(shape=(1,))})
    with pytest.raises(ValueError, match="field 'a_relative' has a name kept for the relative fields"):
        create_recipe(params(), create_converter(params()))


def test_strides_and_limits_have_a_least_value(params):
    for options, message in (
        ({"stride": 0}, r"stride \(0\) must be at least 1"),
        ({"max_padding_right": -1}, r"max_padding_right \(-1\) must be at least 0"),
        ({"still_threshold": -1.0}, r"still_threshold \(-1\) must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            params(**options)


def test_params_that_no_episode_could_follow_are_refused_at_once(rig, params, monkeypatch):
    for options, message in (
        ({"still_thresholds": {"*_xzy": "1 mm"}}, r"still_thresholds: field '\*_xzy' is unknown"),
        ({"still_thresholds": {"*xyz": "1 inch"}}, "'1 inch' is not a number with a unit"),
        ({"camera_rotations": {"front": 1}}, "camera_rotations: camera 'front' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            create_recipe(params(**options), create_converter(params()))
    delta = {"delta": FieldDescription(shape=(1,), representation="delta")}
    monkeypatch.setattr(rig.RigConverter, "describe_fields", lambda self: rig.FIELDS | delta)
    with pytest.raises(ValueError, match=r"target_fps \(5\): field 'delta' holds delta values"):
        create_recipe(params(target_fps=5.0), create_converter(params()))


def test_thresholds_have_units() -> None:
    assert parse_threshold("5 mm", where="x") == pytest.approx(0.005)
    assert parse_threshold("2deg", where="x") == pytest.approx(np.deg2rad(2))
    assert parse_threshold("1e-3", where="x") == 1e-3
    for text in ("5 furlongs", "-1.0", "nan mm", "1.2.3", "1e999"):
        with pytest.raises(ValueError, match=f"x '{text}' is not a number with a unit"):
            parse_threshold(text, where="x")


def test_a_field_that_several_patterns_match_has_the_smallest_threshold(rig, params):
    wanted = params(filter_still_samples=True, still_thresholds={"*__xyz": "5 mm", rig.ACTION_XYZ: "1 mm", "*": "1 cm"})
    thresholds = create_recipe(wanted, create_converter(wanted)).still_thresholds
    assert thresholds.keys() == rig.FIELDS.keys()
    assert thresholds[rig.ACTION_XYZ] == pytest.approx(0.001)
    assert thresholds[rig.GRIPPER] == pytest.approx(0.01)


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
