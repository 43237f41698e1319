"""The queue of episodes: outcomes do not depend on how many run, in which order they answer, or who dies."""

import math
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from vla_foundry.config.command_line import named_plugins
from vla_foundry.evaluation.actors import Actor, ExpertActor, NullActor, RandomActor, create_baseline
from vla_foundry.evaluation.evaluate import TaskRollouts
from vla_foundry.evaluation.results import EpisodeResult
from vla_foundry.evaluation.rollout_worker import RobotFacts, RolloutWorker, SimulatorSetup
from vla_foundry.evaluation.rollouts import Death, Episode, RolloutPool, create_pool, run_episodes
from vla_foundry.params.commands.evaluation import EvaluateParams
from vla_foundry.simulators import SIMULATORS, create_simulator

pytestmark = pytest.mark.usefixtures("toy_simulator")


def create_setup(**values: Any) -> SimulatorSetup:
    given: dict[str, Any] = {"simulator": "toy", "cameras": (), "picture_camera": "front", "image_size": (16, 16)}
    return SimulatorSetup(**given | {"max_steps": None, "plugins": named_plugins()} | values)


def describe_toy() -> RobotFacts:
    return RolloutWorker(create_setup()).describe(task="easy")


class Clock:
    """A clock that goes on only as a test says."""

    seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


class ShuffledPool(RolloutPool):
    """Workers in this process. They answer in a random order, some die, and one may be slower than all others.

    Args:
        seed: of the order and the deaths.
        deaths: chance that a worker dies of a request, where it has not died in the same episode yet.
        slow_seed: the episode that gets on only while no other runs.
    """

    def __init__(
        self, setup: SimulatorSetup, num_workers: int, *, seed: int, deaths: float = 0.0, slow_seed: int | None = None
    ) -> None:
        super().__init__(setup, num_workers)
        self.setup, self.deaths, self.slow_seed = setup, deaths, slow_seed
        self.random = np.random.default_rng(seed)
        self.workers: dict[int, RolloutWorker] = {}
        self.requests: dict[int, Any] = {}
        self.episodes: dict[int, tuple[str, int]] = {}
        self.died: list[tuple[str, int]] = []
        self.clock = Clock()

    def send(self, number: int, request: Any) -> None:
        assert number not in self.requests
        self.requests[number] = request
        if request.func is RolloutWorker.begin:
            self.episodes[number] = (request.keywords["task"], request.keywords["seed"])

    def wait(self, seconds: float = math.inf) -> dict[int, Any]:
        ready = [number for number in self.requests if self.episodes[number][1] != self.slow_seed]
        if not ready and seconds < math.inf:
            self.clock.seconds += seconds
            return {}
        ready = ready or [*self.requests]
        chosen = self.random.choice(ready, size=self.random.integers(1, len(ready) + 1), replace=False)
        return {int(number): self.answer(int(number)) for number in chosen}

    def answer(self, number: int) -> Any:
        request, episode = self.requests.pop(number), self.episodes[number]
        if episode not in self.died and self.random.random() < self.deaths:
            self.died.append(episode)
            self.workers.pop(number, None)
            return Death(reason="it was killed.")
        return self.workers.setdefault(number, RolloutWorker(self.setup)).handle(request)


def find_toy() -> Any:
    """Return the class, as the plug-in registered it."""
    return type(create_simulator("toy", "easy", cameras=(), image_size=(16, 16)))


def list_episodes(tasks: Sequence[str], actor: Actor, num_seeds: int) -> list[Episode]:
    found = [(task, seed) for task in tasks for seed in range(num_seeds)]
    return [Episode(task=task, seed=seed, instruction=task, fps=10.0, actor=actor) for task, seed in found]


def by_seed(results: Sequence[EpisodeResult]) -> list[EpisodeResult]:
    return sorted(results, key=lambda result: (result.task, result.seed))


def test_outcomes_are_those_of_one_worker_whoever_answers_first_or_dies() -> None:
    actor = RandomActor(describe_toy(), seed=3)
    episodes = list_episodes(["easy", "hard"], actor, 8)
    alone = by_seed([*run_episodes(ShuffledPool(create_setup(), 1, seed=0), episodes)])
    assert {result.outcome for result in alone} == {"success", "failure"}
    for num_workers in (1, 4, 16):
        for seed in range(2):
            pool = ShuffledPool(create_setup(), num_workers, seed=seed, deaths=0.05)
            assert by_seed([*run_episodes(pool, episodes)]) == alone
            assert pool.died
            assert not pool.requests


def test_a_worker_that_dies_twice_makes_its_episode_invalid_and_no_other() -> None:
    class Deadly(ShuffledPool):
        def answer(self, number: int) -> Any:
            if self.episodes[number][1] == 2:
                self.requests.pop(number)
                return Death(reason="it was killed.")
            return super().answer(number)

    episodes = list_episodes(["easy"], ExpertActor(describe_toy()), 5)
    results = by_seed([*run_episodes(Deadly(create_setup(), 3, seed=0), episodes)])
    assert [result.outcome for result in results] == ["success", "success", "invalid", "success", "success"]
    assert (results[2].failure_kind, results[2].failure_message) == ("worker_died", "In 2 attempts it was killed.")


@pytest.mark.parametrize("num_deaths", [1, 2])
def test_a_worker_that_dies_when_it_starts_is_asked_once_more(num_deaths: int) -> None:
    class Deadly(ShuffledPool):
        def answer(self, number: int) -> Any:
            request = self.requests.pop(number)
            if number == 0 and len(self.died) < num_deaths:
                self.died.append(("easy", 0))
                return Death(reason="it was killed.")
            return RolloutWorker(self.setup).handle(request)

    pool = Deadly(create_setup(), 3, seed=0)
    pool.episodes = dict.fromkeys(range(3), ("easy", 0))
    if num_deaths == 1:
        assert [facts.robot for facts in pool.describe(["easy", "hard"])] == ["toy", "toy"]
    else:
        with pytest.raises(ValueError, match=r"cannot be created: in 2 attempts it was killed\."):
            pool.describe(["easy", "hard"])


@pytest.mark.parametrize("num_workers", [2, 4, 16])
def test_a_slow_episode_delays_no_other(num_workers: int) -> None:
    """All others end before the slow one answers for the first time."""
    episodes = list_episodes(["easy"], ExpertActor(describe_toy()), 40)
    pool = ShuffledPool(create_setup(), num_workers, seed=0, slow_seed=0)
    ends = [result.seed for result in run_episodes(pool, episodes)]
    assert ends[-1] == 0
    assert sorted(ends) == list(range(40))


def test_a_slow_process_delays_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed 0 waits until four others have ended, which its neighbour must run."""
    monkeypatch.chdir(tmp_path)
    with create_pool(create_setup(), 2) as pool:
        actor = ExpertActor(pool.describe(["slow"])[0])
        ends = [result.seed for result in run_episodes(pool, list_episodes(["slow"], actor, 5))]
    assert ends == [1, 2, 3, 4, 0]


@pytest.mark.parametrize("slow_seed", [None, 5])
def test_predictions_are_made_in_batches_and_nobody_waits_for_a_slow_simulator(
    monkeypatch: pytest.MonkeyPatch, slow_seed: int | None
) -> None:
    sizes: list[int] = []

    class Thinker(RandomActor):
        def predicts_next(self, slot: int) -> bool:
            return self._steps[slot] % 2 == 0

        def act(self, observed: Any) -> dict[int, np.ndarray | None]:
            sizes.append(sum(map(self.predicts_next, observed)))
            pool.clock.seconds += min(sizes[-1], 1)
            return super().act(observed)

    episodes = list_episodes(["easy"], Thinker(describe_toy(), seed=3), 40)
    pool = ShuffledPool(create_setup(), 1, seed=0)
    alone = by_seed([*run_episodes(pool, episodes)])
    sizes.clear()
    pool = ShuffledPool(create_setup(), 6, seed=1, deaths=0.02, slow_seed=slow_seed)
    monkeypatch.setattr("vla_foundry.evaluation.rollouts.time", pool.clock)
    ends = [*run_episodes(pool, episodes, batch_size=3)]
    assert by_seed(ends) == alone
    assert pool.died
    assert slow_seed is None or ends[-1].seed == slow_seed
    # few are smaller: the last ones
    assert np.mean([size for size in sizes if size > 0]) > 2.8


def test_a_robot_does_not_wait_for_those_that_only_follow_their_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = [0]

    class Thinker(RandomActor):
        def predicts_next(self, slot: int) -> bool:
            return slot == 0

        def act(self, observed: Any) -> dict[int, np.ndarray | None]:
            waits.append(0 if 0 in observed else waits[-1] + 1)
            pool.clock.seconds += 10 if 0 in observed else 0
            return super().act(observed)

    class InTurn(ShuffledPool):
        def wait(self, seconds: float = math.inf) -> dict[int, Any]:
            self.clock.seconds += min(seconds, 1)
            first = next(iter(self.requests))
            return {first: self.answer(first)} if seconds >= 1 else {}

    episodes = list_episodes(["easy"], Thinker(describe_toy(), seed=3), 6)
    pool = InTurn(create_setup(), 6, seed=1)
    monkeypatch.setattr("vla_foundry.evaluation.rollouts.time", pool.clock)
    list(run_episodes(pool, episodes, batch_size=4))
    # the others act some ten times while one prediction is made, and a hundred times in all
    assert max(waits) < 20


def test_actions_that_are_not_finite_are_the_policys_failure() -> None:
    class Broken(NullActor):
        def act(self, observed: Any) -> dict[int, np.ndarray | None]:
            return {slot: np.array([np.nan if slot == 1 else 1.0, 0]) for slot in observed}

    episodes = list_episodes(["easy"], Broken(describe_toy()), 2)
    results = by_seed([*run_episodes(ShuffledPool(create_setup(), 2, seed=0), episodes)])
    assert [result.outcome for result in results] == ["success", "failure"]
    assert results[1].failure_message == "The policy's action [nan, 0.0] is not finite."
    assert (results[1].failure_kind, results[1].num_steps) == ("action_not_finite", 0)


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("sense", {"place": np.array([np.nan]), "opening": np.zeros(1)}, r"'place' of toy must be 1 finite .*\[nan\]"),
        ("sense", {"place": np.zeros(99), "opening": np.zeros(1)}, r"1 finite numbers, got float64 \(99,\)"),
        ("sense", {"place": "left", "opening": np.zeros(1)}, "1 finite numbers, got <U4"),
        ("sense", {"opening": np.zeros(1), "place": np.zeros(1)}, r"toy senses \['opening', 'place'\]"),
        ("render", np.zeros((16, 8, 3), np.uint8), r"'front' of toy gives uint8 \(16, 8, 3\), not uint8 \(16, 16, 3\)"),
        ("render", np.zeros((16, 16, 3)), r"gives float64 \(16, 16, 3\), not uint8"),
        ("render", None, "gives None, not uint8"),
        ("step", ({"images": {}, "fields": {}}, 0.0, False, False, {"success": np.nan}), "true or false, got nan"),
        ("step", ({"images": {}, "fields": {}}, 0.0, False, False, {}), "true or false, got None"),
    ],
)
def test_a_simulator_that_breaks_down_invalidates_its_episode_alone(
    monkeypatch: pytest.MonkeyPatch, method: str, value: Any, message: str
) -> None:
    good = getattr(SIMULATORS.get("toy"), method)
    monkeypatch.setattr(
        SIMULATORS.get("toy"), method, lambda toy, *words: value if toy.seed == 1 else good(toy, *words)
    )
    pool = ShuffledPool(create_setup(cameras=("front",)), 2, seed=0)
    results = by_seed([*run_episodes(pool, list_episodes(["easy"], ExpertActor(describe_toy()), 3))])
    assert [result.outcome for result in results] == ["success", "invalid", "success"]
    assert results[1].failure_kind == "simulator_failed"
    assert re.search(message, str(results[1].failure_message))


def test_a_worker_that_does_not_answer_is_killed() -> None:
    pool = RolloutPool(create_setup(timeout_s=0.2), 1)
    ours, _theirs = get_context("fork").Pipe()
    process = get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
    process.start()
    pool._workers[0] = (ours, process)
    pool.send(0, partial(RolloutWorker.describe, task="easy"))
    assert pool.wait() == {0: Death(reason="the simulator did not answer within simulator_timeout_s (0.2 s).")}
    assert process.exitcode == -9
    assert not pool._workers


@pytest.mark.parametrize("save_videos", ["none", "failures", "all"])
def test_videos_are_of_the_episodes_that_were_asked_for(
    save_videos: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at most, of every step, whoever dies. Nothing is rendered that nobody asked for."""
    toy, renders = find_toy(), []
    render = toy.render
    monkeypatch.setattr(toy, "render", lambda self, camera: renders.append(camera) or render(self, camera))
    params = EvaluateParams(
        simulator="toy",
        tasks=["hard"],
        policy="random",
        episodes="0:20",
        output=str(tmp_path),
        save_videos=save_videos,
        max_sample_size=40,
        max_videos=2,
        num_pictured=0,
    )

    def run(params: EvaluateParams) -> tuple[TaskRollouts, list[Path]]:
        task = TaskRollouts.open(params, create_baseline(params, "front"), "hard")
        pool = ShuffledPool(create_setup(image_size=(17, 15)), 4, seed=0, deaths=0.05)
        for result in run_episodes(pool, task.plan(params, describe_toy(), RandomActor(describe_toy(), seed=3), None)):
            task.add(params, result)
        task.write()
        return task, sorted(path for path in tmp_path.rglob("*") if path.name.startswith("video"))

    task, videos = run(params)
    assert sum(result.outcome == "failure" for result in task.episodes.values()) > 4
    if save_videos == "none":
        assert (videos, renders) == ([], [])
        return
    assert [video.name for video in videos] == ["video.mp4"] * 2
    for video in videos:
        result = task.episodes[int(video.parent.name.removeprefix("demonstration_"))]
        assert result.outcome == "failure" if save_videos == "failures" else result.seed < 2
        with av.open(str(video)) as film:
            frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        assert (len(frames) - 1, frames[0].shape) == (result.num_steps, (14, 16, 3))
    # videos of earlier runs count
    num_renders = len(renders)
    assert run(replace(params, episodes="0:30"))[1] == videos
    assert len(renders) == num_renders


def test_no_episodes_need_no_worker() -> None:
    assert list(run_episodes(ShuffledPool(create_setup(), 4, seed=0), [])) == []
