"""The expert of gymnasium's Reacher: an arm of two joints in a plane."""

from collections.abc import Callable
from typing import Any

import numpy as np

from vla_foundry.simulators.gymnasium import register_expert

# lengths of the links, metres
_UPPER, _LOWER = 0.1, 0.11
# torque per radian of error, and per radian per second
_STIFFNESS, _DAMPING = 1.0, 0.1


@register_expert("reacher")
def create_expert(environment: Any) -> Callable[[], np.ndarray]:
    """Return the expert of an episode: it brings both joints to the angles at which the fingertip is on the target."""

    def act() -> np.ndarray:
        shoulder, elbow, x, y = environment.data.qpos
        distance = np.clip(np.hypot(x, y), _LOWER - _UPPER, _UPPER + _LOWER)
        cosine = (distance**2 - _UPPER**2 - _LOWER**2) / (2 * _UPPER * _LOWER)
        # of the two ways, the one with the elbow on the side where it is
        bend = np.copysign(np.arccos(np.clip(cosine, -1, 1)), np.sin(elbow))
        turn = np.arctan2(y, x) - np.arctan2(_LOWER * np.sin(bend), _UPPER + _LOWER * np.cos(bend))
        error = np.array([turn - shoulder, bend - elbow])
        error = (error + np.pi) % (2 * np.pi) - np.pi
        return _STIFFNESS * error - _DAMPING * environment.data.qvel[:2]

    return act
