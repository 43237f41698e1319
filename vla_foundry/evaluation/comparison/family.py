"""The family of comparisons whose error is controlled as a whole: declared before the first rollout, then fixed.

`family.yaml` at the root of the results declares it. `vla-foundry evaluate` writes its hash into the settings of every
results.json, so that rollouts under another declaration are never mixed in. What a reader of a report ticks changes no
letter.

    models: [pi, baseline]          # all pairs are compared
    tasks: [lift, push]             # columns; null: every task. The mean over tasks is one more
    alpha: 0.05                     # probability of any separation if all are equal
    family: column                  # column: alpha holds for each column; all: for all columns together
    max_sample_size: 200            # rollouts of each model on each task; null: as in the results
    paired: false                   # compare rollouts of equal seeds
    seed: 0                         # of the draws that decide in a few states of the sequential test
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vla_foundry.evaluation.comparison.sequential import SIZES, as_fraction
from vla_foundry.storage.uri import read_yaml

FAMILY_NAME = "family.yaml"


@dataclass(frozen=True, kw_only=True)
class Family:
    """Which comparisons are made, and how often any of them may be wrong."""

    models: tuple[str, ...]
    # None: every task of the results
    tasks: tuple[str, ...] | None = None
    alpha: Fraction = Fraction(1, 20)
    # the error holds for each column, or for all columns together
    scope: Literal["column", "all"] = "column"
    # None: as in the results
    max_sample_size: int | None = None
    is_paired: bool = False
    seed: int = 0
    # there is a manifest; else the models of the folder are the family
    is_declared: bool = False

    def __post_init__(self) -> None:
        for name, values in (("models", self.models), ("tasks", self.tasks or ())):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must name each once, got {', '.join(values)}.")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must lie between 0 and 1, got {float(self.alpha)}.")

    @property
    def digest(self) -> str:
        """The SHA-256 of what is declared."""
        values = {
            "models": self.models,
            "tasks": self.tasks,
            "alpha": str(self.alpha),
            "family": self.scope,
            "max_sample_size": self.max_sample_size,
            "paired": self.is_paired,
            "seed": self.seed,
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_family(root: Path) -> Family | None:
    """Read the manifest of a folder with results; None if there is none.

    Raises:
        ValueError: the manifest is broken.
    """
    path = root / FAMILY_NAME
    if not path.is_file():
        return None
    values = read_yaml(str(path))
    if not isinstance(values, dict) or not values.get("models") or not isinstance(values["models"], list):
        raise ValueError(f"{path} must declare `models`, a list of names.")
    try:
        return _to_family(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def find_family(root: Path, model: str) -> Family | None:
    """Read the manifest of a folder to which the rollouts of a model are to be written; None if there is none.

    Raises:
        ValueError: the manifest is broken, or does not declare the model.
    """
    family = read_family(root)
    if family and model not in family.models:
        raise ValueError(
            f"{root / FAMILY_NAME} does not declare the model '{model}', only {', '.join(family.models)}. Give another "
            "--name, or declare it before the first rollout of any model."
        )
    return family


_KEYS: dict[str, tuple[type, ...]] = {
    "models": (list,),
    "tasks": (list, type(None)),
    "alpha": (float,),
    "family": (str,),
    "max_sample_size": (int, type(None)),
    "paired": (bool,),
    "seed": (int,),
}


def _to_family(values: dict[Any, Any]) -> Family:
    for key, value in values.items():
        if key not in _KEYS:
            raise ValueError(f"'{key}' is unknown. Keys: {', '.join(_KEYS)}.")
        if type(value) not in _KEYS[key]:
            raise ValueError(f"{key} must be {' or '.join(each.__name__ for each in _KEYS[key])}, got {value!r:.40}.")
    for key in ("models", "tasks"):
        if not all(isinstance(name, str) and name for name in values.get(key) or ()):
            raise ValueError(f'{key} must be a list of names. YAML needs quotes around "null" and numbers.')
    budget = values.get("max_sample_size")
    if (budget is not None and budget < 1) or values.get("seed", 0) < 0:
        raise ValueError("max_sample_size must be at least 1, and seed at least 0.")
    if (scope := values.get("family", "column")) not in ("column", "all"):
        raise ValueError(f"family must be column or all, got '{scope}'.")
    if not 0 < (alpha := values.get("alpha", 0.05)) < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}.")
    tasks = values.get("tasks")
    if scope == "all" and not tasks:
        raise ValueError("family: all needs `tasks`, the columns over which the error holds.")
    return Family(
        models=tuple(values["models"]),
        tasks=tuple(tasks) if tasks is not None else None,
        alpha=as_fraction(alpha),
        scope=scope,
        max_sample_size=budget,
        is_paired=values.get("paired", False),
        seed=values.get("seed", 0),
        is_declared=True,
    )


def null_sizes(num_models: int) -> list[int]:
    """Return how many pairs may be equal at once: models fall into groups of equal ones (Shaffer 1986)."""
    sizes: list[set[int]] = [{0}, {0}]
    for num in range(2, num_models + 1):
        sizes.append({part * (part - 1) // 2 + rest for part in range(1, num + 1) for rest in sizes[num - part]})
    return sorted(sizes[num_models] - {0})


def separate(num_models: int, decide: Callable[[int], tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Decide which pairs of models are separated, by a closed test: the family-wise error is at most alpha.

    A set of k pairs that may be equal at once is rejected if the test of one of them rejects at the level alpha / k. A
    pair is separated if every such set that holds it is rejected (Marcus, Peritz and Gabriel 1976): if, for every k, it
    is rejected at alpha / k itself or fewer than k pairs are not.

    Args:
        decide: returns, for tests at the level alpha / k, the better model of each pair (0 or 1; -1: not decided) and
            the rollouts that it took. It is asked for a few k only; the next larger one stands for those between.

    Returns:
        The better model of each pair and the rollouts that it took, (pairs,) each, in the order of combinations.
    """
    num_pairs = num_models * (num_models - 1) // 2
    separated, better, stop = np.ones(num_pairs, bool), np.full(num_pairs, -1), np.zeros(num_pairs, int)
    for level, size in closed_levels(num_models).items():
        if not separated.any():
            break
        found, needed = decide(level)
        separated &= (found >= 0) | ((found < 0).sum() < size)
        better = np.where(found >= 0, found, better)
        stop = np.where(found >= 0, np.maximum(stop, needed), stop)
    return np.where(separated, better, -1), stop


def closed_levels(num_models: int) -> dict[int, int]:
    """Return what the closed test divides alpha by, from the largest on, and the least k that each stands for."""
    levels: dict[int, int] = {}
    for size in null_sizes(num_models):
        levels.setdefault(level_for(size), size)
    return dict(sorted(levels.items(), reverse=True))


def level_for(size: int) -> int:
    """Return by what alpha is divided for a set of pairs: its size, or the next one that has a table."""
    return next((known for known in SIZES if known >= size), size)


def count_columns(num_tasks: int) -> int:
    """Return how many columns tasks make: each is one, and the mean over several is one more."""
    return num_tasks + (num_tasks > 1)


def pair_name(task: str, first: str, second: str) -> str:
    """Return the name under which the draws of a comparison are made, whatever the order of the pair."""
    return f"{task}: {' | '.join(sorted((first, second)))}"


def pairs_of(models: Sequence[str]) -> list[tuple[str, str]]:
    """Return all pairs, in the order of `separate`."""
    return list(itertools.combinations(models, 2))


def assign_letters(models: Sequence[str], separated: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Give each model its letters: two share one if and only if they are not separated (Piepho 2004).

    Args:
        models: from the best to the worst, which gets the last letters.
        separated: pairs that differ, in either order.

    Returns:
        The letters of each model, in the order of `models`; after z come aa, ab, ..., and then letters are separated
        by spaces.
    """
    ranks = {model: rank for rank, model in enumerate(models)}
    columns = [frozenset(ranks.values())] if models else []
    for first, second in separated:
        pair = {ranks[first], ranks[second]}
        split = [column for column in columns if pair <= column]
        columns = [column for column in columns if not pair <= column]
        for column in split:
            for rank in sorted(pair):
                part = column - {rank}
                if not any(part <= other for other in columns):
                    columns = [other for other in columns if not other <= part] + [part]
    columns.sort(key=lambda column: (min(column), -len(column), sorted(column)))
    names = [_letter(number) for number in range(len(columns))]
    between = "" if len(names) <= 26 else " "
    return {
        model: between.join(name for name, column in zip(names, columns, strict=True) if rank in column)
        for model, rank in ranks.items()
    }


def _letter(number: int) -> str:
    letters = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        letters = chr(ord("a") + digit) + letters
    return letters
