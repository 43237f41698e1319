"""Rollouts end when the test has told a policy and its baseline apart; the error holds, and rollouts are saved."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from vla_foundry.evaluation.comparison.compare import compare
from vla_foundry.evaluation.comparison.family import Family
from vla_foundry.evaluation.comparison.published import find_published
from vla_foundry.evaluation.comparison.rollouts import read_rollouts
from vla_foundry.evaluation.comparison.stopping import Baseline, StoppingRule, open_rule, read_baseline
from vla_foundry.evaluation.results import EpisodeResult, write_results


def write(root: Path, model: str, outcomes: list[bool], *, task: str = "lift", budget: int = 50) -> Path:
    path = root / model / task / "rollouts" / "t" / "results.json"
    episodes = [
        EpisodeResult(task=task, seed=seed, outcome="success" if outcome else "failure")
        for seed, outcome in enumerate(outcomes)
    ]
    write_results(path, episodes, max_sample_size=budget, settings={})
    return root / model


def run_until_decided(rule: StoppingRule, outcomes: list[bool], *, batch_size: int) -> tuple[int | None, int]:
    """Roll out in batches as `evaluate` does; return the better one and the rollouts that it took."""
    for num in range(batch_size, len(outcomes) + batch_size, batch_size):
        done = dict(enumerate(outcomes[:num]))
        if (found := rule.decide("lift", done, len(outcomes))).better is not None:
            return found.better, len(done)
    return None, len(outcomes)


def simulate(rate: float, baseline_rate: float, *, is_paired: bool, num: int = 400) -> list[tuple[int | None, int]]:
    found = []
    for seed in range(num):
        other, mine = np.random.default_rng(seed).random((2, 100)) < [[baseline_rate], [rate]]
        baseline = Baseline(name="b", outcomes={"lift": dict(enumerate(other.tolist()))}, has_seeds=True)
        family = Family(models=("a", "b"), seed=seed, is_paired=is_paired)
        rule = StoppingRule(policy="a", baseline=baseline, family=family, levels=(1,))
        found.append(run_until_decided(rule, mine.tolist(), batch_size=10))
    return found


@pytest.mark.parametrize("is_paired", [False, True])
def test_the_error_is_held_and_rollouts_are_saved(is_paired: bool) -> None:
    for rate in (0.2, 0.7):
        found = simulate(rate, rate, is_paired=is_paired)
        assert sum(better is not None for better, _ in found) <= stats.binom.ppf(0.999, len(found), 0.05)
    found = simulate(0.8, 0.3, is_paired=is_paired)
    assert np.mean([better == 1 for better, _ in found]) > 0.98
    # of 100
    assert np.mean([num for _, num in found]) < 45
    found = simulate(0.3, 0.8, is_paired=is_paired)
    assert np.mean([better == 0 for better, _ in found]) > 0.98


def test_the_report_comes_to_the_decision_that_ended_the_rollouts(tmp_path: Path) -> None:
    other, mine = (np.random.default_rng(3).random((2, 50)) < [[0.2], [0.7]]).tolist()
    baseline = write(tmp_path, "null", other)
    rule = open_rule(str(baseline), policy="pi", tasks=["lift"], alpha=0.05, family=None, budgets={"lift": 50})
    better, num = run_until_decided(rule, mine, batch_size=4)
    assert better == 1
    assert num < 40
    write(tmp_path, "pi", mine[:num])
    (pair,) = compare(read_rollouts(tmp_path)).columns[0].pairs
    assert pair.better == "pi"
    done = dict(enumerate(mine[:num]))
    assert rule.decide("lift", done, 50).stop == pair.num_rollouts
    assert f"pi is better than null, decided after {pair.num_rollouts} of 50" in rule.describe("lift", done, 50)
    assert f"({50 - num} saved)" in rule.describe("lift", done, 50)


def test_a_published_policy_is_a_baseline_in_a_random_order() -> None:
    found = read_baseline("CS/LBM-MT", seed=0)
    for task, count in find_published("CS/LBM-MT").items():
        assert (sum(found.outcomes[task].values()), len(found.outcomes[task])) == (count.successes, 200)
    assert found == read_baseline("CS/LBM-MT", seed=0)
    assert found != read_baseline("CS/LBM-MT", seed=1)
    first_half = [sum(list(outcomes.values())[:100]) for outcomes in found.outcomes.values()]
    assert sum(first_half) == pytest.approx(1915 / 2, abs=60)


def test_a_declared_family_divides_the_error_and_must_hold_the_baseline(tmp_path: Path) -> None:
    baseline = str(write(tmp_path, "null", [False] * 50))

    def rule_of(family: Family | None, **given: str) -> StoppingRule:
        policy = given.get("policy", "pi")
        return open_rule(baseline, policy=policy, tasks=["lift"], alpha=0.05, family=family, budgets={"lift": 50})

    assert rule_of(None).levels == (1,)
    assert rule_of(Family(models=("pi", "null", "random"))).levels == (3, 1)
    assert rule_of(Family(models=("pi", "null", "random"), tasks=("lift",), scope="all")).levels == (3,)
    successes = dict(enumerate([True, False] * 25))
    stops = [
        rule_of(family).decide("lift", successes, 50).stop for family in (None, Family(models=("pi", "null", "x", "y")))
    ]
    assert stops[0] < stops[1]
    with pytest.raises(ValueError, match="the declared family does not hold null; it has: pi, random"):
        rule_of(Family(models=("pi", "random")))
    with pytest.raises(ValueError, match="have one name, 'null'"):
        rule_of(None, policy="null")


def test_unfit_baselines_are_named_before_a_rollout_is_spent(tmp_path: Path) -> None:
    def opened(baseline: str, task: str = "lift", budget: int = 50, family: Family | None = None) -> StoppingRule:
        return open_rule(baseline, policy="pi", tasks=[task], alpha=0.05, family=family, budgets={task: budget})

    with pytest.raises(ValueError, match="neither a folder with results nor a published policy"):
        opened("nothing")
    with pytest.raises(ValueError, match=r"'CS/LBM-MTT' is unknown. Did you mean 'CS/LBM-MT'"):
        opened("CS/LBM-MTT")
    with pytest.raises(ValueError, match=r"needs the folder of one policy; .* none"):
        opened(str(tmp_path))
    one = str(write(tmp_path, "null", [False] * 50))
    write(tmp_path, "random", [False] * 50)
    with pytest.raises(ValueError, match="null, random"):
        opened(str(tmp_path))
    with pytest.raises(ValueError, match="null has no rollouts of 'push'; it has: lift"):
        opened(one, "push")
    with pytest.raises(ValueError, match=r"needs 5 to 500 rollouts of each policy \(max_sample_size\), not 4"):
        opened(one, budget=4)
    paired = Family(models=("pi", "CS/LBM-MT"), is_paired=True)
    with pytest.raises(ValueError, match="the rollouts of CS/LBM-MT have no seeds"):
        opened("CS/LBM-MT", "PutMugOnSaucer", family=paired)
    write(tmp_path, "null", [False] * 50, budget=50)
    again = tmp_path / "null" / "lift" / "rollouts" / "t2" / "results.json"
    write_results(again, [EpisodeResult(task="lift", seed=0, outcome="success")], max_sample_size=50, settings={})
    with pytest.raises(ValueError, match="episode 0 of 'lift' ran more than once"):
        opened(one)
