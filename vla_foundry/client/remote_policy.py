"""A policy behind `vla-foundry serve`, with the interface of a policy in this process.

    policy = RemotePolicy("robot-server:50051", timeout_s=0.5)
    policy.reset(seed=0)
    actions = policy.act(RobotObservation(images=..., fields=..., instruction="open the drawer"))   # {field: (C,)}

It needs numpy and grpcio, not torch.

With `execution="async"` or "realtime" it asks for a chunk while the robot executes the rest of the last one, and `act`
only waits for the first:

    observation     0 ......... s ......... s + d
    chunk of 0      actions 0 ............. s + d - 1 | never executed
    chunk of s                  request ... answer    | actions d ...        d: the measured delay, network included
"""

import operator
import re
import ssl
import time
import uuid
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from vla_foundry.client.chunks import Chunk, DelayForecast, Execution, Timing, count_delay_steps
from vla_foundry.client.messages import (
    JPEG,
    MAX_MESSAGE_BYTES,
    METHODS,
    PROTOCOL_VERSION,
    SERVICE,
    TOKEN_KEY,
    ActRequest,
    ActResponse,
    CheckRobotRequest,
    ForgetRequest,
    Image,
    Metadata,
    MetadataRequest,
    ResetRequest,
    raw_image,
    read_arrays,
    write_arrays,
)
from vla_foundry.client.observation import RobotObservation
from vla_foundry.client.remote_episode import Answer, RemoteEpisode
from vla_foundry.client.wire import decode, encode

_OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # an action must not be asked for twice
    ("grpc.enable_retries", 0),
    # try often, so that a robot finds a server that comes back; the defaults grow to 2 minutes
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]
# gRPC takes much longer ones for no time at all
_MAX_TIMEOUT_S = 86400
# what gRPC says of a connection, and what may help
_HINTS = {
    "Socket closed": "Is this the gRPC port, and does the server need tls_certificate?",
    "WRONG_VERSION_NUMBER": "Is this the gRPC port of a server with TLS?",
    "Hostname Verification": "The server's certificate must name this host, as its subjectAltName.",
    "CERTIFICATE_VERIFY_FAILED": "tls_certificate must be the server's certificate, or its authority's.",
}
_TO_REQUEST = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OUT_OF_RANGE,
)


class RemotePolicy:
    """A policy behind a server. One object may serve several robots (`client`), from one thread.

    An action is returned by the deadline or not at all: after an error, act again with the newest observation.

    Args:
        server: HOST:PORT.
        timeout_s: deadline of each call, seconds.
        token: the server's token, if it asks for one.
        tls_certificate: file with the certificate (PEM) of the server or of its authority; None: without TLS.
        encode_jpeg: turns an image, uint8 (H, W, 3), into a JPEG file, for slow networks; None: images are sent as they
            are, which changes nothing of the policy's answer.
        execution: sync: the server keeps the chunks, and `act` asks for each action. async: the robot acts while the
            next chunk is inferred. realtime: async, and each chunk goes on where the last one is (real-time chunking).
        delay_steps: None: chunks take the time that they take, and the delay is measured. Otherwise a chunk is used
            this many steps after its observation, and waited for: for simulations.

    Raises:
        ValueError: the deadline, token or certificate cannot be used, or the policy cannot do this execution.
        ConnectionError: the server does not answer, or speaks another version.
        PermissionError: the server refuses the token.
    """

    def __init__(
        self,
        server: str,
        *,
        timeout_s: float = 10.0,
        token: str | None = None,
        tls_certificate: str | None = None,
        encode_jpeg: Callable[[np.ndarray], bytes] | None = None,
        execution: Execution = "sync",
        delay_steps: int | None = None,
    ) -> None:
        if not 0 < timeout_s <= _MAX_TIMEOUT_S:
            raise ValueError(f"timeout_s must be above 0 and at most {_MAX_TIMEOUT_S}, got {timeout_s}.")
        self.server = server
        self.timeout_s = timeout_s
        self._encode_jpeg = encode_jpeg
        if token is not None and not (token.isascii() and token.isprintable() and token):
            raise ValueError("token must be one line of ASCII letters, digits and signs. Is a line break at its end?")
        self._call_metadata = None if token is None else ((TOKEN_KEY, f"Bearer {token}"),)
        self._channel = _open_channel(server, tls_certificate)
        self._methods = {
            name: self._channel.unary_unary(
                f"/{SERVICE}/{name}",
                request_serializer=None,
                response_deserializer=lambda data, kind=response: decode(kind, data),
            )
            for name, (_, response) in METHODS.items()
        }
        # sessions of two processes must not meet
        self._prefix = uuid.uuid4().hex
        self._clients: dict[Hashable, Any] = {}
        # calls for chunks that run
        self._calls: dict[Hashable, Any] = {}
        # requests for actions or chunks, over all clients
        self.num_predicted = 0
        # whose were asked for when actions were last chosen
        self.predicted: set[Hashable] = set()
        self.metadata: Metadata = self._call("GetMetadata", MetadataRequest(client=self._prefix))
        if self.metadata.protocol_version != PROTOCOL_VERSION:
            raise ConnectionError(
                f"{server} speaks version {self.metadata.protocol_version} of the protocol, this client "
                f"{PROTOCOL_VERSION}. Install the same version of vla-foundry on both sides."
            )
        self._timing = Timing(
            execution=execution,
            delay_steps=delay_steps,
            open_loop_steps=self.open_loop_steps,
            ensemble_decay=None,
        )
        self._delays = DelayForecast(delay_steps)
        offered = ["sync", *self.metadata.executions]
        if execution not in offered:
            raise ValueError(
                f"the policy of {server} cannot do execution '{execution}'. It can do {', '.join(offered)}."
            )

    def __enter__(self) -> "RemotePolicy":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all sessions and close the connection."""
        for client in list(self._clients):
            try:
                self.forget(client)
            except (ConnectionError, TimeoutError):
                break
        self._channel.close()

    @property
    def action_fields(self) -> list[str]:
        """The fields of an action in the model's order; poses are absolute."""
        return [field.name for field in self.metadata.actions]

    @property
    def open_loop_steps(self) -> int:
        """Executed actions of each chunk."""
        return self.metadata.open_loop_steps

    @property
    def delay_steps(self) -> int:
        """The delay to expect of the next chunk, in control steps; 0: nothing was measured yet."""
        return self._delays.forecast()

    def set_delay_steps(self, steps: int) -> None:
        """Change `delay_steps` of episodes that begin later."""
        self._timing, self._delays = replace(self._timing, delay_steps=steps), DelayForecast(steps)

    def check_robot(self, robot: str, spec_json: str) -> None:
        """Check that a robot has the cameras and fields of the training data, with the same meaning.

        Args:
            robot: its name, for messages.
            spec_json: its dataset spec, as robotics.json.

        Raises:
            ValueError: it lacks one, or means something else by it; one line.
        """
        self._call("CheckRobot", CheckRobotRequest(client=self._prefix, robot=robot, spec_json=spec_json))

    def reset(self, seed: int, *, client: Hashable = None) -> None:
        """Begin an episode and forget the previous one.

        Args:
            seed: the episode's seed.
            client: the robot, if there are several.

        Raises:
            ValueError: the seed is not a whole number from 0 to 2**64 - 1.
            ConnectionError, TimeoutError, PermissionError: the server is gone, late, full, or refuses.
        """
        if operator.index(seed) not in range(1 << 64):
            raise ValueError(f"seed must be from 0 to 2**64 - 1, got {seed}.")
        self._discard(client)
        name = f"{self._prefix}/{client}"
        self._call("Reset", ResetRequest(client=name, seed=seed))
        is_sync = self._timing.execution == "sync"
        self._clients[client] = _Client(name) if is_sync else RemoteEpisode(name, self._timing, self.metadata)

    def forget(self, client: Hashable = None) -> None:
        """Discard the episode of a robot that will not act again."""
        session = self._discard(client)
        if session is not None:
            self._call("Forget", ForgetRequest(client=session.name))

    def _discard(self, client: Hashable) -> Any:
        call = self._calls.pop(client, None)
        if call is not None:
            call.cancel()
        return self._clients.pop(client, None)

    def needs_images(self, client: Hashable = None) -> bool:
        """True if the next observation must hold images."""
        return self._find(client).needs_images

    def act(self, observation: RobotObservation) -> dict[str, np.ndarray]:
        """Return the action that follows an observation: {field: (C,)}.

        Raises:
            ValueError: no episode was begun, or the observation lacks something.
            TimeoutError: the action was not there in time; with chunks of its own: the chunk is used up, and the next
                one is late.
            ConnectionError: the server is gone; with chunks of its own, once the chunk is used up.
        """
        actions = self.act_many({None: observation})
        if None not in actions:
            late = self._delays.describe_late(self.metadata.chunk_steps, self.open_loop_steps)
            raise TimeoutError(f"The next chunk of {self.server} is late: {late}")
        return actions[None]

    def act_many(self, observations: Mapping[Any, RobotObservation]) -> dict[Any, dict[str, np.ndarray]]:
        """Return the action of each robot; they are asked for at once. A robot whose chunk is late has none.

        Raises:
            ValueError, TimeoutError, ConnectionError: as `act`.
        """
        if self._timing.execution == "sync":
            return self._ask_actions(observations)
        episodes: dict[Any, RemoteEpisode] = {name: self._find(name) for name in observations}
        for name, episode in episodes.items():
            episode.observe(observations[name])
        try:
            self._update_chunks(episodes)
            actions = {name: episode.schedule.plan(episode.step) for name, episode in episodes.items()}
            for name, episode in episodes.items():
                if actions[name] is None and episode.error is not None:
                    raise episode.error
        except (ValueError, OSError):
            for episode in episodes.values():
                episode.lose()
            raise
        for name, action in actions.items():
            episodes[name].command(action)
        return {name: action for name, action in actions.items() if action is not None}

    def correct(self, action: Mapping[str, np.ndarray], *, client: Hashable = None) -> None:
        """Record the action that the robot executed instead of the last one from `act`: {field: (C,)}."""
        if isinstance(self._find(client), RemoteEpisode):
            self._find(client).command(action)

    def _update_chunks(self, episodes: Mapping[Any, RemoteEpisode]) -> None:
        """Receive the chunks that are there, and ask for those that are due."""
        waiting = []
        self.predicted = set()
        for name, episode in episodes.items():
            schedule, step = episode.schedule, episode.step
            try:
                delay = schedule.receive(step)
                self._delays.add(delay)
                episode.error = episode.error if delay is None else None
            except (TimeoutError, ConnectionError) as error:
                # the chunk goes on meanwhile
                episode.error = error
            if schedule.is_due(step):
                request = episode.ask(
                    self.delay_steps if self._timing.execution == "realtime" else 0, self._encode_image
                )
                call = self._calls[name] = self._send("Predict", request)
                self.num_predicted += 1
                self.predicted.add(name)
                answer = Answer(call.done, lambda call=call: self._wait(call))
                if schedule.waits:
                    waiting.append((episode, answer))
                else:
                    schedule.begin(step, answer, 0)
        start, fps = time.perf_counter(), self.metadata.fps
        for episode, answer in waiting:
            episode.schedule.add(Chunk(episode.step, answer.result()[0]))
            self._delays.add(count_delay_steps(time.perf_counter() - start, fps) if fps else 1)

    def _ask_actions(self, observations: Mapping[Any, RobotObservation]) -> dict[Any, dict[str, np.ndarray]]:
        """Return the actions of the server's chunks."""
        calls = {}
        self.predicted = set(observations)
        for name, observation in observations.items():
            session = self._find(name)
            request = ActRequest(
                client=session.name,
                step=session.step,
                images=[self._encode_image(camera, image) for camera, image in observation.images.items()],
                fields=write_arrays(observation.fields),
                instruction=observation.instruction,
            )
            # time passes for the robot, whatever becomes of the call
            session.step += 1
            session.needs_images = True
            calls[name] = self._send("Act", request)
        actions = {}
        try:
            for name, call in calls.items():
                response: ActResponse = self._wait(call)
                self.num_predicted += 1
                self._find(name).needs_images = response.needs_images
                actions[name] = read_arrays(response.actions)
        finally:
            for call in calls.values():
                call.cancel()
        return actions

    def _encode_image(self, camera: str, image: np.ndarray) -> Image:
        if self._encode_jpeg is None or image.ndim == 2:  # depth
            return raw_image(camera, image)
        height, width, _ = image.shape
        return Image(camera=camera, encoding=JPEG, height=height, width=width, data=self._encode_jpeg(image))

    def _find(self, client: Hashable) -> Any:
        if client not in self._clients:
            who = "" if client is None else f" of client {client!r}"
            raise ValueError(f"No episode{who} was begun. Call reset(seed) first.")
        return self._clients[client]

    def _call(self, method: str, request: Any) -> Any:
        return self._wait(self._send(method, request))

    def _send(self, method: str, request: Any) -> Any:
        return self._methods[method].future(encode(request), timeout=self.timeout_s, metadata=self._call_metadata)

    def _wait(self, call: Any) -> Any:
        try:
            return call.result()
        except grpc.RpcError as error:
            code, details = error.code(), error.details()  # pyright: ignore[reportAttributeAccessIssue]
            if code in _TO_REQUEST:
                raise ValueError(details) from None
            if code == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise TimeoutError(f"{self.server} did not answer within {self.timeout_s:g} s.") from None
            if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                raise PermissionError(f"{self.server}: {details}") from None
            hints = [hint for sign, hint in _HINTS.items() if sign in (details or "")]
            raise ConnectionError(" ".join([f"{self.server}: {code.name.lower()}: {details}", *hints])) from None


def _open_channel(server: str, tls_certificate: str | None) -> grpc.Channel:
    # gRPC takes a missing port for 443, and a large one modulo 65536
    address = re.fullmatch(r"(\[[^\[\]/]+\]|[^\s:/]+):(\d{1,5})", server)
    if address is None or not 0 < int(address[2]) < 65536:
        raise ValueError(f"server must be HOST:PORT, such as 127.0.0.1:50051, got '{server}'.")
    if tls_certificate is None:
        return grpc.insecure_channel(server, options=_OPTIONS)
    certificate = Path(tls_certificate).read_bytes()
    try:
        ssl.create_default_context(cafile=tls_certificate)
    except ssl.SSLError as error:
        raise ValueError(f"{tls_certificate} is not a certificate (PEM): {error.reason}.") from None
    return grpc.secure_channel(server, grpc.ssl_channel_credentials(certificate), options=_OPTIONS)


class _Client:
    """One robot's episode, whose chunks the server keeps."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.step = 0
        self.needs_images = True
