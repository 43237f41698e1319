"""Simulators are found by name, and say in one line what is unknown."""

from collections.abc import Sequence
from typing import NoReturn

import pytest

from vla_foundry.simulators import SIMULATORS, create_simulator, register_simulator
from vla_foundry.simulators.metaworld_tasks import HALF_OPEN_STARTS, INSTRUCTIONS, TASKS_WITH_MARKED_GOAL, THINGS


def test_a_registered_factory_is_called_with_what_was_asked_for() -> None:
    asked = []

    def refuse(task: str, *, cameras: Sequence[str], image_size: tuple[int, int]) -> NoReturn:
        asked.append((task, cameras, image_size))
        raise ValueError("no such world")

    register_simulator("test-registered")(refuse)
    with pytest.raises(ValueError, match="no such world"):
        create_simulator("test-registered", "push", cameras=["top"], image_size=8)
    assert asked == [("push", ("top",), (8, 8))]


def test_an_unknown_simulator_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"simulator 'metawold' is unknown\. Did you mean 'metaworld'"):
        SIMULATORS.get("metawold")


def test_every_table_of_tasks_names_tasks_that_have_an_instruction() -> None:
    assert len(INSTRUCTIONS) == 50
    for table in (HALF_OPEN_STARTS, TASKS_WITH_MARKED_GOAL, THINGS):
        assert set(table) <= set(INSTRUCTIONS)
