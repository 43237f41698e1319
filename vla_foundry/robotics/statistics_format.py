"""Read every published form of stats.json, and write a superset of the newest one.

    {field: {"mean": [C], "std", "min", "max": [C], "percentile_1", ... "percentile_99": [C],
             "mean_per_timestep": [T][C], ..., "percentile_99_per_timestep": [T][C],
             "count": [T], "percentile_sample_count": [T], "anchor_index": int (ours),
             "tdigest_state": STATE of C cells, "tdigest_state_per_timestep": STATE of T x C cells}}
    STATE = {"shape", "counts", "max_buffer", "compression",
             "buffers": {"indices": [[t, c], ...], "data": [[values], ...]},
             "digests": {"indices": [[t, c], ...], "means": [[...], ...], "weights": [[...], ...]}}

Every cell is either in buffers (all its values) or in digests. Older states use the index as a string key ("(0, 1)") or
hold one array `buffer`. Numbers are always finite: where a count is 0, all other values are 0.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from vla_foundry.parsing import parse_json
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.statistics import PERCENTILES, FieldStatistics
from vla_foundry.robotics.tdigest import Sketch, compress_sketch

# cells with at most this many values are written value by value
_MAX_BUFFER = 1000
# beyond it, a float64 no longer counts
_MAX_COUNT = 2.0**53


def parse_statistics(
    text: str, origin: str, *, anchor_index: int | None = None, fields: Iterable[str] | None = None
) -> dict[str, FieldStatistics]:
    """Read the text of a stats.json.

    Args:
        origin: where the text comes from, for messages.
        anchor_index: index of the anchor step, for files that do not state it (for published files, the
            past_lowdim_steps of the preprocessing_config.yaml beside them).
        fields: read only these fields, which is much faster for a large file; None: all.

    Raises:
        ValueError: the text is not a stats.json, a field is missing, or its values contradict each other.
    """
    values = parse_json(text, origin)
    if not isinstance(values, dict):
        raise ValueError(f"{origin} holds no statistics: expected an object keyed by field.")
    wanted = list(values if fields is None else fields)
    for name in wanted:
        if name not in values:
            raise ValueError(unknown_name_message(f"{origin}: field", name, sorted(values)))
    result = {}
    for name in sorted(wanted):
        if not isinstance(values[name], dict):
            raise ValueError(f"{origin}: field '{name}' holds no usable statistics (it is not an object).")
        try:
            result[name] = _parse_field(values[name], anchor_index)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{origin}: field '{name}' holds no usable statistics ({reason}).") from None
    return result


def _parse_field(value: Mapping[str, Any], anchor_index: int | None) -> FieldStatistics:
    has_steps = value.get("mean_per_timestep") is not None
    suffix = "_per_timestep" if has_steps else ""
    mean = _numbers(value["mean" + suffix], "mean" + suffix)
    if not has_steps:
        mean = mean.reshape(1, -1)
    if mean.ndim != 2:
        raise ValueError(f"its mean has {mean.ndim} axes")
    count = _numbers(value["count"], "count").reshape(-1)
    if not ((count >= 0) & (count <= _MAX_COUNT)).all():
        raise ValueError(f"its count ({count.min():g} to {count.max():g}) must be from 0 to 2^53")
    if not has_steps:
        count = count.sum(keepdims=True)
    if len(count) != len(mean):
        raise ValueError(f"its mean has {len(mean)} steps, its count {len(count)}")
    is_empty = (count == 0)[:, None]

    def read(key: str, empty: float) -> Float64[np.ndarray, "T C"]:
        # the std of windows with one value is written as a single 0
        array = np.broadcast_to(_numbers(value[key + suffix], key + suffix), mean.shape)
        array = np.where(is_empty, empty, array)
        if not np.isfinite(array[count > 0]).all():
            raise ValueError(f"its {key + suffix} is not finite")
        return array

    anchor = value.get("anchor_index", anchor_index if has_steps else 0)
    if anchor is not None and (type(anchor) is not int or not 0 <= anchor < len(mean)):
        raise ValueError(f"its anchor_index must be a step from 0 to {len(mean) - 1}, got {anchor!r}")
    state = value.get("tdigest_state_per_timestep" if has_steps else "tdigest_state")
    return FieldStatistics(
        anchor_index=anchor,
        count=count,
        mean_per_timestep=read("mean", 0.0),
        m2_per_timestep=np.square(read("std", 0.0)) * np.maximum(count - 1, 0)[:, None],
        lowest=read("min", np.inf),
        highest=read("max", -np.inf),
        sketch=None if state is None else _parse_state(state, count, mean.shape),
        known_percentiles=_parse_percentiles(value, "", (mean.shape[1],)),
        known_percentiles_per_timestep=_parse_percentiles(value, suffix, mean.shape),
    )


def _numbers(value: Any, key: str) -> np.ndarray:
    array = np.array(value)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"its {key} must hold numbers only")
    return array.astype(np.float64)


def _parse_percentiles(value: Mapping[str, Any], suffix: str, shape: tuple[int, ...]) -> dict[int, np.ndarray] | None:
    found = {percentile: value.get(f"percentile_{percentile}{suffix}") for percentile in PERCENTILES}
    if any(entry is None for entry in found.values()):
        return None
    arrays = {key: _numbers(entry, f"percentile_{key}{suffix}").reshape(shape) for key, entry in found.items()}
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"its percentile_{key}{suffix} is not finite")
    return arrays


def _parse_state(state: Mapping[str, Any], count: Float[np.ndarray, " T"], shape: tuple[int, int]) -> Sketch | None:
    cells: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for index, data in _buffers(state, shape):
        values = _numbers(data, "digest")
        cells[_flat_index(index, shape)] = (values, np.ones(len(values)))
    for index, means, weights in _digests(state):
        cells[_flat_index(index, shape)] = (_numbers(means, "digest"), _numbers(weights, "digest"))
    size = max((len(means) for means, _ in cells.values()), default=0)
    all_means, all_weights = np.full((shape[0] * shape[1], size), np.inf), np.zeros((shape[0] * shape[1], size))
    for cell, (means, weights) in cells.items():
        is_sound = np.isfinite(means).all() and ((weights > 0) & (weights <= _MAX_COUNT)).all()
        if means.ndim != 1 or means.shape != weights.shape or not is_sound:
            raise ValueError(f"the digest of cell {cell} is broken")
        order = np.argsort(means, kind="stable")
        all_means[cell, : len(means)], all_weights[cell, : len(means)] = means[order], weights[order]
    expected = np.repeat(count, shape[1])
    total = all_weights.sum(axis=1)
    if ((total == 0) & (expected > 0)).any():
        return None
    # a digest of part of the data represents all of it
    is_other = (total != expected) & (total > 0)
    all_weights[is_other] *= (expected[is_other] / total[is_other])[:, None]
    return Sketch(all_means, all_weights)


def _flat_index(index: tuple[int, ...], shape: tuple[int, int]) -> int:
    step, column = index if len(index) == 2 else (0, *index)
    if not (0 <= step < shape[0] and 0 <= column < shape[1]):
        raise ValueError(f"its digest has a cell {list(index)}")
    return step * shape[1] + column


def _cell(index: Any) -> tuple[int, ...]:
    # "(0, 1)" as a key, [0, 1] or 1 in a list
    parts = index.strip("()").split(",") if isinstance(index, str) else np.atleast_1d(index).tolist()
    return tuple(int(part) for part in parts if part != "")


def _buffers(state: Mapping[str, Any], shape: tuple[int, int]) -> Iterable[tuple[tuple[int, ...], Any]]:
    buffers = state.get("buffers")
    if buffers and "indices" in buffers:
        yield from zip(map(_cell, buffers["indices"]), buffers["data"], strict=True)
    elif buffers:
        yield from ((_cell(key), data) for key, data in buffers.items())
    elif state.get("buffer") is not None:
        # one array for all cells, filled up to each cell's count, with the values along the last or first axis
        buffer = _numbers(state["buffer"], "buffer")
        own_shape = tuple(state.get("shape", shape))
        if buffer.shape[:-1] != own_shape:
            buffer = np.moveaxis(buffer, 0, -1)
        if buffer.shape[:-1] != own_shape:
            raise ValueError(f"its buffer of shape {buffer.shape} does not have the shape {list(own_shape)}")
        counts = np.broadcast_to(np.array(state["counts"], dtype=np.int64), own_shape)
        in_digests = {index for index, _, _ in _digests(state)}
        for index in np.ndindex(own_shape):
            if counts[index] and index not in in_digests:
                yield index, buffer[index][: counts[index]]


def _digests(state: Mapping[str, Any]) -> Iterable[tuple[tuple[int, ...], Any, Any]]:
    digests = state.get("digests") or {}
    if "indices" in digests:
        yield from zip(map(_cell, digests["indices"]), digests["means"], digests["weights"], strict=True)
    else:
        yield from ((_cell(key), entry["means"], entry["weights"]) for key, entry in digests.items())


def format_statistics(statistics: Mapping[str, FieldStatistics]) -> str:
    """Write the text of a stats.json: one line per field, alphabetical, the same bytes for the same values.

    Digests and percentiles are omitted for statistics that were read without them.
    """
    lines = (
        f"{json.dumps(name)}: {json.dumps(_field_values(statistics[name]), allow_nan=False)}"
        for name in sorted(statistics)
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _field_values(field: FieldStatistics) -> dict[str, Any]:
    count = _plain_numbers(field.count)
    values: dict[str, Any] = {
        "anchor_index": field.anchor_index,
        "count": count,
        "mean": field.mean.tolist(),
        "std": field.std.tolist(),
        "min": field.min.tolist(),
        "max": field.max.tolist(),
        "mean_per_timestep": field.mean_per_timestep.tolist(),
        "std_per_timestep": field.std_per_timestep.tolist(),
        "min_per_timestep": field.min_per_timestep.tolist(),
        "max_per_timestep": field.max_per_timestep.tolist(),
    }
    if field.anchor_index is None:
        del values["anchor_index"]
    if field.sketch is not None or field.known_percentiles is not None:
        values |= {f"percentile_{key}": array.tolist() for key, array in field.percentiles.items()}
    if field.sketch is not None or field.known_percentiles_per_timestep is not None:
        per_step = field.percentiles_per_timestep
        values |= {f"percentile_{key}_per_timestep": array.tolist() for key, array in per_step.items()}
    if field.sketch is not None:
        values["percentile_sample_count"] = count
        values["tdigest_state"] = _format_state(field.global_sketch, field, (field.width,))
        shape = (field.num_steps, field.width)
        values["tdigest_state_per_timestep"] = _format_state(field.sketch, field, shape)
    return values


def _format_state(sketch: Sketch, field: FieldStatistics, shape: tuple[int, ...]) -> dict[str, Any]:
    sketch = compress_sketch(sketch, compression=field.compression, max_exact=_MAX_BUFFER)
    buffers: dict[str, list[Any]] = {"indices": [], "data": []}
    digests: dict[str, list[Any]] = {"indices": [], "means": [], "weights": []}
    for cell, index in enumerate(np.ndindex(shape)):
        used = int((sketch.weights[cell] > 0).sum())
        means, weights = sketch.means[cell, :used], sketch.weights[cell, :used]
        if (weights == 1).all() and used <= _MAX_BUFFER:
            buffers["indices"].append(list(index))
            buffers["data"].append(means.tolist())
        else:
            digests["indices"].append(list(index))
            # nine digits distinguish any two float32 values
            digests["means"].append([float(f"{mean:.9g}") for mean in means])
            digests["weights"].append(_plain_numbers(weights))
    return {
        "shape": list(shape),
        "counts": np.reshape(np.array(_plain_numbers(sketch.counts)), shape).tolist(),
        "max_buffer": _MAX_BUFFER,
        "compression": field.compression,
        "buffers": buffers,
        "digests": digests,
    }


def _plain_numbers(values: Float[np.ndarray, " N"]) -> list[int | float]:
    # integers without a decimal point, as published readers expect
    return [int(value) if value == int(value) else float(f"{value:.9g}") for value in values.tolist()]


_ARRAYS = ("count", "mean_per_timestep", "m2_per_timestep", "lowest", "highest")


def pack_statistics(statistics: Mapping[str, FieldStatistics]) -> dict[str, np.ndarray]:
    """Pack statistics into plain arrays for an .npz, fast and exactly, to be merged later. See `unpack_statistics`."""
    arrays = {}
    for name, field in statistics.items():
        anchor_index = -1 if field.anchor_index is None else field.anchor_index
        arrays[f"{name}|shape"] = np.array([anchor_index, field.compression, field.max_exact])
        arrays |= {f"{name}|{key}": getattr(field, key) for key in _ARRAYS}
        if field.sketch is not None:
            arrays |= {f"{name}|means": field.sketch.means, f"{name}|weights": field.sketch.weights}
    return arrays


def unpack_statistics(arrays: Mapping[str, np.ndarray]) -> dict[str, FieldStatistics]:
    """Read the output of `pack_statistics`."""
    result = {}
    for name in sorted(key.removesuffix("|shape") for key in arrays if key.endswith("|shape")):
        anchor_index, compression, max_exact = (int(value) for value in arrays[f"{name}|shape"])
        sketch = None
        if f"{name}|means" in arrays:
            sketch = Sketch(arrays[f"{name}|means"], arrays[f"{name}|weights"])
        count, mean, m2, lowest, highest = (arrays[f"{name}|{key}"] for key in _ARRAYS)
        result[name] = FieldStatistics(
            anchor_index=None if anchor_index < 0 else anchor_index,
            count=count,
            mean_per_timestep=mean,
            m2_per_timestep=m2,
            lowest=lowest,
            highest=highest,
            sketch=sketch,
            compression=compression,
            max_exact=max_exact,
        )
    return result
