"""Which robots share a prediction."""

from collections.abc import Sequence
from typing import Any


def group_robots(robots: Sequence[Any], batch_size: int | None) -> list[Sequence[Any]]:
    """Return groups of at most batch_size robots with one instruction; other lengths would change a batch's shape.

    Args:
        robots: those that need a prediction.
        batch_size: None: one group of all.
    """
    if batch_size is None:
        return [robots] if robots else []
    groups: list[Sequence[Any]] = []
    for instruction in dict.fromkeys(robot.instruction for robot in robots):
        alike = [robot for robot in robots if robot.instruction == instruction]
        groups += [alike[start : start + batch_size] for start in range(0, len(alike), batch_size)]
    return groups
