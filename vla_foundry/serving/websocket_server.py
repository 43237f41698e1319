"""The websocket protocols of openpi (path /) and of the vla-eval harness (path /vla_eval), and HTTP for operators.

openpi: the server speaks first, with metadata; each observation is answered with a chunk of actions.
vla-eval: the client speaks first; each observation is answered with one action.
Messages are msgpack. HTTP on the same port: /healthz, /health, /config and /metrics.
"""

import hashlib
import hmac
import http
import json
import ssl
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from typing import Any

import msgpack
import numpy as np
import websockets
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.http11 import Request, Response

from vla_foundry.client.messages import JPEG, PNG, Image
from vla_foundry.serving.client_map import ClientMap
from vla_foundry.serving.engine import FullError, PolicyFailedError
from vla_foundry.serving.service import DrainingError, PolicyService, describe_error

VLA_EVAL_PATH = "/vla_eval"
_KINDS = "biuf"
# of a message, in all its lists and maps
_MAX_ITEMS = 20_000
_ENCODINGS = {"jpeg": JPEG, "png": PNG}
# type and payload
_Answer = tuple[str, dict[str, Any]]
# what a client gets to see of an error
_REFUSALS = (ValueError, FullError, DrainingError, PolicyFailedError)


async def open_websocket_server(
    service: PolicyService,
    maps: Mapping[str, ClientMap],
    *,
    host: str,
    port: int,
    token: str | None,
    tls: ssl.SSLContext | None,
    max_message_bytes: int,
) -> Server:
    """Listen on a port.

    Args:
        service: the policy.
        maps: path -> what its clients call the policy's cameras and fields.
        host, port: where to listen; port 0: a free one.
        token: what clients must show in the header Authorization; None: nothing.
        tls: None: without TLS.
        max_message_bytes: larger messages end the connection.

    Raises:
        OSError: the port is taken.
    """

    async def handle(connection: ServerConnection) -> None:
        assert connection.request is not None
        path = connection.request.path.partition("?")[0]
        kind = _VlaEvalSession if path == VLA_EVAL_PATH else _OpenpiSession
        session = kind(service, maps[path], connection)
        try:
            await session.run()
        except websockets.ConnectionClosed:
            pass
        finally:
            await session.close()

    return await serve(
        handle,
        host,
        port,
        process_request=_create_http(service, token),
        compression=None,
        max_size=max_message_bytes,
        # a slow first prediction must not end the connection
        ping_interval=None,
        ssl=tls,
        server_header=None,
    )


def _create_http(service: PolicyService, token: str | None) -> Callable[[ServerConnection, Request], Response | None]:
    """Return what answers plain HTTP requests, and refuses websockets without the token."""
    pages: dict[str, Callable[[], tuple[str, bytes]]] = {
        "/healthz": lambda: ("text/plain", b"OK\n"),
        "/health": lambda: ("application/json", b'{"status": "ok"}\n'),
        "/config": lambda: ("application/json", json.dumps(_describe(service)).encode()),
        "/metrics": lambda: ("text/plain; version=0.0.4", service.metrics()),
    }

    def answer_http(connection: ServerConnection, request: Request) -> Response | None:
        path = request.path.partition("?")[0]
        shown = ", ".join(request.headers.get_all("Authorization")).partition(" ")[2]
        is_public = path in ("/healthz", "/health")
        if token is not None and not is_public and not hmac.compare_digest(shown.encode(), token.encode()):
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "The token is missing or wrong.\n")
        if path in pages:
            if is_public and service.is_draining:
                return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "shutting down\n")
            kind, body = pages[path]()
            response = connection.respond(http.HTTPStatus.OK, body.decode())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = kind
            return response
        if path not in ("/", VLA_EVAL_PATH):
            return connection.respond(http.HTTPStatus.NOT_FOUND, f"There is no {path}.\n")
        return None

    return answer_http


def _describe(service: PolicyService) -> dict[str, Any]:
    """Return the metadata for clients, as plain values."""
    metadata = service.metadata
    return {
        "name": metadata.name,
        "fps": metadata.fps,
        "cameras": {camera.name: [camera.width, camera.height] for camera in metadata.cameras},
        "fields": {field.name: field.width for field in metadata.fields},
        "actions": {field.name: field.width for field in metadata.actions},
        "chunk_steps": metadata.chunk_steps,
        "open_loop_steps": metadata.open_loop_steps,
        "follows_instructions": metadata.follows_instructions,
        **metadata.info,
    }


class _Session:
    """A connection: it is one client."""

    _PROTOCOL: str

    def __init__(self, service: PolicyService, client_map: ClientMap, connection: ServerConnection) -> None:
        self._service = service
        self._map = client_map
        self._connection = connection
        self._client = uuid.uuid4().hex

    async def run(self) -> None:
        """Answer until the client closes the connection."""
        raise NotImplementedError

    async def close(self) -> None:
        await self._service.forget(self._PROTOCOL, self._client)

    def _read_instruction(self, observation: Mapping[Any, Any]) -> str:
        key = self._map.params.instruction
        found = observation.get(key)
        if not isinstance(found, str | None):
            raise ValueError(f"the observation's '{key}' must be text, got {type(found).__name__}.")
        return found or ""


class _OpenpiSession(_Session):
    """A connection that speaks openpi's protocol.

    Optional keys of an observation: `episode` (a value; another one begins an episode), `seed` (the episode's), and
    `step` (the control step in the episode, from 0 on; a policy that looks at earlier steps needs it).
    """

    _PROTOCOL = "openpi"

    def __init__(self, service: PolicyService, client_map: ClientMap, connection: ServerConnection) -> None:
        super().__init__(service, client_map, connection)
        # of the latest observation; the first one always begins an episode
        self._episode: Any = self
        self._next_step: int | None = None
        self._previous_ms: float | None = None

    async def run(self) -> None:
        await self._connection.send(_pack(_describe(self._service), bytes_keys=True))
        async for data in self._connection:
            start = time.perf_counter()
            with self._service.running():
                try:
                    reply = await self._answer(_unpack(data))
                except _REFUSALS as error:
                    await self._connection.send(describe_error(error))
                    await self._connection.close(1011, "refused")
                    return
                timing = {"infer_ms": 1000 * (time.perf_counter() - start)}
                if self._previous_ms is not None:
                    timing["prev_total_ms"] = self._previous_ms
                with self._service.times.measured("encode"):
                    packed = _pack({**reply, "server_timing": timing}, bytes_keys=True)
                await self._connection.send(packed)
            self._previous_ms = 1000 * (time.perf_counter() - start)

    async def _answer(self, observation: dict[Any, Any]) -> dict[str, Any]:
        step = None if observation.get("step") is None else _as_number("step", observation["step"])
        episode = observation.get("episode")
        if self._episode != episode:
            await self._service.reset(self._PROTOCOL, self._client, _as_number("seed", observation.get("seed", 0)))
            self._episode, self._next_step = episode, step
        steps_back = self._service.metadata.steps_back
        if steps_back > 0 and (step is None or step != self._next_step):
            raise ValueError(
                f"the policy looks {steps_back} steps back: give the control step as the observation's 'step', and an "
                "observation for every step."
            )
        self._next_step = None if step is None else step + 1
        reply = await self._service.act(
            self._PROTOCOL,
            self._client,
            images=self._map.read_images(observation),
            fields=self._map.read_state(observation),
            instruction=self._read_instruction(observation),
            adapt_image=self._map.adapt_image,
            step=step,
            whole_chunk=True,
        )
        return {"actions": self._map.write_actions(reply.actions)}


class _VlaEvalSession(_Session):
    """A connection of the vla-eval harness."""

    _PROTOCOL = "vla_eval"

    def __init__(self, service: PolicyService, client_map: ClientMap, connection: ServerConnection) -> None:
        super().__init__(service, client_map, connection)
        self._seed = 0

    async def run(self) -> None:
        handlers: dict[str, Callable[[dict[Any, Any]], Awaitable[_Answer | None]]] = {
            "hello": self._greet,
            "episode_start": self._begin,
            "observation": self._act,
            "episode_end": self._end,
        }
        async for data in self._connection:
            with self._service.running():
                await self._answer(data, handlers)

    async def _answer(
        self, data: str | bytes, handlers: Mapping[str, Callable[[dict[Any, Any]], Awaitable[_Answer | None]]]
    ) -> None:
        sequence = 0
        try:
            message = _unpack(data)
            missing = [key for key in ("type", "payload", "seq", "timestamp") if key not in message]
            if missing or not isinstance(message["payload"], dict):
                raise ValueError(f"the message lacks {', '.join(missing) or 'a map as payload'}.")
            kind, number = message["type"], message["seq"]
            if not isinstance(number, int):
                raise ValueError(f"seq must be a whole number, got {number!r:.80}.")
            sequence = number
            if kind == "error":
                return
            if not isinstance(kind, str) or kind not in handlers:
                raise ValueError(f"the message type {kind!r:.80} is unknown.")
            reply = await handlers[kind](message["payload"])
        except _REFUSALS as error:
            reply = ("error", {"error": describe_error(error)})
        if reply is not None:
            kind, payload = reply
            frame = {"type": kind, "payload": payload, "seq": sequence, "timestamp": time.time()}
            with self._service.times.measured("encode") if kind == "action" else nullcontext():
                packed = _pack(frame, bytes_keys=False)
            await self._connection.send(packed)

    async def _greet(self, payload: dict[Any, Any]) -> tuple[str, dict[str, Any]]:
        hello = {
            "harness_version": str(payload.get("harness_version", "")),
            "protocol_version": 1,
            "model_server": self._service.metadata.name,
            "capabilities": {},
            "action_spec": self._map.describe_actions(),
        }
        if self._map.params.observation_params:
            hello["observation_params"] = dict(self._map.params.observation_params)
        return "hello", hello

    async def _begin(self, payload: dict[Any, Any]) -> None:
        # the same task and episode draw the same noise in every run
        try:
            task = json.dumps(payload.get("task", {}), sort_keys=True, default=str)
        except TypeError as error:
            raise ValueError(f"the task cannot be read: {error}.") from None
        self._seed = int.from_bytes(hashlib.sha256(task.encode()).digest()[:7])
        await self._service.reset(self._PROTOCOL, self._client, self._seed)

    async def _act(self, observation: dict[Any, Any]) -> tuple[str, dict[str, Any]]:
        if observation.get("episode_restart"):
            await self._service.reset(self._PROTOCOL, self._client, self._seed)
        images = observation.get("images", {})
        reply = await self._service.act(
            self._PROTOCOL,
            self._client,
            images=self._map.read_images(images if isinstance(images, dict) else {}),
            fields=self._map.read_state(observation),
            instruction=self._read_instruction(observation),
            adapt_image=self._map.adapt_image,
        )
        # float32 by the protocol
        return "action", {"actions": self._map.write_actions(reply.actions).astype(np.float32)}

    async def _end(self, payload: dict[Any, Any]) -> None:
        await self._service.forget(self._PROTOCOL, self._client)


def _as_number(name: str, value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError(f"the observation's '{name}' must be a whole number from 0 on, got {value!r:.80}.")
    return value


def _pack(message: Any, *, bytes_keys: bool) -> bytes:
    """Encode a message; openpi's arrays have keys of bytes, vla-eval's of text."""

    def encode(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            raise TypeError(type(value).__name__)
        found = {
            "__ndarray__": True,
            "data": value.tobytes(),
            "dtype": value.dtype.str,
            "shape": list(value.shape),
        }
        return {key.encode(): part for key, part in found.items()} if bytes_keys else found

    packed = msgpack.packb(message, default=encode)
    assert packed is not None
    return packed


def _unpack(data: str | bytes) -> dict[Any, Any]:
    """Decode a message of either protocol; arrays of numbers only.

    Raises:
        ValueError: it is not a map, or an array is malformed.
    """
    if isinstance(data, str):
        raise ValueError("the message is text; binary msgpack is needed.")
    num_items = 0

    def count(container: Any) -> Any:
        nonlocal num_items
        num_items += 1 + len(container)
        if num_items > _MAX_ITEMS:
            raise ValueError(f"it has more than {_MAX_ITEMS} items")
        return container

    try:
        message = msgpack.unpackb(
            data,
            object_hook=lambda found: _decode_array(count(found)),
            list_hook=count,
            strict_map_key=False,
            max_array_len=_MAX_ITEMS,
            max_map_len=_MAX_ITEMS,
        )
    except (ValueError, TypeError, KeyError, OverflowError, SyntaxError, msgpack.UnpackException) as error:
        raise ValueError(f"the message is broken: {describe_error(error) or type(error).__name__}.") from None
    if not isinstance(message, dict):
        raise ValueError(f"the message is a {type(message).__name__}, not a map.")
    return message


def _decode_array(found: dict[Any, Any]) -> Any:
    values = {key.decode() if isinstance(key, bytes) else key: value for key, value in found.items()}
    if "__npgeneric__" in values:
        return values["data"]
    if "__image__" in values and values.get("format") != "raw":
        if values.get("format") not in _ENCODINGS:
            raise ValueError(f"the image format {values.get('format')!r} is unknown")
        if not isinstance(values["data"], bytes):
            raise ValueError("an image's data must be bytes")
        return Image(encoding=_ENCODINGS[values["format"]], data=values["data"])
    if "__ndarray__" not in values and "__image__" not in values:
        return found
    dtype = np.dtype(str(values["dtype"]))
    if dtype.kind not in _KINDS:
        raise ValueError(f"arrays of {dtype} are refused")
    return np.frombuffer(values["data"], dtype=dtype).reshape([int(size) for size in values["shape"]])
