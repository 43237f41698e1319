"""Run one policy for many clients: one thread owns it, and the requests of all clients wait in one queue."""

import asyncio
import concurrent.futures
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from vla_foundry.client.observation import RobotObservation, RobotSteps

Actions = dict[str, np.ndarray]
THREAD_NAME = "engine"
# how long the end waits for the prediction that runs, seconds
_END_S = 1.0


@runtime_checkable
class ServedPolicy(Protocol):
    """What the engine needs of a policy; inference.Policy has it, and policies.py makes it of any class."""

    def reset(self, seed: int, *, client: Hashable = None) -> None: ...
    def forget(self, client: Hashable = None) -> None: ...
    def observe(self, observation: RobotObservation, *, client: Hashable = None, step: int | None = None) -> None: ...
    def retract(self, client: Hashable = None) -> None: ...
    def choose_actions(self, clients: Any) -> dict[Any, Any]: ...
    def predict_chunk(self, client: Hashable = None) -> Actions: ...
    def predict_from(self, robot: RobotSteps, *, client: Hashable = None) -> Actions: ...
    def needs_images(self, client: Hashable = None) -> bool: ...


class NoSessionError(ValueError):
    """The client has no episode: it never began one, or its session expired."""


class FullError(RuntimeError):
    """The server takes no more clients or requests now."""


class PolicyFailedError(RuntimeError):
    """The policy raised something that is not the observation's fault."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer to an observation."""

    # {field: (C,)}; a whole chunk: {field: (steps, C)}
    actions: Actions
    needs_images: bool
    queue_ms: float
    policy_ms: float


@dataclass(eq=False, kw_only=True)
class _Request:
    client: Hashable
    # runs in the policy's thread; None: an observation to answer
    run: Callable[[], Any] | None
    observation: RobotObservation | None = None
    step: int | None = None
    whole_chunk: bool = False
    # it runs though its caller has given up: sessions begin and end in the policy as they do here
    must_run: bool = False
    future: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    since: float = field(default_factory=time.perf_counter)


class Engine:
    """Answers requests of many clients with one policy, in one thread.

    A client's requests are answered in their order. Predictions whose caller has given up are dropped unmade.

    Args:
        policy: the policy.
        batching: exact: each prediction is made alone, so that other clients do not change its last bits; fast: clients
            that wait together share a prediction.
        window_ms: how long a request waits for others to share its prediction.
        batch_size: most clients that share one.
        max_clients: most sessions at a time.
        session_timeout_s: silent sessions end after this many seconds.
    """

    def __init__(
        self,
        policy: ServedPolicy,
        *,
        batching: Literal["exact", "fast"] = "exact",
        window_ms: float = 0.0,
        batch_size: int = 16,
        max_clients: int = 64,
        session_timeout_s: float = 600.0,
    ) -> None:
        self.policy = policy
        self.batch_size = 1 if batching == "exact" else batch_size
        self.window_s = 0.0 if batching == "exact" else window_ms / 1000
        self.max_clients = max_clients
        self.session_timeout_s = session_timeout_s
        # client -> time of its last request
        self.sessions: dict[Hashable, float] = {}
        self._queue: deque[_Request] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=THREAD_NAME)
        self._task: asyncio.Task | None = None
        self._running: Future[Any] = self._thread.submit(list)
        self._batch: list[_Request] = []
        self._is_ended = False

    async def __aenter__(self) -> "Engine":
        self._task = asyncio.create_task(self._work())
        return self

    def end(self) -> None:
        """Answer no more requests: those that wait, or run in the policy, are cancelled."""
        assert self._task is not None
        self._is_ended = True
        self._task.cancel()
        for request in (*self._queue, *self._batch):
            request.future.cancel()

    async def __aexit__(self, *error: object) -> None:
        self.end()
        # a prediction that never ends must not keep the server
        ended, _ = concurrent.futures.wait([self._running], timeout=_END_S)
        self._thread.shutdown(wait=bool(ended))

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    async def reset(self, client: Hashable, seed: int) -> None:
        """Begin an episode of a client, and forget its previous one.

        Raises:
            FullError: there are max_clients other clients.
            ValueError, PolicyFailedError: the policy failed; the client has no episode then.
        """
        self._end_silent_sessions()
        if client not in self.sessions and len(self.sessions) >= self.max_clients:
            raise FullError(f"the server has its {self.max_clients} clients (max_clients). Try again later.")
        self.sessions[client] = time.monotonic()
        try:
            await self._ask(_Request(client=client, run=lambda: self.policy.reset(seed, client=client), must_run=True))
        except (ValueError, PolicyFailedError):
            await self.forget(client)
            raise

    async def forget(self, client: Hashable) -> None:
        """End a client's session; unknown clients are no error."""
        if self.sessions.pop(client, None) is not None:
            await self._ask(_Request(client=client, run=partial(self.policy.forget, client), must_run=True))

    async def act(
        self, client: Hashable, observation: RobotObservation, *, step: int | None = None, whole_chunk: bool = False
    ) -> Reply:
        """Return the action for an observation.

        Args:
            client: whose observation it is.
            observation: what its robot senses.
            step: see Policy.observe.
            whole_chunk: predict now, and return all predicted steps.

        Raises:
            NoSessionError: the client did not begin an episode.
            ValueError: the observation lacks something; the session is as it was.
            PolicyFailedError: the policy failed.
        """
        self._touch(client)
        request = _Request(client=client, run=None, observation=observation, step=step, whole_chunk=whole_chunk)
        return await self._ask(request)

    async def predict(self, client: Hashable, robot: RobotSteps) -> Reply:
        """Return a chunk for a robot that keeps its own chunks; see Policy.predict_from.

        Raises:
            NoSessionError, ValueError, PolicyFailedError: as `act`.
        """
        self._touch(client)
        since = time.perf_counter()

        def run() -> Reply:
            start = time.perf_counter()
            actions = _check_actions(self.policy.predict_from(robot, client=client))
            if isinstance(actions, Exception):
                raise actions
            return Reply(
                actions=actions,
                needs_images=True,
                queue_ms=1000 * (start - since),
                policy_ms=1000 * (time.perf_counter() - start),
            )

        return await self._ask(_Request(client=client, run=run))

    def _touch(self, client: Hashable) -> None:
        self._end_silent_sessions()
        if client not in self.sessions:
            raise NoSessionError(
                "no episode was begun, or it ended after "
                f"{self.session_timeout_s:g} s of silence (session_timeout_s). Reset first."
            )
        self.sessions[client] = time.monotonic()

    def _ask(self, request: _Request) -> asyncio.Future:
        if self._is_ended:
            request.future.cancel()
        self._queue.append(request)
        self._arrived.set()
        return request.future

    def _end_silent_sessions(self) -> None:
        limit = time.monotonic() - self.session_timeout_s
        for client in [client for client, last in self.sessions.items() if last < limit]:
            del self.sessions[client]
            # without waiting: this client's request must keep its place
            self._ask(_Request(client=client, run=partial(self.policy.forget, client), must_run=True))

    async def _work(self) -> None:
        while True:
            if not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
            if self.window_s and self._queue[0].run is None:
                await self._wait_for_others()
            batch = self._batch = self._take()
            if batch:
                self._running = self._thread.submit(attempt, lambda batch=batch: self._run(batch))
                found = await asyncio.wrap_future(self._running)
                outcomes = [found] * len(batch) if isinstance(found, Exception) else found
                for request, outcome in zip(batch, outcomes, strict=True):
                    _settle(request.future, outcome)

    async def _wait_for_others(self) -> None:
        """Wait until the window is over, the batch is full, or every client waits already."""
        deadline = self._queue[0].since + self.window_s
        most = min(self.batch_size, len(self.sessions))
        while len(self._queue) < most and (left := deadline - time.perf_counter()) > 0:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except TimeoutError:
                return

    def _take(self) -> list[_Request]:
        """Take the next requests that are answered together, each of another client; no client's order changes."""
        batch: list[_Request] = []
        blocked: set[Hashable] = set()
        kept: deque[_Request] = deque()
        while self._queue:
            request = self._queue.popleft()
            if request.future.done() and not request.must_run:
                continue
            is_alone = request.run is not None or request.whole_chunk
            if request.client in blocked or len(batch) == self.batch_size or (batch and is_alone):
                kept.append(request)
            else:
                batch.append(request)
                if is_alone:
                    break
            blocked.add(request.client)
        kept.extend(self._queue)
        self._queue = kept
        return batch

    def _run(self, batch: list[_Request]) -> list[Any]:
        """Answer a batch in the policy's thread: a result or an exception for each request."""
        start = time.perf_counter()
        if batch[0].run is not None:
            return [attempt(batch[0].run)]
        outcomes: dict[Hashable, Any] = {}
        for request in batch:
            outcomes[request.client] = attempt(lambda request=request: self._observe(request))
        due = [request for request in batch if not isinstance(outcomes[request.client], Exception)]
        found = attempt(lambda: self._choose(due)) if due else {}
        if isinstance(found, ValueError) and len(due) > 1:
            # one client's fault must not reach the others
            found = {}
            for request in due:
                alone = attempt(lambda request=request: self._choose([request]))
                found[request.client] = alone if isinstance(alone, Exception) else alone[request.client]
        elif isinstance(found, Exception):
            found = dict.fromkeys([request.client for request in due], found)
        now = time.perf_counter()
        for request in due:
            actions = found[request.client]
            if isinstance(actions, Exception):
                self.policy.retract(request.client)
                outcomes[request.client] = actions
            else:
                outcomes[request.client] = Reply(
                    actions=actions,
                    needs_images=self.policy.needs_images(request.client),
                    queue_ms=1000 * (start - request.since),
                    policy_ms=1000 * (now - start),
                )
        return [outcomes[request.client] for request in batch]

    def _observe(self, request: _Request) -> None:
        assert request.observation is not None
        self.policy.observe(request.observation, client=request.client, step=request.step)

    def _choose(self, requests: list[_Request]) -> dict[Hashable, Actions | Exception]:
        if requests[0].whole_chunk:
            found = {requests[0].client: self.policy.predict_chunk(requests[0].client)}
        else:
            found = self.policy.choose_actions([request.client for request in requests])
        return {client: _check_actions(actions) for client, actions in found.items()}


def _check_actions(actions: Actions | Exception) -> Actions | Exception:
    """Return actions that a robot may execute; else the error for its client."""
    if isinstance(actions, Exception):
        return actions
    broken = [name for name, values in actions.items() if not np.isfinite(values).all()]
    if broken or not actions:
        what = f"its action '{broken[0]}' is not finite" if broken else "it returned no action"
        return PolicyFailedError(f"the policy failed: {what}.")
    return actions


def attempt(function: Callable[[], Any]) -> Any:
    """Return what a function returns, or the exception that clients get to see."""
    try:
        return function()
    except (ValueError, PolicyFailedError) as error:
        return error
    except BaseException as error:  # the border to a policy's code, where even sys.exit must not end the server
        traceback.print_exc(file=sys.stderr)
        return PolicyFailedError(f"the policy failed ({type(error).__name__}); the server's log says more.")


def _settle(future: asyncio.Future, outcome: Any) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
