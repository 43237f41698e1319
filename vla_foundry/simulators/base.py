"""What every simulator offers, and the registry of simulators: reset, observe, apply, success, render, expert.

A simulator knows no policy. Positions are metres in its world frame; images are uint8 HWC and upright.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import Float, UInt8

from vla_foundry.registry import Registry
from vla_foundry.robotics.spec import FieldDescription

S = TypeVar("S", bound="Simulator")


@dataclass(frozen=True, kw_only=True, eq=False)
class Observation:
    """What a robot senses at one control step."""

    # camera name -> picture, uint8, rows from the top
    images: Mapping[str, UInt8[np.ndarray, "_ _ 3"]]
    # field name -> low-dimensional signal
    fields: Mapping[str, Float[np.ndarray, " _"]]


@dataclass(frozen=True, kw_only=True, eq=False)
class ObjectState:
    """Where one thing is, and in which state."""

    # what it is called in an instruction or a caption
    name: str
    # the part that a robot acts on ("handle"); empty: the thing itself
    part: str
    # position of that part
    position: Float[np.ndarray, "3"]
    # points spread over the whole thing
    landmarks: Float[np.ndarray, "N 3"]
    # from 0, fully closed (or at rest), to 1, fully open; None where it has no such state
    openness: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class SimulatorState:
    """The true state of a scene, which a policy does not see."""

    # midpoint between the fingertips
    gripper_position: Float[np.ndarray, "3"]
    # the things of the scene, the main one first
    objects: tuple[ObjectState, ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A scene to be set up. Every number is a fraction, 0 to 1, of the range that the simulator chooses for it."""

    # where the main object stands: across and along the table
    object_place: tuple[float, float]
    # how far it is open
    openness: float
    # where the gripper is: across, along and above the table
    gripper_place: tuple[float, float, float]
    # how far the fingers are apart
    gripper_opening: float


class Simulator(ABC):
    """One task in one simulated world. Use it as a context manager, or call `close()`.

    Everything is a function of the seed given to `reset`: the same seed and the same actions give the same bytes,
    whatever was done before.
    """

    # what the robot is told to do
    instruction: str
    # every way to tell it so; `instruction` is the first
    instructions: tuple[str, ...]
    # the robot's name
    robot: str
    # control steps in a second
    fps: int
    # width of an action; each number lies in [-1, 1]
    action_dim: int
    # what each number of an action is; the effort of fingers is called "gripper"
    action_names: tuple[str, ...]
    # what an action's numbers mean: names of its parts, in order; empty: nothing is said of them
    action_parts: Mapping[str, FieldDescription] = MappingProxyType({})
    # field of an observation -> what each of its numbers is
    field_names: Mapping[str, tuple[str, ...]]
    # control steps that an episode may last
    max_steps: int
    # names of the cameras that `observe` draws
    cameras: tuple[str, ...]

    @abstractmethod
    def reset(self, seed: int) -> Observation:
        """Begin the episode that belongs to `seed`."""

    @abstractmethod
    def observe(self, *, with_images: bool = True) -> Observation:
        """Sense the present state; nothing moves. To draw takes most of the time: `with_images` false leaves it out."""

    @abstractmethod
    def apply(self, action: Float[np.ndarray, " A"]) -> None:
        """Advance one control step. Values beyond [-1, 1] are clipped.

        Raises:
            ValueError: the width is wrong, the episode is over, or none was begun.
        """

    @abstractmethod
    def success(self) -> bool:
        """Whether the task is done in the present state."""

    @abstractmethod
    def render(self, camera: str) -> UInt8[np.ndarray, "H W 3"]:
        """Draw the present state, upright."""

    @abstractmethod
    def project(self, camera: str, position: Float[np.ndarray, "3"]) -> tuple[float, float]:
        """Where a point appears in a picture: (column, row) as fractions of its width and height from the top left."""

    @abstractmethod
    def is_hidden(self, camera: str, position: Float[np.ndarray, "3"], *, by: Literal["robot", "object"]) -> bool:
        """Whether the robot, or the main object, is what stands first between the camera and a point."""

    @abstractmethod
    def expert(self) -> Float[np.ndarray, " A"]:
        """The action that a scripted expert, who sees the true state, takes now."""

    @abstractmethod
    def describe(self) -> SimulatorState:
        """The true present state."""

    def arrange(self, layout: Layout) -> SimulatorState | None:
        """Set up a scene outside any episode, as a pure function of `layout`. Goal markers are hidden.

        Returns:
            Its true state, or None if the robot would stand inside a thing.

        Raises:
            ValueError: this task has no such scenes.
        """
        raise ValueError(f"{type(self).__name__} cannot arrange scenes of its task.")

    @abstractmethod
    def close(self) -> None:
        """Free the renderer. The simulator cannot be used after it."""

    def __enter__(self: S) -> S:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# a factory: (task, cameras=..., image_size=...) -> Simulator
SimulatorFactory = Callable[..., Simulator]

F = TypeVar("F", bound=SimulatorFactory)

SIMULATORS: Registry[SimulatorFactory] = Registry(
    "simulator", package="vla_foundry.simulators", decorator="register_simulator"
)


def register_simulator(name: str) -> Callable[[F], F]:
    """Register a factory `(task, *, cameras, image_size) -> Simulator` as the simulator called `name`."""

    def decorate(factory: F) -> F:
        SIMULATORS.register(name)(factory)
        return factory

    return decorate


def create_simulator(name: str, task: str, *, cameras: Sequence[str], image_size: int) -> Simulator:
    """Build one task of the simulator called `name`.

    Args:
        task: the simulator's own name of the task.
        cameras: cameras that `observe` draws.
        image_size: width and height of each picture in pixels.

    Raises:
        ValueError: the simulator, task or camera is unknown, the simulator is not installed, or nothing can draw.
    """
    return SIMULATORS.get(name)(task, cameras=tuple(cameras), image_size=image_size)
