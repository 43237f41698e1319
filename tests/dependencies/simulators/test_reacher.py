"""Gymnasium's Reacher by its map, and its expert."""

from typing import Any

import pytest

pytest.importorskip("mujoco", reason="needs vla-foundry[simulators]")

from vla_foundry.simulators import create_simulator


def create(*cameras: str) -> Any:
    source: Any = {"env_id": "Reacher-v5", "field_map": "simulators/reacher.yaml"}
    return create_simulator("gymnasium", "Reacher-v5", cameras=cameras, image_size=32, **source)


def play(simulator: Any, seed: int) -> list[bytes]:
    observations = [simulator.reset(seed=seed)[0]]
    observations += [simulator.step(simulator.expert())[0] for _ in range(3)]
    return [array.tobytes() for one in observations for arrays in one.values() for array in arrays.values()]


def test_the_same_seed_gives_the_same_bytes_whatever_was_done_before() -> None:
    with create("front") as used, create("front") as fresh:
        play(used, 3)
        assert play(used, 5) == play(fresh, 5)


def test_the_expert_brings_the_fingertip_to_the_ball() -> None:
    with create() as simulator:
        for seed in range(5):
            simulator.reset(seed=seed)
            assert any(simulator.step(simulator.expert())[4]["success"] for _ in range(25))
