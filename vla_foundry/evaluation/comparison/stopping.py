"""Stop rollouts as soon as a policy and a baseline are told apart: the sequential test drives `evaluate`.

The baseline is a folder with the results of one policy, or the name of a published one. Published counts have no order;
they are put into a random one, which is as good as the true one, because their outcomes are independent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from vla_foundry.evaluation.comparison.family import (
    Family,
    closed_levels,
    count_columns,
    level_for,
    pair_name,
    pairs_of,
)
from vla_foundry.evaluation.comparison.published import find_published, published_counts
from vla_foundry.evaluation.comparison.result_files import read_files
from vla_foundry.evaluation.comparison.sequential import Decision, StepTable, draw_decisions, find_table, run_test


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Outcomes to compare with."""

    name: str
    # {task: {seed: success}}, in the order of the rollouts; of published ones the seeds are made up
    outcomes: Mapping[str, Mapping[int, bool]]
    has_seeds: bool


def read_baseline(baseline: str, *, seed: int) -> Baseline:
    """Read what a policy is to be compared with.

    Args:
        baseline: a folder with the results of one policy, or the name of a published one.
        seed: of the order of published outcomes.

    Raises:
        ValueError: it is neither, or the folder holds several policies or an episode twice.
    """
    folder = Path(baseline)
    if folder.is_dir():
        return _read_folder(folder)
    if baseline not in published_counts() and ("/" not in baseline or folder.parent.is_dir()):
        raise ValueError(f"until_decided '{baseline}' is neither a folder with results nor a published policy.")
    outcomes = {}
    for task, count in find_published(baseline).items():
        rate = count.rate
        order = np.argsort(draw_decisions([f"order of {baseline} on {task}"], rate.num_trials, seed)[0])
        outcomes[task] = {number: bool(place < rate.num_successes) for number, place in enumerate(order)}
    return Baseline(name=baseline, outcomes=outcomes, has_seeds=False)


def _read_folder(folder: Path) -> Baseline:
    runs = read_files(folder)
    models = sorted({run.model for run in runs})
    if len(models) != 1:
        found = ", ".join(models) or "none"
        raise ValueError(f"until_decided needs the folder of one policy; {folder} holds results of: {found}.")
    outcomes: dict[str, dict[int, bool]] = {}
    for run in sorted(runs, key=lambda run: (run.time, run.path)):
        for index, outcome in zip(run.index, run.outcome, strict=True):
            if outcome in ("success", "failure"):
                if index in outcomes.setdefault(run.task, {}):
                    raise ValueError(
                        f"{folder}: episode {index} of '{run.task}' ran more than once. Move one run away."
                    )
                outcomes[run.task][index] = outcome == "success"
    return Baseline(name=models[0], outcomes=outcomes, has_seeds=True)


@dataclass(frozen=True, kw_only=True)
class StoppingRule:
    """Says when a policy and a baseline are told apart on a task."""

    policy: str
    baseline: Baseline
    family: Family
    # what the family's alpha is divided by. The policies are told apart if the test says so at each of these levels:
    # then the closed test of the whole family separates them, whatever the other pairs come to
    levels: tuple[int, ...]

    def decide(self, task: str, outcomes: Mapping[int, bool], n_max: int) -> Decision:
        """Run the test on the rollouts that there are.

        Args:
            outcomes: {seed: success} of the policy, in the order of the rollouts.
            n_max: planned rollouts of each.

        Returns:
            `better` is 0 for the baseline and 1 for the policy.
        """
        other = self.baseline.outcomes[task]
        first, second = list(other.values()), list(outcomes.values())
        if self.family.is_paired:
            seeds = sorted(other.keys() & outcomes.keys())
            first, second = [other[seed] for seed in seeds], [outcomes[seed] for seed in seeds]
        name = pair_name(task, self.baseline.name, self.policy)
        found = [
            run_test(table, [first, second], seed=self.family.seed, purpose=name)
            for table in _tables(self.family, self.levels, n_max)
        ]
        undecided = [decision for decision in found if decision.better is None]
        return undecided[0] if undecided else max(found, key=lambda decision: decision.stop)

    def describe(self, task: str, outcomes: Mapping[int, bool], n_max: int) -> str:
        """Say in one line what the test found, and what it saved."""
        found = self.decide(task, outcomes, n_max)
        if found.better is None:
            return f"{task}: not decided against {self.baseline.name} after {found.stop} of {n_max} rollouts"
        verb = "better" if found.better else "worse"
        return (
            f"{task}: {self.policy} is {verb} than {self.baseline.name}, decided after {found.stop} of {n_max} "
            f"rollouts ({n_max - len(outcomes)} saved)"
        )


def open_rule(
    baseline: str, *, policy: str, tasks: Sequence[str], alpha: float, family: Family | None, budgets: Mapping[str, int]
) -> StoppingRule:
    """Check what a stopping rule needs before any rollout is spent.

    Args:
        alpha: error of the comparison on each task, unless a family is declared.
        budgets: planned rollouts of each task.

    Raises:
        ValueError: the baseline lacks a task, is not in the family, or no test exists for a budget.
    """
    found = read_baseline(baseline, seed=family.seed if family else 0)
    if found.name == policy:
        raise ValueError(f"until_decided: the policy and the baseline have one name, '{policy}'. Give another --name.")
    missing = [task for task in tasks if not found.outcomes.get(task)]
    if missing:
        known = ", ".join(sorted(found.outcomes)) or "none"
        raise ValueError(f"until_decided: {found.name} has no rollouts of '{missing[0]}'; it has: {known}.")
    levels = (1,)
    if family is None:
        family = Family(models=(found.name, policy), alpha=Fraction(alpha).limit_denominator(1_000_000))
    else:
        if found.name not in family.models:
            raise ValueError(
                f"until_decided: the declared family does not hold {found.name}; it has: {', '.join(family.models)}."
            )
        levels = tuple(closed_levels(len(family.models)))
        if family.scope == "all":
            num_pairs = len(pairs_of(family.models))
            levels = (level_for(count_columns(len(family.tasks or tasks)) * num_pairs),)
    if family.is_paired and not found.has_seeds:
        raise ValueError(f"until_decided: the family is paired, but the rollouts of {found.name} have no seeds.")
    for budget in sorted(set(budgets.values())):
        _tables(family, levels, budget)
    return StoppingRule(policy=policy, baseline=found, family=family, levels=levels)


def _tables(family: Family, levels: Sequence[int], n_max: int) -> list[StepTable]:
    return [find_table(n_max, family.alpha / (2 * level), is_paired=family.is_paired) for level in levels]
