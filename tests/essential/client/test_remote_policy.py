"""A robot infers while it acts over the network as in one process; no action is late, stale or repeated unseen."""

import threading
import time
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest

from tests.essential.inference.test_policy import COMMANDED, load, observe, roll
from tests.essential.serving.conftest import arm as arm
from tests.essential.serving.conftest import serve
from tests.essential.serving.conftest import served as served
from vla_foundry.client import RemotePolicy
from vla_foundry.client.messages import METHODS, SERVICE, Array, PredictRequest, ResetRequest, Step
from vla_foundry.client.wire import encode
from vla_foundry.params.commands.serving import ServeParams
from vla_foundry.serving.policies import Served, load_policy


def connect(ports: Any, execution: Any, delay_steps: int | None = None, **settings: Any) -> RemotePolicy:
    return RemotePolicy(f"127.0.0.1:{ports.grpc}", execution=execution, delay_steps=delay_steps, **settings)


def roll_remotely(policy: RemotePolicy, recording: Any, num_steps: int) -> list[dict[str, np.ndarray] | None]:
    """As `roll`; images are given only where they are needed, in arrays that are used again."""
    policy.reset(seed=4)
    found, buffers = [], {name: np.empty_like(image) for name, image in observe(recording, 0).images.items()}
    for step in range(num_steps):
        observation = observe(recording, min(step, 13))
        for name, image in observation.images.items():
            buffers[name][:] = image
        images = buffers if policy.needs_images() else {}
        found.append(policy.act_many({None: replace(observation, images=images)}).get(None))
    return found


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert (one is None) is (other is None), step
        for name in COMMANDED if one is not None else ():
            assert one[name].dtype == other[name].dtype
            assert np.array_equal(one[name], other[name]), (step, name)


@pytest.mark.parametrize("execution", ["async", "realtime"])
@pytest.mark.parametrize("delay_steps", [0, 1, 2, 4])
def test_the_same_delay_gives_the_same_actions_as_in_this_process(
    arm: Any, served: Served, execution: Any, delay_steps: int
) -> None:
    recording = arm.recordings[0]
    expected = roll(load(arm, execution=execution, delay_steps=delay_steps), recording, 16)
    with serve(served) as ports, connect(ports, execution, delay_steps) as policy:
        assert_same(roll_remotely(policy, recording, 16), expected)
        if delay_steps == 0:
            assert_same(expected, roll(load(arm), recording, 16))
    # the next prediction begins after three of a chunk's six actions
    assert (None in expected) is (delay_steps == 4)


def hold(served: Served, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let the server's chunks wait until the event is set."""
    may_go_on, predict = threading.Event(), served.policy.predict_from

    def wait_and_predict(*args: Any, **values: Any) -> Any:
        assert may_go_on.wait(60)
        return predict(*args, **values)

    monkeypatch.setattr(served.policy, "predict_from", wait_and_predict)
    may_go_on.set()
    return may_go_on


def wait_for_chunk(policy: RemotePolicy) -> None:
    policy._calls[None].result()


def test_a_late_chunk_is_measured_and_no_action_is_stale(
    arm: Any, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = arm.recordings[0]
    may_go_on = hold(served, monkeypatch)
    plan = roll(load(arm, open_loop_steps=6), recording, 6)
    with serve(served) as ports, connect(ports, "realtime") as policy:
        policy.reset(seed=4)
        found: list[Any] = [policy.act(observe(recording, 0))]
        may_go_on.clear()
        # the chunk of 0 lasts until step 5
        for frame in range(1, 6):
            found.append(policy.act(observe(recording, frame)))
        assert_same(found, plan)
        start = time.perf_counter()
        with pytest.raises(TimeoutError, match=r"next chunk of .* is late: .*, and a chunk has 6 actions\. Hold"):
            policy.act(observe(recording, 6))
        assert time.perf_counter() - start < 1
        assert policy.num_predicted == 2
        may_go_on.set()
        wait_for_chunk(policy)
        # the chunk of 3 begins, at its action for step 7
        action = policy.act(observe(recording, 7))
        assert policy.delay_steps == 4
        wait_for_chunk(policy)
        policy.act(observe(recording, 8))
        # the chunk of 7 begins at 8
        assert policy.delay_steps == 4
    assert not any(np.array_equal(action[name], before[name]) for name in COMMANDED for before in found)


def test_the_first_chunk_comes_by_the_deadline_or_not_at_all(
    arm: Any, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = arm.recordings[0]
    may_go_on = hold(served, monkeypatch)
    with serve(served) as ports, connect(ports, "async", timeout_s=0.2) as policy:
        policy.reset(seed=4)
        may_go_on.clear()
        start = time.perf_counter()
        with pytest.raises(TimeoutError, match=r"did not answer within 0\.2 s"):
            policy.act(observe(recording, 9))
        assert time.perf_counter() - start < 2
        may_go_on.set()
        policy.timeout_s = 10.0
        # the episode begins with its first action
        assert_same([policy.act(observe(recording, 0))], roll(load(arm), recording, 1))


def test_a_robot_goes_on_with_its_chunk_when_the_server_is_gone(arm: Any, served: Served) -> None:
    recording = arm.recordings[0]
    plan = roll(load(arm, open_loop_steps=6), recording, 6)
    with serve(served) as ports:
        policy = connect(ports, "async", timeout_s=5.0)
        policy.reset(seed=4)
        found: list[Any] = [policy.act(observe(recording, frame)) for frame in range(3)]
    for frame in range(3, 6):
        found.append(policy.act(observe(recording, frame)))
        time.sleep(0.05)
    assert_same(found, plan)
    for frame in (6, 7):
        with pytest.raises(ConnectionError, match="unavailable"):
            policy.act(observe(recording, frame))
    policy.close()


def test_a_refused_observation_is_named_and_its_step_passes(arm: Any, served: Served) -> None:
    recording = arm.recordings[0]
    with serve(served) as ports, connect(ports, "async", 1) as policy:
        policy.reset(seed=4)
        with pytest.raises(ValueError, match=r"client \w+/None: observation: the policy needs the field"):
            policy.act(observe(recording, 0, fields={}))
        found = [policy.act(observe(recording, frame)) for frame in range(3)]
        # refused when its chunk is due
        policy.act(observe(recording, 3, images={}))
        with pytest.raises(ValueError, match=r"the image of camera 'rig\.front' is missing"):
            policy.act(observe(recording, 4))
        found.append(policy.act(observe(recording, 5)))
    plan = roll(load(arm, open_loop_steps=6), recording, 6)
    assert_same(found, [plan[0], plan[1], plan[2], plan[5]])


def test_what_a_policy_cannot_do_is_refused_at_once(served: Served) -> None:
    wave = load_policy(ServeParams(policy="examples.wave_policy:WavePolicy"))
    with serve(wave) as ports, pytest.raises(ValueError, match=r"cannot do execution 'async'\. It can do sync"):
        connect(ports, "async")
    with serve(served) as ports, pytest.raises(ValueError, match="delay_steps must be at least 0"):
        connect(ports, "async", -1)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"steps": []}, "step 0 needs the last 1 observations and the actions between them, got 0 and 0"),
        ({"step": 7}, "step 7 needs the last 3 observations and the actions between them, got 1 and 0"),
        ({"steps": [Step(), Step()]}, "step 0 needs the last 1 observations"),
        ({"step": 9, "steps": [Step()] * 4}, "4 steps; the policy looks 2 steps back"),
        ({"step": 1, "steps": [Step(), Step()]}, "action: the policy needs the field"),
        ({"rest": [Array("a", [1.0])]}, "field 'a' has 1 numbers, which do not fill 0 rows"),
        ({"rest": [Array("a", [1.0, 2.0, 3.0], rows=2)]}, "has 3 numbers, which do not fill 2 rows"),
        ({"rest": [Array("a", [], rows=10**9)]}, "1000000000 actions are left of the chunk, but a chunk has 6"),
        ({"rest": [Array("a", [], rows=6)]}, "has 0 numbers, which do not fill 6 rows"),
        ({"step": 2**64 - 1}, "step 18446744073709551615 is too large"),
        ({"rest": [Array("a", [1.0], rows=1)]}, "action: the policy needs the field"),
        ({"rest": [Array("a", [1.0], rows=1), Array("b", [1.0, 2.0], rows=2)]}, "must have the same number of rows"),
        ({"rest": [Array(name, [np.nan], rows=1) for name in COMMANDED]}, "must be 3 finite numbers, got"),
        ({"delay_steps": 2**32 - 1}, "the policy needs the field"),
    ],
)
def test_a_bad_request_for_a_chunk_is_refused_by_name(served: Served, changes: dict[str, Any], fault: str) -> None:
    with serve(served) as ports, grpc.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel:
        call = {name: channel.unary_unary(f"/{SERVICE}/{name}") for name in METHODS}
        call["Reset"](encode(ResetRequest(client="c", seed=0)))
        with pytest.raises(grpc.RpcError) as error:
            call["Predict"](encode(PredictRequest(**{"client": "c", "step": 0, "steps": [Step()], **changes})))
        details = str(error.value.details())
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert details.startswith("client c: ")
        assert fault in details
        with pytest.raises(grpc.RpcError) as error:
            call["Predict"](encode(PredictRequest(client="d", steps=[Step()])))
        assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
