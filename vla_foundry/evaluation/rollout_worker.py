"""A worker process with a simulator: it starts episodes, applies actions and returns what the robot senses.

It does not know the policy. The parent sends a request and receives its answer. The process ends when its parent does.
"""

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import TypeAlias

import numpy as np

from vla_foundry.config.command_line import import_installed_plugins, import_plugins
from vla_foundry.evaluation.pictures import Film, FrameStrip
from vla_foundry.evaluation.results import FailureKind
from vla_foundry.robotics.spec import FieldDescription
from vla_foundry.simulators import Simulator, create_simulator, read_success


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
    # seconds in which it must answer
    timeout_s: float = 600.0
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
    """The state of an episode after a request."""

    images: Mapping[str, np.ndarray]
    fields: Mapping[str, np.ndarray]
    # actions applied so far
    num_steps: int
    is_success: bool
    # the episode has ended
    is_over: bool
    # why, if not by success
    failure_kind: FailureKind | None = None
    failure_message: str | None = None
    # pictures and videos of the episode that has ended: {file to write: content}
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The simulator failed and was closed."""

    message: str


@dataclass(frozen=True, kw_only=True)
class Death:
    """A process died before it answered."""

    reason: str


class RolloutWorker:
    """The simulator of a process, reused while the task stays the same.

    Args:
        setup: how to create it.
    """

    def __init__(self, setup: SimulatorSetup) -> None:
        self.setup = setup
        self._task: str | None = None
        # the episode's, and one that shows another episode, if the policy is to see that
        self._simulators: list[Simulator] = []
        self._num_steps = 0
        self._recorders: dict[str, FrameStrip | Film] = {}
        self._shown: Mapping[str, np.ndarray] = {}
        self._is_shown_over = False

    def handle(self, request: "Request") -> RobotFacts | Reply | Failure:
        """Answer a request. A simulator that fails is closed, and the answer says why."""
        try:
            return request(self)
        except Exception as error:  # process border: the parent names the episode and counts it
            self.close()
            return Failure(message=str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")

    def describe(self, *, task: str) -> RobotFacts:
        """Describe the robot of a task, even if the simulator lacks the cameras."""
        camera_fault = None
        try:
            (simulator,) = self._open(task, 1)
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

    def begin(
        self,
        *,
        task: str,
        seed: int,
        pictures: str | None = None,
        video: str | None = None,
        shown_seed: int | None = None,
    ) -> Reply:
        """Start an episode, replacing the previous one.

        Args:
            task: task of the simulator.
            seed: seed of the start.
            pictures: file for pictures of the episode, whose content is in the last reply; None: no pictures.
            video: so for an mp4.
            shown_seed: the policy sees the pictures of this start, where the same actions are applied; None: its own.
        """
        seeds = [seed] if shown_seed is None else [seed, shown_seed]
        simulators = self._open(task, len(seeds))
        self._num_steps = 0
        self._recorders = {} if pictures is None else {pictures: FrameStrip()}
        if video is not None:
            self._recorders[video] = Film(simulators[0].fps)
        self._is_shown_over = False
        simulators[-1].renders_images = True
        found = [simulator.reset(seed=each) for simulator, each in zip(simulators, seeds, strict=True)]
        (observation, info), self._shown = found[0], found[-1][0]["images"]
        is_success = read_success({"success": False, **info})
        return Reply(
            images=self._shown,
            fields=observation["fields"],
            num_steps=0,
            is_success=is_success,
            is_over=is_success,
            files=self._keep_picture(is_last=is_success),
        )

    def step(self, *, action: np.ndarray | None, with_images: bool) -> Reply:
        """Apply an action.

        Args:
            action: what to do; None: the simulator's expert acts.
            with_images: render the images of the next observation.
        """
        if action is not None and not np.isfinite(action).all():
            files = self._keep_picture(is_last=True)
            failed = Reply(images={}, fields={}, num_steps=self._num_steps, is_success=False, is_over=True, files=files)
            message = f"The policy's action {action.tolist()} is not finite."
            return replace(failed, failure_kind="action_not_finite", failure_message=message)
        simulator, shown = self._simulators[0], self._simulators[-1]
        # Ray's arrays are read-only
        action = simulator.expert() if action is None else action.copy()
        simulator.renders_images = with_images and shown is simulator
        observation, _, is_terminated, is_truncated, info = simulator.step(action)
        images = observation["images"] if shown is simulator else self._show(shown, action, with_images)
        self._num_steps += 1
        most = simulator.max_steps if self.setup.max_steps is None else min(simulator.max_steps, self.setup.max_steps)
        is_late = is_truncated or self._num_steps >= most
        is_success = read_success(info)
        is_over = bool(is_success or is_terminated or is_late)
        return Reply(
            images=images,
            fields=observation["fields"],
            num_steps=self._num_steps,
            is_success=is_success,
            is_over=is_over,
            failure_kind=None if is_success or not is_over else "terminated" if is_terminated else "timeout",
            files=self._keep_picture(is_last=is_over),
        )

    def _show(self, simulator: Simulator, action: np.ndarray, with_images: bool) -> Mapping[str, np.ndarray]:
        """Move the other episode too, as long as it lasts, and return its pictures."""
        if not self._is_shown_over:
            simulator.renders_images = True
            observation, _, is_terminated, is_truncated, _ = simulator.step(action)
            self._is_shown_over, self._shown = is_terminated or is_truncated, observation["images"]
        return self._shown if with_images else {}

    def close(self) -> None:
        """Close the simulators."""
        while self._simulators:
            self._simulators.pop().close()

    def _open(self, task: str, number: int) -> list[Simulator]:
        if self._task != task or len(self._simulators) > number:
            self.close()
        self._task = task
        while len(self._simulators) < number:
            self._simulators.append(self._create(task, cameras=self.setup.cameras))
        return self._simulators

    def _create(self, task: str, *, cameras: tuple[str, ...]) -> Simulator:
        setup = self.setup
        import_installed_plugins()
        import_plugins(setup.plugins, "--plugins")
        return create_simulator(setup.simulator, task, cameras=cameras, image_size=setup.image_size, **setup.source)

    def _keep_picture(self, *, is_last: bool) -> dict[str, bytes]:
        """Show the recorders that want it where the episode is; after the last step, return what they recorded."""
        wanting = [recorder for recorder in self._recorders.values() if is_last or recorder.wants(self._num_steps)]
        if wanting:
            image = self._simulators[0].render(self.setup.picture_camera)
            for recorder in wanting:
                recorder.add(self._num_steps, image)
        return {path: recorder.save() for path, recorder in self._recorders.items()} if is_last else {}


# a call of one of the worker's methods
Request: TypeAlias = Callable[[RolloutWorker], RobotFacts | Reply]


def serve_rollouts(connection: Connection, setup: SimulatorSetup) -> None:
    """Answer requests until the parent closes the connection or ends."""
    # the parent handles interrupts
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker = RolloutWorker(setup)
    try:
        while True:
            connection.send(worker.handle(connection.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        worker.close()
