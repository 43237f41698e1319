"""The paper's published counts, by name: `CS/Foundry-Qwen3VLA-2.1B` and 20 other policies on up to 19 tasks.

published.csv was made from the 390 files that the paper's authors published with their code (MIT licence, Copyright (c)
2026 Toyota Research Institute):

    python -m vla_foundry.evaluation.comparison.published FOLDER > vla_foundry/evaluation/comparison/published.csv

`failures` holds the policies' own ones; the authors count the invalid episodes as failures too. `trivial` says how many
of the starts succeed whatever the policy does.
"""

import csv
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TextIO

from vla_foundry.evaluation.results import SuccessRate
from vla_foundry.registry import unknown_name_message

PATH = Path(__file__).with_name("published.csv")
# tasks that none of the policies saw in training; the others are the 16 "seen" ones
UNSEEN_TASKS = (
    "BimanualPlaceAvocadoFromBowlIntoBin",
    "BimanualPutSpatulaOnPlateFromUtensilCrock",
    "PutMugInCenterOfTable",
)
_COLUMNS = ("model", "task", "successes", "failures", "invalid", "trivial")


@dataclass(frozen=True, kw_only=True)
class PublishedCount:
    """Rollouts of one policy on one task; neither their order nor their seeds are known here."""

    successes: int
    failures: int
    invalid: int
    trivial: int

    @property
    def rate(self) -> SuccessRate:
        """The policy's own outcomes."""
        return SuccessRate(
            num_successes=self.successes, num_trials=self.successes + self.failures, num_invalid=self.invalid
        )

    @property
    def published_rate(self) -> SuccessRate:
        """The authors' reading: invalid episodes are failures."""
        return SuccessRate(num_successes=self.successes, num_trials=self.successes + self.failures + self.invalid)


@cache
def published_counts() -> dict[str, dict[str, PublishedCount]]:
    """Return all published counts: {model: {task: count}}."""
    counts: dict[str, dict[str, PublishedCount]] = {}
    with PATH.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            numbers = {name: int(row[name]) for name in _COLUMNS[2:]}
            counts.setdefault(row["model"], {})[row["task"]] = PublishedCount(**numbers)
    return counts


def find_published(model: str) -> dict[str, PublishedCount]:
    """Return the counts of one policy by task.

    Raises:
        ValueError: no such policy was published.
    """
    counts = published_counts()
    if model not in counts:
        raise ValueError(unknown_name_message("published policy", model, sorted(counts)))
    return counts[model]


def write_published(folder: Path, file: TextIO) -> None:
    """Count the rollouts below a folder and write them as CSV."""
    from vla_foundry.evaluation.comparison.rollouts import count_outcomes, read_rollouts

    table = read_rollouts(folder).table
    rates = count_outcomes(table)
    budget = count_outcomes(table, invalid_is_failure=True)
    left = count_outcomes(table, invalid_is_failure=True, without_trivial=True)
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for (model, task), rate in rates.items():
        trivial = budget[model, task].num_trials - left[model, task].num_trials
        failures = rate.num_trials - rate.num_successes
        writer.writerow((model, task, rate.num_successes, failures, rate.num_invalid, trivial))


if __name__ == "__main__":
    write_published(Path(sys.argv[1]), sys.stdout)
