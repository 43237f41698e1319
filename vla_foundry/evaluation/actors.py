"""The actor interface of rollouts, and baselines to compare a policy with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vla_foundry.evaluation.rollout_worker import Death, Reply, RobotFacts
from vla_foundry.params.commands.evaluation import EvaluateParams
from vla_foundry.randomness import draw_uniforms


@runtime_checkable
class Actor(Protocol):
    """Acts in episodes; those that run at a time have different slots."""

    def begin(self, slot: int, seed: int, instruction: str) -> None:
        """Start an episode in a slot."""
        ...

    def needs_images(self, slot: int) -> bool:
        """Return whether the slot's next observation must contain images."""
        ...

    def predicts_next(self, slot: int) -> bool:
        """Return whether the slot's next action may take a prediction, which is cheaper for several slots at once."""
        ...

    def act(self, observed: Mapping[int, Reply]) -> Mapping[int, np.ndarray | Death | None]:
        """Return the action of each slot; None: the simulator's expert acts; Death: the policy's process died."""
        ...

    def end(self, slot: int) -> Sequence[float]:
        """End the slot's episode; return how long it waited for each prediction, milliseconds."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """What is evaluated: a policy or a baseline, and what the simulators render for it."""

    name: str
    # cameras of observations
    cameras: tuple[str, ...]
    # camera of the contact sheet
    picture_camera: str
    # width and height of all pictures, pixels
    image_size: tuple[int, int]
    # what the outcomes depend on besides the simulator, task and seeds, for results.json
    settings: Mapping[str, Any]
    # returns the actor for one robot; raises ValueError if the policy does not fit it
    create_actor: Callable[[RobotFacts], Actor]


def create_baseline(params: EvaluateParams, camera: str) -> Candidate:
    """Return the baseline that `params.policy` names.

    Args:
        camera: camera of the contact sheet.
    """

    def create_actor(facts: RobotFacts) -> Actor:
        if facts.camera_fault is not None:
            raise ValueError(facts.camera_fault)
        if params.policy == "random":
            return RandomActor(facts, params.seed)
        return (ExpertActor if params.policy == "expert" else NullActor)(facts)

    return Candidate(
        name=params.name or params.policy,
        # baselines need no images; naming the camera makes the simulator check it
        cameras=(camera,) if params.num_pictured or params.save_videos != "none" else (),
        picture_camera=camera,
        image_size=(params.image_size, params.image_size),
        settings={},
        create_actor=create_actor,
    )


class NullActor:
    """Does nothing: its actions are zeros, or hold the robot where it is.

    Args:
        facts: the robot.
    """

    def __init__(self, facts: RobotFacts) -> None:
        self.facts = facts

    def begin(self, slot: int, seed: int, instruction: str) -> None:
        """See Actor."""

    def needs_images(self, slot: int) -> bool:
        """See Actor."""
        return False

    def predicts_next(self, slot: int) -> bool:
        """See Actor."""
        return False

    def act(self, observed: Mapping[int, Reply]) -> dict[int, np.ndarray | None]:
        """See Actor."""
        return {slot: self._rest(reply) for slot, reply in observed.items()}

    def _rest(self, reply: Reply) -> np.ndarray:
        """Return the action that holds the robot still."""
        parts, fields = self.facts.action_parts, self.facts.rest_fields
        if not fields:
            return np.zeros(self.facts.action_dim, np.float32)
        found = [reply.fields[fields[name]] if name in fields else np.zeros(parts[name].width) for name in parts]
        return np.concatenate(found).astype(np.float32)

    def end(self, slot: int) -> Sequence[float]:
        """See Actor."""
        return ()


class RandomActor(NullActor):
    """Draws actions uniformly from their range, as a function of `seed`, the episode's seed and the step.

    Args:
        facts: the robot.
        seed: seed common to all episodes.

    Raises:
        ValueError: actions have no range.
    """

    def __init__(self, facts: RobotFacts, seed: int) -> None:
        super().__init__(facts)
        if not np.isfinite(facts.action_range).all():
            raise ValueError(f"The actions of {facts.robot} have no range, so policy 'random' cannot draw them.")
        self.seed = seed
        self._episodes: dict[int, int] = {}
        self._steps: dict[int, int] = {}

    def begin(self, slot: int, seed: int, instruction: str) -> None:
        """See Actor."""
        self._episodes[slot], self._steps[slot] = seed, 0

    def act(self, observed: Mapping[int, Reply]) -> dict[int, np.ndarray | None]:
        """See Actor."""
        actions: dict[int, np.ndarray | None] = {}
        low, high = self.facts.action_range
        for slot in observed:
            purpose = f"random action of episode {self._episodes[slot]}"
            numbers = draw_uniforms(self.facts.action_dim, seed=self.seed, position=self._steps[slot], purpose=purpose)
            actions[slot] = (low + (high - low) * numbers).astype(np.float32)
            self._steps[slot] += 1
        return actions


class ExpertActor(NullActor):
    """Leaves every action to the simulator's expert, which sees the true state.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, facts: RobotFacts) -> None:
        super().__init__(facts)
        if not facts.has_expert:
            raise ValueError(f"{facts.robot} has no expert. Choose another --policy.")

    def act(self, observed: Mapping[int, Reply]) -> dict[int, np.ndarray | None]:
        """See Actor."""
        return dict.fromkeys(observed)
