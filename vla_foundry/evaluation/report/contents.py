"""What a report shows: the tables, and what its figures are drawn from, of the models and tasks that a reader picks.

All comparisons are those of the family (comparison/family.py). What is picked changes no letter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vla_foundry.evaluation.comparison.compare import AgainstPublished, Column, Comparison, PairResult
from vla_foundry.evaluation.comparison.rollouts import Rollouts, count_faults, count_outcomes
from vla_foundry.evaluation.report.drawings import Violin
from vla_foundry.evaluation.report.tables import Table, columns_of, percent
from vla_foundry.evaluation.results import SuccessRate
from vla_foundry.evaluation.statistics import beta_posterior, macro_posterior

# why an episode is invalid, see count_faults
FAULTS = ("simulator", "infrastructure", "other")
KINDS = ("success", "failure", *FAULTS, "pending")


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Everything a report is made of."""

    rollouts: Rollouts
    comparison: Comparison
    # shown, in the order of the last column
    models: tuple[str, ...]
    columns: tuple[Column, ...]
    # (column, model) -> its posterior and the letters
    violins: Mapping[tuple[str, str], Violin]
    # (model, task) -> {seed: outcome, or "trivial" for a success that says nothing}
    outcomes: Mapping[tuple[str, str], Mapping[int, str]]
    tables: Mapping[str, Table]
    against: str | None = None
    # SHA-256 of the declared family; None: none was declared
    digest: str | None = None

    def shown_on(self, column: Column) -> list[str]:
        """Return the picked models that have rollouts in a column, from the best to the worst."""
        return shown_models(column, self.models)

    def title(self, column: Column) -> str:
        """Return the name of a column to show."""
        name = self.rollouts.task_names.get(column.name, column.name)
        return f"{name}: mean of {len(column.tasks)}" if is_aggregate(column) else name


def collect(
    rollouts: Rollouts,
    comparison: Comparison,
    *,
    models: Sequence[str],
    tasks: Sequence[str],
    against: str | None = None,
    published: Sequence[AgainstPublished] = (),
    digest: str | None = None,
) -> Contents:
    """Compute all tables.

    Args:
        models: to show, of the family.
        tasks: to show, of the family; the mean over all tasks is always shown.
        against: name of a published policy.
        published: comparisons with it.
        digest: SHA-256 of the declared family.
    """
    columns = tuple(
        column for column in comparison.columns if column.models and (column.name in tasks or is_aggregate(column))
    )
    order = shown_models(columns[-1], models)
    models = (*order, *(model for model in models if model not in order))
    family = comparison.family.models
    kept = pc.and_(  # type: ignore[attr-defined]
        pc.is_in(rollouts.table["model"], pa.array(models, pa.string())),  # type: ignore[attr-defined]
        pc.is_in(rollouts.table["task"], pa.array([task for each in columns for task in each.tasks], pa.string())),  # type: ignore[attr-defined]
    )
    table = rollouts.table.filter(kept)
    outcomes = _outcomes(table)
    floors = _floors(rollouts.table, columns)
    violins = _violins(columns, models, count_outcomes(table), floors)
    tables = [
        _rates(columns, violins),
        _pairs(columns, models),
        _readings(columns[-1], models, table),
        _seeds(columns, models, outcomes),
        _failures(table, models),
        _reasons(table),
        _trivial(floors, outcomes),
        _budgets(rollouts, models, outcomes),
    ]
    if against is not None:
        tables.append(_against(against, [row for row in published if row.model in models], len(family)))
    return Contents(
        rollouts=rollouts,
        comparison=comparison,
        models=models,
        columns=columns,
        violins=violins,
        outcomes=outcomes,
        tables={each.name: each for each in tables},
        against=against,
        digest=digest,
    )


def is_aggregate(column: Column) -> bool:
    """Return whether a column is the mean over tasks."""
    return column.name not in column.tasks


def shown_models(column: Column, models: Sequence[str]) -> list[str]:
    """Return the picked models that have rollouts in a column, from the best to the worst."""
    return [model for model in column.models if model in models]


def shown_pairs(column: Column, models: Sequence[str]) -> list[PairResult]:
    """Return the pairs of picked models in a column."""
    return [pair for pair in column.pairs if pair.first in models and pair.second in models]


def ordered_pair(pair: PairResult, column: Column) -> tuple[str, str, float, tuple[float, float]]:
    """Return the better-ranked model of a pair, the other one, and the first's rate minus the second's."""
    (low, high), ranks = pair.interval, {model: rank for rank, model in enumerate(column.models)}
    if ranks[pair.first] < ranks[pair.second]:
        return pair.first, pair.second, 0.0 - pair.difference, (-high, -low)
    return pair.second, pair.first, pair.difference, (low, high)


def _outcomes(table: pa.Table) -> dict[tuple[str, str], dict[int, str]]:
    outcomes: dict[tuple[str, str], dict[int, str]] = {}
    columns = (table[name].to_pylist() for name in ("model", "task", "index", "outcome", "is_trivial"))
    for model, task, index, outcome, is_trivial in zip(*columns, strict=True):
        outcomes.setdefault((model, task), {})[index] = "trivial" if is_trivial and outcome == "success" else outcome
    return outcomes


def _floors(table: pa.Table, columns: Sequence[Column]) -> dict[tuple[str, str], tuple[int, int]]:
    """Return {(set of models, task): (starts that succeed by themselves, starts)} of every task shown."""
    tasks = {task for column in columns for task in column.tasks}
    starts: dict[tuple[str, str], dict[int, bool]] = {}
    for model, task, index, is_trivial in zip(
        *(table[name].to_pylist() for name in ("model", "task", "index", "is_trivial")), strict=True
    ):
        if task in tasks:
            found = starts.setdefault((model.rpartition("/")[0], task), {})
            found[index] = found.get(index, False) or is_trivial
    return {key: (sum(found.values()), len(found)) for key, found in sorted(starts.items())}


def _violins(
    columns: Sequence[Column],
    models: Sequence[str],
    rates: Mapping[tuple[str, str], SuccessRate],
    floors: Mapping[tuple[str, str], tuple[int, int]],
) -> dict[tuple[str, str], Violin]:
    from scipy import stats

    keys = [(column, model) for column in columns for model in shown_models(column, models)]
    parameters = []
    for column, model in keys:
        counts = [rates[model, task] for task in column.tasks]
        (first, *more) = counts
        parameters.append(macro_posterior(counts) if more else beta_posterior(first.num_successes, first.num_trials))
    a, b = np.array(parameters).reshape(-1, 2).T
    low, high = stats.beta.ppf(0.025, a, b), stats.beta.ppf(0.975, a, b)
    violins = {}
    for number, (column, model) in enumerate(keys):
        rate = column.rates[model]
        shares = [floors[model.rpartition("/")[0], task] for task in column.tasks]
        violins[column.name, model] = Violin(
            model=model,
            note=f"{rate.num_successes}/{rate.num_trials} = {percent(column.means[model])}%",
            letters=column.letters[model],
            parameters=parameters[number],
            rate=column.means[model],
            interval=(float(low[number]), float(high[number])),
            floor=sum(trivial / total for trivial, total in shares) / len(shares),
        )
    return violins


def _rates(columns: Sequence[Column], violins: Mapping[tuple[str, str], Violin]) -> Table:
    rows = []
    for (name, model), violin in violins.items():
        rate = next(column for column in columns if column.name == name).rates[model]
        counts = (rate.num_successes, rate.num_trials, rate.num_invalid)
        rows.append((name, model, violin.letters, *counts, violin.rate, *violin.interval, violin.floor))
    return Table(
        name="rates",
        caption="Success rates with the 95% interval of the posterior",
        columns=columns_of(
            ("text", "task", "model", "letters"),
            ("count", "successes", "rollouts", "invalid"),
            ("rate", "rate", "low", "high", "floor"),
        ),
        rows=rows,
    )


def _pairs(columns: Sequence[Column], models: Sequence[str]) -> Table:
    rows = []
    for column in columns:
        for pair in shown_pairs(column, models):
            first, second, difference, interval = ordered_pair(pair, column)
            rows.append((column.name, first, second, difference, *interval, pair.better, pair.num_rollouts))
    return Table(
        name="pairs",
        caption="Differences of pairs with the 95% interval of each alone",
        columns=columns_of(
            ("text", "task", "model", "other"),
            ("difference", "difference", "low", "high"),
            ("text", "separated: better"),
            ("count", "rollouts of each"),
        ),
        rows=rows,
    )


def _readings(column: Column, models: Sequence[str], table: pa.Table) -> Table:
    """Compare the readings: invalid episodes as failures, and without starts that succeed by themselves."""
    readings = (
        count_outcomes(table),
        count_outcomes(table, invalid_is_failure=True),
        count_outcomes(table, without_trivial=True),
    )
    rows = []
    for model in shown_models(column, models):
        means = []
        for rates in readings:
            counted = [rates[model, task] for task in column.tasks]
            shares = [rate.num_successes / rate.num_trials for rate in counted if rate.num_trials]
            means.append(sum(shares) / len(shares) if shares else None)
        rows.append((model, *means))
    return Table(
        name="readings",
        caption=f"{column.name}: other ways to count",
        columns=columns_of(
            ("text", "model"), ("rate", "as shown", "invalid counted as failures", "without trivial starts")
        ),
        rows=rows,
    )


def _seeds(
    columns: Sequence[Column], models: Sequence[str], outcomes: Mapping[tuple[str, str], Mapping[int, str]]
) -> Table:
    rows = []
    for column in columns:
        if not is_aggregate(column):
            for model in shown_models(column, models):
                found = outcomes[model, column.name]
                kinds = (("success", "trivial"), ("failure",), ("invalid",), ("trivial",))
                rows.append((column.name, model, *(_ranges(found, kind) for kind in kinds)))
    names = ("task", "model", "succeeded", "failed", "invalid", "succeeded by itself")
    return Table(name="seeds", caption="Seeds by outcome", columns=columns_of(("text", *names)), rows=rows)


def _ranges(outcomes: Mapping[int, str], kinds: tuple[str, ...]) -> str:
    """Return the seeds with these outcomes as text, such as 0-3 7."""
    stretches: list[list[int]] = []
    for seed in sorted(seed for seed, outcome in outcomes.items() if outcome in kinds):
        if stretches and seed == stretches[-1][1] + 1:
            stretches[-1][1] = seed
        else:
            stretches.append([seed, seed])
    return " ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in stretches)


def _failures(table: pa.Table, models: Sequence[str]) -> Table:
    counted = table.group_by(["model", "outcome"]).aggregate([([], "count_all")]).to_pylist()
    counts = {(row["model"], row["outcome"]): row["count_all"] for row in counted}
    invalid = table.filter(pc.equal(table["outcome"], "invalid"))  # type: ignore[attr-defined]
    rows = []
    for model in models:
        faults = count_faults(invalid.filter(pc.equal(invalid["model"], model)))  # type: ignore[attr-defined]
        rows.append(
            (model, *(faults.get(kind, 0) if kind in FAULTS else counts.get((model, kind), 0) for kind in KINDS))
        )
    return Table(
        name="failures",
        caption="Episodes by outcome; invalid ones by what failed",
        columns=columns_of(("text", "model"), ("count", *KINDS)),
        rows=rows,
    )


def _reasons(table: pa.Table) -> Table:
    """Count the messages of failed and invalid episodes, the 20 most frequent ones."""
    told = table.filter(pc.is_valid(table["reason"]))  # type: ignore[attr-defined]
    counted = told.group_by(["outcome", "reason"]).aggregate([([], "count_all")]).to_pylist()
    rows = sorted((-row["count_all"], row["outcome"], row["reason"]) for row in counted if row["reason"])
    return Table(
        name="reasons",
        caption=f"Messages of failed and invalid episodes{', the 20 most frequent' if len(rows) > 20 else ''}",
        columns=columns_of(("count", "episodes"), ("text", "outcome", "message")),
        rows=[(-count, outcome, reason) for count, outcome, reason in rows[:20]],
    )


def _trivial(
    floors: Mapping[tuple[str, str], tuple[int, int]], outcomes: Mapping[tuple[str, str], Mapping[int, str]]
) -> Table:
    shown = {(model.rpartition("/")[0], task) for model, task in outcomes}
    rows = [
        (group or "-", task, trivial, total, trivial / total)
        for (group, task), (trivial, total) in floors.items()
        if trivial and (group, task) in shown
    ]
    return Table(
        name="trivial",
        caption="Starts that succeed whatever the policy does",
        columns=columns_of(("text", "set", "task"), ("count", "trivial", "starts"), ("rate", "floor")),
        rows=rows,
    )


def _budgets(rollouts: Rollouts, models: Sequence[str], outcomes: Mapping[tuple[str, str], Mapping[int, str]]) -> Table:
    rows = []
    for model in models:
        mine = {task: found for (name, task), found in outcomes.items() if name == model}
        planned = sum(rollouts.budgets.get((model, task), len(found)) for task, found in mine.items())
        run = sum(outcome not in ("pending", "invalid") for found in mine.values() for outcome in found.values())
        rows.append((model, len(mine), planned, run, planned - run, run / planned if planned else None))
    return Table(
        name="budget",
        caption="Rollouts that were planned before the first one, and that count",
        columns=columns_of(("text", "model"), ("count", "tasks", "planned", "run", "not run"), ("rate", "used")),
        rows=rows,
    )


def _against(name: str, found: Sequence[AgainstPublished], num_models: int) -> Table:
    rows = []
    for row in found:
        counts = (row.rate.num_successes, row.rate.num_trials, row.published.num_successes, row.published.num_trials)
        verdict = ("better" if row.difference > 0 else "worse") if row.is_separated else "not separated"
        rows.append((row.task, row.model, *counts, row.difference, row.p_value, verdict))
    return Table(
        name="against",
        caption=f"Against the published {name}: exact tests, corrected over the {num_models} models of each task",
        columns=columns_of(
            ("text", "task", "model"),
            ("count", "successes", "rollouts", "published successes", "published rollouts"),
            ("difference", "difference"),
            ("p_value", "p"),
            ("text", "verdict"),
        ),
        rows=rows,
    )
