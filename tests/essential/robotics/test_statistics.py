"""Statistics: equal to plain numpy, in any order and grouping, with padding, types, windows and weights."""

import numpy as np
import pytest

from vla_foundry.robotics.accumulator import StatisticsAccumulator
from vla_foundry.robotics.statistics import PERCENTILES, FieldStatistics, merge_field_statistics, merge_statistics
from vla_foundry.robotics.tdigest import rank_error


def collect(values: np.ndarray, valid: np.ndarray | None = None, **settings: int) -> FieldStatistics:
    accumulator = StatisticsAccumulator(settings.pop("anchor_index", 1), **settings)
    accumulator.update({"x": values}, valid)
    return accumulator.finish()["x"]


def reference(values: np.ndarray, valid: np.ndarray) -> dict[str, np.ndarray]:
    """Plain numpy, step by step and column by column."""
    num_steps, width = values.shape[1:]
    names = ["mean", "std", "min", "max", *[f"percentile_{p}" for p in PERCENTILES]]
    result = {f"{name}_per_timestep": np.zeros((num_steps, width)) for name in names}
    for t in range(num_steps):
        column = values[valid[:, t], t].astype(np.float64)
        result["mean_per_timestep"][t] = column.mean(axis=0)
        result["std_per_timestep"][t] = column.std(axis=0, ddof=1)
        result["min_per_timestep"][t], result["max_per_timestep"][t] = column.min(axis=0), column.max(axis=0)
        for p in PERCENTILES:
            result[f"percentile_{p}_per_timestep"][t] = np.percentile(column, p, axis=0)
    everything = values[valid].astype(np.float64)
    weights = valid.sum(axis=0)
    result["count"] = weights
    result["mean"] = everything.mean(axis=0)
    between = np.square(result["mean_per_timestep"] - result["mean"])
    within = np.square(result["std_per_timestep"])
    result["std"] = np.sqrt(np.average(within + between, axis=0, weights=weights))
    result["min"], result["max"] = everything.min(axis=0), everything.max(axis=0)
    for p in PERCENTILES:
        result[f"percentile_{p}"] = np.percentile(everything, p, axis=0)
    return result


def flat(statistics: FieldStatistics) -> dict[str, np.ndarray]:
    names = ["count", *[f"{name}{s}" for name in ("mean", "std", "min", "max") for s in ("", "_per_timestep")]]
    result = {name: getattr(statistics, name) for name in names}
    result |= {f"percentile_{p}": statistics.percentiles[p] for p in PERCENTILES}
    return result | {f"percentile_{p}_per_timestep": statistics.percentiles_per_timestep[p] for p in PERCENTILES}


def padded_windows(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, 4, 3)) * [1, 10, 1e-3] + [0, 5, 100]
    valid = rng.random((count, 4)) < [0.7, 1.0, 0.9, 0.5]
    valid[:, 1] = True
    return values, valid


def test_statistics_equal_plain_numpy_and_padding_does_not_count() -> None:
    values, valid = padded_windows(500)
    garbage = np.where(valid[..., None], values, np.nan)
    found = flat(collect(garbage, valid))
    for name, expected in reference(values, valid).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8, np.int64, np.uint16])
def test_every_number_type_is_taken_for_what_it_holds(dtype: type) -> None:
    values = (np.random.default_rng(1).normal(size=(300, 2, 2)) * 20 + 60).astype(dtype)
    found = flat(collect(values))
    for name, expected in reference(values, np.ones((300, 2), dtype=bool)).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-10, err_msg=name)


def test_a_wider_type_may_follow_a_narrow_one() -> None:
    narrow = np.random.default_rng(2).normal(size=(50, 1, 1)).astype(np.float32)
    wide = np.random.default_rng(3).normal(size=(50, 1, 1)) * 1e3 + 1e9
    accumulator = StatisticsAccumulator(0)
    accumulator.update({"x": narrow})
    accumulator.update({"x": wide})
    both = np.concatenate([narrow.astype(np.float64), wide])
    assert accumulator.finish()["x"].percentiles[95] == pytest.approx(np.percentile(both, 95), rel=1e-12)


def test_single_frames_and_single_columns_need_no_extra_axes() -> None:
    values = np.random.default_rng(4).normal(size=(200, 1))
    np.testing.assert_allclose(collect(values, anchor_index=0).mean, [values.mean()])


@pytest.mark.parametrize("batch", [1, 7, 64, 999])
def test_the_size_of_batches_does_not_matter(batch: int) -> None:
    values, valid = padded_windows(999, seed=5)
    accumulator = StatisticsAccumulator(1, max_exact=128)
    for start in range(0, 999, batch):
        accumulator.update({"x": values[start : start + batch]}, valid[start : start + batch])
    found, expected = flat(accumulator.finish()["x"]), flat(collect(values, valid, max_exact=128))
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_finishing_does_not_end_the_collecting() -> None:
    values, valid = padded_windows(400, seed=6)
    accumulator = StatisticsAccumulator(1, max_exact=64)
    accumulator.update({"x": values[:150]}, valid[:150])
    first = accumulator.finish()["x"].count
    accumulator.update({"x": values[150:]}, valid[150:])
    np.testing.assert_array_equal(first, valid[:150].sum(axis=0))
    np.testing.assert_array_equal(accumulator.finish()["x"].count, valid.sum(axis=0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_merging_in_any_order_gives_the_same_moments_and_percentiles_within_the_bound(dtype: type) -> None:
    values, valid = padded_windows(12_000, seed=7)
    values[..., 0] = np.random.default_rng(8).exponential(size=values.shape[:2])
    values = values.astype(dtype)
    cuts = np.sort(np.random.default_rng(9).integers(0, 12_000, 11))
    pieces = np.split(np.arange(12_000), cuts)
    parts = [collect(values[piece], valid[piece], max_exact=256) for piece in pieces]
    truth = reference(values, valid)
    rng = np.random.default_rng(10)
    for _ in range(4):
        order = rng.permutation(len(parts))
        middle = int(rng.integers(1, len(parts)))
        left = merge_field_statistics([parts[i] for i in order[:middle]])
        right = merge_field_statistics([parts[i] for i in order[middle:]])
        merged = merge_field_statistics([left, right])
        for name in ("mean", "std", "min", "max", "mean_per_timestep", "std_per_timestep", "count"):
            np.testing.assert_allclose(getattr(merged, name), truth[name], rtol=1e-10, err_msg=name)
        for p in PERCENTILES:
            for column in range(3):
                ordered = np.sort(values[valid][:, column].astype(np.float64))
                rank = np.searchsorted(ordered, merged.percentiles[p][column]) / len(ordered)
                assert abs(rank - p / 100) <= rank_error(p / 100) + 1 / len(ordered)


def test_the_same_parts_in_the_same_order_give_the_same_bits() -> None:
    values, valid = padded_windows(3000, seed=11)
    runs = []
    for _ in range(2):
        parts = [collect(values[i : i + 500], valid[i : i + 500], max_exact=100) for i in range(0, 3000, 500)]
        runs.append(flat(merge_field_statistics(parts)))
    for name, value in runs[0].items():
        np.testing.assert_array_equal(runs[1][name], value, err_msg=name)


def test_large_offsets_cost_no_precision() -> None:
    values = 1e9 + np.random.default_rng(12).normal(size=(2000, 1, 1))
    parts = [collect(values[i : i + 100], anchor_index=0) for i in range(0, 2000, 100)]
    merged = merge_field_statistics(parts)
    exact = values[:, 0, 0] - 1e9
    assert merged.mean[0] - 1e9 == pytest.approx(exact.mean(), abs=1e-6)
    assert merged.std[0] == pytest.approx(exact.std(ddof=1), rel=1e-7)


def test_windows_are_aligned_by_their_anchors() -> None:
    rng = np.random.default_rng(13)
    short, long = rng.normal(size=(100, 3, 2)), rng.normal(size=(50, 5, 2)) + 10
    merged = merge_field_statistics([collect(short, anchor_index=1), collect(long, anchor_index=3)])
    assert (merged.anchor_index, merged.num_steps) == (3, 5)
    assert merged.count.tolist() == [50, 50, 150, 150, 150]
    np.testing.assert_allclose(merged.mean_per_timestep[0], long[:, 0].mean(axis=0))
    anchors = np.concatenate([short[:, 1], long[:, 3]])
    np.testing.assert_allclose(merged.mean_per_timestep[3], anchors.mean(axis=0))
    np.testing.assert_allclose(merged.percentiles_per_timestep[5][3], np.percentile(anchors, 5, axis=0))


def test_a_step_that_was_never_valid_has_zeros_and_no_infinities() -> None:
    values = np.random.default_rng(14).normal(size=(20, 2, 1)) + 5
    valid = np.tile([False, True], (20, 1))
    for name, value in flat(collect(values, valid)).items():
        assert np.isfinite(value).all(), name
    assert collect(values, valid).min_per_timestep[0, 0] == 0
    assert collect(values, valid).min[0] > 1


def test_a_field_need_not_be_in_every_dataset() -> None:
    rng = np.random.default_rng(15)
    first, second = rng.normal(size=(30, 1, 1)), rng.normal(size=(40, 1, 2))
    a, b = StatisticsAccumulator(0), StatisticsAccumulator(0)
    a.update({"x": first, "only a": first})
    b.update({"x": first + 1, "only b": second})
    merged = merge_statistics([a.finish(), b.finish()])
    assert list(merged) == ["only a", "only b", "x"]
    np.testing.assert_allclose(merged["only b"].mean, second.mean(axis=(0, 1)))
    assert merged["x"].count.tolist() == [60]


def test_shares_weigh_datasets_as_the_mixture_does() -> None:
    rng = np.random.default_rng(16)
    small, large = rng.normal(size=(400, 1, 1)), rng.normal(size=(4000, 1, 1)) * 3 + 10
    parts = [{"x": collect(small, anchor_index=0)}, {"x": collect(large, anchor_index=0)}]
    merged = merge_statistics(parts, shares=[3.0, 1.0])["x"]
    mean = 0.75 * small.mean() + 0.25 * large.mean()
    variance = 0.75 * (small.var() + (small.mean() - mean) ** 2) + 0.25 * (large.var() + (large.mean() - mean) ** 2)
    assert merged.mean[0] == pytest.approx(mean)
    assert merged.std[0] == pytest.approx(np.sqrt(variance), rel=1e-3)
    repeated = np.concatenate([np.repeat(small, 30, axis=0), large]).reshape(-1)
    for p in (5, 95, 99):
        rank = (repeated <= merged.percentiles[p][0]).mean()
        assert rank == pytest.approx(p / 100, abs=0.01)
    # by count, the large one dominates
    assert merge_statistics(parts)["x"].mean[0] > 8.5
    with pytest.raises(ValueError, match=r"shares \[1.0\] must be 2 positive numbers"):
        merge_statistics(parts, shares=[1.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(bad: float) -> None:
    values = np.zeros((10, 4, 3))
    values[7, 2, 1] = bad
    with pytest.raises(ValueError, match=r"field 'x' holds -?(nan|inf) in window 7, step 2, column 1"):
        collect(values)


def test_changed_shapes_and_other_types_are_named() -> None:
    accumulator = StatisticsAccumulator(0)
    accumulator.update({"x": np.zeros((2, 1, 3))})
    with pytest.raises(ValueError, match=r"'x' has changed its shape from \(1, 3\) to \(1, 4\)"):
        accumulator.update({"x": np.zeros((2, 1, 4))})
    with pytest.raises(ValueError, match="field 'y' must be numbers of shape"):
        accumulator.update({"y": np.zeros((2, 1, 3, 3))})


def test_contradicting_datasets_name_the_field() -> None:
    with pytest.raises(ValueError, match="field 'x': it has 2 and 3 columns"):
        merge_statistics([{"x": collect(np.zeros((2, 4, 2)))}, {"x": collect(np.zeros((2, 4, 3)))}])
