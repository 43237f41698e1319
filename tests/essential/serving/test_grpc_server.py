"""The gRPC services, with real calls over loopback."""

import concurrent.futures
import contextlib
import runpy
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import msgpack
import numpy as np
import pytest
from websockets.sync.client import connect

from tests.essential.inference.test_policy import observe
from tests.essential.serving.conftest import serve
from vla_foundry.client import RemotePolicy, RobotObservation
from vla_foundry.images.codec import encode_png, image_from_array
from vla_foundry.inference import Policy
from vla_foundry.params.commands.serving import ServeParams
from vla_foundry.serving.policies import Served, load_policy


def act_in_process(arm: Any, recording: Any, *, seed: int, num_steps: int = 9, **changes: Any) -> list[Any]:
    policy = Policy.from_run(str(arm.run), device="cpu")
    policy.reset(seed)
    return [policy.act(observe(recording, frame, **changes)) for frame in range(num_steps)]


def act_remotely(port: int, recording: Any, *, seed: int, num_steps: int = 9, **changes: Any) -> list[Any]:
    with RemotePolicy(f"127.0.0.1:{port}") as policy:
        policy.reset(seed)
        return [policy.act(observe(recording, frame, **changes)) for frame in range(num_steps)]


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.keys() == other.keys()
        for name, values in one.items():
            assert values.dtype == other[name].dtype
            assert np.array_equal(values, other[name]), (step, name)


def test_a_served_policy_acts_as_in_this_process(arm: Any, served: Served) -> None:
    with serve(served) as ports:
        found = act_remotely(ports.grpc, arm.recordings[0], seed=3)
    assert_equal(found, act_in_process(arm, arm.recordings[0], seed=3))


@pytest.mark.parametrize("num_clients", [3, 8])
def test_company_changes_nothing(arm: Any, served: Served, num_clients: int) -> None:
    jobs = [(arm.recordings[number % 2], number) for number in range(num_clients)]
    with serve(served) as ports, concurrent.futures.ThreadPoolExecutor(num_clients) as pool:
        calls = [pool.submit(act_remotely, ports.grpc, recording, seed=seed) for recording, seed in jobs]
        found = [call.result() for call in calls]
    for actions, (recording, seed) in zip(found, jobs, strict=True):
        assert_equal(actions, act_in_process(arm, recording, seed=seed))


def test_sessions_that_reuse_features_of_images_act_as_they_would_alone(arm: Any) -> None:
    options: dict[str, Any] = {"device": "cpu", "open_loop_steps": 1}
    served = load_policy(ServeParams(checkpoint=str(arm.run), reuse_image_features=True, **options))
    jobs = [(arm.recordings[seed % 2], seed) for seed in range(3)]
    with serve(served) as ports, concurrent.futures.ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(act_remotely, ports.grpc, recording, seed=seed, num_steps=5) for recording, seed in jobs]
        found = [call.result() for call in calls]
    policy = Policy.from_run(str(arm.run), **options)
    for actions, (recording, seed) in zip(found, jobs, strict=True):
        policy.reset(seed)
        for frame, action in enumerate(actions):
            expected = policy.act(observe(recording, frame))
            assert all(np.allclose(action[name], values, rtol=0, atol=1e-5) for name, values in expected.items())


def test_an_answer_that_came_too_late_is_never_given_again(arm: Any, served: Served) -> None:
    recording = arm.recordings[0]
    with serve(served) as ports, RemotePolicy(f"127.0.0.1:{ports.grpc}") as policy:
        policy.reset(3)
        policy.act(observe(recording, 0))
        policy.timeout_s = 1e-4
        with pytest.raises(TimeoutError, match=r"did not answer within 0.0001 s"):
            policy.act(observe(recording, 1))
        policy.timeout_s = 10.0
        assert policy.needs_images()
        found = policy.act(observe(recording, 2))
    expected = act_in_process(arm, recording, seed=3, num_steps=3)
    # both are of one chunk, which looked at the first step only
    assert_equal([found], [expected[2]])


def test_a_policy_catches_up_after_skipped_steps(arm: Any) -> None:
    recording = arm.recordings[0]
    policy = Policy.from_run(str(arm.run), device="cpu")
    policy.reset(3)
    policy.act(observe(recording, 0))
    policy.observe(observe(recording, 5), step=5)
    policy.choose_actions([None])
    # the next chunk begins at step 8, and looks at the images of steps 6 and 8
    assert policy.needs_images()
    policy.act(observe(recording, 6))
    assert not policy.needs_images()
    policy.act(observe(recording, 7, images={}))
    assert policy.needs_images()
    with pytest.raises(ValueError, match="step 7 has passed, the next is 8"):
        policy.observe(observe(recording, 7), step=7)
    policy.observe(observe(recording, 8), step=10**15)
    assert set(policy.choose_actions([None])) == {None}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"fields": {}}, "the policy needs the field"),
        ({"images": {}}, "the image of camera 'rig.front' is missing"),
        ({"images": {"front": np.zeros((8, 8, 3), np.uint8)}}, "gives 8 x 8 pixels"),
        ({"instruction": ""}, "the instruction is empty"),
        ({"instruction": "é" * 10**5}, "the instruction has 100000 characters, over 10000"),
        ({"fields": {"é" * 10**5: np.zeros(1)}}, "the observation has (é){200,600} ...$"),
    ],
)
def test_a_bad_observation_names_client_and_fault_and_changes_nothing(
    arm: Any, served: Served, change: dict[str, Any], fault: str
) -> None:
    recording = arm.recordings[0]
    with serve(served) as ports, RemotePolicy(f"127.0.0.1:{ports.grpc}") as policy:
        policy.reset(3, client="left")
        with pytest.raises(ValueError, match=fault) as error:
            policy.act_many({"left": observe(recording, 0, **change)})
        assert "/left: " in str(error.value)
        found = policy.act_many({"left": observe(recording, 0)})["left"]
    assert_equal([found], act_in_process(arm, recording, seed=3, num_steps=1))


def test_an_encoded_image_is_decoded(arm: Any, served: Served) -> None:
    recording = arm.recordings[0]
    with serve(served) as ports:
        policy = RemotePolicy(f"127.0.0.1:{ports.grpc}", encode_jpeg=lambda image: encode_png(image_from_array(image)))
        with policy:
            policy.reset(3)
            found = policy.act(observe(recording, 0))
            bomb = encode_png(image_from_array(np.zeros((2500, 2500, 3), np.uint8)))
            for data, fault in ((b"\xff\xd8\xff broken", "JPEG of 10 bytes is broken"), (bomb, "the limit is 4194304")):
                policy._encode_jpeg = lambda image, data=data: data
                policy.reset(4)
                with pytest.raises(ValueError, match=f"the image of camera 'front' cannot be decoded: .*{fault}"):
                    policy.act(observe(recording, 0))
    # PNG loses nothing
    assert_equal([found], act_in_process(arm, recording, seed=3, num_steps=1))


def test_sessions_are_counted_and_end(arm: Any, served: Served) -> None:
    recording = arm.recordings[0]
    with serve(served, max_clients=2, session_timeout_s=0.5) as ports:
        policy = RemotePolicy(f"127.0.0.1:{ports.grpc}")
        for client in range(2):
            policy.reset(0, client=client)
        with pytest.raises(ConnectionError, match=r"the server has its 2 clients \(max_clients\)"):
            policy.reset(0, client=2)
        time.sleep(0.6)
        policy.reset(0, client=2)
        with pytest.raises(ValueError, match=r"ended after 0.5 s of silence \(session_timeout_s\)"):
            policy.act_many({0: observe(recording, 0)})
        policy.act_many({2: observe(recording, 0)})
        policy.close()


def test_garbage_harms_nobody_else(arm: Any, served: Served) -> None:
    recording = arm.recordings[0]
    rng = np.random.default_rng(0)
    with serve(served, max_message_mib=1) as ports:
        channel = grpc.insecure_channel(f"127.0.0.1:{ports.grpc}", options=[("grpc.max_send_message_length", 1 << 28)])
        act = channel.unary_unary("/vla_foundry.policy.v1.PolicyService/Act")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            good = pool.submit(act_remotely, ports.grpc, recording, seed=3)
            codes = set()
            for _ in range(100):
                with pytest.raises(grpc.RpcError) as error:
                    act(rng.bytes(200))
                codes.add(error.value.code())
            with pytest.raises(grpc.RpcError) as error:
                act(bytes(2 << 20))
            assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            with pytest.raises(grpc.RpcError) as error:
                channel.unary_unary("/vla_foundry.policy.v1.PolicyService/Nothing")(b"")
            assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED
            assert_equal(good.result(), act_in_process(arm, recording, seed=3))
        assert codes <= {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION}
        channel.close()


def test_a_token_is_asked_for(served: Served) -> None:
    with serve(served, token="secret") as ports:
        address = f"127.0.0.1:{ports.grpc}"
        for token in (None, "wrong"):
            with pytest.raises(PermissionError, match="the token is missing or wrong"):
                RemotePolicy(address, token=token)
        RemotePolicy(address, token="secret").close()
        assert check_health(address) == 1


def check_health(address: str) -> int:
    with grpc.insecure_channel(address) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        with pytest.raises(grpc.RpcError) as error:
            check(b"\x0a\x04none", timeout=10)
        assert error.value.code() == grpc.StatusCode.NOT_FOUND
        assert check(b"\x0a\x23vla_foundry.policy.v1.PolicyService") == b"\x08\x01"
        answer = check(b"", timeout=10)
    # field 1, a number
    assert answer[0] == 0x08
    return answer[1]


def test_nobody_answers_at_a_closed_port() -> None:
    with pytest.raises(ConnectionError, match=r"127.0.0.1:1: unavailable"):
        RemotePolicy("127.0.0.1:1", timeout_s=5.0)


def test_a_robot_that_does_not_fit_is_refused(served: Served) -> None:
    with serve(served) as ports, RemotePolicy(f"127.0.0.1:{ports.grpc}") as policy:
        policy.check_robot("the arm", policy.metadata.spec_json)
        with pytest.raises(ValueError, match="the arm lacks the key 'layout'"):
            policy.check_robot("the arm", '{"version": 1}')
        other = policy.metadata.spec_json.replace("rig.wrist", "rig.elbow")
        with pytest.raises(ValueError, match=r"the arm has no camera 'rig.wrist'"):
            policy.check_robot("the arm", other)


class FailingPolicy:
    """Fails as a model would, at its second action."""

    def __init__(self, *, width: int = 2) -> None:
        self.width = width
        self.step = 0

    def reset(self, seed: int) -> None:
        self.step, self.seed = 0, seed

    def act(self, observation: RobotObservation) -> dict[str, np.ndarray]:
        self.step += 1
        if self.step == 2:
            raise RuntimeError("CUDA error")
        return {"action": np.full(self.width, self.seed + observation.fields["state"][0])}


def test_any_class_is_served_and_may_fail(capfd: pytest.CaptureFixture[str]) -> None:
    name = f"{__name__}:FailingPolicy"
    served = load_policy(ServeParams(policy=name, policy_args={"width": 3}))
    observation = RobotObservation(images={}, fields={"state": np.array([0.5])})
    with serve(served) as ports, RemotePolicy(f"127.0.0.1:{ports.grpc}") as policy:
        assert policy.metadata.name == "FailingPolicy"
        for client, seed in (("a", 1), ("b", 2)):
            policy.reset(seed, client=client)
        found = policy.act_many({"a": observation, "b": observation})
        assert {client: action["action"].tolist() for client, action in found.items()} == {
            "a": [1.5] * 3,
            "b": [2.5] * 3,
        }
        with pytest.raises(ConnectionError, match=r"internal: the policy failed \(RuntimeError\)"):
            policy.act_many({"a": observation})
        assert policy.act_many({"a": observation})["a"].keys() == {"action"}
    assert "CUDA error" in capfd.readouterr().err
    with pytest.raises(ValueError, match="cannot be created with policy_args"):
        load_policy(ServeParams(policy=name, policy_args={"depth": 3}))
    with pytest.raises(ValueError, match="cannot be imported"):
        load_policy(ServeParams(policy="no_such_module:Policy"))


class OddPolicy:
    """Fails in the way that its argument names."""

    def __init__(self, *, kind: str, seconds: float = 0.0) -> None:
        self.kind, self.seconds = kind, seconds

    def reset(self, seed: int) -> None:
        pass

    def act(self, observation: RobotObservation) -> Any:
        time.sleep(self.seconds)
        if self.kind == "exit":
            raise SystemExit(3)
        odd = {"nan": {"a": np.array([1.0, np.nan])}, "list": [1.0], "text": {"a": "up"}, "nothing": {}}
        return {**odd, "matrix": {"a": np.zeros((2, 3))}}.get(self.kind, {"action": np.zeros(2)})

    def needs_images(self) -> bool:
        if self.kind == "images":
            raise ZeroDivisionError
        return True


def load_odd(**settings: Any) -> Served:
    return load_policy(ServeParams(policy=f"{__name__}:OddPolicy", policy_args=settings))


ODD = RobotObservation(images={}, fields={"state": np.zeros(2)})


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("exit", r"the policy failed \(SystemExit\)"),
        ("images", r"the policy failed \(ZeroDivisionError\)"),
        ("nan", "its action 'a' is not finite"),
        ("nothing", "it returned no action"),
        ("list", r"it returned \[1.0\]"),
        ("text", "it returned {'a': 'up'}"),
        ("matrix", "act must return {field: numbers}"),
    ],
)
def test_a_policy_that_fails_is_told_and_the_server_goes_on(kind: str, fault: str) -> None:
    with serve(load_odd(kind=kind)) as ports, RemotePolicy(f"127.0.0.1:{ports.grpc}", timeout_s=5.0) as policy:
        for _ in range(2):
            policy.reset(0)
            with pytest.raises(ConnectionError, match=fault):
                policy.act(ODD)


def test_requests_under_way_are_answered_at_the_end() -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        with serve(load_odd(kind="fine", seconds=0.3)) as ports:
            policy = RemotePolicy(f"127.0.0.1:{ports.grpc}", timeout_s=5.0)
            policy.reset(0)
            address = f"ws://127.0.0.1:{ports.websocket}"
            connections = [stack.enter_context(connect(address, compression=None)) for _ in range(2)]
            for connection in connections:
                connection.recv()
                connection.send(msgpack.packb({"prompt": ""}))
            call = pool.submit(policy.act, ODD)
            time.sleep(0.1)
        found = [connection.recv(timeout=5) for connection in connections]
        assert call.result()["action"].tolist() == [0.0, 0.0]
    assert all(b"actions" in message for message in found)


def test_a_client_finds_a_server_that_comes_back() -> None:
    with serve(load_odd(kind="fine")) as ports:
        policy = RemotePolicy(f"127.0.0.1:{ports.grpc}", timeout_s=1.0)
        policy.reset(0)
    down_until = time.monotonic() + 2.5
    while time.monotonic() < down_until:
        with pytest.raises(ConnectionError):
            policy.act(ODD)
        time.sleep(0.1)
    with serve(load_odd(kind="fine"), port=ports.grpc):
        up_since = time.monotonic()
        while True:
            try:
                policy.reset(0)
                break
            except ConnectionError:
                # it would take seconds, and minutes after a longer absence
                assert time.monotonic() < up_since + 1
                time.sleep(0.02)
        assert policy.act(ODD)["action"].shape == (2,)
        policy.close()


def test_a_client_says_itself_what_cannot_be_sent() -> None:
    with serve(load_odd(kind="fine")) as ports, RemotePolicy(f"127.0.0.1:{ports.grpc}") as policy:
        with pytest.raises(ValueError, match=r"seed must be from 0 to 2\*\*64 - 1, got -1"):
            policy.reset(-1)
        policy.reset(2**64 - 1)
        for timeout_s in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"timeout_s must be above 0 and at most 86400, got {timeout_s}"):
                RemotePolicy(policy.server, timeout_s=timeout_s)
        for values in (np.zeros((2, 2)), np.array(["a"])):
            with pytest.raises(ValueError, match=r"field 'state' must be an array \(C,\) of numbers"):
                policy.act(RobotObservation(images={}, fields={"state": values}))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A certificate for this machine, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=localhost", "-addext", names, "-keyout", "key.pem", "-out", "certificate.pem"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return str(folder / "certificate.pem"), str(folder / "key.pem")


@pytest.mark.parametrize(
    "server", ["127.0.0.1", "localhost:", "http://localhost:50051", "localhost:99999", "::1:1", ""]
)
def test_an_address_is_a_host_and_a_port(server: str) -> None:
    # gRPC takes no port for 443, and 99999 for 34463
    with pytest.raises(ValueError, match=r"server must be HOST:PORT, such as 127\.0\.0\.1:50051, got"):
        RemotePolicy(server)


def test_tls_and_token(certificate: tuple[str, str]) -> None:
    path, key = certificate
    settings: dict[str, Any] = {"host": "0.0.0.0", "tls_certificate": path, "tls_key": key, "token_file": "given"}
    with serve(load_odd(kind="fine"), token="secret", **settings) as ports:
        address = f"localhost:{ports.grpc}"
        with RemotePolicy(address, token="secret", tls_certificate=path) as policy:
            policy.reset(0)
            assert policy.act(ODD)["action"].shape == (2,)
        for token in ("other", None):
            with pytest.raises(PermissionError, match="the token is missing or wrong"):
                RemotePolicy(address, token=token, tls_certificate=path)
        for token in ("secret\n", "s\u00e9cret", ""):
            with pytest.raises(ValueError, match="token must be one line of ASCII"):
                RemotePolicy(address, token=token, tls_certificate=path)
        with pytest.raises(ConnectionError, match="does the server need tls_certificate"):
            RemotePolicy(address, token="secret", timeout_s=5.0)
        with pytest.raises(ConnectionError, match="must name this host, as its subjectAltName"):
            RemotePolicy(f"[::ffff:127.0.0.1]:{ports.grpc}", token="secret", tls_certificate=path)
        with pytest.raises(ValueError, match="is not a certificate"):
            RemotePolicy(address, token="secret", tls_certificate=key)
        context = ssl.create_default_context(cafile=path)
        header = {"Authorization": "Bearer secret"}
        with connect(f"wss://localhost:{ports.websocket}", ssl=context, additional_headers=header) as connection:
            assert b"OddPolicy" in connection.recv()
    encrypted = f"{key}.encrypted"
    command = ["openssl", "ec", "-in", key, "-aes256", "-passout", "pass:word", "-out", encrypted]
    subprocess.run(command, check=True, capture_output=True)
    fault = "are not a certificate and its private key"
    for pair in ((key, path), (path, encrypted)):
        broken: dict[str, Any] = dict(zip(("tls_certificate", "tls_key"), pair, strict=True))
        with pytest.raises(ValueError, match=fault), serve(load_odd(kind="fine"), **broken):
            pass


def test_ipv6() -> None:
    with serve(load_odd(kind="fine"), host="::1") as ports, RemotePolicy(f"[::1]:{ports.grpc}") as policy:
        policy.reset(0)
        with connect(f"ws://[::1]:{ports.websocket}", compression=None) as connection:
            assert b"OddPolicy" in connection.recv()


def test_a_full_disk_stops_the_log_only(capfd: pytest.CaptureFixture[str]) -> None:
    log: dict[str, Any] = {"request_log": "/dev/full"}
    with serve(load_odd(kind="fine"), **log) as ports, RemotePolicy(f"127.0.0.1:{ports.grpc}") as policy:
        policy.reset(0)
        assert policy.act(ODD)["action"].shape == (2,)
    assert capfd.readouterr().err.count("request_log /dev/full: No space left on device") == 1


def test_an_insecure_server_warns_once(capfd: pytest.CaptureFixture[str]) -> None:
    insecure: dict[str, Any] = {"host": "0.0.0.0", "insecure": True}
    with serve(load_odd(kind="fine"), **insecure) as ports, RemotePolicy(f"127.0.0.1:{ports.grpc}") as policy:
        policy.reset(0)
    assert capfd.readouterr().err.count("warning: insecure: anyone who can reach 0.0.0.0 can use this server") == 1


def test_other_addresses_need_protection() -> None:
    for settings in ({}, {"token_file": "token"}, {"tls_certificate": "a", "tls_key": "b"}):
        with pytest.raises(ValueError, match=r"host '0.0.0.0' can be reached by others"):
            ServeParams(policy="any:Policy", host="0.0.0.0", **settings)
    for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        ServeParams(policy="any:Policy", host=host)
    ServeParams(policy="any:Policy", host="0.0.0.0", insecure=True)
    with pytest.raises(ValueError, match="open_loop_steps is for checkpoints"):
        ServeParams(policy="any:Policy", open_loop_steps=3)
    with pytest.raises(ValueError, match="belong together"):
        ServeParams(policy="any:Policy", tls_key="b")


def test_a_taken_port_is_one_line(served: Served) -> None:
    with serve(served) as ports:
        for port in ({"port": ports.grpc}, {"websocket_port": ports.websocket}):
            with (
                pytest.raises(ValueError, match=r"port \d+ of 127.0.0.1 cannot be opened: .*in use"),
                serve(served, **port),
            ):
                pass


def test_logged_requests_are_replayed_as_the_docs_say(arm: Any, served: Served, tmp_path: Path) -> None:
    recording, log = arm.recordings[0], tmp_path / "requests.jsonl"
    with serve(served, request_log=str(log)) as ports:
        found = act_remotely(ports.grpc, recording, seed=3, num_steps=5)
    page = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
    script = page.split("## Replay")[1].split("```python\n")[1].split("```")[0]
    printed: list[Any] = []
    with serve(served) as ports:
        script = script.replace("127.0.0.1:50051", f"127.0.0.1:{ports.grpc}").replace("requests.jsonl", str(log))
        (tmp_path / "replay.py").write_text(script, encoding="utf-8")
        runpy.run_path(str(tmp_path / "replay.py"), {"print": lambda client, action: printed.append(action)})
    assert_equal(printed, found)


SLOW_POLICY = """
import time
class Slow:
    def reset(self, seed): pass
    def act(self, observation): time.sleep(30)
"""


def test_a_second_signal_ends_the_server_at_once(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW_POLICY, encoding="utf-8")
    words = ["--policy", "slow:Slow"]
    command = [sys.executable, "-m", "vla_foundry.cli", "serve", *words, "--port", "0", "--websocket_port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        try:
            with RemotePolicy(line.split("grpc ")[1].split(",")[0], timeout_s=20.0) as policy:
                policy.reset(0)
                with concurrent.futures.ThreadPoolExecutor(1) as pool:
                    call = pool.submit(policy.act, ODD)
                    time.sleep(0.3)
                    start = time.monotonic()
                    server.send_signal(signal.SIGTERM)
                    time.sleep(0.3)
                    assert server.poll() is None
                    server.send_signal(signal.SIGTERM)
                    out, err = server.communicate(timeout=20)
                    assert time.monotonic() - start < 5
                    with pytest.raises(ConnectionError):
                        call.result()
        finally:
            server.kill()
    assert (server.returncode, out) == (128 + signal.SIGTERM, "")
    assert err == "warning: a second signal: the server ends at once, and requests under way get no answer.\n"
