"""Maths on robot data: field names, poses, windows, statistics and normalization."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vla_foundry.robotics.normalization import RoboticsNormalizer as RoboticsNormalizer

__all__ = ["RoboticsNormalizer"]


def __getattr__(name: str) -> Any:
    # lazy, so that params and the command line can import this package without numpy
    if name == "RoboticsNormalizer":
        from vla_foundry.robotics.normalization import RoboticsNormalizer

        return RoboticsNormalizer
    raise AttributeError(f"module 'vla_foundry.robotics' has no attribute '{name}'")
