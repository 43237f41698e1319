"""The queue of all clients' requests, with a policy that writes down what it is asked."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Any

import numpy as np
import pytest

from vla_foundry.client import RobotObservation
from vla_foundry.client.observation import RobotSteps
from vla_foundry.serving.engine import Engine, NoSessionError, PolicyFailedError
from vla_foundry.serving.policies import _PerClient

OBSERVATION = RobotObservation(images={}, fields={"state": np.zeros(1)})


class CountingPolicy:
    """Counts its actions; seed 13 cannot begin, and the state 13 cannot be acted on."""

    def __init__(self) -> None:
        self.num_actions = 0

    def reset(self, seed: int) -> None:
        if seed == 13:
            raise RuntimeError("no luck")
        self.num_actions = 0

    def act(self, observation: RobotObservation) -> dict[str, np.ndarray]:
        time.sleep(0.1)
        self.num_actions += 1
        if observation.fields["state"][0] == 13:
            raise ValueError("no luck")
        return {"action": np.array([self.num_actions])}


def run(use: Callable[[Engine, _PerClient], Awaitable[Any]], **settings: Any) -> Any:
    async def main() -> Any:
        policy = _PerClient(CountingPolicy, CountingPolicy())
        async with Engine(policy, **settings) as engine:
            return await use(engine, policy)

    return asyncio.run(main())


async def reset(engine: Engine, *clients: Hashable) -> None:
    for client in clients:
        await engine.reset(client, 0)


def test_one_clients_fault_makes_no_other_act_twice() -> None:
    bad = RobotObservation(images={}, fields={"state": np.array([13.0])})

    async def use(engine: Engine, policy: _PerClient) -> list[Any]:
        await reset(engine, "a", "b", "c")
        asked = [engine.act("a", OBSERVATION), engine.act("b", bad), engine.act("c", OBSERVATION)]
        return await asyncio.gather(*asked, return_exceptions=True)

    first, second, third = run(use, batching="fast", window_ms=500.0)
    assert isinstance(second, ValueError)
    assert (first.actions["action"], third.actions["action"]) == (1, 1)


def test_a_session_that_nobody_waits_to_end_is_forgotten() -> None:
    async def use(engine: Engine, policy: _PerClient) -> None:
        await reset(engine, *range(20))
        busy = asyncio.create_task(engine.act(0, OBSERVATION))
        await asyncio.sleep(0)
        for client in range(1, 20):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(engine.forget(client), 1e-4)
        await busy
        await engine.act(0, OBSERVATION)
        assert list(policy._clients) == [0]

    run(use)


def test_a_chunk_that_nobody_waits_for_is_not_predicted() -> None:
    asked: list[int] = []

    async def use(engine: Engine, policy: _PerClient) -> None:
        policy.predict_from = lambda robot, client: asked.append(robot.step) or {"action": np.zeros((1, 1))}
        await reset(engine, "a")
        busy = asyncio.create_task(engine.act("a", OBSERVATION))
        await asyncio.sleep(0)
        steps = [RobotSteps(step=step, observations=[], actions=[], rest=[], delay_steps=0) for step in range(2)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.predict("a", steps[0]), 1e-4)
        await asyncio.gather(busy, engine.predict("a", steps[1]))
        assert asked == [1]

    run(use)


def test_an_endless_prediction_keeps_nobody_at_the_end() -> None:
    async def use(engine: Engine, policy: _PerClient) -> None:
        await reset(engine, "a", "b")
        asked = [asyncio.create_task(engine.act(client, OBSERVATION)) for client in "ab"]
        await asyncio.sleep(0.02)
        engine.end()
        calls = [*asked, engine.forget("a"), engine.reset("c", 0)]
        found = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 0.05)
        assert {type(each) for each in found} == {asyncio.CancelledError}

    run(use)


def test_a_silent_session_ends_whoever_asks_next() -> None:
    async def use(engine: Engine, policy: _PerClient) -> None:
        await reset(engine, "a", "b")
        await asyncio.sleep(0.2)
        with pytest.raises(NoSessionError, match="silence"):
            await engine.act("a", OBSERVATION)
        await reset(engine, "c")
        assert (list(engine.sessions), list(policy._clients)) == (["c"], ["c"])

    run(use, session_timeout_s=0.1)


def test_an_episode_that_could_not_begin_is_none() -> None:
    async def use(engine: Engine, policy: _PerClient) -> None:
        await reset(engine, "a")
        with pytest.raises(PolicyFailedError, match="RuntimeError"):
            await engine.reset("a", 13)
        with pytest.raises(NoSessionError):
            await engine.act("a", OBSERVATION)

    run(use)
