"""Normalize fields by their statistics, and invert it exactly, for numpy arrays and torch tensors.

    x' = (x - center) / scale            x = x' * scale + center

| method          | center      | scale                                                                    |
|-----------------|-------------|--------------------------------------------------------------------------|
| std             | mean        | std                                                                      |
| min_max         | min         | max - min                    gives [0, 1]; centered: [-1, 1]             |
| percentile_5_95 | 5th perc.   | 95th - 5th percentile        the same for the middle 90%                 |
| percentile_1_99 | 1st perc.   | 99th - 1st percentile        the same for the middle 98%                 |

Centered (never for std): center += scale / 2, scale /= 2. A range (or std) below `range_floor` is widened to it around
its middle. Finally, the scale is raised to at least `epsilon`. With scope per_timestep each step of the window has its
own statistics, aligned by the anchor: the step at offset k from the anchor uses the statistics at offset k.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from jaxtyping import Float64

from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.fields import Window
from vla_foundry.robotics.statistics import FieldStatistics

NormalizationMethod = Literal["std", "min_max", "percentile_1_99", "percentile_5_95"]
NormalizationScope = Literal["global", "per_timestep"]

# a numpy array or a torch tensor
Array = TypeVar("Array")

STATE_VERSION = 1
# a dimension counts as constant if it varies by at most this (in its unit), ...
_CONSTANT_SPREAD = 1e-8
# ... or by at most this share of the field's widest spread or of its own magnitude
_CONSTANT_SHARE = 1e-5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NormalizationRule:
    """How one field is normalized."""

    # false: the field is left unchanged
    enabled: bool = True
    method: NormalizationMethod = "std"
    scope: NormalizationScope = "global"
    # to [-1, 1] rather than [0, 1]; std is always centered
    centered: bool = False
    # smallest scale, in the field's unit
    epsilon: float = 1e-8
    # smallest range (or std), in the field's unit; None: no limit
    range_floor: float | None = None
    # normalized values are clipped to [-clip, clip]; None: not clipped
    clip: float | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("method", self.method, get_args(NormalizationMethod)),
            ("scope", self.scope, get_args(NormalizationScope)),
        ):
            if value not in known:
                raise ValueError(unknown_name_message(f"normalization {name}", value, list(known)))
        if not self.epsilon > 0:
            raise ValueError(f"normalization epsilon ({self.epsilon}) must be above 0: scales are divided by.")
        for name, limit in (("range_floor", self.range_floor), ("clip", self.clip)):
            if limit is not None and not limit > 0:
                raise ValueError(f"normalization {name} ({limit}) must be above 0, or null.")


@dataclass(frozen=True, eq=False, kw_only=True)
class FieldScale:
    """The center and scale of one field: S rows, one per step, or a single row for all steps."""

    rule: NormalizationRule
    # row of the anchor; None if the scope is global
    anchor_index: int | None
    # (S, C) float64
    center: np.ndarray
    # (S, C) float64, above 0
    scale: np.ndarray

    @property
    def width(self) -> int:
        """Number of columns (C)."""
        return self.center.shape[1]

    def rows(self, name: str, anchor: int | None, num_steps: int | None) -> slice:
        """Return the rows for `num_steps` steps with the anchor at `anchor`; with global scope, the only row.

        Raises:
            ValueError: some steps have no statistics, or the anchor is not given.
        """
        if self.anchor_index is None:
            return slice(0, 1)
        available = len(self.center)
        if num_steps is None:
            raise ValueError(f"field '{name}' is normalized per time step: its values need a time axis (..., T, C).")
        if anchor is None and num_steps != available:
            raise ValueError(
                f"field '{name}' is normalized per time step over {available} steps, but the values have {num_steps}: "
                "say which of them is the anchor."
            )
        first = 0 if anchor is None else self.anchor_index - anchor
        if first < 0 or first + num_steps > available:
            raise ValueError(
                f"field '{name}' has statistics for {self.anchor_index} past and {available - 1 - self.anchor_index} "
                f"future steps, but the values hold {anchor} past and {num_steps - 1 - (anchor or 0)} future ones. "
                "Use a smaller window, or statistics of a larger one."
            )
        return slice(first, first + num_steps)


@dataclass(frozen=True, eq=False)
class RoboticsNormalizer:
    """Normalizes and denormalizes fields, one at a time or concatenated.

    Built by `create` from statistics, or by `from_state` from the output of `state`, a JSON object saved beside a
    checkpoint that makes the statistics unnecessary.
    """

    # {field: its centers and scales}
    scales: Mapping[str, FieldScale]
    # dimensions that hardly vary, as named in the warning
    near_constant: tuple[str, ...] = ()
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def create(
        cls,
        statistics: Mapping[str, FieldStatistics],
        rules: Mapping[str, NormalizationRule],
        *,
        window: Window | None = None,
        names: Mapping[str, Sequence[str]] | None = None,
    ) -> "RoboticsNormalizer":
        """Work out centers and scales; a warning names the dimensions that hardly vary.

        Args:
            rules: {field: rule} for every field that the normalizer handles.
            window: the steps to normalize; None: all steps of the statistics.
            names: {field: name of each column}, for the warning; fields without names may be absent.

        Raises:
            ValueError: the statistics lack a field, a time step or percentiles.
        """
        scales, near_constant, smallest = {}, [], np.inf
        for name, rule in rules.items():
            if name not in statistics:
                raise ValueError(unknown_name_message("statistics: field", name, sorted(statistics)))
            try:
                scales[name], is_constant = _create_scale(statistics[name], rule, window)
            except ValueError as error:
                raise ValueError(f"field '{name}': {error}") from None
            near_constant += _name_dimensions(name, is_constant, (names or {}).get(name))
            smallest = min(smallest, scales[name].scale[is_constant].min(initial=np.inf))
        if near_constant:
            logger.warning(
                "%d dimensions hardly vary; noise in them is divided by as little as %.3g. "
                "Raise normalization range_floor or epsilon, or leave them out: %s",
                len(near_constant),
                smallest,
                ", ".join(near_constant[:12]) + (", ..." if len(near_constant) > 12 else ""),
            )
        return cls(scales, tuple(near_constant))

    def __reduce__(self) -> tuple[Any, ...]:
        # without the cache: a worker cannot use tensors on this process's device
        return RoboticsNormalizer, (self.scales, self.near_constant)

    @property
    def widths(self) -> dict[str, int]:
        """Number of columns of each field."""
        return {name: scale.width for name, scale in self.scales.items()}

    def normalize(self, values: Array, fields: str | Sequence[str], *, anchor: int | None = None) -> Array:
        """Normalize values of one field, or of several concatenated fields.

        Args:
            values: (..., T, C) or, if no field is normalized per time step, (..., C); a numpy array or a torch
                tensor. The columns are those of the fields, in order.
            fields: the field or fields.
            anchor: index of the anchor among the T steps; None: the values have exactly the steps of the statistics.

        Returns:
            The same kind of array, on the same device, with the same floating type (integers become float64 in numpy
            and float32 in torch). Causes no device synchronization.

        Raises:
            ValueError: unknown fields, a wrong number of columns, or steps without statistics.
        """
        (center, scale, clip), values, to_result = self._prepare(values, fields, anchor)
        result = (values - center) / scale
        return to_result(result if clip is None else result.clip(-clip, clip))

    def denormalize(self, values: Array, fields: str | Sequence[str], *, anchor: int | None = None) -> Array:
        """Invert `normalize` exactly, except for clipped values. Takes and raises the same."""
        (center, scale, _), values, to_result = self._prepare(values, fields, anchor)
        return to_result(values * scale + center)

    def state(self) -> dict[str, Any]:
        """Return everything that `from_state` needs, as a JSON object of finite numbers."""
        return {
            "version": STATE_VERSION,
            "fields": {
                name: {
                    "rule": asdict(field.rule),
                    "anchor_index": field.anchor_index,
                    "center": field.center.tolist(),
                    "scale": field.scale.tolist(),
                }
                for name, field in self.scales.items()
            },
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], *, origin: str = "normalizer") -> "RoboticsNormalizer":
        """Rebuild a normalizer from the output of `state`.

        Raises:
            ValueError: the state has another version or is malformed.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"{origin} is of version {state.get('version')!r}, this code reads {STATE_VERSION}.")
        scales = {}
        for name, values in state["fields"].items():
            center, scale = np.array(values["center"], np.float64), np.array(values["scale"], np.float64)
            if center.ndim != 2 or center.shape != scale.shape or not (np.isfinite(center).all() and (scale > 0).all()):
                raise ValueError(f"{origin}: field '{name}' has broken centers or scales.")
            scales[name] = FieldScale(
                rule=NormalizationRule(**values["rule"]),
                anchor_index=values["anchor_index"],
                center=center,
                scale=scale,
            )
        return cls(scales)

    def _prepare(self, values: Any, fields: str | Sequence[str], anchor: int | None) -> tuple[Any, Any, Any]:
        """Return ((center, scale, clip), values in the computation dtype, function that restores their dtype)."""
        names = (fields,) if isinstance(fields, str) else tuple(fields)
        num_steps = values.shape[-2] if values.ndim > 1 else None
        is_numpy = isinstance(values, np.ndarray | np.generic)
        key = (names, anchor, num_steps, None if is_numpy else (values.device, values.dtype))
        if key not in self._cache:
            numbers = self._numbers(names, anchor, num_steps)
            self._cache[key] = numbers if is_numpy else _to_torch(numbers, values)
        center, scale, clip = self._cache[key]
        if values.shape[-1] != center.shape[-1]:
            raise ValueError(f"{', '.join(names)} need {center.shape[-1]} columns, got {values.shape[-1]}.")
        if is_numpy:
            dtype = values.dtype if values.dtype.kind == "f" else np.dtype(np.float64)
            return (center, scale, clip), values.astype(np.float64), lambda result: result.astype(dtype)
        dtype = values.dtype if values.is_floating_point() else center.dtype
        return (center, scale, clip), values.to(center.dtype), lambda result: result.to(dtype)

    def _numbers(
        self, names: tuple[str, ...], anchor: int | None, num_steps: int | None
    ) -> tuple[Float64[np.ndarray, "*T C"], Float64[np.ndarray, "*T C"], Float64[np.ndarray, " C"] | None]:
        for name in names:
            if name not in self.scales:
                raise ValueError(unknown_name_message("field", name, sorted(self.scales)))
        rows = {name: self.scales[name].rows(name, anchor, num_steps) for name in names}
        num_rows = max((part.stop - part.start for part in rows.values()), default=1)
        width = sum(self.scales[name].width for name in names)
        center, scale, clip = np.zeros((num_rows, width)), np.ones((num_rows, width)), np.full(width, np.inf)
        start = 0
        for name in names:
            field = self.scales[name]
            columns = slice(start, start + field.width)
            center[:, columns], scale[:, columns] = field.center[rows[name]], field.scale[rows[name]]
            if field.rule.enabled and field.rule.clip is not None:
                clip[columns] = field.rule.clip
            start = columns.stop
        if num_steps is None:
            center, scale = center[0], scale[0]
        return center, scale, clip if np.isfinite(clip).any() else None


def _to_torch(numbers: tuple[Any, Any, Any], like: Any) -> tuple[Any, Any, Any]:
    import torch

    # half precision is too coarse for a center far from zero
    dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
    center, scale, clip = (
        None if part is None else torch.as_tensor(part, dtype=dtype, device=like.device) for part in numbers
    )
    return center, scale, clip


def _create_scale(
    statistics: FieldStatistics, rule: NormalizationRule, window: Window | None
) -> tuple[FieldScale, np.ndarray]:
    """Return a field's scale, and which of its dimensions (S, C) hardly vary."""
    is_per_step = rule.scope == "per_timestep" and rule.enabled
    anchor_index = statistics.anchor_index if is_per_step else None
    if not rule.enabled:
        shape = (1, statistics.width)
        unchanged = FieldScale(rule=rule, anchor_index=None, center=np.zeros(shape), scale=np.ones(shape))
        return unchanged, np.zeros(shape, dtype=bool)
    center, spread = _center_and_spread(statistics, rule)
    if is_per_step:
        if anchor_index is None:
            raise ValueError("its statistics do not say which step is the anchor, which scope per_timestep needs.")
        stored = Window(anchor_index, statistics.num_steps - 1 - anchor_index)
        window = window or stored
        if window.past > stored.past or window.future > stored.future:
            raise ValueError(
                f"its statistics cover {stored.past} past and {stored.future} future steps, not {window.past} and "
                f"{window.future}. Use --data.lowdim_past_timesteps {min(window.past, stored.past)} and "
                f"--data.lowdim_future_timesteps {min(window.future, stored.future)}, or "
                "--data.normalization.scope global, or preprocess with more steps."
            )
        steps = stored.crop(window)
        if not statistics.count[steps].all():
            empty = int(np.flatnonzero(statistics.count[steps] == 0)[0]) + steps.start - anchor_index
            raise ValueError(f"its statistics hold no values {empty} steps from the anchor. Use a smaller window.")
        center, spread, anchor_index = center[steps], spread[steps], anchor_index - steps.start
    elif not statistics.count.any():
        raise ValueError("its statistics hold no values.")
    scale = spread if rule.range_floor is None else np.maximum(spread, rule.range_floor)
    if rule.method != "std":
        # widen around the middle
        center = center - (scale - spread) / 2
        if rule.centered:
            center, scale = center + scale / 2, scale / 2
    largest = np.maximum(spread.max(axis=-1, keepdims=True), np.abs(center))
    limit = max(_CONSTANT_SPREAD, rule.range_floor or 0.0)
    is_constant = (spread <= limit) | (spread <= _CONSTANT_SHARE * largest)
    scale = np.maximum(scale, rule.epsilon)
    return FieldScale(rule=rule, anchor_index=anchor_index, center=center, scale=scale), is_constant


def _center_and_spread(
    statistics: FieldStatistics, rule: NormalizationRule
) -> tuple[Float64[np.ndarray, "S C"], Float64[np.ndarray, "S C"]]:
    """Return the start of the range (std: the mean) and its width (std: the std), per step or in one row."""
    is_per_step = rule.scope == "per_timestep"
    if rule.method == "std":
        low = statistics.mean_per_timestep if is_per_step else statistics.mean[None]
        spread = statistics.std_per_timestep if is_per_step else statistics.std[None]
        return low, spread
    if rule.method == "min_max":
        low = statistics.min_per_timestep if is_per_step else statistics.min[None]
        high = statistics.max_per_timestep if is_per_step else statistics.max[None]
        return low, high - low
    below, above = (int(number) for number in rule.method.split("_")[1:])
    if is_per_step:
        values = statistics.percentiles_per_timestep
        return values[below], values[above] - values[below]
    values = statistics.percentiles
    return values[below][None], (values[above] - values[below])[None]


def _name_dimensions(name: str, is_constant: np.ndarray, columns: Sequence[str] | None) -> list[str]:
    """Name the columns that hardly vary, with the steps if it is not all of them."""
    names = []
    for column in np.flatnonzero(is_constant.any(axis=0)).tolist():
        num_steps = int(is_constant[:, column].sum())
        where = "" if num_steps == len(is_constant) else f" at {num_steps} of {len(is_constant)} steps"
        names.append(f"{name}[{column}{f' {columns[column]}' if columns else ''}]{where}")
    return names
