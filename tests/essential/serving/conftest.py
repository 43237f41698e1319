"""A policy of a made-up arm with two cameras, and a server in a thread of this process."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.essential.inference.conftest import arm as arm
from vla_foundry.params.commands.serving import ServeParams
from vla_foundry.serving.command import Ports, open_server
from vla_foundry.serving.policies import Served, load_policy


@contextmanager
def serve(served: Served, *, token: str | None = None, **settings: Any) -> Iterator[Ports]:
    """Serve a policy on free ports while the block runs."""
    # the params need a policy; it is loaded already
    params = ServeParams(**{"policy": "any:Policy", "port": 0, "websocket_port": 0, **settings})
    started: list[Any] = []
    ready = threading.Event()

    async def run() -> None:
        stop = asyncio.Event()
        try:
            async with open_server(params, served, token) as ports:
                started.extend([ports, asyncio.get_running_loop(), stop])
                ready.set()
                await stop.wait()
        except ValueError as error:
            started.append(error)
            ready.set()

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    assert ready.wait(30)
    if isinstance(started[0], Exception):
        raise started[0]
    ports, loop, stop = started
    try:
        yield ports
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def served(arm: Any) -> Served:
    """The arm's policy, loaded as `vla-foundry serve` loads it."""
    return load_policy(ServeParams(checkpoint=str(arm.run), device="cpu"))
