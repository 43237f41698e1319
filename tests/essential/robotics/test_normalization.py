"""The normalizer: formulas, exact inverse, alignment by the anchor, floors, clipping, state; numpy and torch alike."""

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_foundry.robotics import RoboticsNormalizer
from vla_foundry.robotics.accumulator import StatisticsAccumulator
from vla_foundry.robotics.fields import Window
from vla_foundry.robotics.normalization import NormalizationRule
from vla_foundry.robotics.statistics import FieldStatistics, merge_statistics

METHODS = ["std", "min_max", "percentile_1_99", "percentile_5_95"]
SCOPES = ["global", "per_timestep"]
NUM_STEPS, ANCHOR = 6, 2


def data(count: int = 400, seed: int = 0) -> dict[str, np.ndarray]:
    """Fields whose statistics differ from step to step and from column to column."""
    rng = np.random.default_rng(seed)
    drift = np.arange(NUM_STEPS)[:, None]
    return {
        "xyz": rng.normal(size=(count, NUM_STEPS, 3)) * [0.1, 1, 5] * (1 + drift) + drift,
        "gripper": rng.random((count, NUM_STEPS, 1)) * 0.1,
    }


def statistics(fields: dict[str, np.ndarray], anchor_index: int = ANCHOR) -> dict[str, FieldStatistics]:
    accumulator = StatisticsAccumulator(anchor_index)
    accumulator.update(fields)
    return accumulator.finish()


def normalizer(window: Window | None = None, **settings: object) -> RoboticsNormalizer:
    rule = NormalizationRule(**settings)  # pyright: ignore[reportArgumentType]
    return RoboticsNormalizer.create(statistics(data()), {"xyz": rule, "gripper": rule}, window=window)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_global_values_follow_the_formula(method: str, centered: bool) -> None:
    values = data()["xyz"]
    flat = values.reshape(-1, 3)
    low, high = {
        "min_max": lambda: (flat.min(axis=0), flat.max(axis=0)),
        "percentile_1_99": lambda: np.percentile(flat, [1, 99], axis=0),
        "percentile_5_95": lambda: np.percentile(flat, [5, 95], axis=0),
        "std": lambda: (flat.mean(axis=0), flat.mean(axis=0) + flat.std(axis=0)),
    }[method]()
    expected = (values - low) / (high - low)
    if centered and method != "std":
        expected = 2 * expected - 1
    found = normalizer(method=method, centered=centered).normalize(values, "xyz")
    # the published global std has n - 1 within steps
    np.testing.assert_allclose(found, expected, rtol=2e-3 if method == "std" else 1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_each_step_has_its_own_statistics(method: str) -> None:
    values = data()["xyz"]
    found = normalizer(method=method, scope="per_timestep").normalize(values, "xyz")
    for t in range(NUM_STEPS):
        alone = RoboticsNormalizer.create(
            statistics({"xyz": values[:, t : t + 1]}, 0),
            {"xyz": NormalizationRule(method=method)},  # pyright: ignore[reportArgumentType]
        )
        np.testing.assert_allclose(found[:, t], alone.normalize(values[:, t], "xyz"), atol=1e-9)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["numpy float64", "numpy float32", "torch float64", "torch float32"])
def test_denormalizing_undoes_normalizing(method: str, scope: str, centered: bool, kind: str) -> None:
    fields = data(seed=1)
    values = np.concatenate([fields["xyz"], fields["gripper"]], axis=-1)
    library, dtype = kind.split()
    array = values.astype(dtype) if library == "numpy" else torch.tensor(values, dtype=getattr(torch, dtype))
    robot = normalizer(method=method, scope=scope, centered=centered)
    normal = robot.normalize(array, ["xyz", "gripper"])
    back = robot.denormalize(normal, ["xyz", "gripper"])
    assert type(back) is type(array)
    assert back.dtype == normal.dtype == array.dtype
    tolerance = 1e-12 if dtype == "float64" else 1e-6
    spread = values.max(axis=(0, 1)) - values.min(axis=(0, 1))
    assert (np.abs(np.asarray(back, np.float64) - values.astype(dtype)) <= tolerance * (spread + np.abs(values))).all()


def test_torch_and_numpy_agree() -> None:
    values = data(seed=2)["xyz"]
    robot = normalizer(method="percentile_1_99", scope="per_timestep", centered=True, clip=1.2)
    expected = robot.normalize(values, "xyz")
    np.testing.assert_allclose(robot.normalize(torch.tensor(values), "xyz").numpy(), expected, atol=1e-12)
    single = robot.normalize(torch.tensor(values, dtype=torch.float32), "xyz")
    np.testing.assert_allclose(single.numpy(), expected, atol=1e-5)


def test_half_precision_is_computed_in_single_precision() -> None:
    fields = {"xyz": np.random.default_rng(3).normal(size=(100, 1, 1)) * 0.01 + 300}
    robot = RoboticsNormalizer.create(statistics(fields, 0), {"xyz": NormalizationRule()})
    values = torch.full((4, 1, 1), 300.0, dtype=torch.bfloat16)
    found = robot.normalize(values, "xyz")
    assert found.dtype == torch.bfloat16
    expected = robot.normalize(values.double(), "xyz")
    assert found.double().sub(expected).abs().max() < 0.05


def test_integers_become_floating_point() -> None:
    fields = {"xyz": np.arange(40).reshape(20, 1, 2)}
    robot = RoboticsNormalizer.create(statistics(fields, 0), {"xyz": NormalizationRule(method="min_max")})
    assert robot.normalize(fields["xyz"], "xyz").dtype == np.float64
    assert robot.normalize(torch.tensor(fields["xyz"]), "xyz").dtype == torch.float32


def test_fields_side_by_side_equal_fields_alone() -> None:
    fields = data(seed=4)
    robot = normalizer(method="min_max", scope="per_timestep")
    whole = robot.normalize(np.concatenate([fields["gripper"], fields["xyz"]], axis=-1), ["gripper", "xyz"])
    np.testing.assert_array_equal(whole[..., :1], robot.normalize(fields["gripper"], "gripper"))
    np.testing.assert_array_equal(whole[..., 1:], robot.normalize(fields["xyz"], "xyz"))


def test_a_step_is_normalized_by_its_distance_from_the_anchor() -> None:
    values = data(seed=5)["xyz"]
    robot = normalizer(scope="per_timestep")
    whole = robot.normalize(values, "xyz")
    # proprioception: the past and the anchor; actions of a shorter window; one step alone
    np.testing.assert_array_equal(robot.normalize(values[:, :3], "xyz", anchor=2), whole[:, :3])
    np.testing.assert_array_equal(robot.normalize(values[:, 1:5], "xyz", anchor=1), whole[:, 1:5])
    np.testing.assert_array_equal(robot.normalize(values[:, 4:5], "xyz", anchor=-2), whole[:, 4:5])
    np.testing.assert_allclose(robot.denormalize(whole[:, 1:5], "xyz", anchor=1), values[:, 1:5], atol=1e-12)


@pytest.mark.parametrize("direction", ["normalize", "denormalize"])
def test_steps_without_statistics_are_an_error_in_both_directions(direction: str) -> None:
    apply = getattr(normalizer(scope="per_timestep"), direction)
    with pytest.raises(ValueError, match="2 past and 3 future steps, but the values hold 3 past"):
        apply(np.zeros((1, 6, 3)), "xyz", anchor=3)
    with pytest.raises(ValueError, match="hold 0 past and 4 future"):
        apply(np.zeros((1, 5, 3)), "xyz", anchor=0)
    with pytest.raises(ValueError, match="say which of them is the anchor"):
        apply(np.zeros((1, 5, 3)), "xyz")
    with pytest.raises(ValueError, match="need a time axis"):
        apply(np.zeros(3), "xyz")


def test_global_statistics_need_no_time_axis() -> None:
    robot = normalizer()
    values = data(seed=6)["xyz"]
    np.testing.assert_array_equal(robot.normalize(values[0, 0], "xyz"), robot.normalize(values, "xyz")[0, 0])
    assert robot.normalize(values[None], "xyz").shape == (1, *values.shape)


def test_a_smaller_window_takes_the_statistics_of_its_steps() -> None:
    values = data(seed=7)["xyz"]
    small = normalizer(window=Window(0, 2), scope="per_timestep")
    whole = normalizer(scope="per_timestep").normalize(values, "xyz")
    # past = 0 must not fall back to all the past there is
    np.testing.assert_array_equal(small.normalize(values[:, 2:5], "xyz"), whole[:, 2:5])
    with pytest.raises(ValueError, match=r"field 'xyz': its statistics cover 2 past and 3 future steps, not 3 and 2"):
        normalizer(window=Window(3, 2), scope="per_timestep")


def test_statistics_of_different_windows_merge_by_the_anchor() -> None:
    values = data(seed=8)["xyz"]
    merged = merge_statistics([statistics({"xyz": values}), statistics({"xyz": values[:, 1:]}, 1)])
    robot = RoboticsNormalizer.create(merged, {"xyz": NormalizationRule(method="min_max", scope="per_timestep")})
    alone = RoboticsNormalizer.create(
        statistics({"xyz": values}), {"xyz": NormalizationRule(method="min_max", scope="per_timestep")}
    )
    np.testing.assert_allclose(robot.normalize(values, "xyz"), alone.normalize(values, "xyz"), atol=1e-12)


def test_a_disabled_field_passes_unchanged() -> None:
    values = data()["xyz"]
    np.testing.assert_array_equal(normalizer(enabled=False, clip=0.1).normalize(values, "xyz"), values)


def test_normalized_values_are_clipped_only_if_asked() -> None:
    values = data()["xyz"] * 100
    assert np.abs(normalizer(method="min_max").normalize(values, "xyz")).max() > 10
    assert np.abs(normalizer(method="min_max", clip=1.5).normalize(values, "xyz")).max() == 1.5
    assert normalizer(method="min_max", clip=1.5).normalize(torch.tensor(values), "xyz").abs().max() == 1.5


def nearly_constant() -> dict[str, np.ndarray]:
    values = np.random.default_rng(9).normal(size=(200, 2, 3))
    values[..., 1] = 7.0 + 1e-9 * values[..., 1]
    return {"joint": values}


@pytest.mark.parametrize("method", METHODS)
def test_a_floor_on_the_range_tames_nearly_constant_dimensions(method: str) -> None:
    fields = nearly_constant()
    rule = NormalizationRule(method=method, range_floor=0.5, centered=True)  # pyright: ignore[reportArgumentType]
    robot = RoboticsNormalizer.create(statistics(fields, 0), {"joint": rule})
    found = robot.normalize(fields["joint"], "joint")
    # widened about the middle: a constant stays at 0 and noise stays noise
    assert np.abs(found[..., 1]).max() < 1e-7
    np.testing.assert_allclose(robot.denormalize(found, "joint"), fields["joint"], atol=1e-12)
    # other dimensions are as without a floor
    without = RoboticsNormalizer.create(
        statistics(fields, 0),
        {"joint": NormalizationRule(method=method, centered=True)},  # pyright: ignore[reportArgumentType]
    )
    np.testing.assert_array_equal(found[..., [0, 2]], without.normalize(fields["joint"], "joint")[..., [0, 2]])


def test_nearly_constant_dimensions_are_named_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    fields = nearly_constant()
    with caplog.at_level(logging.WARNING):
        robot = RoboticsNormalizer.create(statistics(fields, 0), {"joint": NormalizationRule()})
    assert robot.near_constant == ("joint[1]",)
    (record,) = caplog.records
    assert "joint[1]" in record.getMessage()
    assert "range_floor" in record.getMessage()
    names = {"joint": ["elbow", "wrist", "gripper"]}
    robot = RoboticsNormalizer.create(statistics(fields, 0), {"joint": NormalizationRule()}, names=names)
    assert robot.near_constant == ("joint[1 wrist]",)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        normalizer()
    assert not caplog.records


def test_a_dimension_that_is_constant_at_some_steps_says_so() -> None:
    values = data()["xyz"]
    values[:, ANCHOR, 0] = 0.0
    rule = NormalizationRule(scope="per_timestep")
    robot = RoboticsNormalizer.create(statistics({"xyz": values}), {"xyz": rule})
    assert robot.near_constant == ("xyz[0] at 1 of 6 steps",)


def test_epsilon_is_the_smallest_scale() -> None:
    fields = nearly_constant()
    rule = NormalizationRule(method="min_max", epsilon=0.25)
    robot = RoboticsNormalizer.create(statistics(fields, 0), {"joint": rule})
    assert robot.scales["joint"].scale[0, 1] == 0.25


@pytest.mark.parametrize("scope", SCOPES)
def test_the_state_is_json_and_restores_the_same_bits(scope: str) -> None:
    robot = normalizer(method="percentile_5_95", scope=scope, centered=True, clip=3.0)
    text = json.dumps(robot.state(), allow_nan=False)
    back = RoboticsNormalizer.from_state(json.loads(text))
    values = data(seed=10)["xyz"]
    np.testing.assert_array_equal(back.normalize(values, "xyz"), robot.normalize(values, "xyz"))
    assert back.state() == robot.state()


def test_a_state_of_another_version_or_with_broken_numbers_is_refused() -> None:
    state = normalizer().state()
    with pytest.raises(ValueError, match=r"run/normalizer.json is of version 99, this code reads 1"):
        RoboticsNormalizer.from_state(state | {"version": 99}, origin="run/normalizer.json")
    state["fields"]["xyz"]["scale"][0][1] = 0.0
    with pytest.raises(ValueError, match="field 'xyz' has broken centers or scales"):
        RoboticsNormalizer.from_state(state)


def test_a_normalizer_travels_to_workers_without_its_cache() -> None:
    robot = normalizer()
    values = torch.tensor(data()["xyz"])
    expected = robot.normalize(values, "xyz")
    copy = pickle.loads(pickle.dumps(robot))
    assert not copy._cache
    assert torch.equal(copy.normalize(values, "xyz"), expected)


def test_what_can_not_be_normalized_is_named() -> None:
    stats = statistics(data())
    with pytest.raises(ValueError, match=r"field 'xzy' is unknown. Did you mean 'xyz'"):
        RoboticsNormalizer.create(stats, {"xzy": NormalizationRule()})
    with pytest.raises(ValueError, match="xyz, gripper need 4 columns, got 5"):
        normalizer().normalize(np.zeros((2, 6, 5)), ["xyz", "gripper"])
    with pytest.raises(ValueError, match="field 'other' is unknown"):
        normalizer().normalize(np.zeros((2, 6, 5)), ["xyz", "other"])
    with pytest.raises(ValueError, match=r"epsilon \(0.0\) must be above 0"):
        NormalizationRule(epsilon=0.0)


def test_a_step_that_was_never_valid_is_an_error_only_where_it_is_used() -> None:
    values = data()["xyz"]
    accumulator = StatisticsAccumulator(ANCHOR)
    valid = np.ones(values.shape[:2], dtype=bool)
    valid[:, -1] = False
    accumulator.update({"xyz": values}, valid)
    stats, rule = accumulator.finish(), {"xyz": NormalizationRule(scope="per_timestep")}
    with pytest.raises(ValueError, match="field 'xyz': its statistics hold no values 3 steps from the anchor"):
        RoboticsNormalizer.create(stats, rule)
    RoboticsNormalizer.create(stats, rule, window=Window(2, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_host_on_a_device() -> None:
    robot = normalizer(method="percentile_1_99", scope="per_timestep", centered=True, clip=1.5)
    values = torch.tensor(data()["xyz"], dtype=torch.float32)
    expected = robot.denormalize(robot.normalize(values, "xyz"), "xyz")
    on_device = values.cuda()
    # the first call copies the statistics to the device
    robot.normalize(on_device, "xyz")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = robot.denormalize(robot.normalize(on_device, "xyz"), "xyz")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.shared_data
def test_a_published_shard_is_normalized_by_its_own_statistics(shared_data: Path) -> None:
    import io
    import tarfile

    samples = []
    with tarfile.open(shared_data / "small_lbm_dataset" / "shard_000000.tar") as tar:
        for member in tar:
            if member.name.endswith("lowdim.npz"):
                file = tar.extractfile(member)
                assert file is not None
                samples.append(dict(np.load(io.BytesIO(file.read()))))
    names = [name for name in samples[0] if name.startswith("robot__") and samples[0][name].dtype.kind == "f"]
    fields = {name: np.stack([sample[name] for sample in samples]) for name in names}
    valid = np.stack([sample["past_mask"] | sample["future_mask"] for sample in samples])
    accumulator = StatisticsAccumulator(1)
    accumulator.update(fields, valid)
    stats = accumulator.finish()
    rule = NormalizationRule(method="min_max", scope="per_timestep", centered=True)
    robot = RoboticsNormalizer.create(stats, dict.fromkeys(names, rule))
    whole = np.concatenate([fields[name] for name in names], axis=-1)
    found = robot.normalize(whole, names)
    assert np.abs(found[valid]).max() <= 1 + 1e-6
    np.testing.assert_allclose(robot.denormalize(found, names), whole, atol=1e-12)
    # the reference pose in its own frame is constant, and said to be so
    assert "robot__actual__poses__right::panda__xyz_relative[0] at 1 of 16 steps" in robot.near_constant
