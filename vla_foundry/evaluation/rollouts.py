"""Run batches of episodes in lockstep: simulators in worker processes, one policy in this process.

All episodes of a batch start together and step together. So neither the number of processes nor their speed affects
which episodes share a prediction.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from vla_foundry.evaluation.actors import Actor
from vla_foundry.evaluation.results import EpisodeResult
from vla_foundry.evaluation.rollout_worker import (
    Failure,
    Reply,
    Request,
    RobotFacts,
    RolloutWorker,
    SimulatorSetup,
    serve_rollouts,
)

_SECONDS_TO_END = 5


class RolloutPool:
    """Worker processes with simulators. Slot s lives in process s modulo their number.

    Args:
        connections: to the processes.
    """

    def __init__(self, connections: Sequence[Connection]) -> None:
        self._connections = connections

    def ask(self, requests: Sequence[tuple[int, Request]]) -> list[Any]:
        """Send (slot, request) pairs; return the answers in the same order.

        Raises:
            ValueError: a process died.
        """
        shares: dict[int, list[int]] = {}
        for number, (slot, _) in enumerate(requests):
            shares.setdefault(slot % len(self._connections), []).append(number)
        answers: list[Any] = [None] * len(requests)
        try:
            for process, numbers in shares.items():
                self._connections[process].send([requests[number] for number in numbers])
            for process, numbers in shares.items():
                for number, answer in zip(numbers, self._connections[process].recv(), strict=True):
                    answers[number] = answer
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise ValueError(
                "A simulator process died, most likely because the machine ran out of memory. Lower num_workers "
                f"({len(self._connections)}) or batch_size and run the command again: finished episodes are kept."
            ) from None
        return answers

    def describe(self, tasks: Sequence[str]) -> list[RobotFacts]:
        """Return the facts of each task's robot.

        Raises:
            ValueError: a simulator, task or camera is unknown, or the simulator cannot be created.
        """
        # one slot per process, so that no process keeps more than one simulator
        num_slots = len(self._connections)
        answers = self.ask(
            [(number % num_slots, partial(RolloutWorker.describe, task=task)) for number, task in enumerate(tasks)]
        )
        for answer in answers:
            if isinstance(answer, Failure):
                raise ValueError(answer.message)
        return answers


@contextmanager
def create_pool(setup: SimulatorSetup, num_workers: int) -> Iterator[RolloutPool]:
    """Start worker processes; stop them at the end of the block."""
    # spawn: no process inherits another's OpenGL context or threads
    context = get_context("spawn")
    connections, processes = [], []
    try:
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve_rollouts, args=(theirs, setup), daemon=True)
            process.start()
            # if both ends stayed open here, the process would never see us close ours
            theirs.close()
            connections.append(ours)
            processes.append(process)
        yield RolloutPool(connections)
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.join(_SECONDS_TO_END)
            process.kill()
            process.join()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Episodes of one task that run in lockstep."""

    task: str
    seeds: tuple[int, ...]
    instruction: str
    # control steps per second
    fps: float
    # seed -> file for pictures of its episode, where they are kept
    pictures: Mapping[int, str]


def run_batch(pool: RolloutPool, actor: Actor, batch: Batch) -> list[EpisodeResult]:
    """Run a batch to the end. A simulator that fails invalidates only its own episode."""
    results = [
        EpisodeResult(task=batch.task, seed=seed, instruction=batch.instruction, num_steps=0) for seed in batch.seeds
    ]
    requests: list[tuple[int, Request]] = [
        (slot, partial(RolloutWorker.begin, task=batch.task, seed=seed, pictures=batch.pictures.get(seed)))
        for slot, seed in enumerate(batch.seeds)
    ]
    actor.begin(dict(enumerate(batch.seeds)), batch.instruction)
    while requests:
        live: dict[int, Reply] = {}
        for (slot, _), answer in zip(requests, pool.ask(requests), strict=True):
            results[slot] = _advance(results[slot], answer)
            if results[slot].outcome is None:
                live[slot] = answer
        actions = actor.act(live) if live else {}
        requests = []
        for slot, action in actions.items():
            if action is not None and not np.isfinite(action).all():
                message = f"The policy's action {action.tolist()} is not finite."
                results[slot] = replace(results[slot], outcome="failure", failure_message=message)
            else:
                step = partial(RolloutWorker.step, action=action, with_images=actor.needs_images(slot))
                requests.append((slot, step))
    return [_finish(result, batch, actor, slot) for slot, result in enumerate(results)]


def _advance(result: EpisodeResult, answer: Reply | Failure) -> EpisodeResult:
    if isinstance(answer, Failure):
        return replace(result, outcome="invalid", failure_message=answer.message)
    result = replace(result, num_steps=answer.num_steps)
    return replace(result, outcome="success" if answer.is_success else "failure") if answer.is_over else result


def _finish(result: EpisodeResult, batch: Batch, actor: Actor, slot: int) -> EpisodeResult:
    assert result.num_steps is not None
    latency = actor.mean_latency_ms(slot)
    return replace(
        result,
        seconds=None if result.outcome == "invalid" else round(result.num_steps / batch.fps, 6),
        latency_ms=None if latency is None else round(latency, 3),
    )
