"""PushT behind the interface, and its expert."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("gym_pusht", reason="needs vla-foundry[pusht]")

from vla_foundry.simulators import create_simulator
from vla_foundry.simulators import pusht as expert


def create(task: str = "push-t", **given: Any) -> Any:
    return create_simulator("pusht", task, **{"cameras": (), "image_size": 16} | given)


def test_it_senses_the_agent_and_if_asked_the_corners_of_the_block() -> None:
    with create(cameras=("top",), image_size=32) as plain, create("push-t@keypoints") as detailed:
        observation, _ = plain.reset(seed=5)
        assert observation["images"]["top"].shape == (32, 32, 3)
        assert {name: len(values) for name, values in observation["fields"].items()} == {"agent_position": 2}
        observation, _ = detailed.reset(seed=5)
        assert {name: len(values) for name, values in observation["fields"].items()} == {
            "agent_position": 2,
            "block_keypoints": 16,
        }
        assert (plain.action_space.low.min(), plain.action_space.high.max(), plain.fps) == (0, 512, 10)
    with pytest.raises(ValueError, match=r"task of PushTSimulator 'pusht' is unknown\. Did you mean 'push-t'"):
        create("pusht")


def test_pictures_show_this_episode_and_no_action() -> None:
    seen = []
    with create("push-t@keypoints", cameras=("top",), image_size=64) as used:
        used.reset(seed=1)
        used.step(np.array([300.0, 40.0]))
        for _ in range(2):
            seen.append(used.reset(seed=2)[0])
            used.step(np.array([80.0, 400.0]))
    for kind in ("images", "fields"):
        for name, values in seen[0][kind].items():
            np.testing.assert_array_equal(values, seen[1][kind][name])
    red, green, blue = (seen[0]["images"]["top"][..., channel].astype(int) for channel in range(3))
    assert not ((red > 150) & (green < 100) & (blue < 100)).any()


def test_pushes_do_what_the_expert_computes() -> None:
    """The block moves and turns by what was computed, but for the slop of the physics."""
    pushes = expert._predict_pushes()
    for number in range(2, len(pushes.places), 9):
        with create() as simulator:
            simulator.reset(seed=1)
            world = simulator._environment.unwrapped
            length = int(np.flatnonzero(~np.isnan(pushes.turns[number]))[-1])
            place, inward = pushes.places[number] + 256, pushes.inward[number]
            world.block.angle, world.block.position = 0.0, (256.0, 256.0)
            world.agent.position, world.agent.velocity = tuple(place - inward * 17), (0.0, 0.0)
            before = np.array(world.block.local_to_world((0, 45)))
            for _ in range(15):
                simulator.step(place + inward * (expert._LENGTHS[length] - 15))
            moved = np.array(world.block.local_to_world((0, 45))) - before
            assert np.abs(moved - pushes.shifts[number, length]).max() < 3
            assert abs(world.block.angle - pushes.turns[number, length]) < 0.05


def test_the_expert_brings_the_block_to_its_goal() -> None:
    for seed in (0, 3):
        with create() as simulator:
            simulator.reset(seed=seed)
            assert any(simulator.step(simulator.expert())[4]["success"] for _ in range(150))
