"""Maths on robot data: field names, poses, windows, statistics and normalization."""

from typing import TYPE_CHECKING

from vla_foundry.registry import import_lazily

if TYPE_CHECKING:
    from vla_foundry.robotics.normalization import RoboticsNormalizer as RoboticsNormalizer

__all__ = ["RoboticsNormalizer"]

# lazy, so that params and the command line can import this package without numpy
__getattr__, __dir__ = import_lazily(__name__, {"RoboticsNormalizer": "vla_foundry.robotics.normalization"})
