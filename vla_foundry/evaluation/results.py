"""@: the outcomes of rollouts, in the published layout.

    <root>/<policy>/<task>/rollouts/<time>/results.json
      max_sample_size_per_model   rollouts that were planned before the first one
      evaluations                 one object an episode:
        skill_type, scenario_index                     task and seed of the start
        is_success, is_pending, total_time             true or false; of an invalid episode null; seconds simulated
        failure_message                                what went wrong, if it was not just the policy's lack of skill
        outcome, instruction, num_steps, latency_ms    ours besides; outcome is success, failure, invalid or null
      settings                    ours: all that the outcomes depend on

An episode is invalid if the simulator failed; it is no trial, and is run again when the evaluation goes on.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from vla_foundry.evaluation.statistics import wilson_interval
from vla_foundry.storage.uri import write_text

RESULTS_NAME = "results.json"
ROLLOUTS_FOLDER = "rollouts"

Outcome = Literal["success", "failure", "invalid"]


@dataclass(frozen=True, kw_only=True)
class EpisodeResult:
    """One episode; what is None is not known yet."""

    task: str
    seed: int
    instruction: str | None = None
    outcome: Outcome | None = None
    # actions that were executed
    num_steps: int | None = None
    # seconds of simulated time
    seconds: float | None = None
    # mean time of predicting a chunk of actions, with all that shared its batch; None: the policy predicts none
    latency_ms: float | None = None
    failure_message: str | None = None

    @property
    def is_final(self) -> bool:
        """True if the episode counts."""
        return self.outcome in ("success", "failure")


@dataclass(frozen=True, kw_only=True)
class SuccessRate:
    """How often a policy succeeded."""

    num_successes: int
    num_trials: int
    num_invalid: int = 0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, of 95%."""
        return wilson_interval(self.num_successes, self.num_trials)

    def format(self) -> str:
        """In words."""
        low, high = self.interval
        share = f"{self.num_successes / self.num_trials:.0%}" if self.num_trials else "-"
        invalid = f", {self.num_invalid} invalid" if self.num_invalid else ""
        return f"{self.num_successes}/{self.num_trials} = {share} [{low:.0%}, {high:.0%}]{invalid}"


def count_successes(episodes: Sequence[EpisodeResult]) -> SuccessRate:
    """Count final episodes; invalid ones are no trials."""
    return SuccessRate(
        num_successes=sum(episode.outcome == "success" for episode in episodes),
        num_trials=sum(episode.is_final for episode in episodes),
        num_invalid=sum(episode.outcome == "invalid" for episode in episodes),
    )


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
    """Read episodes and settings of a results.json that `write_results` wrote.

    Raises:
        ValueError: it is broken; the file is named.
    """
    try:
        values = json.loads(path.read_text())
        return [_from_json(item) for item in values["evaluations"]], values["settings"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no results file of `vla-foundry evaluate` ({error!r}). Name another output."
        ) from None


def find_results(task_folder: Path) -> Path | None:
    """The newest results.json of a task's folder."""
    found = sorted(task_folder.glob(f"{ROLLOUTS_FOLDER}/*/{RESULTS_NAME}"))
    return found[-1] if found else None


def _to_json(episode: EpisodeResult) -> dict[str, Any]:
    values = asdict(episode)
    return {
        "skill_type": values.pop("task"),
        "scenario_index": values.pop("seed"),
        "is_success": episode.outcome == "success" if episode.is_final else None,
        "is_pending": episode.outcome is None,
        "total_time": values.pop("seconds"),
        "failure_message": values.pop("failure_message"),
        **values,
    }


def _from_json(values: Mapping[str, Any]) -> EpisodeResult:
    outcome = values["outcome"]
    if outcome is not None and outcome not in get_args(Outcome):
        raise ValueError(f"unknown outcome {outcome!r}")
    return EpisodeResult(
        task=values["skill_type"],
        seed=values["scenario_index"],
        seconds=values["total_time"],
        **{key: values[key] for key in ("instruction", "outcome", "num_steps", "latency_ms", "failure_message")},
    )
