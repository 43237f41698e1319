"""What can act in rollouts: a trained policy, and the policies that it is to be compared with."""

from collections.abc import Mapping

import numpy as np

from vla_foundry.evaluation.rollout_worker import Reply
from vla_foundry.randomness import draw_uniforms


class NullActor:
    """Does nothing: all numbers of its actions are 0.

    Args:
        action_dim: how many they are.
    """

    def __init__(self, action_dim: int) -> None:
        self.action_dim = action_dim

    def begin(self, seeds: Mapping[int, int], instruction: str) -> None:
        """See Actor."""

    def needs_images(self, slot: int) -> bool:
        """See Actor."""
        return False

    def act(self, observed: Mapping[int, Reply]) -> dict[int, np.ndarray | None]:
        """See Actor."""
        return {slot: np.zeros(self.action_dim, np.float32) for slot in observed}

    def mean_latency_ms(self, slot: int) -> float | None:
        """See Actor."""
        return None


class RandomActor(NullActor):
    """Takes actions of uniform numbers in -1 .. 1, a function of the seed, the episode's seed and the step.

    Args:
        action_dim: how many numbers there are.
        seed: of all.
    """

    def __init__(self, action_dim: int, seed: int) -> None:
        super().__init__(action_dim)
        self.seed = seed
        self._episodes: dict[int, int] = {}
        self._steps: dict[int, int] = {}

    def begin(self, seeds: Mapping[int, int], instruction: str) -> None:
        """See Actor."""
        self._episodes, self._steps = dict(seeds), dict.fromkeys(seeds, 0)

    def act(self, observed: Mapping[int, Reply]) -> dict[int, np.ndarray | None]:
        """See Actor."""
        actions: dict[int, np.ndarray | None] = {}
        for slot in observed:
            purpose = f"random action of episode {self._episodes[slot]}"
            numbers = draw_uniforms(self.action_dim, seed=self.seed, position=self._steps[slot], purpose=purpose)
            actions[slot] = (2 * numbers - 1).astype(np.float32)
            self._steps[slot] += 1
        return actions


class ExpertActor(NullActor):
    """Leaves the actions to the simulator's expert, who sees the true state."""

    def act(self, observed: Mapping[int, Reply]) -> dict[int, np.ndarray | None]:
        """See Actor."""
        return dict.fromkeys(observed)
