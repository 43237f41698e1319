"""A policy without a model: it waves. A template for serving a class of your own.

vla-foundry serve --policy examples.wave_policy:WavePolicy --policy_args '{amplitude: 0.1}'
"""

import math
from typing import Any

import numpy as np

from vla_foundry.client import RobotObservation


class WavePolicy:
    """Moves the first column of an action up and down around where the arm was at the start.

    Args:
        field: field of the observation that says where the arm is.
        action: field of the action.
        amplitude: how far to move, in the field's unit.
        period: steps of a wave.
    """

    def __init__(
        self, *, field: str = "observation.state", action: str = "action", amplitude: float = 0.1, period: int = 20
    ) -> None:
        self.field, self.action = field, action
        self.amplitude, self.period = amplitude, period
        self.start: np.ndarray | None = None
        self.step = 0

    def describe(self) -> dict[str, Any]:
        """Say what clients must send and what they get; widths of 0 are unknown."""
        return {"fields": {self.field: 0}, "actions": {self.action: 0}, "fps": 10.0}

    def reset(self, seed: int) -> None:
        """Begin an episode."""
        self.start, self.step = None, 0

    def act(self, observation: RobotObservation) -> dict[str, np.ndarray]:
        """Return the action that follows an observation."""
        if self.field not in observation.fields:
            raise ValueError(f"the observation lacks '{self.field}'.")
        if self.start is None:
            self.start = observation.fields[self.field].astype(np.float64)
        action = self.start.copy()
        action[0] += self.amplitude * math.sin(2 * math.pi * self.step / self.period)
        self.step += 1
        return {self.action: action}
