"""Compare the models of a folder on each task and over all tasks: rates, differences, and letters.

    rollouts = read_rollouts("evaluation")
    comparison = compare(rollouts, read_family(Path("evaluation")))
    for column in comparison.columns:
        print(column.name, column.letters)

Every decision belongs to a family whose error is controlled (family.py). Tasks are compared by the sequential test
(sequential.py), the mean over tasks by the aggregate test (aggregate.py); against published counts, which have neither
an order nor seeds, by exact tests for a fixed number of rollouts (statistics.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from vla_foundry.evaluation.comparison.aggregate import (
    AggregatePath,
    Stratum,
    estimate_difference,
    follow_aggregate,
    macro_difference,
)
from vla_foundry.evaluation.comparison.family import (
    FAMILY_NAME,
    Family,
    assign_letters,
    count_columns,
    level_for,
    pair_name,
    pairs_of,
    separate,
)
from vla_foundry.evaluation.comparison.published import PublishedCount
from vla_foundry.evaluation.comparison.rollouts import Rollouts, count_outcomes
from vla_foundry.evaluation.comparison.sequential import MAX_ROLLOUTS, dead_time, draw_decisions, find_table, run_tests
from vla_foundry.evaluation.results import SuccessRate, add_rates
from vla_foundry.evaluation.statistics import boschloo_p_value, difference_interval, holm, stratified_p_value
from vla_foundry.registry import unknown_name_message

# name of the column over all tasks
AGGREGATE = "all tasks"
_Z95 = 1.959964
_NONE = np.zeros(0, int), np.zeros(0, int)


@dataclass(frozen=True, kw_only=True)
class PairResult:
    """What is known of two models in one column."""

    first: str
    second: str
    # rate of the second minus rate of the first, with a 95% interval (of this pair alone)
    difference: float
    interval: tuple[float, float]
    # the model that is better, as far as the family's error allows to say; None: not separated
    better: str | None
    # rollouts of each that the decision took, or that there are
    num_rollouts: int


@dataclass(frozen=True, kw_only=True)
class Column:
    """One task, or all tasks."""

    name: str
    # from the best to the worst; models without a rollout are left out
    models: tuple[str, ...]
    rates: Mapping[str, SuccessRate]
    # success rate (over all tasks: mean of the tasks' rates)
    means: Mapping[str, float]
    letters: Mapping[str, str]
    pairs: tuple[PairResult, ...]
    # rollouts of each model that were planned (over all tasks: their sum)
    n_max: int
    # the tasks that count, and those that some model lacks
    tasks: tuple[str, ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All columns, and what a reader must know of how they came about."""

    family: Family
    columns: tuple[Column, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class AgainstPublished:
    """A model and a published one on one task, or on all tasks that both have."""

    model: str
    task: str
    rate: SuccessRate
    published: SuccessRate
    # rate minus published rate (over all tasks: of the means)
    difference: float
    p_value: float
    # by Holm's test over the models of this task, at the family's alpha
    is_separated: bool


def compare(rollouts: Rollouts, family: Family | None = None) -> Comparison:
    """Compare all models of a family; without one, all models that there are.

    Raises:
        ValueError: a model or task is unknown, or rollouts exceed the declared budget.
    """
    outcomes = outcomes_by_seed(rollouts.table)
    found = sorted({model for model, _ in outcomes})
    notes = []
    if family is None:
        family = Family(models=tuple(found))
        notes.append(
            f"No {FAMILY_NAME} declared what is compared before the rollouts: the family is all {len(found)} models "
            "of the folder."
        )
    missing = [model for model in family.models if model not in found]
    if missing and not family.is_declared:
        raise ValueError(unknown_name_message("model", missing[0], found))
    if missing:
        notes.append(f"Of the declared models these have no rollouts yet: {', '.join(missing)}.")
    tasks = sorted({task for model, task in outcomes if model in family.models})
    missing = [task for task in family.tasks or () if task not in tasks]
    if missing and not family.is_declared:
        raise ValueError(unknown_name_message("task", missing[0], tasks))
    if missing:
        notes.append(f"Of the declared tasks these have no rollouts yet: {', '.join(missing)}.")
    num_columns = count_columns(len(family.tasks or tasks)) if family.scope == "all" else 1
    tasks = [task for task in family.tasks or tasks if task in tasks]
    rates = count_outcomes(rollouts.table)
    unplanned = sorted({model for model, task in outcomes if (model, task) not in rollouts.budgets})
    if unplanned and family.max_sample_size is None:
        notes.append(
            f"The files of {', '.join(unplanned)} do not say how many rollouts were planned: taken to be all that "
            "there are. Declare max_sample_size beforehand."
        )
    sheet = _Sheet(rollouts=rollouts, family=family, outcomes=outcomes, rates=rates, num_columns=num_columns)
    columns = [sheet.compare_task(task) for task in tasks]
    if len(tasks) > 1:
        columns.append(sheet.compare_all(tasks))
        if columns[-1].left_out:
            notes.append(
                f"Over all tasks count those that every model ran; left out: {', '.join(columns[-1].left_out)}."
            )
    return Comparison(family=family, columns=tuple(columns), notes=(*notes, *rollouts.audit))


def outcomes_by_seed(table: pa.Table) -> dict[tuple[str, str], dict[int, bool]]:
    """Return {(model, task): {seed: success}} of valid rollouts, in the order in which they were run."""
    outcomes: dict[tuple[str, str], dict[int, bool]] = {}
    columns = (table[name].to_pylist() for name in ("model", "task", "index", "outcome"))
    for model, task, index, outcome in zip(*columns, strict=True):
        if outcome in ("success", "failure"):
            outcomes.setdefault((model, task), {})[index] = outcome == "success"
    return outcomes


@dataclass(frozen=True, kw_only=True)
class _Sheet:
    """What all columns share."""

    rollouts: Rollouts
    family: Family
    outcomes: Mapping[tuple[str, str], Mapping[int, bool]]
    rates: Mapping[tuple[str, str], SuccessRate]
    # over which alpha is divided beforehand
    num_columns: int

    def models_on(self, tasks: Sequence[str]) -> list[str]:
        """Return the models that have rollouts, on each of the tasks."""
        there = {model for model, _ in self.outcomes}
        return [
            model
            for model in self.family.models
            if model in there and all(self.outcomes.get((model, task)) for task in tasks)
        ]

    def n_max(self, task: str, models: Sequence[str]) -> int:
        """Return the planned rollouts of a task.

        Raises:
            ValueError: there are more than the family declares.
        """
        planned = self.family.max_sample_size
        largest = max(len(self.outcomes[model, task]) for model in models)
        if planned is None:
            return max(*(self.rollouts.budgets.get((model, task), 0) for model in models), largest)
        if largest > planned:
            raise ValueError(
                f"'{task}' has {largest} rollouts of one model; the family was declared with max_sample_size {planned}."
            )
        return planned

    def stratum(self, first: str, second: str, task: str, n_max: int) -> Stratum:
        """Return two models' outcomes on a task, paired by seed if the family says so."""
        mine, other = self.outcomes[first, task], self.outcomes[second, task]
        if self.family.is_paired:
            seeds = sorted(mine.keys() & other.keys())
            mine, other = ({seed: each[seed] for seed in seeds} for each in (mine, other))
        values = np.array(list(mine.values()), bool), np.array(list(other.values()), bool)
        return Stratum(outcomes=values, n_max=n_max)

    def separate(
        self, models: Sequence[str], decide: Callable[[int], tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Decide the pairs of the models that are there; a declared family is corrected for those that are not, too."""
        declared = self.family.models if self.family.is_declared else tuple(models)
        pairs = pairs_of(declared)
        if self.family.scope == "all":
            return decide(level_for(self.num_columns * len(pairs)))
        is_there = np.array([pair[0] in models and pair[1] in models for pair in pairs], bool)

        def decide_all(level: int) -> tuple[np.ndarray, np.ndarray]:
            better, stop = np.full(len(pairs), -1), np.zeros(len(pairs), int)
            better[is_there], stop[is_there] = decide(level)
            return better, stop

        better, stop = separate(len(declared), decide_all)
        return better[is_there], stop[is_there]

    def compare_task(self, task: str) -> Column:
        models = self.models_on([task])
        n_max = self.n_max(task, models)
        pairs = pairs_of(models)
        strata = [self.stratum(*pair, task, n_max) for pair in pairs]
        if dead_time(n_max) < n_max <= MAX_ROLLOUTS:
            names = [pair_name(task, *pair) for pair in pairs]
            decide = partial(_decide_sequential, self.family, strata, n_max, names)
        else:
            decide = partial(_decide_aggregate, self.family, [self.follow([stratum]) for stratum in strata])
        better, stop = self.separate(models, decide) if pairs else _NONE
        rates = {model: self.rates[model, task] for model in models}
        means = {model: rate.num_successes / rate.num_trials for model, rate in rates.items()}
        results = []
        for number, ((first, second), stratum) in enumerate(zip(pairs, strata, strict=True)):
            difference, interval = self.difference(stratum, rates[first], rates[second])
            num = int(stop[number]) if better[number] >= 0 else min(map(len, stratum.outcomes))
            results.append(_pair(first, second, difference, interval, int(better[number]), num))
        return _column(task, means, rates, results, n_max, (task,))

    def follow(self, strata: Sequence[Stratum]) -> AggregatePath:
        return follow_aggregate(strata, is_paired=self.family.is_paired)

    def difference(
        self, stratum: Stratum, first: SuccessRate, second: SuccessRate
    ) -> tuple[float, tuple[float, float]]:
        if not self.family.is_paired or len(stratum.outcomes[0]) == 0:
            low, high = difference_interval(first, second)
            return second.num_successes / second.num_trials - first.num_successes / first.num_trials, (low, high)
        difference, variance = estimate_difference(*stratum.outcomes, is_paired=True)
        return difference, _around(difference, variance**0.5)

    def compare_all(self, tasks: Sequence[str]) -> Column:
        """Compare the mean rates over the tasks that every model of the family ran."""
        present = self.models_on([])
        common = [task for task in tasks if self.models_on([task]) == present]
        left_out = tuple(task for task in tasks if task not in common)
        models = present if common else []
        n_max = {task: self.n_max(task, models) for task in common}
        pairs = pairs_of(models)
        strata = [[self.stratum(*pair, task, n_max[task]) for task in common] for pair in pairs]
        decide = partial(_decide_aggregate, self.family, [self.follow(each) for each in strata])
        better, stop = self.separate(models, decide) if pairs else _NONE
        rates, means = {}, {}
        for model in models:
            of_model = [self.rates[model, task] for task in common]
            rates[model] = add_rates(of_model)
            means[model] = sum(rate.num_successes / rate.num_trials for rate in of_model) / len(of_model)
        results = []
        for number, ((first, second), each) in enumerate(zip(pairs, strata, strict=True)):
            whole = all(len(stratum.outcomes[0]) for stratum in each)
            difference, error = macro_difference(each, is_paired=self.family.is_paired) if whole else (0.0, 1.0)
            num = int(stop[number]) if better[number] >= 0 else sum(min(map(len, stratum.outcomes)) for stratum in each)
            results.append(_pair(first, second, difference, _around(difference, error), int(better[number]), num))
        return _column(AGGREGATE, means, rates, results, sum(n_max.values()), tuple(common), left_out)


def _decide_sequential(
    family: Family, strata: Sequence[Stratum], n_max: int, names: Sequence[str], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Run the sequential test of all pairs of a task at the family's alpha / size."""
    table = find_table(n_max, family.alpha / (2 * size), is_paired=family.is_paired)
    nums = np.array([min(map(len, stratum.outcomes)) for stratum in strata])
    values = np.zeros((2, len(strata), n_max), bool)
    for number, stratum in enumerate(strata):
        for each, outcomes in zip(values, stratum.outcomes, strict=True):
            each[number, : min(n_max, len(outcomes))] = outcomes[:n_max]
    return run_tests(table, values[0], values[1], nums, draws=draw_decisions(names, n_max, family.seed))


def _decide_aggregate(family: Family, paths: Sequence[AggregatePath], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Run the aggregate test of all pairs at the family's alpha / size."""
    found = [path.decide(float(family.alpha) / size) for path in paths]
    better = np.array([-1 if decision.better is None else decision.better for decision in found])
    return better, np.array([decision.stop for decision in found])


def _around(difference: float, error: float) -> tuple[float, float]:
    return max(-1.0, difference - _Z95 * error), min(1.0, difference + _Z95 * error)


def _pair(
    first: str, second: str, difference: float, interval: tuple[float, float], better: int, stop: int
) -> PairResult:
    return PairResult(
        first=first,
        second=second,
        difference=difference,
        interval=interval,
        better=None if better < 0 else (first, second)[better],
        num_rollouts=stop,
    )


def _column(
    name: str,
    means: Mapping[str, float],
    rates: Mapping[str, SuccessRate],
    pairs: Sequence[PairResult],
    n_max: int,
    tasks: tuple[str, ...],
    left_out: tuple[str, ...] = (),
) -> Column:
    models = sorted(means, key=lambda model: (-means[model], model))
    separated = [(pair.first, pair.second) for pair in pairs if pair.better]
    return Column(
        name=name,
        models=tuple(models),
        rates=rates,
        means=means,
        letters=assign_letters(models, separated),
        pairs=tuple(pairs),
        n_max=n_max,
        tasks=tasks,
        left_out=left_out,
    )


def compare_against(
    rates: Mapping[tuple[str, str], SuccessRate],
    published: Mapping[str, PublishedCount],
    *,
    models: Sequence[str],
    alpha: float = 0.05,
) -> list[AgainstPublished]:
    """Compare models with a published one, by Boschloo's test on each task and a stratified exact test over tasks.

    The numbers of rollouts must have been fixed in advance. Invalid episodes count on neither side.

    Args:
        rates: (model, task) -> rate, of `count_outcomes`.
        published: of `find_published`.
    """
    found = []
    tasks = [task for task in published if any(rates.get((model, task)) for model in models)]
    for task in [*tasks, AGGREGATE]:
        rows = []
        for model in models:
            counted = [each for each in (tasks if task == AGGREGATE else [task]) if (model, each) in rates]
            mine = [rates[model, each] for each in counted if rates[model, each].num_trials]
            other = [published[each].rate for each in counted if rates[model, each].num_trials]
            if mine and (task != AGGREGATE or len(mine) > 1):
                rows.append(_against(model, task, mine, other))
        for row, is_separated in zip(rows, holm([row.p_value for row in rows], alpha), strict=True):
            found.append(AgainstPublished(**{**vars(row), "is_separated": is_separated}))
    return found


def _against(model: str, task: str, mine: Sequence[SuccessRate], other: Sequence[SuccessRate]) -> AgainstPublished:
    p_value = boschloo_p_value(other[0], mine[0]) if task != AGGREGATE else stratified_p_value(other, mine)
    means = [np.mean([rate.num_successes / rate.num_trials for rate in each]) for each in (mine, other)]
    return AgainstPublished(
        model=model,
        task=task,
        rate=add_rates(mine),
        published=add_rates(other),
        difference=float(means[0] - means[1]),
        p_value=p_value,
        is_separated=False,
    )


def balanced_rates(table: pa.Table, *, models: Sequence[str], tasks: Sequence[str]) -> dict[str, SuccessRate]:
    """Pool each model's rollouts as the paper does: of each task as many as of the one with the fewest.

    Counts the first ones in the order of the rollouts, of the tasks that all models ran.
    """
    outcomes = outcomes_by_seed(table)
    common = [task for task in tasks if all(outcomes.get((model, task)) for model in models)]
    rates = {}
    for model in models:
        num = min((len(outcomes[model, task]) for task in common), default=0)
        kept = [success for task in common for success in list(outcomes[model, task].values())[:num]]
        rates[model] = SuccessRate(num_successes=sum(kept), num_trials=len(kept))
    return rates
