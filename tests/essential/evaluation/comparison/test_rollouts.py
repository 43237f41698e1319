"""Rollouts of every layout come into one table; the published ones give the published numbers."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from vla_foundry.evaluation.comparison.published import UNSEEN_TASKS, find_published, published_counts
from vla_foundry.evaluation.comparison.rollouts import Rollouts, count_faults, count_outcomes, read_rollouts
from vla_foundry.evaluation.results import EpisodeResult, write_results

# successes of 3,200 on the 16 seen tasks and of 600 on the 3 unseen ones, as the paper counts
PUBLISHED = {
    "CS/Foundry-Qwen3VLA-2.1B": (2654, 90),
    "CS/Foundry-Qwen3VLA-2.1B-FT": (2627, 499),
    "CS/Foundry-Qwen3VLA-2.1B-ST": (2019, 415),
    "CS/LBM-FT": (2014, None),
    "CS/Foundry-VLA-1.7B-sim": (1930, 49),
    "CS/Foundry-VLA-1.7B-FT-sim": (1927, 313),
    "CS/LBM-MT": (1915, None),
    "CS/Foundry-VLA-1.7B-FT": (1905, 375),
    "CS/LBM-ST": (1844, None),
    "CS/Foundry-VLA-1.7B-ST": (1824, 364),
    "CS/Foundry-VLA-1.7B-full": (1729, 28),
    "CS/Foundry-VLA-1.7B-real": (31, 2),
    "OSS/Foundry-Qwen3VLA-2.1B-FT": (2425, 433),
    "OSS/Foundry-Qwen3VLA-2.1B": (2316, 81),
    "OSS/Foundry-Qwen3VLA-2.1B-ST": (1805, 369),
    "OSS/Foundry-VLA-1.7B-ST": (1392, 252),
    "OSS/Foundry-VLA-1.7B-FT-sim": (1316, 158),
    "OSS/Foundry-VLA-1.7B-sim": (1312, 70),
    "OSS/Foundry-VLA-1.7B-FT": (1194, 164),
    "OSS/Foundry-VLA-1.7B-full": (1092, 45),
    "OSS/Foundry-VLA-1.7B-real": (71, 27),
}
INVALID = {"1.7B-full": 78, "1.7B-ST": 39, "1.7B-FT": 19, "2.1B-ST": 14, "2.1B": 15, "1.7B-real": 17, "1.7B-sim": 6}


def episode(index: int, success: bool | None = True, **more: Any) -> dict[str, Any]:
    return {"skill_type": "PutMug", "scenario_index": index, "is_success": success, "total_time": 3.2, **more}


def write(root: Path, name: str, episodes: list[Any], *, budget: Any = 200, time: str = "t0") -> Path:
    path = root / name / "rollouts" / time / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"max_sample_size_per_model": budget, "evaluations": episodes}), encoding="utf-8")
    return path


def outcomes(found: Rollouts) -> list[str]:
    return found.table["outcome"].to_pylist()


@pytest.fixture(scope="module")
def published_folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    with tarfile.open(shared_data / "lbm_eval_results.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def published(published_folder: Path) -> Rollouts:
    return read_rollouts(published_folder)


@pytest.mark.shared_data
def test_published_files_give_the_published_counts(published: Rollouts) -> None:
    rates = count_outcomes(published.table, invalid_is_failure=True)
    assert {rate.num_trials for rate in rates.values()} == {200} == set(published.budgets.values())
    assert len({task for _, task in rates}) == 19 == len(published.task_names)
    for model, (seen, unseen) in PUBLISHED.items():
        of_model = {task: rate.num_successes for (name, task), rate in rates.items() if name == model}
        assert sum(num for task, num in of_model.items() if task not in UNSEEN_TASKS) == seen
        assert sum(of_model.get(task, 0) for task in UNSEEN_TASKS) == (unseen or 0)
    assert len(rates) == 390
    assert published.audit == ()


@pytest.mark.shared_data
def test_crashes_and_trivial_starts_of_the_published_files_are_found(published: Rollouts) -> None:
    table = published.table
    assert count_faults(table) == {"infrastructure": 114, "simulator": 82}
    invalid: dict[str, int] = {}
    for (model, _), rate in count_outcomes(table).items():
        invalid[model] = invalid.get(model, 0) + rate.num_invalid
    assert {
        name: invalid[f"OSS/Foundry-{'VLA' if '1.7' in name else 'Qwen3VLA'}-{name}"] for name in INVALID
    } == INVALID
    columns = (table[name].to_pylist() for name in ("model", "task", "index", "is_trivial"))
    trivial = {
        (model.split("/")[0], task, index)
        for model, task, index, is_trivial in zip(*columns, strict=True)
        if is_trivial
    }
    assert {group for group, _, _ in trivial} == {"OSS"}
    tasks = [task for _, task, _ in trivial]
    assert {task: tasks.count(task) for task in tasks} == {
        "PutMugInCenterOfTable": 25,
        "PutKiwiInCenterOfTable": 21,
        "PushCoasterToCenterOfTable": 12,
        "PlaceCupByCoaster": 10,
        "PushCoasterToMug": 9,
    }


@pytest.mark.shared_data
def test_the_counts_in_the_package_are_those_of_the_published_files(published: Rollouts) -> None:
    table = published.table
    rates = count_outcomes(table)
    assert {
        (model, task): count.rate for model, tasks in published_counts().items() for task, count in tasks.items()
    } == rates


@pytest.mark.shared_data
def test_published_files_are_read_in_a_second(published_folder: Path) -> None:
    # in a process of its own, without the type checks of tests
    code = (
        "import sys, time\nfrom vla_foundry.evaluation.comparison.rollouts import read_rollouts\ntimes = []\n"
        "for _ in range(2):\n    start = time.process_time()\n    read_rollouts(sys.argv[1])\n"
        "    times.append(time.process_time() - start)\nprint(min(times))"
    )
    command = [sys.executable, "-c", code, str(published_folder)]
    assert float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) < 1.0


def test_published_counts_are_found_by_name() -> None:
    assert {
        model: sum(c.published_rate.num_successes for t, c in find_published(model).items() if t not in UNSEEN_TASKS)
        for model in PUBLISHED
    } == {model: seen for model, (seen, _) in PUBLISHED.items()}
    with pytest.raises(ValueError, match=r"'CS/LBM' is unknown. Did you mean 'CS/LBM-"):
        find_published("CS/LBM")


def test_flat_and_nested_folders_and_both_spellings_meet(tmp_path: Path) -> None:
    write(tmp_path, "a/Put Mug", [episode(0), episode(1, skill_type="put_mug")])
    write(tmp_path, "set/b/PutMug", [episode(0, False)])
    found = read_rollouts(tmp_path)
    assert list(count_outcomes(found.table)) == [("a", "PutMug"), ("set/b", "PutMug")]
    assert count_outcomes(read_rollouts(tmp_path / "set" / "b").table).keys() == {("b", "PutMug")}
    assert count_outcomes(read_rollouts(tmp_path / "set" / "b" / "PutMug").table).keys() == {("b", "PutMug")}


def test_pending_and_invalid_episodes_are_no_trials(tmp_path: Path) -> None:
    disk = "Traceback\nOSError: [Errno 28] No space left on device"
    finished = [episode(0), episode(1, False), episode(2, False, is_pending=True), episode(3, None)]
    more = [episode(4, None, is_pending=True), episode(5, False, failure_message=disk), episode(6, False)]
    write(tmp_path, "a/PutMug", finished + more)
    found = read_rollouts(tmp_path)
    assert outcomes(found) == ["success", "failure", "pending", "invalid", "pending", "invalid", "failure"]
    assert found.table["reason"].to_pylist()[5] == "OSError: [Errno 28] No space left on device"
    rate, published = (count_outcomes(found.table, invalid_is_failure=flag)["a", "PutMug"] for flag in (False, True))
    assert (rate.num_successes, rate.num_trials, rate.num_invalid, published.num_trials) == (1, 3, 2, 5)


def test_our_own_files_keep_their_outcomes_and_names(tmp_path: Path) -> None:
    path = tmp_path / "mine" / "put_mug@half" / "rollouts" / "t" / "results.json"
    episodes = [
        EpisodeResult(task="put_mug@half", seed=7, outcome="failure", failure_message="an action is not finite"),
        EpisodeResult(task="put_mug@half", seed=8, outcome="invalid", failure_message="it broke"),
        EpisodeResult(task="put_mug@half", seed=9),
    ]
    write_results(path, episodes, max_sample_size=9, settings={"policy": "checkpoint"})
    found = read_rollouts(tmp_path)
    assert outcomes(found) == ["failure", "invalid", "pending"]
    assert found.budgets == {("mine", "put_mug@half"): 9}


def test_starts_that_the_null_policy_solves_are_trivial(tmp_path: Path) -> None:
    for name in ("null", "checkpoint"):
        path = tmp_path / name / "lift" / "rollouts" / "t" / "results.json"
        episodes = [
            EpisodeResult(task="lift", seed=seed, outcome="success" if seed < 2 else "failure", seconds=5.0)
            for seed in range(4)
        ]
        write_results(path, episodes, max_sample_size=4, settings={"policy": name})
    found = read_rollouts(tmp_path)
    assert found.table["is_trivial"].to_pylist() == [True, True, False, False] * 2
    assert count_outcomes(found.table, without_trivial=True)["null", "lift"].num_trials == 2


def harness_file(folder: Path, name: str = "libero_aggregate.json") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    episodes = [
        {"episode_id": 0, "metrics": {"success": True}, "steps": 9, "elapsed_sec": 1.0},
        {"episode_id": 1, "metrics": {"success": False}, "steps": 9, "elapsed_sec": 1.0},
        {"episode_id": 2, "metrics": {}, "failure_reason": "timeout", "failure_detail": "no answer"},
    ]
    tasks = [{"task": "put_mug", "num_episodes": 3, "episodes": episodes}]
    values = {"benchmark": "libero", "mode": "sync", "harness_version": "0.8.0", "tasks": tasks, "config": {}}
    (folder / name).write_text(json.dumps(values), encoding="utf-8")


def test_files_of_the_harness_are_read_and_failures_with_a_reason_are_invalid(tmp_path: Path) -> None:
    harness_file(tmp_path / "pi0")
    (tmp_path / "pi0" / "notes.json").write_text("[1]", encoding="utf-8")
    found = read_rollouts(tmp_path)
    assert outcomes(found) == ["success", "failure", "invalid"]
    assert found.table["reason"].to_pylist()[2] == "timeout: no answer"
    both = [count_outcomes(found.table, invalid_is_failure=flag)["pi0", "libero: put_mug"] for flag in (False, True)]
    assert [(rate.num_successes, rate.num_trials) for rate in both] == [(1, 2), (1, 3)]


@pytest.mark.parametrize(
    ("episodes", "message"),
    [
        ([1], "episode 0 must be an object, not 1"),
        ([{"metrics": None}], "no attribute 'get'"),
        ([{"episode_id": -1, "metrics": {"success": True}}], "episode_id 0 must be a whole number from 0, not -1"),
        ([{"metrics": {"success": 0.4}}], "success of episode 0 must be true or false"),
        ([{"episode_id": 1, "metrics": {"success": True}}] * 2, "episode 1 of 'b: t' is there twice"),
    ],
)
def test_broken_files_of_the_harness_are_named_with_the_fault(
    tmp_path: Path, episodes: list[Any], message: str
) -> None:
    values = {"benchmark": "b", "tasks": [{"task": "t", "episodes": episodes}]}
    (tmp_path / "x.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_rollouts(tmp_path)


def test_the_harness_files_of_our_own_command_are_not_counted_twice(tmp_path: Path) -> None:
    write(tmp_path, "mine/put_mug", [episode(0)])
    harness_file(tmp_path / "mine" / "harness" / "t")
    assert len(outcomes(read_rollouts(tmp_path))) == 1


@pytest.mark.parametrize(("rule", "kept"), [("latest", [True, False, False]), ("first", [True, True, False])])
def test_runs_of_one_episode_are_merged_by_the_rule_that_was_chosen(
    tmp_path: Path, rule: Any, kept: list[bool]
) -> None:
    write(tmp_path, "a/PutMug", [episode(0), episode(1), episode(2, None, is_pending=True)], time="2026-01-01")
    write(tmp_path, "a/PutMug", [episode(0, None), episode(1, False), episode(2, False)], time="2026-01-02")
    with pytest.raises(ValueError, match=r"episode 1 of 'PutMug' ran more than once .*--duplicates latest or first"):
        read_rollouts(tmp_path)
    found = read_rollouts(tmp_path, duplicates=rule)
    rows = sorted(zip(found.table["index"].to_pylist(), outcomes(found), strict=True))
    assert [outcome == "success" for _, outcome in rows] == kept
    assert len(found.audit) == 1
    assert "1 episodes ran more than once" in found.audit[0]


def test_a_pending_episode_does_not_block_a_second_run(tmp_path: Path) -> None:
    write(tmp_path, "a/PutMug", [episode(0), episode(1, None, is_pending=True)], time="1")
    write(tmp_path, "a/PutMug", [episode(1, False)], time="2")
    assert outcomes(read_rollouts(tmp_path)) == ["success", "failure"]


@pytest.mark.parametrize(
    ("episodes", "budget", "message"),
    [
        ([episode(0), episode(0)], 200, "episode 0 of 'PutMug' is there twice"),
        ([episode(0), episode(1)], 1, "has 2 rollouts, more than the 1 planned"),
        ([episode(0)], None, "max_sample_size_per_model must be"),
        ([episode(0)], True, "max_sample_size_per_model must be"),
        ([7], 200, "evaluations must be a list of episodes"),
        ([episode(0, skill_type=None)], 200, r"skill_type 0 must be the name of a task"),
        ([episode(0, skill_type=["x"])], 200, "unhashable type"),
        ([episode(0, skill_type="\ud800")], 200, "half of a surrogate pair"),
        ([episode(0), episode(-1)], 200, r"scenario_index 1 must be"),
        ([episode(2**60)], 200, "scenario_index 0 must be"),
        ([episode(0.5)], 200, "scenario_index 0 must be"),  # type: ignore[arg-type]
        ([episode(0, 1)], 200, "is_success 0 must be"),  # type: ignore[arg-type]
        ([episode(0, [])], 200, "is_success 0 must be"),  # type: ignore[arg-type]
        ([episode(0, total_time=float("nan"))], 200, "total_time 0 must be"),
        ([episode(0, total_time=-1)], 200, "total_time 0 must be"),
        ([episode(0, total_time="3")], 200, "total_time 0 must be"),
        ([episode(0, failure_message={})], 200, "failure_message 0 must be"),
        ([episode(0, outcome="won")], 200, "outcome 0 must be"),
        ([episode(0, outcome=[])], 200, "outcome 0 must be"),
    ],
)
def test_broken_files_are_named_with_the_fault(tmp_path: Path, episodes: list[Any], budget: Any, message: str) -> None:
    write(tmp_path, "a/PutMug", episodes, budget=budget)
    with pytest.raises(ValueError, match=message):
        read_rollouts(tmp_path)


def test_a_folder_whose_name_is_not_text_is_named(tmp_path: Path) -> None:
    write(tmp_path, "bad\udcff/PutMug", [episode(0)])
    with pytest.raises(ValueError, match="which is not text"):
        read_rollouts(tmp_path)


def test_misplaced_files_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no results"):
        read_rollouts(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        read_rollouts(tmp_path / "none")
    (tmp_path / "results.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="is misplaced"):
        read_rollouts(tmp_path)
