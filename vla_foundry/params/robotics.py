"""Params of what is done to robot data's fields: how each is normalized."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from vla_foundry.config.base import BaseParams
from vla_foundry.registry import unknown_name_message

if TYPE_CHECKING:
    from vla_foundry.robotics.normalization import NormalizationRule


def _check_limits(epsilon: float | None, range_floor: float | None, clip: float | None) -> None:
    for name, value in (("epsilon", epsilon), ("range_floor", range_floor), ("clip", clip)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} ({value:g}) must be above 0.")


@dataclass(frozen=True, kw_only=True)
class FieldNormalizationParams(BaseParams):
    """How the fields of one name or pattern are normalized; null: as all others."""

    # false: these fields pass unchanged
    enabled: bool = True
    # mean and std; the range of all values; of the middle 98% or 90% of them
    method: Literal["std", "min_max", "percentile_1_99", "percentile_5_95"] | None = None
    # one set of statistics for all time steps, or one for each
    scope: Literal["global", "per_timestep"] | None = None
    # smallest scale, in the field's unit
    epsilon: float | None = None
    # ranges to [-1, 1] rather than [0, 1]
    centered_norm: bool | None = None
    # smaller ranges (or stds) are widened to this, in the field's unit
    range_floor: float | None = None
    # normalized values are limited to [-clip, clip]
    clip: float | None = None

    def __post_init__(self) -> None:
        _check_limits(self.epsilon, self.range_floor, self.clip)


@dataclass(frozen=True, kw_only=True)
class NormalizationParams(BaseParams):
    """`--data.normalization.` How proprioception and actions are normalized."""

    # false: every field passes unchanged
    enabled: bool = True
    # mean and std; the range of all values; of the middle 98% or 90% of them
    method: Literal["std", "min_max", "percentile_1_99", "percentile_5_95"] = "std"
    # one set of statistics for all time steps of a window, or one for each
    scope: Literal["global", "per_timestep"] = "global"
    # smallest scale, in the field's unit
    epsilon: float = 1e-8
    # only these fields are normalized; empty: all that are used
    include_fields: list[str] = field(default_factory=list)
    # ranges to [-1, 1] rather than [0, 1]; std is always centered
    centered_norm: bool = False
    # smaller ranges (or stds) are widened to this, in the field's unit; null: not
    range_floor: float | None = None
    # normalized values are limited to [-clip, clip]; null: not
    clip: float | None = None
    # what differs for some fields, by exact name or glob pattern ("*__rot_6d")
    field_configs: dict[str, FieldNormalizationParams] = field(default_factory=dict)
    # steps before the anchor that statistics are taken of; null: those of the data
    lowdim_past_timesteps: int | None = None
    # steps after the anchor that statistics are taken of; null: those of the data
    lowdim_future_timesteps: int | None = None

    def __post_init__(self) -> None:
        _check_limits(self.epsilon, self.range_floor, self.clip)
        for name in ("lowdim_past_timesteps", "lowdim_future_timesteps"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} ({value}) must be at least 0.")

    def rules(self, fields: Iterable[str], known_fields: Iterable[str]) -> dict[str, "NormalizationRule"]:
        """Return the rule of each field.

        Args:
            fields: the fields that are used.
            known_fields: all fields that the data has, to tell a misspelt pattern from one that is not needed here.

        Raises:
            ValueError: a pattern names no field, or two patterns disagree about one.
        """
        used, known = list(fields), list(known_fields)
        for pattern in self.field_configs:
            if not any(_matches(name, pattern) for name in [*used, *known]):
                raise ValueError(unknown_name_message("normalization.field_configs: field", pattern, sorted(known)))
        return {name: self._rule(name) for name in used}

    def _rule(self, name: str) -> "NormalizationRule":
        from vla_foundry.robotics.normalization import NormalizationRule

        own = self._field_config(name)
        is_included = not self.include_fields or name in self.include_fields
        return NormalizationRule(
            enabled=self.enabled and own.enabled and is_included,
            method=own.method or self.method,
            scope=own.scope or self.scope,
            centered=self.centered_norm if own.centered_norm is None else own.centered_norm,
            epsilon=own.epsilon or self.epsilon,
            range_floor=own.range_floor or self.range_floor,
            clip=own.clip or self.clip,
        )

    def _field_config(self, name: str) -> FieldNormalizationParams:
        if name in self.field_configs:
            return self.field_configs[name]
        patterns = [pattern for pattern in self.field_configs if _matches(name, pattern)]
        others = [pattern for pattern in patterns if self.field_configs[pattern] != self.field_configs[patterns[0]]]
        if others:
            raise ValueError(
                f"normalization.field_configs has the patterns '{patterns[0]}' and '{others[0]}', which disagree about "
                f"'{name}'. Narrow one of them, or give '{name}' an entry of its own."
            )
        return self.field_configs[patterns[0]] if patterns else FieldNormalizationParams()


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)
