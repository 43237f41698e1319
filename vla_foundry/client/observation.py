"""What a robot senses at one control step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


def to_millimetres(depth: np.ndarray) -> np.ndarray:
    """Return depth in metres as uint16 in millimetres; what is not within 0 .. 65 m is 0, not measured."""
    is_measured = np.isfinite(depth) & (depth >= 0) & (depth < 65.535)
    return np.rint(np.where(is_measured, depth, 0) * 1000).astype(np.uint16)


@dataclass(frozen=True, kw_only=True, eq=False)
class RobotObservation:
    """What a robot senses at one control step, under the names of the data that the policy was trained on."""

    # {camera: image as recorded, uint8 (H, W, 3), RGB, rows from the top}; by full name, or by the part after its last
    # dot. Only needed where the policy's needs_images says so. Depth is uint16 (H, W), millimetres, or float32, metres
    images: Mapping[str, np.ndarray]
    # {field: its numbers (C,), in the data's unit}; poses absolute
    fields: Mapping[str, np.ndarray]
    # what the robot should do
    instruction: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class RobotSteps:
    """The latest control steps of a robot that keeps its own chunks: what a prediction needs of its episode."""

    # the last observation's step in the episode, from 0 on
    step: int
    # one a step, oldest first; images only where the policy looks
    observations: Sequence[RobotObservation]
    # what the robot did after each but the last: {field: (C,)}
    actions: Sequence[Mapping[str, np.ndarray]] = ()
    # what is left of its chunk, the first one for now; the prediction goes on from it (real-time chunking)
    rest: Sequence[Mapping[str, np.ndarray]] = ()
    # how many of these will run before the prediction is there
    delay_steps: int = 0
