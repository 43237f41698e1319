"""ALOHA behind the interface."""

import numpy as np
import pytest

pytest.importorskip("gym_aloha", reason="needs vla-foundry[aloha]")

from vla_foundry.simulators import create_simulator


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_holding_the_joints_where_they_are_moves_little() -> None:
    with create_simulator("aloha", "transfer-cube", cameras=("top",), image_size=(64, 48)) as simulator:
        observation, _ = simulator.reset(seed=0)
        assert observation["images"]["top"].shape == (48, 64, 3)
        assert {name: len(values) for name, values in observation["fields"].items()} == {
            "left_arm": 6,
            "left_gripper": 1,
            "right_arm": 6,
            "right_gripper": 1,
        }
        start = np.concatenate(list(observation["fields"].values()))
        # beyond the range of 1 that gym-aloha states
        assert start.max() > 1
        for _ in range(3):
            _, _, is_terminated, _, info = simulator.step(start)
        assert not is_terminated
        assert not info["success"]
        assert np.abs(np.concatenate(list(simulator.sense().values())) - start).max() < 0.05
        assert not simulator.has_expert
