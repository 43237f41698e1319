"""Read rollouts of many policies, in the published layout, ours or the vla-eval harness's, into one table.

    <root>/[<set>/]<model>/<task>/rollouts/<time>/results.json   published, and ours (evaluation/results.py)
    <root>/[<set>/]<model>/<file>.json                           a result file of vla-eval
    <root>/rename.yaml                                           names of tasks to show, and groups of tasks

The task is what the episodes say, not their folder. The published files count an episode that ended in an exception as
a failure of the policy; here it is invalid. `count_outcomes` gives both readings.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from vla_foundry.evaluation.comparison.result_files import Run, read_files, read_names
from vla_foundry.evaluation.results import SuccessRate

# one row per episode, sorted by model and task, then in the order in which the episodes were run
SCHEMA = pa.schema(
    {
        "model": pa.string(),
        "task": pa.string(),
        # the file, relative to the root
        "run": pa.string(),
        # seed of the start; episodes of two models with the same one are a pair
        "index": pa.int64(),
        # success, failure, pending (has not run) or invalid (ended in an exception: says nothing about the policy)
        "outcome": pa.string(),
        # this start succeeds whatever the policy does
        "is_trivial": pa.bool_(),
        # simulated; null: unknown
        "seconds": pa.float64(),
        # last line of the exception or what else went wrong
        "reason": pa.string(),
    }
)
# a success this early, simulated seconds, came before the policy could act
TRIVIAL_SECONDS = 0.7
# share of a set's models that must succeed this early, and how many must have run
_TRIVIAL_SHARE, _TRIVIAL_MODELS = 0.8, 3

Duplicates = Literal["error", "latest", "first"]


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """What was found below a folder."""

    # columns of SCHEMA
    table: pa.Table
    # (model, task) -> rollouts planned before the first one; unknown for vla-eval
    budgets: Mapping[tuple[str, str], int]
    # model -> SHA-256 of the families under which its rollouts were begun (None: none); our files only
    declared: Mapping[str, frozenset[str | None]] = field(default_factory=dict)
    # what a reader should know of how runs were merged, a line each
    audit: tuple[str, ...] = ()
    # task -> its name to show
    task_names: Mapping[str, str] = field(default_factory=dict)
    task_groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_rollouts(root: str | Path, *, duplicates: Duplicates = "error") -> Rollouts:
    """Read every result file below a folder.

    Args:
        duplicates: which of several runs of one episode counts: the latest or the first one; or it is an error. Pending
            episodes never count against finished ones, nor invalid ones against valid ones.

    Raises:
        FileNotFoundError: there is no such folder, or no result file in it.
        ValueError: a file is broken or misplaced, an episode is there twice, or there are more than were planned.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder with results.")
    runs = read_files(root)
    if not runs:
        raise FileNotFoundError(
            f"{root} holds no results: expected <model>/<task>/rollouts/<time>/results.json, or files of vla-eval."
        )
    by_key: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        by_key.setdefault((run.model, run.task), []).append(run)
    audit: list[str] = []
    budgets: dict[tuple[str, str], int] = {}
    for key, found in sorted(by_key.items()):
        found.sort(key=lambda run: (run.time, run.path))
        _merge(found, duplicates, audit)
        if budget := _budget_of(found, duplicates, audit):
            budgets[key] = budget
    declared: dict[str, frozenset[str | None]] = {}
    for run in runs:
        if run.is_ours:
            declared[run.model] = declared.get(run.model, frozenset()) | {run.declared}
    names, groups = read_names(root / "rename.yaml")
    table = _to_table([run for _, found in sorted(by_key.items()) for run in found])
    return Rollouts(
        table=table, budgets=budgets, declared=declared, audit=tuple(audit), task_names=names, task_groups=groups
    )


def count_outcomes(
    table: pa.Table, *, invalid_is_failure: bool = False, without_trivial: bool = False
) -> dict[tuple[str, str], SuccessRate]:
    """Count the outcomes of each (model, task).

    Args:
        table: columns of SCHEMA.
        invalid_is_failure: count as the published numbers do.
        without_trivial: leave out starts that succeed whatever the policy does.
    """
    counted = table.group_by(["model", "task", "outcome", "is_trivial"]).aggregate([([], "count_all")]).to_pylist()
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for row in counted:
        found = counts.setdefault((row["model"], row["task"]), {})
        if not (without_trivial and row["is_trivial"]):
            found[row["outcome"]] = found.get(row["outcome"], 0) + row["count_all"]
    return {
        key: SuccessRate(
            num_successes=found.get("success", 0),
            num_trials=found.get("success", 0)
            + found.get("failure", 0)
            + (found.get("invalid", 0) if invalid_is_failure else 0),
            num_invalid=found.get("invalid", 0),
        )
        for key, found in sorted(counts.items())
    }


# which of two runs of an episode says more about the policy
_RANKS = {"success": 2, "failure": 2, "trivial": 2, "invalid": 1, "pending": 0}


def _merge(runs: list[Run], duplicates: Duplicates, audit: list[str]) -> None:
    """Leave each episode of a model and task in one run only; the runs are sorted by time."""
    model, task = runs[0].model, runs[0].task
    chosen: dict[int, tuple[int, int]] = {}
    num_replaced = 0
    for number, run in enumerate(runs):
        if len(set(run.index)) < len(run.index):
            twice = next(index for index in run.index if run.index.count(index) > 1)
            raise ValueError(f"{run.path}: episode {twice} of '{task}' is there twice.")
        if len(runs) == 1:
            return
        for position, index in enumerate(run.index):
            if index in chosen:
                other, place = chosen[index]
                old, new = _RANKS[runs[other].outcome[place]], _RANKS[run.outcome[position]]
                if old == new == 2:
                    if duplicates == "error":
                        raise ValueError(
                            f"{model}: episode {index} of '{task}' ran more than once ({runs[other].path}, "
                            f"{run.path}). Choose with --duplicates latest or first which one counts, or move one away."
                        )
                    num_replaced += 1
                if new < old or (new == old and duplicates == "first"):
                    continue
            chosen[index] = number, position
    kept = [sorted(position for place, position in chosen.values() if place == number) for number in range(len(runs))]
    parts = ", ".join(f"{len(part)} of {len(run.index)} from {run.path}" for run, part in zip(runs, kept, strict=True))
    audit.append(f"{model}, {task}: {num_replaced} episodes ran more than once (rule: {duplicates}); kept {parts}")
    for run, positions in zip(runs, kept, strict=True):
        run.keep(positions)


def _budget_of(runs: list[Run], duplicates: Duplicates, audit: list[str]) -> int | None:
    """Return how many rollouts were planned for a model and task."""
    model, task = runs[0].model, runs[0].task
    budgets = {run.budget for run in runs if run.budget is not None}
    if len(budgets) > 1 and duplicates == "error":
        raise ValueError(
            f"{model}: runs of '{task}' have different budgets ({', '.join(map(str, sorted(budgets)))}). Choose with "
            "--duplicates latest or first, or move one away."
        )
    budget = max(budgets, default=None)
    if len(budgets) > 1:
        audit.append(f"{model}, {task}: budgets {sorted(budgets)}; the largest one holds")
    num_final = sum(outcome in ("success", "failure") for run in runs for outcome in run.outcome)
    if budget is not None and num_final > budget:
        raise ValueError(
            f"{model}: '{task}' has {num_final} rollouts, more than the {budget} planned before the first one "
            "(max_sample_size_per_model). No test is valid on them; move the surplus away."
        )
    return budget


def _to_table(runs: list[Run]) -> pa.Table:
    def column(name: str) -> list[Any]:
        return [value for run in runs for value in getattr(run, name)]

    def repeated(name: str) -> pa.Array:
        sizes = [len(run.index) for run in runs]
        numbers = pa.array([number for number, size in enumerate(sizes) for _ in range(size)], pa.int32())
        return pa.array([getattr(run, name) for run in runs], pa.string()).take(numbers)

    trivial = find_trivial(runs)
    columns = {
        "model": repeated("model"),
        "task": repeated("task"),
        "run": repeated("path"),
        "index": column("index"),
        "outcome": column("outcome"),
        "is_trivial": [(_set_of(run.model), run.task, index) in trivial for run in runs for index in run.index],
        "seconds": column("seconds"),
        "reason": column("reason"),
    }
    return pa.table(columns, schema=SCHEMA)


def _set_of(model: str) -> str:
    return model.rpartition("/")[0]


def find_trivial(runs: Iterable[Run]) -> set[tuple[str, str, int]]:
    """Find the starts (set, task, index) that succeed whatever the policy does.

    A start is trivial if the null policy succeeds, or if nearly every one of at least three models of the set succeeds
    before it can act.
    """
    num_models: dict[tuple[str, str, int], int] = {}
    num_early: dict[tuple[str, str, int], int] = {}
    trivial = set()
    for run in runs:
        group = _set_of(run.model)
        for index, outcome, seconds in zip(run.index, run.outcome, run.seconds, strict=True):
            key = (group, run.task, index)
            if outcome == "trivial":
                trivial.add(key)
            if seconds is None or outcome not in ("success", "failure"):
                continue
            num_models[key] = num_models.get(key, 0) + 1
            if outcome == "success":
                if seconds < TRIVIAL_SECONDS + 1e-6:
                    num_early[key] = num_early.get(key, 0) + 1
                if run.is_null:
                    trivial.add(key)
    early = (key for key, num in num_early.items() if num >= max(_TRIVIAL_MODELS, _TRIVIAL_SHARE * num_models[key]))
    return trivial.union(early)


def count_faults(table: pa.Table) -> dict[str, int]:
    """Count the invalid episodes by what failed: the infrastructure, the simulator's numbers, or something else."""
    kinds = [
        next((kind for kind, words in _FAULTS if any(word in (reason or "") for word in words)), "other")
        for outcome, reason in zip(table["outcome"].to_pylist(), table["reason"].to_pylist(), strict=True)
        if outcome == "invalid"
    ]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


# what failed, by words of the exception
_FAULTS = (
    ("simulator", ("NaN", "non-finite", "infinity")),
    (
        "infrastructure",
        ("Errno", "object 'time' doesn't exist", "rejected this client", "imeout", "onnection", "UNAVAILABLE"),
    ),
)
