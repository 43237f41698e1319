"""The normalizer of a run: the statistics of all its training datasets, merged, and the rules of its params."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.robotics.fields import Window
from vla_foundry.robotics.fit import width_of
from vla_foundry.robotics.normalization import FieldTransform, NormalizationRule, RoboticsNormalizer
from vla_foundry.robotics.spec import NamedSpec
from vla_foundry.robotics.statistics import FieldStatistics, merge_statistics
from vla_foundry.robotics.statistics_format import parse_statistics
from vla_foundry.storage.uri import is_remote, read_text


@dataclass(frozen=True, eq=False)
class Normalization:
    """How the fields of a run are normalized, and by what."""

    normalizer: RoboticsNormalizer
    # of the fields that are normalized, over all datasets
    statistics: dict[str, FieldStatistics]


@dataclass(frozen=True, kw_only=True)
class _StatisticsFile:
    """One dataset's statistics, and what is used of them."""

    path: str
    # changes when the file does; a remote file is taken to stay as it is
    version: int
    # step of its windows that is the anchor, if it does not say
    anchor_index: int
    fields: tuple[str, ...]


def create_normalization(params: RoboticsDataParams, datasets: Sequence[NamedSpec]) -> Normalization:
    """Create the normalizer of actions and proprioception.

    Args:
        params: of the data, resolved.
        datasets: the training datasets, in the order of `params.dataset_manifest`. Validation uses them too: the model
            was trained on numbers normalized by these, and others would mean something else to it.

    Raises:
        FileNotFoundError: a dataset has no statistics.
        ValueError: statistics lack a field, a step or percentiles.
    """
    widths: dict[str, int] = {}
    plans = []
    for name in ("action_fields", "proprioception_fields"):
        of_name = [params.plan_fields(name, dataset) for dataset in datasets]
        plans.append(of_name)
        widths |= {field: width_of(field, of_name, f"data.{name}") for field in getattr(params, name)}
    known = {field for _, spec in datasets for field in spec.fields} | widths.keys()
    rules = params.normalization.rules(widths, known)
    used = tuple((name, rule) for name, rule in rules.items() if rule.enabled)
    passing = {name: _pass(rules[name], width) for name, width in widths.items() if not rules[name].enabled}
    if not used:
        return Normalization(RoboticsNormalizer(passing), {})
    assert len(params.dataset_statistics) == len(datasets), "resolve derives data.dataset_statistics"
    files = []
    for number, (path, (_, spec)) in enumerate(zip(params.dataset_statistics, datasets, strict=True)):
        has = plans[0][number].descriptions.keys() | plans[1][number].descriptions.keys()
        fields = tuple(name for name, _ in used if name in has)
        version = 0 if is_remote(path) or not os.path.exists(path) else os.stat(path).st_mtime_ns
        anchor_index = spec.past_lowdim_steps
        files.append(_StatisticsFile(path=path, version=version, anchor_index=anchor_index, fields=fields))
    is_mixture = params.statistics_weighting == "mixture"
    shares = tuple(params.dataset_weighting or [1.0] * len(datasets)) if is_mixture else None
    created = _create(tuple(files), used, shares, params.normalization_window)
    normalizer = created.normalizer
    whole = RoboticsNormalizer({**normalizer.transforms, **passing}, normalizer.near_constant)
    return Normalization(whole, created.statistics)


@lru_cache(maxsize=1)  # the loaders of training and validation ask for the same, and files may be large
def _create(
    files: tuple[_StatisticsFile, ...],
    rules: tuple[tuple[str, NormalizationRule], ...],
    shares: tuple[float, ...] | None,
    window: Window,
) -> Normalization:
    merged = merge_statistics([_read(file) for file in files], shares=shares)
    return Normalization(RoboticsNormalizer.create(merged, dict(rules), window=window), merged)


def _read(file: _StatisticsFile) -> dict[str, FieldStatistics]:
    if not file.fields:
        return {}
    try:
        text = read_text(file.path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"data.dataset_statistics: there is no {file.path}. Make it with `vla-foundry stats FOLDER`, or set "
            "--data.normalization.enabled false."
        ) from None
    return parse_statistics(text, file.path, anchor_index=file.anchor_index, fields=file.fields)


def _pass(rule: NormalizationRule, width: int) -> FieldTransform:
    return FieldTransform(rule=rule, anchor_index=None, center=np.zeros((1, width)), scale=np.ones((1, width)))
