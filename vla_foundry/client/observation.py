"""What a robot senses at one control step."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class RobotObservation:
    """What a robot senses at one control step, under the names of the data that the policy was trained on."""

    # {camera: image as recorded, uint8 (H, W, 3), RGB, rows from the top}; by full name, or by the part after its last
    # dot. Only needed where the policy's needs_images says so
    images: Mapping[str, np.ndarray]
    # {field: its numbers (C,), in the data's unit}; poses absolute
    fields: Mapping[str, np.ndarray]
    # what the robot should do
    instruction: str = ""
