"""The interface of simulators, and their registry.

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

# names of a simulator's signals in recorded data: prefix of cameras, prefix of fields, all fields concatenated, and
# prefix of an action's parts
IMAGES, OBSERVATION, STATE, ACTION = "observation.images", "observation", "observation.state", "action"


@dataclass(frozen=True, kw_only=True, eq=False)
class Observation:
    """What a robot senses at one control step."""

    # {camera: image}, uint8, rows from the top
    images: Mapping[str, UInt8[np.ndarray, "_ _ 3"]]
    # {field: low-dimensional signal}
    fields: Mapping[str, Float[np.ndarray, " _"]]


def name_observation(
    images: Mapping[str, np.ndarray], fields: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return (images, fields) of an observation under their names in recorded data, STATE included."""
    named = {f"{OBSERVATION}.{name}": values for name, values in fields.items()}
    named[STATE] = np.concatenate(list(fields.values()))
    return {f"{IMAGES}.{name}": image for name, image in images.items()}, named


@dataclass(frozen=True, kw_only=True, eq=False)
class ObjectState:
    """Position and state of one object."""

    # its name in instructions and captions
    name: str
    # the part that a robot acts on ("handle"); empty: the whole object
    part: str
    # position of that part
    position: Float[np.ndarray, "3"]
    # points spread over the whole object
    landmarks: Float[np.ndarray, "N 3"]
    # 0: fully closed (or at rest), 1: fully open; None: it does not open
    openness: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class SimulatorState:
    """The true state of a scene, hidden from policies."""

    # midpoint between the fingertips
    gripper_position: Float[np.ndarray, "3"]
    # the objects in the scene, the main one first
    objects: tuple[ObjectState, ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A scene to set up. Every number is a fraction, 0 to 1, of a range that the simulator chooses."""

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

    The seed given to `reset` determines everything: the same seed and the same actions give the same bytes, whatever
    happened before.
    """

    # the task in words
    instruction: str
    # all wordings of the task; `instruction` is the first
    instructions: tuple[str, ...]
    # the robot's name
    robot: str
    # control steps per second
    fps: int
    # width of an action; each number lies in [-1, 1]
    action_dim: int
    # name of each number of an action; the effort of the fingers is called "gripper"
    action_names: tuple[str, ...]
    # what an action's numbers mean, part by part in order; empty: unknown
    action_parts: Mapping[str, FieldDescription] = MappingProxyType({})
    # field of an observation -> name of each of its numbers
    field_names: Mapping[str, tuple[str, ...]]
    # control steps after which an episode ends
    max_steps: int
    # names of the cameras that `observe` renders
    cameras: tuple[str, ...]

    @abstractmethod
    def reset(self, seed: int) -> Observation:
        """Start the episode of `seed`."""

    @abstractmethod
    def observe(self, *, with_images: bool = True) -> Observation:
        """Sense the current state; nothing moves. Rendering takes most of the time: `with_images=False` skips it."""

    @abstractmethod
    def apply(self, action: Float[np.ndarray, " A"]) -> None:
        """Advance one control step. Values outside [-1, 1] are clipped.

        Raises:
            ValueError: the width is wrong, the episode is over, or none was started.
        """

    @abstractmethod
    def success(self) -> bool:
        """Return whether the task is done in the current state."""

    @abstractmethod
    def render(self, camera: str) -> UInt8[np.ndarray, "H W 3"]:
        """Render the current state, upright."""

    @abstractmethod
    def project(self, camera: str, position: Float[np.ndarray, "3"]) -> tuple[float, float]:
        """Return where a point appears: (column, row) as fractions of width and height from the top left corner."""

    @abstractmethod
    def is_hidden(self, camera: str, position: Float[np.ndarray, "3"], *, by: Literal["robot", "object"]) -> bool:
        """Return whether the robot, or the main object, hides a point from the camera."""

    @abstractmethod
    def expert(self) -> Float[np.ndarray, " A"]:
        """Return the action of a scripted expert, which sees the true state."""

    @abstractmethod
    def describe(self) -> SimulatorState:
        """Return the true current state."""

    def arrange(self, layout: Layout) -> SimulatorState | None:
        """Set up a scene outside any episode, as a function of `layout` alone. Goal markers are hidden.

        Returns:
            Its true state, or None if the robot would penetrate an object.

        Raises:
            ValueError: this task has no such scenes.
        """
        raise ValueError(f"{type(self).__name__} cannot arrange scenes of its task.")

    @abstractmethod
    def close(self) -> None:
        """Free the renderer. The simulator cannot be used afterwards."""

    def __enter__(self: S) -> S:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# a factory: (task, cameras=..., image_size=...) -> Simulator
SimulatorFactory = Callable[..., Simulator]

SIMULATORS: Registry[SimulatorFactory] = Registry(
    "simulator", package="vla_foundry.simulators", decorator="register_simulator"
)
# decorator of a factory `(task, *, cameras, image_size) -> Simulator`
register_simulator = SIMULATORS.register


def create_simulator(name: str, task: str, *, cameras: Sequence[str], image_size: int) -> Simulator:
    """Build one task of the simulator `name`.

    Args:
        task: the simulator's name of the task.
        cameras: cameras that `observe` renders.
        image_size: width and height of each image in pixels.

    Raises:
        ValueError: the simulator, task or camera is unknown, the simulator is not installed, or there is no renderer.
    """
    return SIMULATORS.get(name)(task, cameras=tuple(cameras), image_size=image_size)
