"""Evaluation: outcomes by seed alone, the published layout, resumption, invalid episodes, refusals in one line."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vla_foundry.config.command_line import parse_command
from vla_foundry.evaluation.actors import ExpertActor, NullActor, RandomActor, create_baseline
from vla_foundry.evaluation.comparison.stopping import open_rule
from vla_foundry.evaluation.evaluate import TaskRollouts, evaluate, main
from vla_foundry.evaluation.results import EpisodeResult, wilson_interval
from vla_foundry.evaluation.rollout_worker import Reply, RobotFacts, RolloutWorker, SimulatorSetup
from vla_foundry.params.commands.evaluation import FIRST_DEMO_SEED, EvaluateParams
from vla_foundry.run_folder import lock_folder

pytestmark = pytest.mark.usefixtures("toy_simulator")


def create_params(output: Path, **values: Any) -> EvaluateParams:
    given: dict[str, Any] = {"tasks": ["easy"], "policy": "random", "episodes": "0:6", "num_workers": 1}
    given |= {"simulator": "toy", "camera": "front", "image_size": 16, "output": str(output)}
    return EvaluateParams(**given | values)


def results_file(folder: Path) -> Path:
    (path,) = folder.glob("rollouts/*/results.json")
    return path


def read_episodes(folder: Path) -> list[dict[str, Any]]:
    return json.loads(results_file(folder).read_text(encoding="utf-8"))["evaluations"]


@pytest.fixture(scope="module")
def random_episodes(toy_simulator: None, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What random actions come to on six seeds of two tasks, by one process."""
    folder = tmp_path_factory.mktemp("random")
    evaluate(create_params(folder, tasks=["easy", "hard"]))
    return read_episodes(folder / "random/easy") + read_episodes(folder / "random/hard")


def test_outcomes_are_a_function_of_the_seed(tmp_path: Path, random_episodes: list[dict[str, Any]]) -> None:
    for number, values in enumerate(({"num_workers": 4}, {"tasks": ["hard", "easy"]})):
        output = tmp_path / str(number)
        evaluate(create_params(output, **{"tasks": ["easy", "hard"]} | values))
        found = read_episodes(output / "random/easy") + read_episodes(output / "random/hard")
        assert found == random_episodes
    assert len({episode["num_steps"] for episode in random_episodes}) > 2


def test_results_have_the_published_layout(tmp_path: Path) -> None:
    rates = evaluate(create_params(tmp_path, policy="expert", max_sample_size=50))
    assert (rates["easy"].num_successes, rates["easy"].num_trials) == (6, 6)
    path = results_file(tmp_path / "expert/easy")
    assert [len(path.relative_to(tmp_path).parts), path.parent.parent.name] == [5, "rollouts"]
    values = json.loads(path.read_text(encoding="utf-8"))
    assert values["max_sample_size_per_model"] == 50
    for seed, episode in enumerate(values["evaluations"]):
        assert (episode["skill_type"], episode["scenario_index"]) == ("easy", seed)
        assert (episode["is_success"], episode["is_pending"], episode["failure_message"]) == (True, False, None)
        assert (episode["outcome"], episode["instruction"]) == ("success", "move right")
        # the expert moves a quarter a step, from what the seed draws to beyond 0.8
        start = np.random.default_rng(seed).uniform(0, 0.4)
        assert episode["num_steps"] == math.floor((0.8 - start) / 0.25) + 1
        assert episode["total_time"] == pytest.approx(episode["num_steps"] / 10)


def test_doing_nothing_fails_and_is_pictured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--policy", "null", "--simulator", "toy", "--tasks", "easy,hard", "--episodes", "2:5"]
    words += ["--num_workers", "1", "--camera", "front", "--image_size", "16", "--output", str(tmp_path)]
    main(words)
    printed = capsys.readouterr().out
    assert "easy: 0/3 = 0% [0%, 56%]\n" in printed
    assert "all tasks: 0/6 = 0% [0%, 39%]\n" in printed
    summary = json.loads((tmp_path / "null/summary.json").read_text(encoding="utf-8"))
    assert summary["all"]["interval_95"] == pytest.approx([0, 0.3903], abs=1e-4)
    assert {episode["num_steps"] for episode in read_episodes(tmp_path / "null/easy")} == {24}
    strips = sorted((tmp_path / "null").glob("*/rollouts/*/*/demonstration_*/pictures.png"))
    assert [strip.parent.name for strip in strips] == ["demonstration_2", "demonstration_3"] * 2
    with Image.open(strips[0]) as image:
        strip = np.asarray(image)
    assert strip.shape == (16, 6 * 16, 3)
    assert (strip[:, :16] == strip[:, 80:]).all()
    with Image.open(tmp_path / "null/contact_sheet.png") as sheet:
        assert sheet.height > 4 * 96


def test_an_evaluation_goes_on_with_what_is_missing(tmp_path: Path, random_episodes: list[dict[str, Any]]) -> None:
    params = create_params(tmp_path, max_sample_size=6)
    evaluate(create_params(tmp_path, max_sample_size=6, episodes="0:4"))
    path = results_file(tmp_path / "random/easy")
    values = json.loads(path.read_text(encoding="utf-8"))
    assert len(values["evaluations"]) == 4
    # a mark on what was done, and one episode that was not
    values["evaluations"][0]["instruction"] = "marked"
    values["evaluations"][1] |= {"is_success": None, "is_pending": True, "outcome": None, "num_steps": None}
    path.write_text(json.dumps(values), encoding="utf-8")
    evaluate(params)
    found = read_episodes(tmp_path / "random/easy")
    assert found[0].pop("instruction") == "marked"
    expected = [dict(episode) for episode in random_episodes[:6]]
    del expected[0]["instruction"]
    assert found == expected
    before = path.stat().st_mtime_ns
    assert evaluate(params)["easy"].num_trials == 6
    assert path.stat().st_mtime_ns == before


def test_a_killed_evaluation_goes_on_to_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    words = [
        "--plugins",
        "toy_simulator",
        "--simulator",
        "toy",
        "--tasks",
        "slow",
        "--policy",
        "expert",
        "--name",
        "killed",
    ]
    words += ["--episodes", "0:4", "--num_workers", "2", "--num_pictured", "0", "--output", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-m", "vla_foundry.cli", "evaluate", *words], env=environment)
    while not [*tmp_path.glob("killed/slow/rollouts/*/results.json")]:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    # seed 0 ran, and its like will end now
    assert read_episodes(tmp_path / "killed/slow")[0]["is_pending"]
    for number in range(4):
        Path(f"ended{number}").touch()
    evaluate(create_params(tmp_path, tasks=["slow"], policy="expert", episodes="0:4", name="killed", num_pictured=0))
    evaluate(create_params(tmp_path, tasks=["easy"], policy="expert", episodes="0:4"))
    found = [{**episode, "skill_type": "easy"} for episode in read_episodes(tmp_path / "killed/slow")]
    assert found == read_episodes(tmp_path / "expert/easy")


def test_a_failing_simulator_makes_episodes_invalid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    params = create_params(tmp_path / "out", tasks=["breaks"], policy="expert")
    rate = evaluate(params)["breaks"]
    assert (rate.num_successes, rate.num_trials, rate.num_invalid) == (3, 3, 3)
    assert rate.format() == "3/3 = 100% [44%, 100%], 3 invalid"
    broken = read_episodes(tmp_path / "out/expert/breaks")[1]
    assert (broken["is_success"], broken["is_pending"], broken["outcome"]) == (None, False, "invalid")
    assert broken["failure_message"] == "RuntimeError: a line search did not converge"
    assert broken["failure_kind"] == "simulator_failed"
    # invalid episodes are run again
    (tmp_path / "mended").touch()
    rate = evaluate(params)["breaks"]
    assert (rate.num_successes, rate.num_trials, rate.num_invalid) == (6, 6, 0)


def test_a_worker_that_dies_is_replaced_and_its_episode_runs_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    params = create_params(tmp_path / "out", tasks=["dies_once", "dies"], policy="expert", episodes="0:2")
    rates = evaluate(params)
    assert [(rate.num_successes, rate.num_invalid) for rate in rates.values()] == [(2, 0), (0, 2)]
    dead = read_episodes(tmp_path / "out/expert/dies")[0]
    assert (dead["outcome"], dead["is_success"], dead["failure_kind"]) == ("invalid", None, "worker_died")
    assert dead["failure_message"] == "In 2 attempts the simulator's process ended with exit code 1."
    assert "failure_kind" not in read_episodes(tmp_path / "out/expert/dies_once")[0]
    (tmp_path / "mended").touch()
    assert [rate.num_successes for rate in evaluate(params).values()] == [2, 2]


def test_a_start_that_is_a_success_is_no_trial(tmp_path: Path) -> None:
    rate = evaluate(create_params(tmp_path, tasks=["done"], episodes="0:2", policy="null"))["done"]
    assert (rate.num_trials, rate.num_trivial, rate.format()) == (0, 2, "0/0 = - [0%, 100%], 2 trivial")
    episode = read_episodes(tmp_path / "null/done")[0]
    assert (episode["outcome"], episode["is_success"], episode["num_steps"]) == ("trivial", None, 0)


def describe_toy() -> RobotFacts:
    setup = SimulatorSetup(simulator="toy", cameras=(), picture_camera="front", image_size=(16, 16), max_steps=None)
    return RolloutWorker(setup).describe(task="easy")


def test_actions_of_a_baseline_are_in_the_robots_own_unit() -> None:
    """Nothing moves if the field that a part aims at is sent back; uniform actions fill any range."""
    low, high = np.array([0, 10], np.float32), np.array([1, 30], np.float32)
    facts = replace(describe_toy(), action_range=(low, high), rest_fields={"step": "place"})
    reply = Reply(images={}, fields={"place": np.array([0.3])}, num_steps=0, is_success=False, is_over=False)
    np.testing.assert_allclose(np.array(NullActor(facts).act({0: reply})[0]), [0.3, 0])
    actor = RandomActor(facts, seed=1)
    actor.begin(0, 5, "")
    drawn = np.array([actor.act({0: reply})[0] for _ in range(200)])
    np.testing.assert_allclose([drawn.min(0), drawn.max(0)], [low, high], atol=1)
    with pytest.raises(ValueError, match="The actions of toy have no range"):
        RandomActor(replace(facts, action_range=(low, high * np.inf)), seed=1)
    with pytest.raises(ValueError, match="toy has no expert"):
        ExpertActor(replace(facts, has_expert=False))


def test_random_actions_fill_their_range() -> None:
    facts = replace(describe_toy(), action_range=(np.full(3, -1, np.float32), np.ones(3, np.float32)))
    actor = RandomActor(facts, seed=1)
    actor.begin(0, 5, "")
    actor.begin(1, 6, "")
    reply = Reply(images={}, fields={}, num_steps=0, is_success=False, is_over=False)
    drawn = [actor.act({0: reply, 1: reply}) for _ in range(200)]
    numbers = np.array([[actions[0], actions[1]] for actions in drawn])
    assert np.abs(numbers).max() <= 1
    assert numbers.std() == pytest.approx(1 / np.sqrt(3), abs=0.03)
    assert abs(np.corrcoef(numbers[:, 0].ravel(), numbers[:, 1].ravel())[0, 1]) < 0.15


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ["medium"]}, r"toy task 'medium' is unknown"),
        ({"simulator": "toys"}, r"simulator 'toys' is unknown. Did you mean 'toy'"),
        ({"camera": "back"}, r"toy camera 'back' is unknown. Registered: front"),
    ],
)
def test_unknown_names_are_told_before_anything_is_written(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(create_params(tmp_path / "out", **values))
    assert not (tmp_path / "out").exists()


def test_an_evaluation_that_another_process_runs_is_left_alone(tmp_path: Path) -> None:
    held = lock_folder(tmp_path / "null", what="evaluation", flag="--name")
    message = rf"evaluation .*null is in use by process {os.getpid()} on .*choose another --name or --output"
    with held, pytest.raises(ValueError, match=message):
        evaluate(create_params(tmp_path, policy="null"))
    assert not (tmp_path / "null").exists()


def test_rollouts_of_other_settings_are_refused(tmp_path: Path) -> None:
    evaluate(create_params(tmp_path, episodes="0:2", policy="null"))
    with pytest.raises(ValueError, match=r"made with other settings \(max_steps None -> 5\)"):
        evaluate(create_params(tmp_path, episodes="0:2", policy="null", max_steps=5))
    with pytest.raises(ValueError, match=r"a budget of 2 rollouts, which is fixed .* 3 are requested"):
        evaluate(create_params(tmp_path, episodes="0:3", policy="null"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policy", "checkpoint"], r"Give either a checkpoint \(a run folder\) or a policy_server"),
        (["--policy", "null", "--checkpoint", "run"], r"policy 'null' takes no checkpoint"),
        (["--policy", "null", "--episodes", "5:5"], r"episodes must be first:end"),
        (["--policy", "null", "--episodes", f"0:{FIRST_DEMO_SEED + 1}"], r"must end at 1000000"),
        (["--policy", "null", "--max_sample_size", "3"], r"max_sample_size \(3\) must be at least the 50"),
        (["--policy", "null", "--instructions.hard", "go"], r"instructions has 'hard', which is none of tasks"),
        (["--policy", "null", "--tasks", "../easy"], r"tasks must be names without / and \\, got '../easy'"),
        (["--policy", "null", "--name", "a/b"], r"name must be the name of a folder"),
    ],
)
def test_params_that_make_no_sense_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_command(EvaluateParams, ["--tasks", "easy", "--output", "out", *words], prog="evaluate")


def test_results_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    evaluate(create_params(tmp_path, policy="expert", episodes="0:2"))
    path = results_file(tmp_path / "expert/easy")
    good = json.loads(path.read_text(encoding="utf-8"))
    first, second = good["evaluations"]
    for change, message in [
        ({"evaluations": [first, first]}, "an episode is there twice"),
        ({"evaluations": [first | {"is_success": False}, second]}, "of seed 0 contradicts its outcome 'success'"),
        ({"evaluations": [first | {"scenario_index": "0"}, second]}, "scenario_index '0' is not a seed"),
        ({"evaluations": [first, second | {"skill_type": "hard"}]}, "holds episodes of hard, not of easy"),
        ({"evaluations": {}}, "evaluations is {}"),
        ({"settings": []}, r"settings is \[\]"),
        ({"max_sample_size_per_model": "2"}, "max_sample_size_per_model is '2'"),
    ]:
        path.write_text(json.dumps(good | change), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            evaluate(create_params(tmp_path, policy="expert", episodes="0:2"))
        assert json.loads(path.read_text(encoding="utf-8")) == good | change


@pytest.mark.parametrize(
    ("successes", "trials", "interval"),
    # of the score test, solved by bisection to ten digits
    [(8, 10, (0.4901624715, 0.9433178485)), (0, 20, (0.0, 0.1611252160)), (3, 3, (0.4385030346, 1.0)), (0, 0, (0, 1))],
)
def test_wilsons_interval_inverts_the_score_test(successes: int, trials: int, interval: tuple[float, float]) -> None:
    low, high = wilson_interval(successes, trials)
    assert (low, high) == pytest.approx(interval, abs=1e-6)
    for bound in (low, high):
        if 0 < bound < 1:
            deviation = abs(successes - trials * bound) / math.sqrt(trials * bound * (1 - bound))
            assert deviation == pytest.approx(1.959964, abs=1e-5)


def test_rollouts_end_when_the_test_has_decided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(create_params(tmp_path, policy="null", episodes="0:40"))
    capsys.readouterr()
    given = {"policy": "expert", "episodes": "0:40", "until_decided": str(tmp_path / "null")}
    rates = evaluate(create_params(tmp_path, **given))
    num = rates["easy"].num_trials
    assert 5 <= num <= 16
    assert f"easy: expert is better than null, decided after {num} of 40" in capsys.readouterr().out
    # what is not needed stays pending, and the same command runs nothing more
    episodes = read_episodes(tmp_path / "expert/easy")
    assert [episode["is_pending"] for episode in episodes] == [False] * num + [True] * (40 - num)
    assert evaluate(create_params(tmp_path, **given)) == rates
    # in the order of seeds, not of their ends; what runs at the decision ends too
    evaluate(create_params(tmp_path, **given, num_workers=3, name="by3"))
    assert f"decided after {num} of 40" in capsys.readouterr().out
    assert read_episodes(tmp_path / "by3/easy")[:num] == episodes[:num]
    # equal policies use the whole budget
    rates = evaluate(create_params(tmp_path, **{**given, "policy": "null", "name": "null2"}))
    assert rates["easy"].num_trials == 40
    assert "not decided against null after 40 of 40 rollouts" in capsys.readouterr().out


def test_the_sequential_test_sees_outcomes_in_the_order_of_seeds(tmp_path: Path) -> None:
    """While seed 0 runs, later successes decide nothing; once they have decided, nothing begins."""
    evaluate(create_params(tmp_path, policy="null", episodes="0:40"))
    params = create_params(tmp_path, policy="expert", episodes="0:40", until_decided=str(tmp_path / "null"))
    task = TaskRollouts.open(params, create_baseline(params, "front"), "easy")
    rule = open_rule(
        str(tmp_path / "null"), policy="expert", tasks=["easy"], alpha=0.05, family=None, budgets={"easy": 40}
    )
    plan = task.plan(params, describe_toy(), ExpertActor(describe_toy()), rule)
    begun = [next(plan).seed for _ in range(20)]
    success = EpisodeResult(task="easy", seed=0, outcome="success", num_steps=3)
    for seed in begun[1:]:
        task.add(params, replace(success, seed=seed))
    assert (task.outcomes(), next(plan).seed) == ({}, 20)
    task.add(params, success)
    assert len(task.outcomes()) == 20
    assert list(plan) == []


def test_a_declared_family_is_fixed_with_the_first_rollout(tmp_path: Path) -> None:
    manifest = tmp_path / "family.yaml"
    manifest.write_text("models: [random, expert]\n", encoding="utf-8")
    evaluate(create_params(tmp_path))
    manifest.write_text("models: [random, expert]\nalpha: 0.1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"made with other settings \(family "):
        evaluate(create_params(tmp_path))
    manifest.unlink()
    with pytest.raises(ValueError, match=r"made with other settings \(family .* -> None"):
        evaluate(create_params(tmp_path))
    manifest.write_text("models: [random, expert]\nmax_sample_size: 8\n", encoding="utf-8")
    with pytest.raises(ValueError, match="declares max_sample_size 8, but 9 rollouts of a task are requested"):
        evaluate(create_params(tmp_path, tasks=["hard"], max_sample_size=9))
    evaluate(create_params(tmp_path, tasks=["hard"]))
    assert json.loads(results_file(tmp_path / "random/hard").read_text("utf-8"))["max_sample_size_per_model"] == 8
    manifest.write_text("models: [expert]\n", encoding="utf-8")
    with pytest.raises(ValueError, match="does not declare the model 'random', only expert"):
        evaluate(create_params(tmp_path))
