"""The queue of episodes: outcomes do not depend on how many run, in which order they answer, or who dies."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_foundry.config.command_line import named_plugins
from vla_foundry.evaluation.actors import Actor, ExpertActor, RandomActor
from vla_foundry.evaluation.results import EpisodeResult
from vla_foundry.evaluation.rollout_worker import RobotFacts, RolloutWorker, SimulatorSetup
from vla_foundry.evaluation.rollouts import Death, Episode, RolloutPool, create_pool, run_episodes

pytestmark = pytest.mark.usefixtures("toy_simulator")


def create_setup(**values: Any) -> SimulatorSetup:
    given: dict[str, Any] = {"simulator": "toy", "cameras": (), "picture_camera": "front", "image_size": (16, 16)}
    return SimulatorSetup(**given | {"max_steps": None, "plugins": named_plugins()} | values)


def describe_toy() -> RobotFacts:
    return RolloutWorker(create_setup()).describe(task="easy")


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

    def send(self, number: int, request: Any) -> None:
        assert number not in self.requests
        self.requests[number] = request
        if request.func is RolloutWorker.begin:
            self.episodes[number] = (request.keywords["task"], request.keywords["seed"])

    def wait(self) -> dict[int, Any]:
        ready = [number for number in self.requests if self.episodes[number][1] != self.slow_seed] or [*self.requests]
        chosen = self.random.choice(ready, size=self.random.integers(1, len(ready) + 1), replace=False)
        return {int(number): self.answer(int(number)) for number in chosen}

    def answer(self, number: int) -> Any:
        request, episode = self.requests.pop(number), self.episodes[number]
        if episode not in self.died and self.random.random() < self.deaths:
            self.died.append(episode)
            self.workers.pop(number, None)
            return Death(reason="it was killed.")
        return self.workers.setdefault(number, RolloutWorker(self.setup)).handle(request)


def list_episodes(tasks: Sequence[str], actor: Actor, num_seeds: int) -> list[Episode]:
    found = [(task, seed) for task in tasks for seed in range(num_seeds)]
    return [Episode(task=task, seed=seed, instruction=task, fps=10.0, actor=actor) for task, seed in found]


def by_seed(results: Sequence[EpisodeResult]) -> list[EpisodeResult]:
    return sorted(results, key=lambda result: (result.task, result.seed))


def test_outcomes_are_those_of_one_worker_whoever_answers_first_or_dies() -> None:
    actor = RandomActor(describe_toy(), seed=3)
    episodes = list_episodes(["easy", "hard"], actor, 20)
    alone = by_seed([*run_episodes(ShuffledPool(create_setup(), 1, seed=0), episodes)])
    assert {result.outcome for result in alone} == {"success", "failure"}
    for num_workers in (1, 4, 16, 64):
        for seed in range(3):
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


def test_no_episodes_need_no_worker() -> None:
    assert list(run_episodes(ShuffledPool(create_setup(), 4, seed=0), [])) == []
