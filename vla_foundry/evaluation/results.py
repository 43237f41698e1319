"""Outcomes of rollouts and success rates, in memory and in the published layout on disk.

    <root>/<policy>/<task>/rollouts/<time>/results.json
      max_sample_size_per_model   rollouts planned before the first one
      evaluations                 one object per episode:
        skill_type, scenario_index                     task and seed of the start
        is_success, is_pending, total_time             true or false (null: invalid episode); simulated seconds
        failure_message                                what went wrong, unless the policy simply did not succeed
        outcome, instruction, num_steps, latency_ms    our additions; outcome is success, failure, trivial, invalid or
                                                       null
        failure_kind, latency_p50_ms, latency_p99_ms   our additions, where there are any; FailureKind
      settings                    our addition: everything the outcomes depend on

An episode is invalid if the simulator failed; it runs again when the evaluation resumes. It is trivial if the start is
a success already. Neither is a trial.
"""

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, get_args

from vla_foundry.inference.loading import find_run_folder
from vla_foundry.record import record_evaluation
from vla_foundry.storage.uri import is_remote, read_object, write_text

RESULTS_NAME = "results.json"
SUMMARY_NAME = "summary.json"
ROLLOUTS_FOLDER = "rollouts"

Outcome = Literal["success", "failure", "trivial", "invalid"]
# timeout: no success within the step limit; terminated: the simulator ended the episode; the last two are invalid
FailureKind = Literal["timeout", "terminated", "action_not_finite", "simulator_failed", "worker_died"]
_OPTIONAL = ("failure_kind", "latency_p50_ms", "latency_p99_ms")


@dataclass(frozen=True, kw_only=True)
class EpisodeResult:
    """One episode; None means not known yet."""

    task: str
    seed: int
    instruction: str | None = None
    outcome: Outcome | None = None
    # actions that were executed
    num_steps: int | None = None
    # seconds of simulated time
    seconds: float | None = None
    # times that the episode waited for a chunk of actions: mean, median, 99th percentile; None: nothing was predicted
    latency_ms: float | None = None
    latency_p50_ms: float | None = None
    latency_p99_ms: float | None = None
    failure_message: str | None = None
    failure_kind: FailureKind | None = None

    @property
    def is_trial(self) -> bool:
        """True if the episode counts."""
        return self.outcome in ("success", "failure")

    @property
    def is_final(self) -> bool:
        """True if the episode does not run again."""
        return self.is_trial or self.outcome == "trivial"


@dataclass(frozen=True, kw_only=True)
class SuccessRate:
    """How often a policy succeeded."""

    num_successes: int
    num_trials: int
    num_invalid: int = 0
    num_trivial: int = 0

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% Wilson interval."""
        return wilson_interval(self.num_successes, self.num_trials)

    def format(self) -> str:
        """Format as `successes/trials = rate [low, high]`."""
        low, high = self.interval
        share = f"{self.num_successes / self.num_trials:.0%}" if self.num_trials else "-"
        others = {"invalid": self.num_invalid, "trivial": self.num_trivial}
        rest = "".join(f", {number} {name}" for name, number in others.items() if number)
        return f"{self.num_successes}/{self.num_trials} = {share} [{low:.0%}, {high:.0%}]{rest}"


def count_successes(episodes: Iterable[EpisodeResult]) -> SuccessRate:
    """Count episodes; only successes and failures are trials."""
    return rate_of(Counter(episode.outcome for episode in episodes))


def rate_of(counts: Mapping[Outcome | None, int]) -> SuccessRate:
    """Return the success rate of so many episodes of each outcome; None: pending."""
    return SuccessRate(
        num_successes=counts.get("success", 0),
        num_trials=counts.get("success", 0) + counts.get("failure", 0),
        num_invalid=counts.get("invalid", 0),
        num_trivial=counts.get("trivial", 0),
    )


def add_rates(rates: Iterable[SuccessRate]) -> SuccessRate:
    """Pool the episodes of several tasks."""
    rates = tuple(rates)
    return SuccessRate(
        num_successes=sum(rate.num_successes for rate in rates),
        num_trials=sum(rate.num_trials for rate in rates),
        num_invalid=sum(rate.num_invalid for rate in rates),
        num_trivial=sum(rate.num_trivial for rate in rates),
    )


def write_rates(rates: Mapping[str, SuccessRate]) -> None:
    """Print the success rate of each task, and of all together."""
    for task, rate in rates.items():
        sys.stdout.write(f"{task}: {rate.format()}\n")
    if len(rates) > 1:
        sys.stdout.write(f"all tasks: {add_rates(rates.values()).format()}\n")


def wilson_interval(num_successes: int, num_trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a success rate (Wilson 1927); (0, 1) without trials."""
    assert 0 <= num_successes <= num_trials, (num_successes, num_trials)
    if num_trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate, spread = num_successes / num_trials, z * z / num_trials
    middle = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / num_trials + spread / (4 * num_trials)) / (1 + spread)
    # the interval reaches 0 or 1 exactly at the ends; rounding may miss that
    low = 0.0 if num_successes == 0 else max(0.0, middle - half)
    high = 1.0 if num_successes == num_trials else min(1.0, middle + half)
    return low, high


def write_results(
    path: Path, episodes: Sequence[EpisodeResult], *, max_sample_size: int, settings: Mapping[str, Any]
) -> None:
    """Write results.json whole or not at all."""
    rate = count_successes(episodes)
    values = {
        "max_sample_size_per_model": max_sample_size,
        "num_evaluated": rate.num_trials,
        "num_success": rate.num_successes,
        "success_rate": rate.num_successes / rate.num_trials if rate.num_trials else None,
        "settings": dict(settings),
        "evaluations": [_to_json(episode) for episode in episodes],
    }
    write_text(str(path), json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def read_results(path: Path) -> tuple[list[EpisodeResult], dict[str, Any]]:
    """Read the episodes and settings of a results.json.

    Raises:
        ValueError: the file is broken.
    """
    try:
        values = read_object(str(path))
        for key, kind in (("settings", dict), ("max_sample_size_per_model", int), ("evaluations", list)):
            if type(values[key]) is not kind:
                raise ValueError(f"{key} is {values[key]!r:.40}")
        episodes = [_from_json(item) for item in values["evaluations"]]
        if len({(episode.task, episode.seed) for episode in episodes}) < len(episodes):
            raise ValueError("an episode is there twice")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a results file of `vla-foundry evaluate` ({error!r}). Choose another --output."
        ) from None
    return episodes, values["settings"]


def find_results(task_folder: Path) -> Path | None:
    """Return the newest results.json in a task's folder."""
    found = sorted(task_folder.glob(f"{ROLLOUTS_FOLDER}/*/{RESULTS_NAME}"))
    return found[-1] if found else None


def write_summary(path: Path, rates: Mapping[str, SuccessRate], **facts: Any) -> None:
    """Write summary.json: facts, the success rate of each task, and that of all tasks together."""
    tasks = {task: _rate_to_json(rate) for task, rate in rates.items()}
    values = {**facts, "tasks": tasks, "all": _rate_to_json(add_rates(rates.values()))}
    write_text(str(path), json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def record_rates(
    checkpoint: str | None, name: str, rates: Mapping[str, SuccessRate], settings: Mapping[str, Any]
) -> None:
    """Keep success rates in the folder and the record of the run that was evaluated, where it can be written to."""
    if checkpoint is None or is_remote(checkpoint):
        return
    run_folder = find_run_folder(checkpoint)
    if not os.access(run_folder, os.W_OK):
        return
    metrics = {}
    for task, rate in rates.items():
        counts = _rate_to_json(rate)
        metrics[task] = {"value": counts["success_rate"], "interval": counts["interval_95"], "n": rate.num_trials}
    record_evaluation(run_folder, {"name": name, "metrics": metrics, "settings": dict(settings)})


def read_summary(path: Path) -> dict[str, SuccessRate]:
    """Read the success rate of each task from a summary.json."""
    tasks = read_object(str(path))["tasks"]
    return {
        task: SuccessRate(
            num_successes=counts["successes"],
            num_trials=counts["trials"],
            num_invalid=counts["invalid"],
            num_trivial=counts.get("trivial", 0),
        )
        for task, counts in tasks.items()
    }


def _rate_to_json(rate: SuccessRate) -> dict[str, Any]:
    return {
        "successes": rate.num_successes,
        "trials": rate.num_trials,
        "invalid": rate.num_invalid,
        "trivial": rate.num_trivial,
        "success_rate": rate.num_successes / rate.num_trials if rate.num_trials else None,
        "interval_95": list(rate.interval),
    }


def _to_json(episode: EpisodeResult) -> dict[str, Any]:
    # without additions that say nothing: as in files of earlier versions
    values = {key: value for key, value in asdict(episode).items() if value is not None or key not in _OPTIONAL}
    return {
        "skill_type": values.pop("task"),
        "scenario_index": values.pop("seed"),
        "is_success": episode.outcome == "success" if episode.is_trial else None,
        "is_pending": episode.outcome is None,
        "total_time": values.pop("seconds"),
        "failure_message": values.pop("failure_message"),
        **values,
    }


def _from_json(values: Mapping[str, Any]) -> EpisodeResult:
    outcome = values["outcome"]
    if outcome is not None and outcome not in get_args(Outcome):
        raise ValueError(f"unknown outcome {outcome!r}")
    seed = values["scenario_index"]
    if type(seed) is not int or seed < 0:
        raise ValueError(f"scenario_index {seed!r} is not a seed")
    episode = EpisodeResult(
        task=values["skill_type"],
        seed=seed,
        seconds=values["total_time"],
        **{key: values.get(key) for key in _OPTIONAL},
        **{key: values[key] for key in ("instruction", "outcome", "num_steps", "latency_ms", "failure_message")},
    )
    if any(values[key] is not value for key, value in _to_json(episode).items() if key in ("is_success", "is_pending")):
        raise ValueError(f"is_success or is_pending of seed {seed} contradicts its outcome {outcome!r}")
    return episode


def check_output(flag: str, path: str | None) -> None:
    """Raise ValueError, before the work is done, if a local file cannot be written."""
    if path is None or is_remote(path):
        return
    place = Path(path).expanduser().absolute()
    folder = next(parent for parent in place.parents if parent.exists())
    if place.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        why = "is a folder" if place.is_dir() else f"cannot be written to {folder}"
        raise ValueError(f"{flag} {path} {why}. Name another file.")


def publish_table(table: Mapping[str, Any], *, checkpoint: str | None, output: str | None) -> None:
    """Print a table of metrics (docs/benchmarks.md), and write it to its run, as evaluation/<name>.json, and to the
    output."""
    _show_table(table)
    if checkpoint is not None:
        folder = find_run_folder(checkpoint)
        if not is_remote(folder) and os.access(folder, os.W_OK):
            record_evaluation(folder, table)
        elif output is None:
            sys.stderr.write(f"The result cannot be kept in {folder}. Name a file with --output.\n")
    if output is not None:
        write_text(output, json.dumps(table, indent=1, ensure_ascii=False) + "\n")


def _show_table(table: Mapping[str, Any]) -> None:
    width = max(map(len, table["metrics"]))
    for name, metric in table["metrics"].items():
        limits = metric.get("interval")
        interval = "" if limits is None else f" [{limits[0]:.4f}, {limits[1]:.4f}]"
        sys.stdout.write(f"{name:<{width}} {metric['value']:.4f}{interval} n={metric['n']}\n")
