"""What all protocols share: sessions of one policy, decoding of pictures, timings, and the log of requests."""

import asyncio
import base64
import json
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from vla_foundry.client.messages import RAW, Image, Metadata, PredictRequest, decode_raw_image, read_arrays, split_rows
from vla_foundry.client.observation import RobotObservation, RobotSteps
from vla_foundry.images.codec import MAX_PIXELS, MAX_SAMPLE_PIXELS, decode_image, image_to_array
from vla_foundry.serving.engine import Engine, FullError, NoSessionError, PolicyFailedError, Reply

# requests whose times make the quantiles
_NUM_TIMED = 2000
_QUANTILES = (0.5, 0.95, 0.99)
# encoded pixels that any observation may have, and how many times those of the policy's cameras
_MIN_PIXELS, _PIXELS_FACTOR = 1 << 22, 4
# characters of an instruction, a client's name, and the description of an error
_MAX_INSTRUCTION, _MAX_NAME, _MAX_ERROR = 10_000, 256, 600
# of an episode: numbers of steps are 64 bits
_MAX_STEPS = 1 << 62


# camera and pixels -> pixels
AdaptImage = Callable[[str, np.ndarray], np.ndarray]


class DrainingError(RuntimeError):
    """The server is about to end and takes no new episodes."""


class PolicyService:
    """One policy for the clients of all protocols.

    Args:
        engine: runs the policy.
        metadata: what the policy observes and commands.
        request_log: file that every request is appended to; None: none.
    """

    def __init__(self, engine: Engine, metadata: Metadata, *, request_log: Path | None = None) -> None:
        self.engine = engine
        self.metadata = metadata
        self.is_draining = False
        self.times = Times()
        self._outcomes: Counter[tuple[str, str]] = Counter()
        self._decoders = ThreadPoolExecutor(2, thread_name_prefix="decode")
        sizes = [camera.width * camera.height for camera in metadata.cameras]
        known = max(_MIN_PIXELS, _PIXELS_FACTOR * sum(sizes))
        # larger pictures are refused before memory is allocated; a size of 0 is unknown
        self._max_pixels = known if sizes and all(sizes) else MAX_SAMPLE_PIXELS
        # answers under way
        self.num_running = 0
        self._log = None if request_log is None else request_log.open("ab", buffering=0)
        self._registry = CollectorRegistry()
        self._registry.register(self)  # pyright: ignore[reportArgumentType]

    def close(self) -> None:
        """Release the threads and the log."""
        self._decoders.shutdown()
        if self._log is not None:
            self._log.close()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count a request from its arrival until its answer is sent."""
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1

    async def drain(self, timeout_s: float) -> None:
        """Refuse new episodes, and wait until all requests are answered, for a time at most."""
        self.is_draining = True
        end = time.monotonic() + timeout_s
        while self.num_running and time.monotonic() < end:
            await asyncio.sleep(0.01)

    async def reset(self, protocol: str, client: str, seed: int) -> None:
        """Begin an episode of a client.

        Raises:
            DrainingError: the server is about to end.
            FullError: it has no room for another client.
            ValueError: the client's name is too long.
        """
        if self.is_draining:
            raise DrainingError("the server is shutting down.")
        if len(client) > _MAX_NAME:
            raise ValueError(f"client {client[:40]}...: a name has at most {_MAX_NAME} characters, not {len(client)}.")
        self._write_log(protocol, client, seed=seed)
        with self._counted(protocol):
            await self.engine.reset((protocol, client), seed)

    async def forget(self, protocol: str, client: str) -> None:
        """End a client's session."""
        await self.engine.forget((protocol, client))

    async def act(
        self,
        protocol: str,
        client: str,
        *,
        images: Sequence[Image],
        fields: Mapping[str, np.ndarray],
        instruction: str = "",
        step: int | None = None,
        whole_chunk: bool = False,
        adapt_image: AdaptImage | None = None,
    ) -> Reply:
        """Return the action for an observation; see Engine.act, and ClientMap.adapt_image.

        Raises:
            ValueError: the observation lacks something, or the client has no episode; the message names the client.
            PolicyFailedError: the policy failed.
        """
        self._write_log(protocol, client, images=images, fields=fields, instruction=instruction, step=step)
        with self._answered(protocol, client):
            _check_step(step)
            observation = await self._read(images, fields, instruction, adapt_image)
            reply = await self.engine.act((protocol, client), observation, step=step, whole_chunk=whole_chunk)
        return self._timed(reply)

    async def predict(self, protocol: str, client: str, request: PredictRequest) -> Reply:
        """Return a chunk for a robot that keeps its own chunks; see Policy.predict_from.

        Raises:
            ValueError, PolicyFailedError: as `act`.
        """
        self._write_log(protocol, client, predict=request)
        with self._answered(protocol, client):
            _check_step(request.step)
            num_rows, most = max((array.rows for array in request.rest), default=0), self.metadata.chunk_steps
            if num_rows > most:
                raise ValueError(f"{num_rows} actions are left of the chunk, but a chunk has {most}.")
            if len(request.steps) > self.metadata.steps_back + 1:
                raise ValueError(f"{len(request.steps)} steps; the policy looks {self.metadata.steps_back} steps back.")
            robot = RobotSteps(
                step=request.step,
                observations=[
                    await self._read(step.images, read_arrays(step.fields), request.instruction)
                    for step in request.steps
                ],
                actions=[read_arrays(step.actions) for step in request.steps[:-1]],
                rest=split_rows(read_arrays(request.rest, ndim=2)),
                delay_steps=request.delay_steps,
            )
            reply = await self.engine.predict((protocol, client), robot)
        return self._timed(reply)

    async def _read(
        self,
        images: Sequence[Image],
        fields: Mapping[str, np.ndarray],
        instruction: str,
        adapt_image: AdaptImage | None = None,
    ) -> RobotObservation:
        if len(instruction) > _MAX_INSTRUCTION:
            raise ValueError(f"the instruction has {len(instruction)} characters, over {_MAX_INSTRUCTION}.")
        with self.times.measured("decode"):
            decoded = await self._decode_images(images)
            if adapt_image is not None:
                decoded = {camera: adapt_image(camera, pixels) for camera, pixels in decoded.items()}
        return RobotObservation(images=decoded, fields=fields, instruction=instruction)

    def _timed(self, reply: Reply) -> Reply:
        self.times.add("queue", reply.queue_ms)
        self.times.add("policy", reply.policy_ms)
        return reply

    async def _decode_images(self, images: Sequence[Image]) -> dict[str, np.ndarray]:
        loop = asyncio.get_running_loop()
        decoded = {}
        num_left = self._max_pixels
        for image in images:
            if image.encoding == RAW:
                decoded[image.camera] = decode_raw_image(image)
                continue
            try:
                decode = partial(decode_image, image.data, max_pixels=min(num_left, MAX_PIXELS))
                pixels = await loop.run_in_executor(self._decoders, decode)
            except ValueError as error:
                raise ValueError(f"the image of camera '{image.camera}' cannot be decoded: {error}") from None
            num_left -= pixels.shape[1] * pixels.shape[2]
            decoded[image.camera] = image_to_array(pixels)
        return decoded

    def metrics(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics (called by prometheus_client)."""
        requests = CounterMetricFamily("vla_foundry_requests", "Requests by outcome", labels=["protocol", "outcome"])
        for labels, count in sorted(self._outcomes.items()):
            requests.add_metric(labels, count)
        yield requests
        yield GaugeMetricFamily("vla_foundry_clients", "Clients with a session", value=len(self.engine.sessions))
        yield GaugeMetricFamily("vla_foundry_waiting", "Requests in the queue", value=self.engine.num_waiting)
        name = "vla_foundry_milliseconds"
        summary = Metric(name, "Time per stage of a request", "summary")
        for stage, (count, total, values) in self.times.by_stage.items():
            for quantile in _QUANTILES:
                labels = {"stage": stage, "quantile": str(quantile)}
                summary.add_sample(name, labels, float(np.quantile(values, quantile)))
            summary.add_sample(f"{name}_count", {"stage": stage}, count)
            summary.add_sample(f"{name}_sum", {"stage": stage}, total)
        yield summary

    @contextmanager
    def _counted(self, protocol: str) -> Iterator[None]:
        """Count how the block ends."""
        outcome = "cancelled"
        try:
            yield
            outcome = "ok"
        except ValueError:
            outcome = "refused"
            raise
        except (FullError, PolicyFailedError):
            outcome = "failed"
            raise
        finally:
            self._outcomes[protocol, outcome] += 1

    @contextmanager
    def _answered(self, protocol: str, client: str) -> Iterator[None]:
        """Count how the block ends, and name the client in what it refuses."""
        with self._counted(protocol):
            try:
                yield
            except NoSessionError as error:
                raise NoSessionError(f"client {client}: {error}") from None
            except ValueError as error:
                raise ValueError(f"client {client}: {error}") from None

    def _write_log(self, protocol: str, client: str, **request: Any) -> None:
        if self._log is None:
            return
        row = {"time": time.time(), "protocol": protocol, "client": client, **request}
        try:
            self._log.write(json.dumps(row, default=_to_json).encode() + b"\n")
        except OSError as error:
            # a robot in motion matters more than the log
            sys.stderr.write(f"warning: request_log {self._log.name}: {error.strerror}. No more requests are logged.\n")
            self._log.close()
            self._log = None


class Times:
    """Milliseconds of each stage of the latest requests."""

    def __init__(self) -> None:
        # stage -> number of all requests, their sum, and the latest
        self.by_stage: dict[str, tuple[int, float, deque[float]]] = {}

    def add(self, stage: str, milliseconds: float) -> None:
        """Add a request's time."""
        count, total, values = self.by_stage.get(stage, (0, 0.0, deque(maxlen=_NUM_TIMED)))
        values.append(milliseconds)
        self.by_stage[stage] = (count + 1, total + milliseconds, values)

    @contextmanager
    def measured(self, stage: str) -> Iterator[None]:
        """Add the time of the block, if it succeeds."""
        start = time.perf_counter()
        yield
        self.add(stage, 1000 * (time.perf_counter() - start))


def _check_step(step: int | None) -> None:
    if step is not None and step >= _MAX_STEPS:
        raise ValueError(f"step {step} is too large: an episode has at most {_MAX_STEPS} steps.")


def describe_error(error: Exception) -> str:
    """Return what a client gets to see of an error: one line, not too long for the header of an answer."""
    line = " ".join(str(error).split())
    return line if len(line) <= _MAX_ERROR else f"{line[:_MAX_ERROR]} ..."


def _to_json(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return vars(value)
