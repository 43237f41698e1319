"""Run trained models: generate text and captions, and run policies in closed loop."""

from typing import TYPE_CHECKING

from vla_foundry.registry import import_lazily

if TYPE_CHECKING:
    from vla_foundry.inference.observations import RobotObservation
    from vla_foundry.inference.policy import Policy

__all__ = ["Policy", "RobotObservation"]

__getattr__, __dir__ = import_lazily(
    __name__,
    {"Policy": "vla_foundry.inference.policy", "RobotObservation": "vla_foundry.inference.observations"},
)
