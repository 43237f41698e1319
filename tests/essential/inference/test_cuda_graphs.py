"""Graphs are replayed on inputs of their own shape; what they capture neither waits for the device nor feeds it."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.essential.inference.test_policy import COMMANDED, load, observe, roll
from vla_foundry.inference import Policy
from vla_foundry.inference.cuda_graphs import _MAX_GRAPHS, GraphedSampler
from vla_foundry.inference.policy_files import load_policy_files
from vla_foundry.models.attention import keep_constants


def imitate(run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """What torch.cuda.graph does, on the CPU: later runs read and write the memory of the first."""
    output = run()
    return lambda: output.copy_(run()), output


def create(arm: Any, **options: Any) -> Policy:
    policy = Policy(load(arm).model, load_policy_files(str(arm.run)), **options)
    policy._sample = GraphedSampler(policy._run_model, capture=imitate)
    return policy


@pytest.mark.parametrize("execution", ["sync", "realtime"])
def test_a_replayed_policy_acts_as_a_policy(arm: Any, execution: Any) -> None:
    recording, delay_steps = arm.recordings[0], None if execution == "sync" else 2
    policy = create(arm, execution=execution, delay_steps=delay_steps)
    expected = roll(load(arm, execution=execution, delay_steps=delay_steps), recording, 14)
    for found, action in zip(roll(policy, recording, 14), expected, strict=True):
        assert found is not None
        assert action is not None
        assert all(np.array_equal(found[name], action[name]) for name in COMMANDED)
    # at the start of an episode, later, and guided by the last chunk
    assert policy.num_predicted >= 4
    assert len(policy._sample._graphs) == 2  # pyright: ignore[reportFunctionMemberAccess]


def test_each_shape_and_host_value_has_a_graph_and_old_ones_are_discarded() -> None:
    def sample(inputs: dict[str, Any], seeds: Tensor) -> Tensor:
        return inputs["x"] * 2 + seeds + (0 if inputs["host"] is None else float(inputs["host"].sum()))

    sampler = GraphedSampler(sample, capture=imitate)
    for host in (None, np.array([1, 2]), np.array([1, 3]), np.array([1.0, 3.0])):
        first = sampler({"x": torch.ones(2), "host": host}, torch.tensor([1, 2]))
        second = sampler({"x": torch.zeros(2), "host": host}, torch.tensor([3, 4]))
        added = 0 if host is None else host.sum()
        # the second does not change what the first returned
        assert (first.tolist(), second.tolist()) == ([3 + added, 4 + added], [3 + added, 4 + added])
    assert len(sampler._graphs) == 4
    for width in range(3, 3 + _MAX_GRAPHS):
        sampler({"x": torch.ones(width), "host": None}, torch.ones(width))
    assert len(sampler._graphs) == _MAX_GRAPHS


def test_a_model_that_cannot_be_captured_is_one_line() -> None:
    def fail(run: Callable[[], Tensor]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    sampler = GraphedSampler(lambda inputs, seeds: seeds, capture=fail)
    with pytest.raises(ValueError, match=r"as a CUDA graph: operation not permitted [a-z ]+\. Leave cuda_graphs out"):
        sampler({}, torch.ones(1))


def test_the_cpu_has_no_graphs(arm: Any) -> None:
    with pytest.raises(ValueError, match="cuda_graphs needs a GPU, but the policy is on the device 'cpu'"):
        Policy.from_run(str(arm.run), device="cpu", cuda_graphs=True)


class _WatchHost(TorchDispatchMode):
    """Finds operators that touch the host; the model and its inputs are on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.found.append(str(func))
        return output


@pytest.mark.parametrize("name", ["arm", "silent_arm"])
def test_sampling_neither_reads_from_the_device_nor_feeds_it(name: str, request: pytest.FixtureRequest) -> None:
    subject = request.getfixturevalue(name)
    policy = Policy(copy.deepcopy(load(subject).model), load_policy_files(str(subject.run)))
    given: list[Any] = []

    def keep(inputs: dict[str, Any], seeds: Tensor) -> Tensor:
        given.append((inputs, seeds))
        return policy._run_model(inputs, seeds)

    policy._sample = keep
    policy.warm_up()
    policy.model.to("meta")
    assert len(given) == 2
    for pair in given:
        inputs, seeds = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, pair)
        with keep_constants():
            # what is constant is copied now; reading from the meta device fails
            policy.model.sample(inputs, seeds=seeds)
            with _WatchHost() as watch:
                policy.model.sample(inputs, seeds=seeds)
        assert watch.found == []


class _WatchCopies(TorchDispatchMode):
    """Records copies from the host to the meta device: (dtype, number of dimensions, whether the host waits)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[torch.dtype, int, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_on_device = isinstance(output, Tensor) and output.device.type == "meta"
        if is_on_device and any(tensor.device.type == "cpu" for tensor in tensors):
            self.found.append((output.dtype, output.ndim, not (kwargs or {}).get("non_blocking", False)))
        return output


@pytest.mark.parametrize("execution", ["sync", "realtime"])
def test_a_steady_prediction_waits_only_for_its_actions(arm: Any, execution: Any) -> None:
    recording = arm.recordings[0]
    options = {"execution": execution, "delay_steps": None if execution == "sync" else 2}
    policy = Policy(copy.deepcopy(load(arm).model).to("meta"), load_policy_files(str(arm.run)), **options)
    num_actions = 0

    def read(inputs: dict[str, Any], seeds: Tensor) -> Tensor:
        # anything else that is read from the meta device fails
        nonlocal num_actions
        num_actions += 1
        return torch.zeros(policy.model.sample(inputs, seeds=seeds).shape)

    policy._sample = read
    roll(policy, recording, 8)
    assert num_actions >= 2
    watches = []
    for frame in range(8, 16):
        with _WatchCopies() as watch:
            policy.act_many({None: observe(recording, min(frame, 13))})
        watches.append(watch.found)
    copied = max(watches, key=len)
    assert (torch.uint8, 4, False) in copied
    assert not any(dtype == torch.float32 and ndim == 4 for dtype, ndim, _ in copied)
    assert not any(waits for _, _, waits in copied)
