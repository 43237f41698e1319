"""A worker process with simulators: it starts episodes, applies actions and returns what the robot senses.

It does not know the policy. The parent sends a list of requests and receives their answers in the same order. The
process ends when its parent does.
"""

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeAlias

import numpy as np

from vla_foundry.config.command_line import import_installed_plugins, import_plugins
from vla_foundry.evaluation.pictures import FrameStrip
from vla_foundry.robotics.spec import FieldDescription
from vla_foundry.simulators import Simulator, create_simulator


@dataclass(frozen=True, kw_only=True)
class SimulatorSetup:
    """How to create the simulators."""

    simulator: str
    # cameras of observations; empty: observations have no images
    cameras: tuple[str, ...]
    # camera of the contact sheet
    picture_camera: str
    # width and height
    image_size: tuple[int, int]
    # actions after which an episode ends; None: the simulator's own limit
    max_steps: int | None
    # further words for the simulator (create_simulator)
    source: dict[str, str] = field(default_factory=dict)
    # modules that register simulators
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RobotFacts:
    """A simulator's description of the robot of a task."""

    robot: str
    fps: int
    # least and largest value of each number of an action
    action_range: tuple[np.ndarray, np.ndarray]
    action_parts: dict[str, FieldDescription]
    # part of an action -> field whose value holds the robot still (Simulator.rest_fields)
    rest_fields: dict[str, str]
    field_names: dict[str, tuple[str, ...]]
    instruction: str
    has_expert: bool
    # why the simulator cannot render the cameras; None: it can
    camera_fault: str | None = None

    @property
    def action_dim(self) -> int:
        """Width of an action."""
        return len(self.action_range[0])


@dataclass(frozen=True, kw_only=True, eq=False)
class Reply:
    """The state of a slot after a request."""

    images: Mapping[str, np.ndarray]
    fields: Mapping[str, np.ndarray]
    # actions applied so far
    num_steps: int
    is_success: bool
    # the episode has ended
    is_over: bool


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The simulator failed and was closed."""

    message: str


@dataclass
class _Slot:
    simulator: Simulator
    task: str
    num_steps: int = 0
    strip: FrameStrip | None = None


class RolloutWorker:
    """The simulators of a process: one per slot, reused while the slot's task stays the same.

    Args:
        setup: how to create each of them.
    """

    def __init__(self, setup: SimulatorSetup) -> None:
        self.setup = setup
        self._slots: dict[int, _Slot] = {}

    def handle(self, slot: int, request: "Request") -> RobotFacts | Reply | Failure:
        """Answer a request. A simulator that fails is closed, and the answer says why."""
        try:
            return request(self, slot)
        except Exception as error:  # process border: the parent names the episode and counts it
            self._drop(slot)
            return Failure(message=str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")

    def describe(self, slot: int, *, task: str) -> RobotFacts:
        """Describe the robot of a task, even if the simulator lacks the cameras."""
        camera_fault = None
        try:
            simulator = self._open(slot, task).simulator
        except ValueError as error:
            if not self.setup.cameras:
                raise
            camera_fault = str(error)
            simulator = self._create(task, cameras=())
            simulator.close()
        return RobotFacts(
            robot=simulator.robot,
            fps=simulator.fps,
            action_range=(simulator.action_space.low, simulator.action_space.high),
            action_parts=dict(simulator.action_parts),
            rest_fields=dict(simulator.rest_fields),
            field_names=dict(simulator.field_names),
            instruction=simulator.instruction,
            has_expert=simulator.has_expert,
            camera_fault=camera_fault,
        )

    def begin(self, number: int, *, task: str, seed: int, pictures: str | None = None) -> Reply:
        """Start an episode in a slot, replacing the previous one.

        Args:
            number: number of the slot.
            task: task of the simulator.
            seed: seed of the start.
            pictures: file for pictures of the episode, written when it ends; None: no pictures.
        """
        slot = self._open(number, task)
        slot.num_steps = 0
        slot.strip = None if pictures is None else FrameStrip(Path(pictures))
        slot.simulator.renders_images = True
        observation, _ = slot.simulator.reset(seed=seed)
        self._keep_picture(slot)
        return Reply(**observation, num_steps=0, is_success=False, is_over=False)

    def step(self, number: int, *, action: np.ndarray | None, with_images: bool) -> Reply:
        """Apply an action in a slot.

        Args:
            number: number of the slot.
            action: what to do; None: the simulator's expert acts.
            with_images: render the images of the next observation.
        """
        slot = self._slots[number]
        simulator = slot.simulator
        simulator.renders_images = with_images
        observation, _, is_terminated, is_truncated, info = simulator.step(
            simulator.expert() if action is None else action
        )
        slot.num_steps += 1
        most = simulator.max_steps if self.setup.max_steps is None else min(simulator.max_steps, self.setup.max_steps)
        is_over = info["success"] or is_terminated or is_truncated or slot.num_steps >= most
        self._keep_picture(slot, is_last=is_over)
        return Reply(**observation, num_steps=slot.num_steps, is_success=info["success"], is_over=is_over)

    def close(self) -> None:
        """Close all simulators."""
        for slot in list(self._slots):
            self._drop(slot)

    def _drop(self, slot: int) -> None:
        dropped = self._slots.pop(slot, None)
        if dropped is not None:
            dropped.simulator.close()

    def _open(self, slot: int, task: str) -> _Slot:
        if slot not in self._slots or self._slots[slot].task != task:
            self._drop(slot)
            self._slots[slot] = _Slot(self._create(task, cameras=self.setup.cameras), task)
        return self._slots[slot]

    def _create(self, task: str, *, cameras: tuple[str, ...]) -> Simulator:
        setup = self.setup
        return create_simulator(setup.simulator, task, cameras=cameras, image_size=setup.image_size, **setup.source)

    def _keep_picture(self, slot: _Slot, *, is_last: bool = False) -> None:
        strip = slot.strip
        if strip is not None and (is_last or strip.wants(slot.num_steps)):
            strip.add(slot.num_steps, slot.simulator.render(self.setup.picture_camera))
            if is_last:
                strip.save()


# a call of one of the worker's methods: request(worker, slot)
Request: TypeAlias = Callable[[RolloutWorker, int], RobotFacts | Reply]


def serve_rollouts(connection: Connection, setup: SimulatorSetup) -> None:
    """Answer requests until the parent closes the connection or ends."""
    # the parent handles interrupts
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import_installed_plugins()
    import_plugins(setup.plugins, "--plugins")
    worker = RolloutWorker(setup)
    try:
        while True:
            connection.send([worker.handle(slot, request) for slot, request in connection.recv()])
    except (EOFError, BrokenPipeError, ConnectionResetError):
        worker.close()
