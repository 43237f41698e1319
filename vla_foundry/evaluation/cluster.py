"""Run rollouts on a Ray cluster: its actors are the workers and policies that otherwise run on this machine.

The queue of episodes, their results and the random numbers stay in this process, so outcomes are the same. A worker or
policy that died, or whose node did, is started again where there is room.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayError, RayTaskError

from vla_foundry.config.command_line import import_installed_plugins, import_plugins, named_plugins
from vla_foundry.evaluation.actors import Actor, Candidate
from vla_foundry.evaluation.rollout_worker import (
    Death,
    Failure,
    Reply,
    Request,
    RobotFacts,
    RolloutWorker,
    SimulatorSetup,
)
from vla_foundry.evaluation.rollouts import RolloutPool
from vla_foundry.params.commands.evaluation import EvaluateParams
from vla_foundry.progress import say

# after this time without any answer the user is told that Ray waits for room
_SECONDS_TO_START = 60
# how often a policy or simulator is started for an episode: Ray may place it on a node that it does not know to be dead
_ATTEMPTS = 3
# a policy's options: where there is room, on all nodes alike
_SPREAD: dict[str, Any] = {"scheduling_strategy": "SPREAD", "num_cpus": 0}


class ClusterPool(RolloutPool):
    """Ray actors with a simulator each. One that died is started again when it is asked next.

    Args:
        setup: how to create the simulators.
        num_workers: number of actors. If the cluster has fewer CPUs, they share them.
    """

    def __init__(self, setup: SimulatorSetup, num_workers: int) -> None:
        super().__init__(setup, num_workers)
        self._class = ray.remote(RolloutWorker)
        num_cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        # Ray counts ten thousandths
        self._share = 10_000 // -(-num_workers // num_cpus) / 10_000
        self.actors: dict[int, Any] = {}
        # answers that are owed
        self._owed: dict[Any, int] = {}
        self._requests: dict[int, Request] = {}
        self._started: set[int] = set()
        # how often in a row workers died before their episode began
        self._lost: dict[int, int] = {}

    def send(self, number: int, request: Request) -> None:
        """Ask a worker that owes no answer."""
        if number not in self.actors:
            # the CPUs of a dead node are gone: its workers must not wait for them
            options = _SPREAD if number in self._started else _SPREAD | {"num_cpus": self._share}
            self.actors[number] = self._class.options(**options).remote(self._setup)
            self._started.add(number)
        self._requests[number] = request
        self._owed[self.actors[number].handle.remote(request)] = number
        self._asked[number] = time.monotonic() + self._setup.timeout_s

    def wait(self, seconds: float = math.inf) -> dict[int, Any]:
        """Wait until workers have answered; return what they say: their answers, or a Death. Nothing if time is up."""
        owed, end = list(self._owed), min(self._asked.values())
        patience = min(_SECONDS_TO_START, end - time.monotonic())
        is_ready = bool(ray.wait(owed, timeout=max(0.0, min(seconds, patience)))[0])
        if not is_ready and seconds >= patience:
            if time.monotonic() < end:
                say(f"no simulator has answered for {_SECONDS_TO_START} s: Ray may be waiting for free CPUs")
            ray.wait(owed, timeout=max(0.0, end - time.monotonic()))
        answers: dict[int, Any] = {}
        ready, late = ray.wait(owed, num_returns=len(owed), timeout=0)
        for reference in late:
            number = self._owed[reference]
            if time.monotonic() > self._asked[number]:
                del self._owed[reference]
                ray.kill(self.actors.pop(number))
                answers[number] = Death(reason=self._describe_delay())
        for reference in ready:
            number = self._owed.pop(reference)
            try:
                answers[number] = answer = ray.get(reference)
                self._lost.pop(number, None)
                if isinstance(answer, Failure):
                    place = _find_node(self.actors[number])
                    answers[number] = replace(answer, message=f"On node {place}: {answer.message}")
            except RayError as error:
                ray.kill(self.actors.pop(number))
                request = self._requests[number]
                lost = self._lost.pop(number, 0) + 1
                if isinstance(request, partial) and request.func is not RolloutWorker.step and lost < _ATTEMPTS:
                    # it may have died before the episode began, and Ray may not have known it
                    self._lost[number] = lost
                    self.send(number, request)
                else:
                    answers[number] = Death(reason=f"the simulator's {_describe_end(error)}")
        for number in answers:
            del self._asked[number]
        return answers

    def close(self) -> None:
        """End the actors."""
        for actor in self.actors.values():
            ray.kill(actor)


class PolicyHost:
    """A policy in a process of its own, and what acts with it in each task.

    Args:
        params: which policy.
        camera: see load_candidate.
        num_threads: of torch; other numbers change the last bits of a prediction.
        plugins: modules that register models.
    """

    def __init__(self, params: EvaluateParams, camera: str, num_threads: int, plugins: Sequence[str]) -> None:
        torch.set_num_threads(num_threads)
        self._params, self._camera, self._plugins = params, camera, plugins
        self._candidate: Candidate | None = None
        self._actors: dict[int, Actor] = {}

    def load(self) -> Candidate:
        """Load the policy, if it is not, and describe it; the description creates no actors."""
        from vla_foundry.evaluation.policy_actor import load_candidate

        if self._candidate is None:
            import_installed_plugins()
            import_plugins(self._plugins, "--plugins")
            self._candidate = load_candidate(self._params, self._camera)
        return replace(self._candidate, create_actor=_create_none)

    def open(self, robot: int, facts: RobotFacts) -> None:
        """Prepare to act for a task's robot."""
        if robot not in self._actors:
            self.load()
            assert self._candidate is not None
            self._actors[robot] = self._candidate.create_actor(facts)

    def begin(self, robot: int, facts: RobotFacts, episode: tuple[int, int, str]) -> None:
        """Start an episode (slot, seed, instruction)."""
        self.open(robot, facts)
        self._actors[robot].begin(*episode)

    def act(self, robot: int, observed: Mapping[int, Reply]) -> tuple[Mapping[int, Any], dict[int, tuple[bool, bool]]]:
        """Return the action of each slot; whether its next observation needs images, and leads to a prediction."""
        actor = self._actors[robot]
        return actor.act(observed), {slot: (actor.needs_images(slot), actor.predicts_next(slot)) for slot in observed}

    def end(self, robot: int, slot: int) -> Sequence[float]:
        """See Actor."""
        return self._actors[robot].end(slot)


def _create_none(facts: RobotFacts) -> Actor:
    raise AssertionError("a description of a policy creates no actors")


@dataclass(eq=False)
class PolicyHosts:
    """The hosts of a policy; slots are shared out among them. One that died is started again for the next episode."""

    create: Callable[[], Any]
    number: int
    _found: dict[int, Any] = field(default_factory=dict)

    def all(self) -> list[Any]:
        """Return all hosts."""
        return [self.find(slot) for slot in range(self.number)]

    def find(self, slot: int) -> Any:
        """Return the host of a slot."""
        number = slot % self.number
        if number not in self._found:
            self._found[number] = self.create()
        return self._found[number]

    def lose(self, host: Any) -> None:
        """Forget a host that has died."""
        self._found = {number: other for number, other in self._found.items() if other is not host}

    def close(self) -> None:
        """End the hosts."""
        for host in self._found.values():
            ray.kill(host)


class ClusterActor:
    """Acts in the episodes of a task with policies on the cluster.

    Args:
        hosts: the policies.
        robot: number of the task's robot.
        facts: the robot.

    Raises:
        ValueError: the policy does not fit the robot.
    """

    def __init__(self, hosts: PolicyHosts, robot: int, facts: RobotFacts) -> None:
        self.hosts, self._robot, self._facts = hosts, robot, facts
        # whether a slot's next observation must contain images, and leads to a prediction
        self._next: dict[int, tuple[bool, bool]] = {}
        # the host of each slot's episode
        self._begun: dict[int, Any] = {}
        _get_all(hosts.all(), lambda host: host.open.remote(robot, facts))

    def begin(self, slot: int, seed: int, instruction: str) -> None:
        """See Actor."""
        for attempt in range(1, _ATTEMPTS + 1):
            host = self.hosts.find(slot)
            try:
                ray.get(host.begin.remote(self._robot, self._facts, (slot, seed, instruction)))
                break
            except RayTaskError as error:
                raise _name_node(error, host) from None
            except RayError as error:  # it died before, and not because of this episode
                self.hosts.lose(host)
                if attempt == _ATTEMPTS:
                    raise ValueError(f"A policy cannot be loaded: its {_describe_end(error)}") from None
        self._begun[slot], self._next[slot] = self.hosts.find(slot), (True, True)

    def needs_images(self, slot: int) -> bool:
        """See Actor."""
        return self._next[slot][0]

    def predicts_next(self, slot: int) -> bool:
        """See Actor."""
        return self._next[slot][1]

    def act(self, observed: Mapping[int, Reply]) -> dict[int, np.ndarray | Death | None]:
        """See Actor."""
        groups: dict[Any, dict[int, Reply]] = {}
        for slot, reply in observed.items():
            groups.setdefault(self._begun[slot], {})[slot] = reply
        asked = {host: host.act.remote(self._robot, group) for host, group in groups.items()}
        actions: dict[int, np.ndarray | Death | None] = {}
        for host, reference in asked.items():
            try:
                found, expected = ray.get(reference)
            except RayTaskError as error:
                raise _name_node(error, host) from None
            except RayError as error:
                self.hosts.lose(host)
                actions |= dict.fromkeys(groups[host], Death(reason=f"the policy's {_describe_end(error)}"))
            else:
                actions |= found
                self._next |= expected
        return actions

    def end(self, slot: int) -> Sequence[float]:
        """See Actor."""
        host = self._begun.pop(slot)
        try:
            return ray.get(host.end.remote(self._robot, slot))
        except RayError:  # it died with the episode
            return ()


@contextmanager
def load_on_cluster(params: EvaluateParams, camera: str) -> Iterator[Candidate]:
    """Load the policy of `params.checkpoint` in Ray actors, and end them at the end of the block.

    Raises:
        FileNotFoundError: a node does not see the checkpoint.
        ValueError: there are not enough GPUs, or it is not a policy.
    """
    num_gpus = choose_gpus(params, [node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]])
    on_node = replace(params, device=params.device if num_gpus or params.device != "auto" else "cpu")
    remote = ray.remote(PolicyHost).options(**_SPREAD | {"num_gpus": num_gpus})
    words = (on_node, camera, torch.get_num_threads(), named_plugins())
    hosts = PolicyHosts(lambda: remote.remote(*words), params.num_policies)
    try:
        candidate: Candidate = _get_all(hosts.all(), lambda host: host.load.remote())[0]
        robots: list[RobotFacts] = []

        def create_actor(facts: RobotFacts) -> Actor:
            robots.append(facts)
            return ClusterActor(hosts, len(robots), facts)

        yield replace(candidate, create_actor=create_actor)
    finally:
        hosts.close()


def choose_gpus(params: EvaluateParams, gpus: Sequence[float]) -> float:
    """Return the fraction of a GPU for each policy.

    Args:
        params: how many policies, and their fraction; None: a whole GPU each, or none on a cluster without GPUs.
        gpus: number of GPUs of each node.

    Raises:
        ValueError: they do not fit.
    """
    wanted = params.gpus_per_policy
    if wanted is None:
        wanted = 0.0 if params.device == "cpu" or not any(gpus) else 1.0
    # a policy does not span two GPUs
    room = sum(int(count) for count in gpus) * int(1 / wanted + 1e-6) if wanted else params.num_policies
    if room < params.num_policies:
        raise ValueError(
            f"num_policies {params.num_policies} with gpus_per_policy {wanted:g} do not fit on the cluster at "
            f"--cluster {params.cluster}: its {sum(gpus):g} GPUs have room for {room}. Lower one of them; "
            "gpus_per_policy 0 runs policies on CPUs."
        )
    return wanted


def _get_all(hosts: Sequence[Any], ask: Callable[[Any], Any]) -> list[Any]:
    """Return what all hosts answer.

    Raises:
        ValueError, OSError: one cannot answer, or died.
    """
    answers = []
    for host, reference in [(host, ask(host)) for host in hosts]:
        try:
            answers.append(ray.get(reference))
        except RayTaskError as error:
            raise _name_node(error, host) from None
        except RayError as error:
            raise ValueError(f"A policy cannot be loaded: its {_describe_end(error)}") from None
    return answers


def _name_node(error: RayTaskError, host: Any) -> Exception:
    """Return an actor's own error with the name of its node."""
    cause = error.cause
    where = f"On node {_find_node(host)}: {str(cause).rstrip('.')}."
    if isinstance(cause, FileNotFoundError):
        return FileNotFoundError(
            f"{where} All nodes must see the checkpoint: put it on shared storage, or name it by s3:// or hf://."
        )
    if isinstance(cause, (ValueError, OSError)):
        return type(cause)(where)
    return error


def _find_node(actor: Any) -> str:
    try:
        return ray.get(actor.__ray_call__.remote(_read_address))
    except RayError:
        return "that has died"


def _read_address(_: object) -> str:
    return ray.util.get_node_ip_address()


def _describe_end(error: RayError) -> str:
    """Return "process ..." with what an actor died of."""
    # what follows are Ray's guesses, memory among them
    text = " ".join(str(error).split()).partition(" Some common causes")[0]
    if "node has died" in text or "node was terminated" in text:
        return "process ended with its node."
    if "OutOfMemory" in type(error).__name__ or "memory" in text:
        return f"process ended: is there enough memory? {text[:200]}"
    _, _, detail = text.rpartition("Worker exit detail: ")
    return f"process on the cluster ended: {detail[:200]}"
