"""Run episodes from a queue: simulators in worker processes, one policy in this process.

A worker that is free takes the next episode. The policy answers whoever asks, so a slow episode delays no other. What
it answers depends on the episode alone (inference.Policy), so neither the number of workers nor their speed matters.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from vla_foundry.evaluation.actors import Actor
from vla_foundry.evaluation.results import EpisodeResult
from vla_foundry.evaluation.rollout_worker import (
    Death,
    Failure,
    Reply,
    Request,
    RobotFacts,
    RolloutWorker,
    SimulatorSetup,
    serve_rollouts,
)
from vla_foundry.storage.uri import write_bytes

_SECONDS_TO_END = 5
# how often an episode runs whose worker dies
_ATTEMPTS = 2


class RolloutPool:
    """Worker processes with a simulator each. One that died is started again when it is asked next.

    Args:
        setup: how to create the simulators.
        num_workers: number of processes.
    """

    def __init__(self, setup: SimulatorSetup, num_workers: int) -> None:
        self.num_workers = num_workers
        self._setup = setup
        self._workers: dict[int, tuple[Connection, BaseProcess]] = {}
        # those that owe an answer, and until when
        self._asked: dict[int, float] = {}

    def send(self, number: int, request: Request) -> None:
        """Ask a worker that owes no answer."""
        if number not in self._workers:
            self._start(number)
        connection, _ = self._workers[number]
        self._asked[number] = time.monotonic() + self._setup.timeout_s
        # if it is dead, the wait for its answer tells
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.send(request)

    def wait(self, seconds: float = math.inf) -> dict[int, Any]:
        """Wait until workers have answered; return what they say: their answers, or a Death. Nothing if time is up."""
        owing = {number: self._workers[number] for number in self._asked}
        # a process of the simulator's own can keep a dead worker's end open, so the worker is watched too
        watched = [each for connection, process in owing.values() for each in (connection, process.sentinel)]
        ready = set(wait(watched, min(seconds, max(0.0, min(self._asked.values()) - time.monotonic()))))
        answers: dict[int, Any] = {}
        for number, (connection, process) in owing.items():
            is_late = time.monotonic() > self._asked[number]
            if ready.isdisjoint((connection, process.sentinel)) and not is_late:
                continue
            try:
                answers[number] = connection.recv() if connection.poll() else Death(reason=self._bury(number, is_late))
            except (EOFError, ConnectionResetError):
                answers[number] = Death(reason=self._bury(number, False))
            del self._asked[number]
        return answers

    def describe(self, tasks: Sequence[str]) -> list[RobotFacts]:
        """Return the facts of each task's robot.

        Raises:
            ValueError: a simulator, task or camera is unknown, or the simulator cannot be created.
        """
        found = []
        for start in range(0, len(tasks), self.num_workers):
            group = tasks[start : start + self.num_workers]
            # every worker, so that all are there when episodes begin
            answers: dict[int, Any] = dict.fromkeys(range(self.num_workers))
            for _ in range(_ATTEMPTS):
                asked = {number for number, answer in answers.items() if answer is None or isinstance(answer, Death)}
                for number in asked:
                    self.send(number, partial(RolloutWorker.describe, task=group[number % len(group)]))
                while asked:
                    answered = self.wait()
                    answers |= answered
                    asked -= answered.keys()
            for number in range(len(group)):
                answer = answers[number]
                if isinstance(answer, Death):
                    raise ValueError(f"A simulator cannot be created: in {_ATTEMPTS} attempts {answer.reason}")
                if isinstance(answer, Failure):
                    raise ValueError(answer.message)
                found.append(answer)
        return found

    def close(self) -> None:
        """End the processes."""
        for connection, _ in self._workers.values():
            connection.close()
        end = time.monotonic() + _SECONDS_TO_END
        for _, process in self._workers.values():
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()

    def _describe_delay(self) -> str:
        return f"the simulator did not answer within simulator_timeout_s ({self._setup.timeout_s:g} s)."

    def _start(self, number: int) -> None:
        # spawn: no process inherits another's OpenGL context or threads
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve_rollouts, args=(theirs, self._setup), daemon=True)
        process.start()
        # if both ends stayed open here, the process would never see us close ours
        theirs.close()
        self._workers[number] = (ours, process)

    def _bury(self, number: int, is_late: bool) -> str:
        """Remove a worker that is dead, or too late; return what it died of."""
        connection, process = self._workers.pop(number)
        connection.close()
        process.join(0 if is_late else _SECONDS_TO_END)
        process.kill()
        process.join()
        if is_late:
            return self._describe_delay()
        code = process.exitcode or 0
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return f"the simulator's process ended {how}" + (": is there enough memory?" if code == -9 else ".")


@contextmanager
def create_pool(setup: SimulatorSetup, num_workers: int, *, on_cluster: bool = False) -> Iterator[RolloutPool]:
    """Yield workers, as processes of this machine or on the Ray cluster; end them at the end of the block."""
    if on_cluster:
        from vla_foundry.evaluation.cluster import ClusterPool

        pool: RolloutPool = ClusterPool(setup, num_workers)
    else:
        pool = RolloutPool(setup, num_workers)
    try:
        yield pool
    finally:
        pool.close()


@dataclass(frozen=True, kw_only=True)
class Episode:
    """An episode to run."""

    task: str
    seed: int
    instruction: str
    # control steps per second
    fps: float
    actor: Actor
    # file for its pictures, where they are kept
    pictures: str | None = None
    # mp4 of it, where there may be one
    video: str | None = None
    # seed of another start, whose pictures the policy sees
    shown_seed: int | None = None


@dataclass
class _Run:
    episode: Episode
    result: EpisodeResult
    # how often it began
    attempt: int = 0


def run_episodes(pool: RolloutPool, episodes: Iterable[Episode], *, batch_size: int = 1) -> Iterator[EpisodeResult]:
    """Run episodes, each taken as soon as a worker is free, and yield their results as they end.

    A simulator that fails invalidates only its own episode. If its process dies, the episode runs once more.

    Args:
        batch_size: a robot whose action takes a prediction waits until as many do, or as long as the last prediction
            took, so that simulators which are faster than the policy get it in batches.
    """
    waiting = iter(episodes)
    runs: dict[int, _Run] = {}
    free = list(range(pool.num_workers))
    # observations of robots that wait for others
    held: dict[int, Reply] = {}
    last_s, until = 0.0, math.inf
    while True:
        while free and (episode := next(waiting, None)) is not None:
            number = free.pop(0)
            runs[number] = _Run(episode, _begin_result(episode))
            _begin(pool, number, runs[number])
        if not runs:
            return
        answers = pool.wait(max(0.0, until - time.monotonic()))
        replies, deaths = _take(answers, runs)
        replies |= held
        due = _list_due(runs, replies) if batch_size > 1 else []
        start = time.monotonic()
        is_full = len(due) >= batch_size or start >= until or not _are_more_coming(runs, replies, deaths)
        held = {} if is_full else {number: replies.pop(number) for number in due}
        until = min(until, start + last_s) if held else math.inf
        deaths |= _act(pool, runs, replies)
        if due and not held:
            last_s = time.monotonic() - start
        for number, death in deaths.items():
            if runs[number].attempt < _ATTEMPTS:
                _begin(pool, number, runs[number])
            else:
                runs[number].result = _advance(runs[number].result, death)
        for number in [number for number, run in runs.items() if run.result.outcome is not None]:
            yield _finish(runs.pop(number), number)
            free.append(number)


def _take(answers: Mapping[int, Any], runs: Mapping[int, _Run]) -> tuple[dict[int, Reply], dict[int, Death]]:
    """Note what workers answered; return the observations of episodes that go on, and the deaths."""
    replies, deaths = dict[int, Reply](), dict[int, Death]()
    for number, answer in answers.items():
        run = runs[number]
        if isinstance(answer, Death):
            deaths[number] = answer
            continue
        run.result = _advance(run.result, answer)
        if isinstance(answer, Reply):
            for path, content in answer.files.items():
                write_bytes(path, content)
            if run.result.outcome is None:
                replies[number] = answer
    return replies, deaths


def _list_due(runs: Mapping[int, _Run], replies: Mapping[int, Reply]) -> list[int]:
    """Return the slots whose action takes a prediction."""
    return [number for number in replies if runs[number].episode.actor.predicts_next(number)]


def _are_more_coming(runs: Mapping[int, _Run], replies: Mapping[int, Reply], deaths: Mapping[int, Death]) -> bool:
    return any(run.result.outcome is None and number not in replies.keys() | deaths for number, run in runs.items())


def _begin_result(episode: Episode) -> EpisodeResult:
    return EpisodeResult(task=episode.task, seed=episode.seed, instruction=episode.instruction, num_steps=0)


def _begin(pool: RolloutPool, number: int, run: _Run) -> None:
    episode = run.episode
    run.result, run.attempt = _begin_result(episode), run.attempt + 1
    episode.actor.begin(number, episode.seed, episode.instruction)
    begin = partial(RolloutWorker.begin, task=episode.task, seed=episode.seed, shown_seed=episode.shown_seed)
    pool.send(number, partial(begin, pictures=episode.pictures, video=episode.video))


def _act(pool: RolloutPool, runs: Mapping[int, _Run], replies: Mapping[int, Reply]) -> dict[int, Death]:
    """Send each worker that waits the policy's action; return where the policy died."""
    deaths: dict[int, Death] = {}
    groups: dict[Actor, dict[int, Reply]] = {}
    for number, reply in replies.items():
        groups.setdefault(runs[number].episode.actor, {})[number] = reply
    for actor, observed in groups.items():
        for number, action in actor.act(observed).items():
            if isinstance(action, Death):
                deaths[number] = action
            else:
                step = partial(RolloutWorker.step, action=action, with_images=actor.needs_images(number))
                pool.send(number, step)
    return deaths


def _advance(result: EpisodeResult, answer: Reply | Failure | Death) -> EpisodeResult:
    if isinstance(answer, Death):
        message = f"In {_ATTEMPTS} attempts {answer.reason}"
        return replace(result, outcome="invalid", failure_message=message, failure_kind="worker_died")
    if isinstance(answer, Failure):
        return replace(result, outcome="invalid", failure_message=answer.message, failure_kind="simulator_failed")
    result = replace(result, num_steps=answer.num_steps)
    result = replace(result, failure_kind=answer.failure_kind, failure_message=answer.failure_message)
    if not answer.is_over:
        return result
    outcome = "failure" if not answer.is_success else "success" if answer.num_steps else "trivial"
    return replace(result, outcome=outcome)


def _finish(run: _Run, number: int) -> EpisodeResult:
    result, episode = run.result, run.episode
    assert result.num_steps is not None
    if result.outcome != "invalid":
        result = replace(result, seconds=round(result.num_steps / episode.fps, 6))
    waits = episode.actor.end(number)
    if not waits:
        return result
    mean, median, high = (round(float(value), 3) for value in (np.mean(waits), *np.percentile(waits, [50, 99])))
    return replace(result, latency_ms=mean, latency_p50_ms=median, latency_p99_ms=high)
