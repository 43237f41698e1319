"""The page of the action stage: how often the policy succeeds, beside what needs no policy, and without its parts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vla_foundry.evaluation.results import SuccessRate
from vla_foundry.evaluation.run import SUMMARY_NAME

# folder of an evaluation -> its name on the page
_NAMES = {
    "vla": "policy",
    "null": "no motion",
    "random": "random motion",
    "other_images": "policy, pictures of another episode",
    "wrong_instruction": "policy, told the opposite",
    "vla_from_scratch": "the same policy, trained from nothing",
}
_GOAL = 0.6
_COLUMN = 13


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What came of letting one policy act."""

    name: str
    rates: dict[str, SuccessRate]

    @property
    def total(self) -> SuccessRate:
        """Over all tasks."""
        return SuccessRate(
            num_successes=sum(rate.num_successes for rate in self.rates.values()),
            num_trials=sum(rate.num_trials for rate in self.rates.values()),
            num_invalid=sum(rate.num_invalid for rate in self.rates.values()),
        )


def write_vla_report(evaluation: Path, names: Sequence[str], action_error: Path, *, summary: Path, figure: Path) -> str:
    """Write the page, and draw success rates with their intervals.

    Args:
        evaluation: folder that `vla-foundry evaluate` wrote to.
        names: what was evaluated, in the order of the page.
        action_error: file of errors that `write_action_error` wrote.
        summary: text file to write.
        figure: PNG to write.

    Returns:
        The page.
    """
    evaluations = [read_evaluation(evaluation / name) for name in names]
    text = "\n".join(
        (
            "Action stage: success in closed loop, with Wilson's interval of 95%",
            *format_rates(evaluations),
            f"  goal: {_GOAL:.0%} of all for the policy, at most 10% without one",
            *action_error.read_text(encoding="utf-8").rstrip("\n").split("\n"),
            f"  figure                {figure}",
            f"  pictures of episodes  {evaluation / names[0] / 'contact_sheet.png'}",
        )
    )
    draw_rates(evaluations, figure)
    summary.write_text(text + "\n", encoding="utf-8")
    return text


def read_evaluation(folder: Path) -> Evaluation:
    """Read the summary that `vla-foundry evaluate` wrote into a folder."""
    values = json.loads((folder / SUMMARY_NAME).read_text(encoding="utf-8"))
    rates = {task: _rate_of(counts) for task, counts in values["tasks"].items()}
    return Evaluation(name=_NAMES.get(folder.name, folder.name), rates=rates)


def _rate_of(counts: Mapping[str, int]) -> SuccessRate:
    return SuccessRate(
        num_successes=counts["successes"], num_trials=counts["trials"], num_invalid=counts.get("invalid", 0)
    )


def format_rates(evaluations: Sequence[Evaluation]) -> list[str]:
    """Write a table: a row for each policy, a column for each task, and all tasks with their interval."""
    tasks = list(evaluations[0].rates)
    heads = [task.partition("-v3")[0] for task in tasks]
    width = max(len(one.name) for one in evaluations)
    lines = [f"  {'':{width}}" + "".join(f"{head:>{_COLUMN}}" for head in heads) + f"{'all':>25}"]
    for one in evaluations:
        cells = [f"{one.rates[task].num_successes}/{one.rates[task].num_trials}" for task in tasks]
        lines.append(
            f"  {one.name:{width}}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells) + f"{one.total.format():>25}"
        )
    return lines


def draw_rates(evaluations: Sequence[Evaluation], path: Path) -> None:
    """Draw success rates over all tasks, with their intervals, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.5 * len(evaluations)), dpi=120)
    for place, one in enumerate(reversed(evaluations)):
        rate = one.total.num_successes / max(one.total.num_trials, 1)
        low, high = one.total.interval
        axes.barh(place, rate, color="#4878a8", height=0.6)
        axes.errorbar(rate, place, xerr=[[rate - low], [high - rate]], color="#222222", capsize=3)
    axes.set_yticks(range(len(evaluations)), [one.name for one in reversed(evaluations)])
    axes.set(xlim=(0, 1), xlabel="success rate over all tasks")
    axes.grid(axis="x", alpha=0.25)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
