"""Features of images that a prediction sees again: the actions are those of encoding all, and robots do not mix."""

from typing import Any

import numpy as np
import pytest
from torch import Tensor

from tests.essential.inference.test_cuda_graphs import imitate
from tests.essential.inference.test_policy import COMMANDED, load, observe
from vla_foundry.inference import Policy
from vla_foundry.inference.cuda_graphs import GraphedSampler
from vla_foundry.inference.policy_files import load_policy_files
from vla_foundry.models.policy import RobotPolicy


def create(arm: Any, **options: Any) -> tuple[Policy, list[int]]:
    """A policy that reuses features, and the number of images that each prediction has encoded."""
    policy = Policy(load(arm).model, load_policy_files(str(arm.run)), reuse_image_features=True, **options)
    features: Any = policy._features
    encode, counts = features._encode, []

    def count(inputs: dict[str, Any], pixel_values: Tensor) -> Tensor:
        counts.append(len(pixel_values))
        return encode(inputs, pixel_values)

    features._encode = count
    return policy, counts


def step(policy: Policy, arm: Any, frame: int) -> dict[Any, dict[str, np.ndarray]]:
    """Two robots act; the second one sees the second recording."""
    return policy.act_many({name: observe(arm.recordings[number], frame) for number, name in enumerate("ab")})


def test_actions_are_those_without_reuse_and_only_new_images_are_encoded(arm: Any) -> None:
    policy, counts = create(arm, open_loop_steps=1)
    plain = Policy(load(arm).model, load_policy_files(str(arm.run)), open_loop_steps=1)
    for each in (policy, plain):
        each.reset(0, client="a")
        each.reset(1, client="b")
    for frame in range(8):
        found, expected = step(policy, arm, frame), step(plain, arm, frame)
        for name in "ab":
            for field in COMMANDED:
                np.testing.assert_allclose(found[name][field], expected[name][field], rtol=0, atol=1e-5)
    num_new = 2 * len(policy.cameras)
    # at first, padded frames of the past are the present one; then each robot has a new image of each camera
    assert policy.image_indices == (-2, 0)
    assert counts == [num_new] * 8
    # no more is kept than later predictions can look at, and the present
    assert [len(policy._clients[name].image_features) for name in "ab"] == [3 * len(policy.cameras)] * 2


def test_what_a_robot_sees_does_not_depend_on_others(arm: Any) -> None:
    policy, _ = create(arm, open_loop_steps=1, batch_size=1)
    alone, _ = create(arm, open_loop_steps=1, batch_size=1)
    for name, seed in (("a", 0), ("b", 1)):
        policy.reset(seed, client=name)
    alone.reset(0, client="a")
    for frame in range(4):
        found = step(policy, arm, frame)["a"]
        expected = alone.act_many({"a": observe(arm.recordings[0], frame)})["a"]
        assert all(np.array_equal(found[field], expected[field]) for field in COMMANDED)
    # an episode that begins again has no features of the last one
    policy.reset(0, client="a")
    assert policy._clients["a"].image_features == {}


def test_a_replayed_encoder_gives_the_same(arm: Any) -> None:
    policy, _ = create(arm, open_loop_steps=1)
    graphed, _ = create(arm, open_loop_steps=1)
    features: Any = graphed._features
    features._encode = GraphedSampler(features._run_encoder, capture=imitate)
    graphed._sample = GraphedSampler(graphed._run_model, capture=imitate)
    for each in (policy, graphed):
        each.reset(0, client="a")
        each.reset(1, client="b")
    for frame in range(5):
        found, expected = step(graphed, arm, frame), step(policy, arm, frame)
        assert all(np.array_equal(found[n][field], expected[n][field]) for n in "ab" for field in COMMANDED)


def test_another_backbone_is_refused(arm: Any) -> None:
    inner = load(arm).model
    other = RobotPolicy(inner.action_head, inner.action_head, action_dim=inner.action_dim)
    with pytest.raises(ValueError, match="needs the backbone vlm_foundry_backbone, but the policy has FlowTransformer"):
        Policy(other, load_policy_files(str(arm.run)), reuse_image_features=True)
