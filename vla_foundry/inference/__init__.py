"""Run trained models: generate text and captions, and run policies in closed loop."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vla_foundry.inference.observations import RobotObservation
    from vla_foundry.inference.policy import Policy

__all__ = ["Policy", "RobotObservation"]

_MODULES = {"Policy": "vla_foundry.inference.policy", "RobotObservation": "vla_foundry.inference.observations"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)
