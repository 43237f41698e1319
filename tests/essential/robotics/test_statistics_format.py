"""stats.json: what we write reads back, is finite JSON, and every published form is read."""

import json
from typing import Any

import numpy as np
import pytest

from vla_foundry.robotics.accumulator import StatisticsAccumulator
from vla_foundry.robotics.statistics import PERCENTILES, FieldStatistics, merge_statistics
from vla_foundry.robotics.statistics_format import (
    format_statistics,
    pack_statistics,
    parse_statistics,
    unpack_statistics,
)

VALUES = ("mean", "std", "min", "max")


def collect(values: np.ndarray, valid: np.ndarray | None = None, **settings: int) -> dict[str, FieldStatistics]:
    accumulator = StatisticsAccumulator(1, **settings)
    accumulator.update({"x": values, "z": values[..., :1]}, valid)
    return accumulator.finish()


def sample(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    valid = rng.random((count, 3)) < [0.5, 1.0, 0.8]
    return rng.normal(size=(count, 3, 2)), valid


def assert_same(found: FieldStatistics, expected: FieldStatistics) -> None:
    for name in VALUES:
        for suffix in ("", "_per_timestep"):
            np.testing.assert_allclose(
                getattr(found, name + suffix), getattr(expected, name + suffix), rtol=1e-12, atol=1e-14
            )
    np.testing.assert_array_equal(found.count, expected.count)
    for p in PERCENTILES:
        np.testing.assert_array_equal(found.percentiles[p], expected.percentiles[p])
        np.testing.assert_array_equal(found.percentiles_per_timestep[p], expected.percentiles_per_timestep[p])
    assert found.anchor_index == expected.anchor_index


@pytest.mark.parametrize("count", [1, 2, 300, 3000])
def test_what_is_written_reads_back_and_writes_the_same_bytes(count: int) -> None:
    statistics = collect(*sample(count))
    text = format_statistics(statistics)
    back = parse_statistics(text, "stats.json")
    assert list(back) == ["x", "z"]
    assert_same(back["x"], statistics["x"])
    # the first writing rounds std and digests; from then on nothing moves
    once = format_statistics(back)
    assert format_statistics(parse_statistics(once, "stats.json")) == once


def test_written_numbers_are_finite_and_plain_json() -> None:
    values, valid = sample(1500)
    valid[:, 0] = False

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    parsed = json.loads(format_statistics(collect(values, valid)), parse_constant=refuse)
    assert parsed["x"]["min_per_timestep"][0] == [0.0, 0.0]
    assert parsed["x"]["count"][0] == 0
    assert all(isinstance(count, int) for count in parsed["x"]["count"])


def test_what_is_written_is_a_superset_of_the_published_keys() -> None:
    value = json.loads(format_statistics(collect(*sample(1500))))["x"]
    published = {f"{name}{suffix}" for name in VALUES for suffix in ("", "_per_timestep")}
    published |= {f"percentile_{p}{suffix}" for p in PERCENTILES for suffix in ("", "_per_timestep")}
    published |= {"count", "percentile_sample_count", "tdigest_state", "tdigest_state_per_timestep"}
    assert published <= value.keys()
    state = value["tdigest_state_per_timestep"]
    assert state["shape"] == [3, 2]
    assert state["counts"] == np.repeat(np.array(value["count"])[:, None], 2, axis=1).tolist()
    cells = [tuple(index) for index in state["buffers"]["indices"] + state["digests"]["indices"]]
    assert sorted(cells) == list(np.ndindex(3, 2))
    for means, weights in zip(state["digests"]["means"], state["digests"]["weights"], strict=True):
        assert len(means) == len(weights)
        assert all(isinstance(weight, int) for weight in weights)


def test_statistics_read_back_can_be_merged_as_if_they_were_fresh() -> None:
    values, valid = sample(4000, seed=1)
    halves = [collect(values[i : i + 2000], valid[i : i + 2000], max_exact=500) for i in (0, 2000)]
    fresh = merge_statistics(halves)["x"]
    read = merge_statistics([parse_statistics(format_statistics(half), "stats.json") for half in halves])["x"]
    for name in VALUES:
        np.testing.assert_allclose(getattr(read, name), getattr(fresh, name), rtol=1e-10)
    for p in PERCENTILES:
        np.testing.assert_allclose(read.percentiles[p], fresh.percentiles[p], rtol=1e-6, atol=1e-6)


def published(values: np.ndarray, form: str) -> dict[str, Any]:
    """Statistics of (N, T, C) as the earlier implementation writes them, in one of the forms of its digests."""
    count, num_steps, width = values.shape
    value: dict[str, Any] = {
        "mean": values.mean(axis=(0, 1)),
        "min": values.min(axis=(0, 1)),
        "max": values.max(axis=(0, 1)),
        "mean_per_timestep": values.mean(axis=0),
        "std_per_timestep": values.std(axis=0, ddof=1),
        "min_per_timestep": values.min(axis=0),
        "max_per_timestep": values.max(axis=0),
    }
    value["std"] = np.sqrt((value["std_per_timestep"] ** 2).mean(axis=0) + value["mean_per_timestep"].var(axis=0))
    for p in PERCENTILES:
        value[f"percentile_{p}"] = np.percentile(values, p, axis=(0, 1))
        value[f"percentile_{p}_per_timestep"] = np.percentile(values, p, axis=0)
    value = {key: array.tolist() for key, array in value.items()}
    value["count"] = value["percentile_sample_count"] = [count] * num_steps
    cells = {index: values[:, index[0], index[1]] for index in np.ndindex(num_steps, width)}
    # neighbours in pairs: a crude digest
    pairs = {
        index: np.sort(cell).reshape(-1, 2).mean(axis=1).astype(np.float32).tolist() for index, cell in cells.items()
    }
    twos = [2] * (count // 2)
    state: dict[str, Any] = {"shape": [num_steps, width], "max_buffer": 1000, "compression": 100}
    state["counts"] = np.full((num_steps, width), count).tolist()
    indices = [list(index) for index in cells]
    nothing: dict[str, Any] = {"indices": [], "data": []}
    if form == "buffers":
        state["buffers"] = {"indices": indices, "data": [cell.tolist() for cell in cells.values()]}
        state["digests"] = {"indices": [], "means": [], "weights": []}
    elif form == "digests":
        state["buffers"] = nothing
        state["digests"] = {"indices": indices, "means": list(pairs.values()), "weights": [twos] * len(indices)}
    elif form == "text keys":
        state["buffers"] = {"(0, 0)": cells[0, 0].tolist()}
        others = {str(index): {"means": pair, "weights": twos} for index, pair in pairs.items() if index != (0, 0)}
        state["digests"] = others
    elif form == "one array":
        buffer = np.zeros((num_steps, width, 1000))
        buffer[..., :count] = np.moveaxis(values, 0, -1)
        state["buffer"] = buffer.tolist()
    elif form == "one array, values first":
        buffer = np.zeros((1000, num_steps, width))
        buffer[:count] = values
        state["buffer"] = buffer.tolist()
    if form != "none":
        value["tdigest_state_per_timestep"] = state
    else:
        value["tdigest_state"] = value["tdigest_state_per_timestep"] = value["percentile_sample_count"] = None
    return value


@pytest.mark.parametrize("form", ["buffers", "digests", "text keys", "one array", "one array, values first", "none"])
def test_published_values_are_read_as_they_stand(form: str) -> None:
    value = published(np.random.default_rng(2).normal(size=(200, 3, 2)) + 3, form)
    read = parse_statistics(json.dumps({"x": value}), "stats.json", anchor_index=1)["x"]
    for name in VALUES:
        for suffix in ("", "_per_timestep"):
            np.testing.assert_allclose(getattr(read, name + suffix), value[name + suffix], rtol=1e-12)
    for p in PERCENTILES:
        np.testing.assert_array_equal(read.percentiles[p], value[f"percentile_{p}"])
        np.testing.assert_array_equal(read.percentiles_per_timestep[p], value[f"percentile_{p}_per_timestep"])
    assert read.anchor_index == 1


@pytest.mark.parametrize("form", ["buffers", "digests", "text keys", "one array", "one array, values first"])
def test_published_digests_merge_to_the_statistics_of_all_data(form: str) -> None:
    rng = np.random.default_rng(3)
    parts = [rng.normal(size=(200, 3, 2)), rng.normal(size=(100, 3, 2)) * 2 + 1]
    read = [parse_statistics(json.dumps({"x": published(part, form)}), "stats.json", anchor_index=1) for part in parts]
    merged = merge_statistics(read)["x"]
    everything = np.concatenate(parts)
    np.testing.assert_allclose(merged.mean, everything.mean(axis=(0, 1)), rtol=1e-10)
    np.testing.assert_allclose(merged.std_per_timestep, everything.std(axis=0, ddof=1), rtol=1e-10)
    exact = form != "digests" and form != "text keys"
    for p in PERCENTILES:
        expected = np.percentile(everything, p, axis=0)
        tolerance = 1e-9 if exact else 0.35
        np.testing.assert_allclose(merged.percentiles_per_timestep[p], expected, atol=tolerance)


def test_merged_percentiles_without_digests_are_an_error_not_a_guess() -> None:
    value = published(np.random.default_rng(4).normal(size=(20, 3, 2)), "none")
    read = parse_statistics(json.dumps({"x": value}), "stats.json", anchor_index=1)
    merged = merge_statistics([read, read])["x"]
    assert merged.count.tolist() == [40, 40, 40]
    with pytest.raises(ValueError, match=r"no digest to take them from. Recompute them with `vla-foundry stats`"):
        _ = merged.percentiles
    assert "percentile_5" not in json.loads(format_statistics({"x": merged}))["x"]


def test_windows_whose_anchor_is_unknown_are_not_merged() -> None:
    text = json.dumps({"x": published(np.random.default_rng(5).normal(size=(20, 3, 2)), "buffers")})
    read = parse_statistics(text, "stats.json")
    with pytest.raises(ValueError, match=r"field 'x': .* Give the past_lowdim_steps"):
        merge_statistics([read, read])


def test_infinities_of_steps_that_were_never_valid_are_read_as_nothing() -> None:
    value = published(np.random.default_rng(6).normal(size=(20, 2, 1)), "buffers")
    value["count"][0] = 0
    value["min_per_timestep"][0], value["max_per_timestep"][0] = [float("inf")], [float("-inf")]
    read = parse_statistics(json.dumps({"x": value}), "stats.json", anchor_index=0)["x"]
    assert read.min_per_timestep[0, 0] == 0
    value["count"][0] = 20
    with pytest.raises(ValueError, match=r"stats.json: field 'x' .*min_per_timestep is not finite"):
        parse_statistics(json.dumps({"x": value}), "stats.json")


def test_a_std_that_shrank_to_one_number_is_read() -> None:
    value = published(np.zeros((2, 3, 2)) + 4, "none") | {"count": [1, 1, 1], "std": 0.0, "std_per_timestep": 0.0}
    assert parse_statistics(json.dumps({"x": value}), "s", anchor_index=0)["x"].std.tolist() == [0.0, 0.0]


def test_frame_statistics_of_other_tools_are_read() -> None:
    # as the lerobot library writes them
    value = {"mean": [0.5, 1.0], "std": [1.0, 2.0], "min": [-1.0, 0.0], "max": [2.0, 3.0], "count": [250]}
    read = parse_statistics(json.dumps({"state": value}), "stats.json")["state"]
    assert (read.num_steps, read.anchor_index, read.count.tolist()) == (1, 0, [250])
    np.testing.assert_allclose(read.std, [1.0, 2.0])


def test_only_the_wanted_fields_are_read() -> None:
    text = json.dumps({"x": published(np.ones((4, 1, 1)), "none"), "broken": {"mean": "?"}})
    assert list(parse_statistics(text, "stats.json", fields=["x"])) == ["x"]
    with pytest.raises(ValueError, match=r"stats.json: field 'y' is unknown"):
        parse_statistics(text, "stats.json", fields=["y"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "stats.json is not JSON"),
        ("[1]", "stats.json holds no statistics"),
        ('{"x": {"mean": [1]}}', "field 'x' .*lacks 'count'"),
        ('{"x": {"mean_per_timestep": [[1]], "count": [1, 2]}}', "1 steps, its count 2"),
        ('{"x": {"mean": [1], "std": [1, 2, 3], "min": [0], "max": [2], "count": [3]}}', "field 'x' holds no usable"),
        ('{"x": {"mean": [NaN], "std": [1], "min": [0], "max": [2], "count": [3]}}', "its mean is not finite"),
        ('{"x": 3}', "field 'x' holds no usable"),
    ],
)
def test_broken_files_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_statistics(text, "stats.json")
    assert "\n" not in str(caught.value)


def test_packed_arrays_unpack_to_the_same_statistics() -> None:
    statistics = collect(*sample(3000, seed=7), max_exact=200)
    back = unpack_statistics(pack_statistics(statistics))
    assert format_statistics(back) == format_statistics(statistics)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": ["1"]}, "its mean must hold numbers only"),
        ({"mean": [True]}, "its mean must hold numbers only"),
        ({"count": [-3]}, "its count .*must be from 0 to"),
        ({"count": float("inf")}, "its count .*must be from 0 to"),
        ({"anchor_index": 1}, "its anchor_index must be a step from 0 to 0, got 1"),
        ({"anchor_index": "a"}, "its anchor_index must be a step from 0 to 0, got 'a'"),
        ({"tdigest_state": {"buffers": {"{": [1]}}}, "invalid literal"),
        ({"tdigest_state": {"buffers": {"indices": [[float("inf")]], "data": [[1]]}}}, "infinity to integer"),
        ({"tdigest_state": {"buffer": [[1]], "shape": [999_999_999], "counts": 0}}, "its buffer of shape"),
    ],
)
def test_nonsense_in_a_field_is_named(change: dict, message: str) -> None:
    value = {"mean": [1], "std": [1], "min": [0], "max": [2], "count": [3]} | change
    with pytest.raises(ValueError, match=rf"^stats.json: field 'x' holds no usable statistics \(.*{message}"):
        parse_statistics(json.dumps({"x": value}), "stats.json")
