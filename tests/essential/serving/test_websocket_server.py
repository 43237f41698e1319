"""The websocket protocols and HTTP pages, with real connections over loopback.

The clients here are written from the protocols' descriptions; tests/dependencies runs the published ones.
"""

import hashlib
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.essential.inference.test_policy import observe
from tests.essential.serving.conftest import serve
from tests.essential.serving.test_grpc_server import act_in_process
from vla_foundry.client import RemotePolicy, RobotObservation
from vla_foundry.client.wire import decode, encode
from vla_foundry.images.codec import encode_png, image_from_array
from vla_foundry.params.commands.serving import ServeParams
from vla_foundry.serving import lbm
from vla_foundry.serving.policies import Served, load_policy


def pack(message: Any, *, bytes_keys: bool) -> bytes:
    def encode(value: np.ndarray) -> dict[Any, Any]:
        found = {"__ndarray__": True, "data": value.tobytes(), "dtype": value.dtype.str, "shape": value.shape}
        return {key.encode(): part for key, part in found.items()} if bytes_keys else found

    return msgpack.packb(message, default=encode)


def unpack(data: bytes | str) -> Any:
    def decode(found: dict[Any, Any]) -> Any:
        for prefix in ("", b""):
            key = (lambda name: name.encode()) if prefix == b"" else (lambda name: name)
            if key("__ndarray__") in found:
                values = np.frombuffer(found[key("data")], found[key("dtype")])
                return values.reshape(found[key("shape")])
        return found

    assert isinstance(data, bytes), data
    return msgpack.unpackb(data, object_hook=decode, strict_map_key=False)


@contextmanager
def openpi(port: int, **options: Any) -> Iterator[tuple[ClientConnection, Any]]:
    with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, **options) as connection:
        yield connection, unpack(connection.recv())


def ask(connection: ClientConnection, observation: dict[str, Any]) -> dict[str, Any]:
    connection.send(pack(observation, bytes_keys=True))
    return unpack(connection.recv())


def openpi_observation(recording: Any, frame: int, **extra: Any) -> dict[str, Any]:
    given = observe(recording, frame)
    images = {f"rig.{camera}": image for camera, image in given.images.items()}
    return {**images, **given.fields, "prompt": given.instruction, "step": frame, **extra}


def join(action: dict[str, np.ndarray], served: Served) -> np.ndarray:
    return np.concatenate([action[field.name] for field in served.metadata.actions])


def test_openpi_gets_the_chunk_of_each_step(arm: Any, served: Served) -> None:
    recording = arm.recordings[0]
    expected = act_in_process(arm, recording, seed=5, num_steps=1)[0]
    with serve(served) as ports, openpi(ports.websocket) as (connection, metadata):
        assert metadata["cameras"] == {"rig.front": [40, 30], "rig.wrist": [20, 24]}
        assert metadata["chunk_steps"] == 6
        replies = [ask(connection, openpi_observation(recording, frame, seed=5)) for frame in range(4)]
        assert [reply["actions"].shape for reply in replies] == [(6, 10)] * 4
        assert replies[0]["actions"].dtype == np.float32
        assert np.array_equal(replies[0]["actions"][0], join(expected, served))
        assert replies[0]["server_timing"].keys() == {"infer_ms"}
        assert replies[1]["server_timing"].keys() == {"infer_ms", "prev_total_ms"}
        # another episode begins anew
        again = ask(connection, openpi_observation(recording, 0, seed=5, episode=1))
        assert np.array_equal(again["actions"], replies[0]["actions"])
        other = ask(connection, openpi_observation(recording, 0, seed=6, episode=2))
        assert not np.array_equal(other["actions"], replies[0]["actions"])


def test_a_map_turns_mirrored_pictures_back(arm: Any, served: Served, tmp_path: Path) -> None:
    recording, metadata = arm.recordings[0], served.metadata
    state = [
        {"field": field.name, "columns": [0, field.width], "key": field.name, "own": {"rotation": None}}
        | ({"rotation": field.rotation} if field.rotation else {})
        for field in metadata.fields
    ]
    ends = np.cumsum([field.width for field in metadata.actions]).tolist()
    columns = [[end - field.width, end] for field, end in zip(metadata.actions, ends, strict=True)]
    actions = [
        {"field": field.name, "columns": part}
        | ({"rotation": field.rotation} if field.rotation else {})
        | ({"gripper": {"open": 1, "closed": 0}} if field.width == 1 else {})
        for field, part in zip(metadata.actions, columns, strict=True)
    ]
    cameras = {"rig.front": "front", "rig.wrist": "wrist"}
    given = {"cameras": cameras, "mirrored": ["rig.front"], "state": state, "actions": actions, "instruction": "prompt"}
    (tmp_path / "map.yaml").write_text(json.dumps(given), encoding="utf-8")
    expected = act_in_process(arm, recording, seed=5, num_steps=1)[0]
    observation = openpi_observation(recording, 0, seed=5)
    for camera, name in cameras.items():
        observation[name] = observation.pop(camera)
    observation["front"] = np.ascontiguousarray(observation["front"][:, ::-1])
    with serve(served, client_map=str(tmp_path / "map.yaml")) as ports, openpi(ports.websocket) as (connection, _):
        found = ask(connection, observation)["actions"]
    assert np.array_equal(found[0], join(expected, served))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"step": None}, "the policy looks 2 steps back: give the control step"),
        ({"step": 3}, "an observation for every step"),
        ({"step": -1}, "'step' must be a whole number from 0 on, got -1"),
        ({"rig.wrist": None}, "the image of camera 'rig.wrist' is object"),
        ({"rig.wrist": b"png"}, "the image of camera 'rig.wrist' is .S3"),
        ({"rig.wrist": np.zeros((24, 20, 3), np.float32)}, "'rig.wrist' is float32 .24, 20, 3., not uint8"),
        ({"robot__actual__poses__right::arm__xyz": None}, "needs the field 'robot__actual__poses__right::arm__xyz'"),
        ({"robot__actual__poses__right::arm__xyz": np.zeros(2)}, "'robot__actual__poses__right::arm__xyz' must be 3"),
        ({"robot__actual__poses__right::arm__xyz": np.full(3, np.nan)}, "must be 3 finite numbers"),
        ({"prompt": ""}, "the instruction is empty"),
        ({"prompt": None}, "the instruction is empty"),
        ({"prompt": np.zeros(3)}, "'prompt' must be text, got ndarray"),
        ({"prompt": "up " * 10_000}, "the instruction has 30000 characters, over 10000"),
        ({"step": "9" * 100_000}, "'step' must be a whole number from 0 on, got '9{79}.$"),
        ({"robot__actual__poses__right::arm__xyz": np.zeros(10**6)}, r"3 finite numbers, got an array \(1000000,\)"),
        ({"rig.wrist": None, 5: np.zeros((2, 2, 3), np.uint8)}, "the image of camera 'rig.wrist' is object"),
    ],
)
def test_openpi_refusals_are_one_line_of_text_and_end_the_connection(
    arm: Any, served: Served, change: dict[str, Any], fault: str
) -> None:
    with serve(served) as ports, openpi(ports.websocket) as (connection, _):
        ask(connection, openpi_observation(arm.recordings[0], 0))
        connection.send(pack(openpi_observation(arm.recordings[0], 1) | change, bytes_keys=True))
        line = connection.recv()
        assert isinstance(line, str)
        assert len(line.splitlines()) == 1
        assert re.search(fault, line), line
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv()
        assert closed.value.rcvd.code == 1011


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1",
        msgpack.packb([1]),
        msgpack.packb({b"__ndarray__": True, b"data": b"1234", b"dtype": "|O", b"shape": [1]}),
        msgpack.packb({"x": {b"__ndarray__": True, b"data": b"1", b"dtype": "<f4", b"shape": [9]}}),
        msgpack.packb({"x": {b"__ndarray__": True}}),
        b"\x91" * 100_000,
        # items of one byte, which take hundreds of times as much memory
        b"\x81\xa1a\xdd\x00\x10\x00\x00" + b"\x80" * (1 << 20),
        b"\x81\xa1a\xdc\x01\x00" + (b"\xdc\x01\x00" + b"\x90" * 256) * 256,
        msgpack.packb({"x": {b"__ndarray__": True, b"data": b"1234", b"dtype": "f4,(", b"shape": [1]}}),
        msgpack.packb({"x": {b"__ndarray__": True, b"data": b"1234", b"dtype": "<f4", b"shape": [float("inf")]}}),
        # bytes(number) would allocate so many
        msgpack.packb({"x": {"__image__": True, "format": "png", "data": 1 << 45}}),
        "text",
    ],
)
def test_garbage_ends_only_its_own_connection(arm: Any, served: Served, data: bytes | str) -> None:
    recording = arm.recordings[0]
    with serve(served) as ports, openpi(ports.websocket) as (good, _):
        first = ask(good, openpi_observation(recording, 0))
        with openpi(ports.websocket) as (bad, _):
            bad.send(data)
            assert isinstance(bad.recv(), str)
            with pytest.raises(ConnectionClosed):
                bad.recv()
        second = ask(good, openpi_observation(recording, 1))
        assert first["actions"].shape == second["actions"].shape


class VlaEvalClient:
    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.sequence = 0

    def send(self, kind: Any, payload: dict[str, Any]) -> None:
        self.sequence += 1
        frame = {"type": kind, "payload": payload, "seq": self.sequence, "timestamp": time.time()}
        self.connection.send(pack(frame, bytes_keys=False))

    def ask(self, kind: Any, payload: dict[str, Any]) -> dict[str, Any]:
        self.send(kind, payload)
        reply = unpack(self.connection.recv())
        assert reply["seq"] == self.sequence
        assert isinstance(reply["timestamp"], float)
        return reply


def vla_eval_observation(recording: Any, frame: int) -> dict[str, Any]:
    given = observe(recording, frame)
    images = {
        "rig.front": {
            "__image__": True,
            "format": "png",
            "data": encode_png(image_from_array(given.images["front"])),
            "shape": given.images["front"].shape,
        },
        "rig.wrist": given.images["wrist"],
    }
    return {"images": images, **given.fields, "task_description": given.instruction}


def test_vla_eval_gets_an_action_for_each_observation(arm: Any, served: Served) -> None:
    recording = arm.recordings[1]
    with serve(served) as ports, connect(f"ws://127.0.0.1:{ports.websocket}/vla_eval", compression=None) as connection:
        client = VlaEvalClient(connection)
        hello = client.ask("hello", {"harness_version": "0.8.0", "protocol_version": 1})
        assert hello["type"] == "hello"
        assert hello["payload"]["protocol_version"] == 1
        assert [part["dims"] for part in hello["payload"]["action_spec"].values()] == [3, 1, 6]
        # nobody acts before an episode
        error = client.ask("observation", vla_eval_observation(recording, 0))
        assert error["type"] == "error"
        assert "no episode was begun" in error["payload"]["error"]
        episodes = []
        for _ in range(2):
            client.send("episode_start", {"task": {"name": "lift", "episode_idx": 4}})
            replies = [client.ask("observation", vla_eval_observation(recording, frame)) for frame in range(7)]
            assert {reply["type"] for reply in replies} == {"action"}
            episodes.append(np.stack([reply["payload"]["actions"] for reply in replies]))
            client.send("episode_end", {"metrics": {"success": True}, "steps": 7})
        assert episodes[0].dtype == np.float32
        assert episodes[0].shape == (7, 10)
        assert np.array_equal(*episodes)
        # the seed of an episode comes from its task
        task = json.dumps({"name": "lift", "episode_idx": 4}, sort_keys=True)
        seed = int.from_bytes(hashlib.sha256(task.encode()).digest()[:7])
        expected = act_in_process(arm, recording, seed=seed, num_steps=7)
        assert np.array_equal(episodes[0], np.stack([join(action, served) for action in expected]))
        client.send("episode_start", {"task": {"name": "lift"}})
        for kind, payload, fault in (
            ("observation", {"images": {}}, "the instruction is empty"),
            ("observation", {"images": {5: np.zeros((2, 2, 3), np.uint8)}}, "the instruction is empty"),
            ("observation", vla_eval_observation(recording, 0) | {"images": {5: 6}}, "the images given were: none"),
            (["observation"], {}, "the message type ['observation'] is unknown"),
            ("episode_start", {"task": {"a": 1, 2: 3}}, "the task cannot be read"),
        ):
            broken = client.ask(kind, payload)
            assert (broken["type"], fault in broken["payload"]["error"]) == ("error", True), broken


def read(port: int, path: str, token: str | None = None) -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_pages(arm: Any, served: Served) -> None:
    with serve(served) as ports:
        port = ports.websocket
        assert read(port, "/healthz") == (200, "OK\n")
        assert json.loads(read(port, "/health")[1]) == {"status": "ok"}
        assert json.loads(read(port, "/config")[1])["name"] == "arm"
        assert read(port, "/nothing")[0] == 404
        with openpi(port) as (connection, _):
            for frame in range(3):
                ask(connection, openpi_observation(arm.recordings[0], frame))
            text = read(port, "/metrics")[1]
        assert 'vla_foundry_requests_total{outcome="ok",protocol="openpi"} 4.0' in text
        assert "vla_foundry_clients 1.0" in text
        for stage in ("queue", "decode", "policy", "encode"):
            assert f'vla_foundry_milliseconds{{quantile="0.99",stage="{stage}"}}' in text
            assert f'vla_foundry_milliseconds_count{{stage="{stage}"}} 3' in text


def test_a_token_is_asked_for(arm: Any, served: Served) -> None:
    with serve(served, token="secret") as ports:
        port = ports.websocket
        assert read(port, "/healthz")[0] == 200
        assert read(port, "/metrics")[0] == 401
        assert read(port, "/metrics", "wrong")[0] == 401
        assert read(port, "/metrics", "secret")[0] == 200
        headers = {"Authorization": "Bearer other"}, [("Authorization", "Bearer a"), ("Authorization", "Bearer secret")]
        for wrong in (None, *headers):
            with pytest.raises(InvalidStatus, match="401"), openpi(port, additional_headers=wrong):
                pass
        with openpi(port, additional_headers={"Authorization": "Api-Key secret"}) as (connection, _):
            assert ask(connection, openpi_observation(arm.recordings[0], 0))["actions"].shape == (6, 10)


def test_the_template_waves_over_all_protocols() -> None:
    """gRPC, the LBM simulator's service, openpi and vla-eval get the same actions of a class without torch."""
    observed, commanded = "robot__actual__grippers__right::hand", "robot__action__grippers__right::hand"
    args = {"field": observed, "action": commanded, "amplitude": 0.25, "period": 4}
    wave = load_policy(ServeParams(policy="examples.wave_policy:WavePolicy", policy_args=args))
    start, expected = np.array([0.5]), [[0.5], [0.75], [0.5], [0.25]]
    found: dict[str, list[list[float]]] = {}
    with serve(wave) as ports, ExitStack() as stack:
        remote = stack.enter_context(RemotePolicy(f"127.0.0.1:{ports.grpc}"))
        remote.reset(0)
        observation = RobotObservation(images={}, fields={observed: start})
        found["grpc"] = [remote.act(observation)[commanded].tolist() for _ in range(4)]
        channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{ports.grpc}"))
        lbm_call = {
            name: channel.unary_unary(f"/lbm_policy_interface.{name}Service/{name}")
            for name in ("PolicyStep", "PolicyReset")
        }
        lbm_call["PolicyReset"](encode(lbm.PolicyResetRequest("a")))
        hands = lbm.PosesAndGrippers(gripper_status=[lbm.RobotGripperStatus("right::hand", 0.5)])
        step = encode(lbm.PolicyStepRequest("a", lbm.MultiarmObservation(robot=lbm.RobotState(actual=hands))))
        replies = [decode(lbm.PolicyStepResponse, lbm_call["PolicyStep"](step)) for _ in range(4)]
        found["lbm"] = [[hand.gripper_position for hand in reply.action.gripper_status] for reply in replies]  # pyright: ignore[reportOptionalMemberAccess]
        connection, _ = stack.enter_context(openpi(ports.websocket))
        # a chunk is one action
        found["openpi"] = [ask(connection, {observed: start})["actions"][0].tolist() for _ in range(4)]
        address = f"ws://127.0.0.1:{ports.websocket}/vla_eval"
        client = VlaEvalClient(stack.enter_context(connect(address, compression=None)))
        client.ask("hello", {"harness_version": "0.8.0", "protocol_version": 1})
        client.send("episode_start", {"task": {"name": "wave"}})
        answers = [client.ask("observation", {observed: start, "task_description": ""}) for _ in range(4)]
        found["vla_eval"] = [answer["payload"]["actions"].tolist() for answer in answers]
    for protocol, actions in found.items():
        np.testing.assert_allclose(actions, expected, atol=1e-12, err_msg=protocol)
