"""Measure what the policy server costs over the bare model call, whether clients disturb each other, and its memory.

Starts `vla-foundry serve` on this machine, with one thread for the model as here, and predicts at every step
(open_loop_steps 1). A call of the model in this process (`bare`) comes before each request, so that both sides find
caches that the other has used. `over_bare` is a ratio of medians, `more_ms` what a round trip took longer than the call
before it (median). `company` has 8 clients at once, of which one sends garbage and one dies in the middle of a message;
`same_actions` says whether the others got what they get alone, bit for bit. `soak` is the server's resident memory
after each fifth of many requests in many episodes. Prints one JSON object.

    uv run python benchmarks/serving.py --checkpoint experiments/tiny_policy
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from websockets.sync.client import ClientConnection, connect

from vla_foundry.client import RemotePolicy, RobotObservation
from vla_foundry.client.messages import Metadata
from vla_foundry.inference import Policy
from vla_foundry.robotics.rotations import matrix_to_rotation

GRPC, WEBSOCKET = 50061, 8061
NUM_WARM = 5


def create_observation(metadata: Metadata) -> RobotObservation:
    """Return noise for images, and poses at rest."""
    rng = np.random.default_rng(0)
    images = {
        camera.name: rng.integers(0, 256, (camera.height or 128, camera.width or 128, 3), dtype=np.uint8)
        for camera in metadata.cameras
    }
    fields = {
        field.name: matrix_to_rotation(np.eye(3), field.rotation) if field.rotation else np.zeros(field.width)
        for field in metadata.fields
    }
    return RobotObservation(images=images, fields=fields, instruction="go")


def measure(
    bare: Callable[[int], Any], asks: dict[str, Callable[[int], Any]], rounds: int
) -> dict[str, dict[str, float]]:
    """Time calls of each `ask(step)` in turn with `bare`, so that other load on the machine meets all alike."""
    bares: list[float] = []
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in asks}
    for step in range(rounds + NUM_WARM):
        for name, ask in asks.items():
            start = time.perf_counter()
            bare(step)
            middle = time.perf_counter()
            ask(step)
            end = time.perf_counter()
            if step >= NUM_WARM:
                bares.append(1000 * (middle - start))
                pairs[name].append((bares[-1], 1000 * (end - middle)))
    found = {"bare": {"p50_ms": float(np.quantile(bares, 0.5)), "p99_ms": float(np.quantile(bares, 0.99))}}
    for name, values in pairs.items():
        before, taken = np.array(values).T
        found[name] = {
            "p50_ms": float(np.quantile(taken, 0.5)),
            "p99_ms": float(np.quantile(taken, 0.99)),
            "over_bare": float(np.quantile(taken, 0.5) / np.quantile(bares, 0.5)),
            "more_ms": float(np.quantile(taken - before, 0.5)),
        }
    return found


def pack(message: Any, *, bytes_keys: bool) -> bytes:
    """Encode a websocket message with arrays."""

    def encode(value: np.ndarray) -> dict[Any, Any]:
        found = {"__ndarray__": True, "data": value.tobytes(), "dtype": value.dtype.str, "shape": list(value.shape)}
        return {key.encode(): part for key, part in found.items()} if bytes_keys else found

    packed = msgpack.packb(message, default=encode)
    assert packed is not None
    return packed


def ask_openpi(connection: ClientConnection, observation: RobotObservation, step: int) -> None:
    """Ask for a chunk."""
    values = {**observation.images, **observation.fields, "prompt": observation.instruction, "step": step}
    connection.send(pack(values, bytes_keys=True))
    reply = connection.recv()
    assert isinstance(reply, bytes), reply


def ask_vla_eval(connection: ClientConnection, observation: RobotObservation, step: int) -> None:
    """Ask for an action; step 0 begins an episode."""
    frame = {"seq": step, "timestamp": time.time()}
    if step == 0:
        connection.send(pack({"type": "episode_start", "payload": {"task": {"name": "go"}}, **frame}, bytes_keys=False))
    payload = {"images": observation.images, **observation.fields, "task_description": observation.instruction}
    connection.send(pack({"type": "observation", "payload": payload, **frame}, bytes_keys=False))
    reply = msgpack.unpackb(connection.recv())
    assert reply["type"] == "action", reply


def measure_company(observation: RobotObservation, expected: list[Any], rounds: int) -> dict[str, Any]:
    """Run six clients beside one that sends garbage and one that dies; return the six's times."""
    times: list[float] = []
    is_same: list[bool] = []
    stop = threading.Event()

    def good() -> None:
        with RemotePolicy(f"127.0.0.1:{GRPC}") as policy:
            policy.reset(0)
            for step in range(rounds):
                start = time.perf_counter()
                found = policy.act(observation)
                times.append(1000 * (time.perf_counter() - start))
                if step < len(expected):
                    is_same.append(all(np.array_equal(found[name], expected[step][name]) for name in found))

    def bad(message: bytes, path: str) -> None:
        while not stop.wait(0.01):
            with connect(f"ws://127.0.0.1:{WEBSOCKET}{path}", compression=None) as connection:
                connection.send(message)
                connection.recv()

    def dying() -> None:
        while not stop.wait(0.01):
            with socket.create_connection(("127.0.0.1", GRPC)) as raw:
                raw.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x40\x00\x00garbage")

    others = [threading.Thread(target=bad, args=(b"\xc1garbage", "")), threading.Thread(target=dying)]
    threads = [threading.Thread(target=good) for _ in range(6)]
    for thread in [*others, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    for thread in others:
        thread.join()
    return {
        "p50_ms": float(np.quantile(times, 0.5)),
        "p99_ms": float(np.quantile(times, 0.99)),
        "num_answered": len(times),
        "same_actions": bool(is_same) and all(is_same),
    }


def read_memory_mib(pid: int) -> float:
    """Return a process's resident memory."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def soak(observation: RobotObservation, pid: int, num_requests: int) -> dict[str, Any]:
    """Ask in episodes of 20 steps, each a new client; return the memory after each fifth."""
    memory = []
    for number in range(num_requests // 20):
        with RemotePolicy(f"127.0.0.1:{GRPC}") as policy:
            policy.reset(number)
            for _ in range(20):
                policy.act(observation)
        if (number + 1) % (num_requests // 100) == 0:
            memory.append(read_memory_mib(pid))
    return {"requests": num_requests, "memory_mib": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--num_inference_steps", type=int, help="default: the policy's own")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--soak", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    command = [sys.executable, "-m", "vla_foundry.cli", "serve", "--checkpoint", args.checkpoint, "--device", "cpu"]
    command += ["--open_loop_steps", "1"]
    if args.num_inference_steps is not None:
        command += ["--num_inference_steps", str(args.num_inference_steps)]
    command += ["--port", str(GRPC), "--websocket_port", str(WEBSOCKET)]
    found: dict[str, Any] = {"checkpoint": args.checkpoint, "rounds": args.rounds}
    # the bare call has one thread too
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server,
        ExitStack() as stack,
    ):
        stack.callback(server.terminate)
        assert server.stdout is not None
        if not server.stdout.readline():
            sys.exit("the server did not start")
        remote = stack.enter_context(RemotePolicy(f"127.0.0.1:{GRPC}"))
        observation = create_observation(remote.metadata)
        remote.reset(0)
        expected = [remote.act(observation) for _ in range(20)]
        policy = Policy.from_run(
            args.checkpoint, device="cpu", open_loop_steps=1, num_inference_steps=args.num_inference_steps
        )
        policy.reset(0)
        remote.reset(0)
        asks: dict[str, Callable[[int], Any]] = {"grpc": lambda step: remote.act(observation)}
        for name, path, ask in (("openpi", "", ask_openpi), ("vla_eval", "/vla_eval", ask_vla_eval)):
            address = f"ws://127.0.0.1:{WEBSOCKET}{path}"
            connection = stack.enter_context(connect(address, compression=None, max_size=None))
            if name == "openpi":
                connection.recv()
            asks[name] = lambda step, ask=ask, connection=connection: ask(connection, observation, step)
        found |= measure(lambda step: policy.act(observation), asks, args.rounds)
        sys.stderr.write(f"{json.dumps(found)}\n")
        found["company"] = measure_company(observation, expected, args.rounds)
        sys.stderr.write(f"{json.dumps(found['company'])}\n")
        found["soak"] = soak(observation, server.pid, args.soak)
    rounded = json.dumps(json.loads(json.dumps(found), parse_float=lambda text: round(float(text), 3)), indent=1)
    sys.stdout.write(rounded + "\n")


if __name__ == "__main__":
    main()
