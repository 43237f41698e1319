"""Comparisons of published and small made-up results."""

import json
from pathlib import Path

import numpy as np
import pytest

from vla_foundry.evaluation.comparison.compare import (
    AGGREGATE,
    Comparison,
    balanced_rates,
    compare,
    compare_against,
)
from vla_foundry.evaluation.comparison.family import Family
from vla_foundry.evaluation.comparison.published import find_published, published_counts
from vla_foundry.evaluation.comparison.rollouts import Rollouts, count_outcomes, read_rollouts
from vla_foundry.evaluation.results import SuccessRate

QWEN, MULTI = "CS/Foundry-Qwen3VLA-2.1B", "CS/LBM-MT"
# rollouts of each model until the published pair is decided, as the earlier implementation at the same level
WINS = {
    "BimanualPlaceAppleFromBowlIntoBin": 67,
    "PutBananaOnSaucer": 12,
    "PlaceCupByCoaster": 92,
    "TurnCupUpsideDown": 78,
    "TurnMugRightsideUp": 46,
    "PutKiwiInCenterOfTable": 10,
    "PutMugOnSaucer": 53,
    "BimanualPutRedBellPepperInBin": 102,
    "PushCoasterToCenterOfTable": 24,
    "PushCoasterToMug": 26,
}


def write(root: Path, model: str, task: str, outcomes: list[bool], *, budget: int = 200, first: int = 0) -> None:
    path = root / model / task / "rollouts" / "t" / "results.json"
    path.parent.mkdir(parents=True)
    episodes = [
        {"skill_type": task, "scenario_index": first + index, "is_success": outcome, "total_time": 9.0}
        for index, outcome in enumerate(outcomes)
    ]
    path.write_text(json.dumps({"max_sample_size_per_model": budget, "evaluations": episodes}), encoding="utf-8")


def draw(rate: float, num: int, seed: int) -> list[bool]:
    return (np.random.default_rng(seed).random(num) < rate).tolist()


@pytest.fixture(scope="module")
def published(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Rollouts:
    import tarfile

    folder = tmp_path_factory.mktemp("published")
    with tarfile.open(shared_data / "lbm_eval_results.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return read_rollouts(folder)


def columns(comparison: Comparison) -> dict[str, dict[str, str]]:
    return {column.name: dict(column.letters) for column in comparison.columns}


@pytest.mark.shared_data
def test_ten_published_wins_stay_and_stack_plates_is_not_separated(published: Rollouts) -> None:
    comparison = compare(published, Family(models=(MULTI, QWEN)))
    decided = {
        column.name: column.pairs[0] for column in comparison.columns if any(pair.better for pair in column.pairs)
    }
    assert {pair.better for pair in decided.values()} == {QWEN}
    assert decided.keys() == {*WINS, AGGREGATE}
    for task, stop in WINS.items():
        assert decided[task].num_rollouts == pytest.approx(stop, abs=1)
    assert columns(comparison)["BimanualStackPlatesOnTableFromDryingRack"] == {MULTI: "a", QWEN: "a"}
    whole = comparison.columns[-1]
    assert len(whole.left_out) == 3
    assert (whole.n_max, len(whole.tasks)) == (3200, 16)
    assert (whole.means[QWEN], whole.means[MULTI]) == (pytest.approx(2654 / 3200), pytest.approx(1915 / 3200))


@pytest.mark.shared_data
def test_the_letters_of_the_papers_figure(published: Rollouts) -> None:
    sim, full = "CS/Foundry-VLA-1.7B-sim", "CS/Foundry-VLA-1.7B-full"
    letters = columns(compare(published, Family(models=(QWEN, sim, MULTI, full))))[AGGREGATE]
    assert letters == {QWEN: "a", sim: "b", MULTI: "b", full: "c"}


@pytest.mark.shared_data
def test_letters_do_not_depend_on_what_else_the_folder_holds(published: Rollouts) -> None:
    family = Family(models=(MULTI, QWEN, "CS/LBM-FT"))
    kept = [model in family.models for model in published.table["model"].to_pylist()]
    part = Rollouts(table=published.table.filter(kept), budgets=published.budgets)
    assert columns(compare(published, family)) == columns(compare(part, family))


def test_against_published_counts_an_exact_test_decides() -> None:
    rates = {(MULTI, task): count.rate for task, count in find_published(MULTI).items()}
    found = {row.task: row for row in compare_against(rates, find_published(QWEN), models=[MULTI])}
    assert {task for task, row in found.items() if row.is_separated} == {*WINS, AGGREGATE}
    assert 0.1 < found["BimanualStackPlatesOnTableFromDryingRack"].p_value < 0.17
    assert found[AGGREGATE].difference == pytest.approx((1915 - 2654) / 3200)


def test_against_published_counts_the_models_of_a_task_are_one_family() -> None:
    task = "PutMugOnSaucer"
    rates = {(f"m{number}", task): SuccessRate(num_successes=70, num_trials=100) for number in range(20)}
    rates["m0", task] = SuccessRate(num_successes=102, num_trials=200)
    published = {task: published_counts()[MULTI][task]}
    alone = compare_against(rates, published, models=["m1"])
    assert alone[0].p_value > 0.05 / 20
    assert not any(row.is_separated for row in compare_against(rates, published, models=[f"m{n}" for n in range(20)]))


def test_the_folders_models_are_the_family_and_the_comparison_says_so(tmp_path: Path) -> None:
    for number, rate in enumerate((0.1, 0.9)):
        write(tmp_path, f"m{number}", "lift", draw(rate, 50, number), budget=50)
    comparison = compare(read_rollouts(tmp_path))
    assert columns(comparison) == {"lift": {"m1": "a", "m0": "b"}}
    assert "the family is all 2 models" in comparison.notes[0]
    (pair,) = comparison.columns[0].pairs
    assert pair.interval[0] > 0.5
    assert pair.num_rollouts < 20


def test_one_model_and_missing_tasks_are_no_error(tmp_path: Path) -> None:
    write(tmp_path, "a", "lift", draw(0.5, 20, 0))
    assert columns(compare(read_rollouts(tmp_path))) == {"lift": {"a": "a"}}
    write(tmp_path, "b", "push", draw(0.5, 20, 0))
    comparison = compare(read_rollouts(tmp_path))
    assert columns(comparison) == {"lift": {"a": "a"}, "push": {"b": "a"}, AGGREGATE: {}}
    assert comparison.columns[-1].left_out == ("lift", "push")


def test_what_was_declared_must_be_there_and_not_be_exceeded(tmp_path: Path) -> None:
    write(tmp_path, "model_a", "lift", draw(0.5, 20, 0))
    write(tmp_path, "model_b", "lift", draw(0.5, 20, 0))
    rollouts = read_rollouts(tmp_path)
    with pytest.raises(ValueError, match=r"model 'model_c' is unknown. Did you mean 'model_"):
        compare(rollouts, Family(models=("model_a", "model_c")))
    with pytest.raises(ValueError, match=r"task 'lifts' is unknown. Did you mean 'lift'"):
        compare(rollouts, Family(models=("model_a",), tasks=("lifts",)))
    with pytest.raises(ValueError, match="declared with max_sample_size 10"):
        compare(rollouts, Family(models=("model_a", "model_b"), max_sample_size=10))


def test_models_that_have_not_run_yet_change_no_letter(tmp_path: Path) -> None:
    for number, rate in enumerate((0.4, 0.65, 0.5)):
        write(tmp_path, f"m{number}", "lift", draw(rate, 100, number), budget=100)
    family = Family(models=("m0", "m1", "m2", "m3"), is_declared=True)
    rollouts = read_rollouts(tmp_path)
    before = compare(rollouts, family)
    assert any("no rollouts yet: m3" in note for note in before.notes)
    part = Rollouts(
        table=rollouts.table.filter([model != "m2" for model in rollouts.table["model"].to_pylist()]),
        budgets=rollouts.budgets,
    )
    decisions = [
        {(pair.first, pair.second): pair.better for pair in compare(found, family).columns[0].pairs}
        for found in (rollouts, part)
    ]
    assert decisions[1] == {("m0", "m1"): decisions[0]["m0", "m1"]}
    # among two models alone the same rollouts decide
    assert compare(part, Family(models=("m0", "m1"))).columns[0].pairs[0].better == "m1"


def test_tasks_that_have_not_run_yet_change_no_letter(tmp_path: Path) -> None:
    family = Family(models=("m0", "m1"), tasks=("lift", "push"), scope="all", is_declared=True)
    found = []
    for task in family.tasks or ():
        for number, rate in enumerate((0.4, 0.65)):
            write(tmp_path, f"m{number}", task, draw(rate, 100, number), budget=100)
        found.append(compare(read_rollouts(tmp_path), family))
    early, late = found
    assert [[column.name for column in each.columns] for each in found] == [["lift"], ["lift", "push", AGGREGATE]]
    assert early.columns[0].pairs == late.columns[0].pairs
    assert early.columns[0].pairs[0].better == "m1"
    assert any("tasks these have no rollouts yet: push" in note for note in early.notes)


def test_correcting_over_all_columns_separates_less(tmp_path: Path) -> None:
    for task in range(4):
        for number, rate in enumerate((0.45, 0.7)):
            write(tmp_path, f"m{number}", f"task{task}", draw(rate, 100, 10 * task + number), budget=100)
    rollouts = read_rollouts(tmp_path)
    counts = []
    for scope in ("column", "all"):
        found = compare(rollouts, Family(models=("m0", "m1"), scope=scope))  # type: ignore[arg-type]
        counts.append(sum(bool(pair.better) for column in found.columns for pair in column.pairs))
    assert counts[0] > counts[1] >= 1


def test_paired_comparisons_use_the_seeds_that_both_have(tmp_path: Path) -> None:
    hard = draw(0.5, 200, 0)
    write(tmp_path, "a", "lift", hard)
    # better on a tenth of the starts, worse on none: 20 pairs differ
    better = [outcome or index % 5 == 0 for index, outcome in enumerate(hard)]
    write(tmp_path, "b", "lift", better[20:], first=20)
    rollouts = read_rollouts(tmp_path)
    unpaired, paired = (compare(rollouts, Family(models=("a", "b"), is_paired=flag)) for flag in (False, True))
    assert columns(unpaired)["lift"] == {"a": "a", "b": "a"}
    assert columns(paired)["lift"] == {"b": "a", "a": "b"}
    (pair,), (other,) = paired.columns[0].pairs, unpaired.columns[0].pairs
    assert pair.interval[1] - pair.interval[0] < other.interval[1] - other.interval[0]


def test_budgets_beyond_the_tables_and_tiny_ones_are_compared(tmp_path: Path) -> None:
    for number, rate in enumerate((0.3, 0.5)):
        write(tmp_path, f"m{number}", "large", draw(rate, 600, number), budget=600)
        write(tmp_path, f"m{number}", "tiny", draw(rate, 3, number), budget=3)
    comparison = compare(read_rollouts(tmp_path))
    assert columns(comparison)["large"] == {"m1": "a", "m0": "b"}
    assert set(columns(comparison)["tiny"].values()) == {"a"}


def test_the_papers_balanced_pooling_and_the_macro_mean(tmp_path: Path) -> None:
    for model, counts in {"a": [50, 20, 100, 100], "b": [70, 30, 80, 90]}.items():
        for number, count in enumerate(counts):
            write(tmp_path / "x", model, f"task{number}", [True] * 20 + [False] * (count - 20))
    for number, count in enumerate([50, 49, 50, 50]):
        write(tmp_path / "y", "c", f"task{number}", [True] * count)
    tasks = [f"task{number}" for number in range(4)]
    table = read_rollouts(tmp_path / "x").table
    rates = balanced_rates(table, models=["a", "b"], tasks=tasks)
    assert {model: (rate.num_successes, rate.num_trials) for model, rate in rates.items()} == {
        "a": (80, 80),
        "b": (80, 120),
    }
    other = balanced_rates(read_rollouts(tmp_path / "y").table, models=["c"], tasks=tasks)
    assert other["c"].num_trials == 196
    comparison = compare(read_rollouts(tmp_path / "x"))
    assert comparison.columns[-1].means["a"] == pytest.approx((0.4 + 1 + 0.2 + 0.2) / 4)
    assert count_outcomes(table)["a", "task0"].num_trials == 50
