"""`vla-foundry serve`: serve a policy to robots and simulators over the network, until SIGTERM or Ctrl-C."""

import asyncio
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import NamedTuple

import grpc
from websockets.asyncio.server import Server

from vla_foundry.config.command_line import parse_command
from vla_foundry.params.commands.serving import ServeParams
from vla_foundry.robotics.spec import parse_spec
from vla_foundry.serving.client_map import OwnNames, load_client_map
from vla_foundry.serving.engine import THREAD_NAME, Engine
from vla_foundry.serving.grpc_server import create_grpc_server
from vla_foundry.serving.policies import Served, load_policy
from vla_foundry.serving.service import PolicyService
from vla_foundry.serving.websocket_server import VLA_EVAL_PATH, open_websocket_server

# how long running requests may take after SIGTERM, seconds
_GRACE_S = 10.0


def main(argv: list[str]) -> None:
    """Run `vla-foundry serve`."""
    params = parse_command(ServeParams, argv, prog="vla-foundry serve")
    token = _read_token(params)
    served = load_policy(params)
    asyncio.run(_serve(params, served, token))
    if any(thread.name.startswith(THREAD_NAME) for thread in threading.enumerate()):
        # the interpreter would wait for a prediction that may never end
        sys.stderr.write(f"warning: a prediction took more than {_GRACE_S:g} s and was cut off.\n")
        sys.stderr.flush()
        os._exit(0)


def _read_token(params: ServeParams) -> str | None:
    if params.token_file is None:
        return None
    # what is not UTF-8 is not ASCII either
    token = Path(params.token_file).read_text(encoding="utf-8", errors="replace").strip()
    if not token:
        raise ValueError(f"token_file {params.token_file} is empty. Write a long random token into it.")
    if not (token.isascii() and token.isprintable()):
        raise ValueError(f"token_file {params.token_file}: a token is one line of ASCII letters, digits and signs.")
    return token


async def _serve(params: ServeParams, served: Served, token: str | None) -> None:
    stop = asyncio.Event()

    def end(number: int) -> None:
        if stop.is_set():
            sys.stderr.write(
                "warning: a second signal: the server ends at once, and requests under way get no answer.\n"
            )
            sys.stderr.flush()
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end, number)
    async with open_server(params, served, token) as ports:
        sys.stdout.write(f"serving {served.metadata.name}: {ports.describe(params)}\n")
        sys.stdout.flush()
        await stop.wait()


class Ports(NamedTuple):
    """The ports that a server listens on."""

    grpc: int
    # None: no websocket
    websocket: int | None

    def describe(self, params: ServeParams) -> str:
        """Return the addresses, for the user."""
        host = f"[{params.host}]" if ":" in params.host else params.host
        scheme = "ws" if params.tls_certificate is None else "wss"
        lines = [f"grpc {host}:{self.grpc}"]
        if self.websocket is not None:
            lines += [
                f"openpi {scheme}://{host}:{self.websocket}",
                f"vla-eval {scheme}://{host}:{self.websocket}{VLA_EVAL_PATH}",
            ]
        return ", ".join(lines)


@asynccontextmanager
async def open_server(params: ServeParams, served: Served, token: str | None = None) -> AsyncIterator[Ports]:
    """Serve a policy while the block runs; at its end requests that have begun are answered.

    Raises:
        ValueError: a port is taken, or a certificate is broken.
    """
    tls = _load_tls(params)
    _check_port("port", params.host, params.port)
    engine = Engine(
        served.policy,
        batching=served.batching if params.batching == "auto" else params.batching,
        window_ms=params.batch_window_ms,
        batch_size=params.batch_size,
        max_clients=params.max_clients,
        session_timeout_s=params.session_timeout_s,
    )
    async with engine:
        log = None if params.request_log is None else Path(params.request_log)
        with closing(PolicyService(engine, served.metadata, request_log=log)) as service:
            server = create_grpc_server(
                service,
                check_robot=served.check_robot,
                token=token,
                max_message_bytes=params.max_message_mib << 20,
            )
            port = _open_port(server, params)
            websocket = await _open_websocket(params, service, served, token, tls)
            await server.start()
            if not params.is_guarded:
                sys.stderr.write(f"warning: insecure: anyone who can reach {params.host} can use this server.\n")
            try:
                yield Ports(port, None if websocket is None else websocket.sockets[0].getsockname()[1])
            finally:
                await asyncio.gather(service.drain(_GRACE_S), server.stop(_GRACE_S))
                # connections that wait for an endless prediction must end too
                engine.end()
                if websocket is not None:
                    websocket.close()
                    await websocket.wait_closed()


async def _open_websocket(
    params: ServeParams, service: PolicyService, served: Served, token: str | None, tls: ssl.SSLContext | None
) -> Server | None:
    """Listen on the websocket port.

    Raises:
        ValueError: the port is taken, or the client map does not fit the policy.
    """
    if params.websocket_port is None:
        return None
    metadata = served.metadata
    spec = parse_spec(metadata.spec_json, "robotics.json") if metadata.spec_json else None
    if params.client_map is not None:
        found = load_client_map(params.client_map, metadata, spec)
        maps = {"/": found, VLA_EVAL_PATH: found}
    else:
        maps = {
            "/": OwnNames(metadata, instruction="prompt"),
            VLA_EVAL_PATH: OwnNames(metadata, instruction="task_description"),
        }
    try:
        return await open_websocket_server(
            service,
            maps,
            host=params.host,
            port=params.websocket_port,
            token=token,
            tls=tls,
            max_message_bytes=params.max_message_mib << 20,
        )
    except OSError as error:
        raise ValueError(
            f"websocket_port {params.websocket_port} of {params.host} cannot be opened: {error.strerror}. Give another."
        ) from None


def _load_tls(params: ServeParams) -> ssl.SSLContext | None:
    """Return the context of the certificate; None: without TLS.

    Raises:
        ValueError: the files are no certificate and its key.
        FileNotFoundError: one does not exist.
    """
    if params.tls_certificate is None:
        return None
    assert params.tls_key is not None
    for path in (params.tls_certificate, params.tls_key):
        Path(path).read_bytes()
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # the password of an encrypted key: nobody is asked for it
        tls.load_cert_chain(params.tls_certificate, params.tls_key, password="")
    except ssl.SSLError as error:
        raise ValueError(
            f"tls_certificate {params.tls_certificate} and tls_key {params.tls_key} are not a certificate and its "
            f"private key, both PEM and not encrypted ({error.reason or 'unreadable'})."
        ) from None
    return tls


def _check_port(name: str, host: str, port: int) -> None:
    """Check that a port can be opened; gRPC does not say why it cannot.

    Raises:
        ValueError: it cannot.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ValueError(f"{name} {port} of {host} cannot be opened: {error.strerror}. Give another.") from None


def _open_port(server: grpc.aio.Server, params: ServeParams) -> int:
    """Listen on the gRPC port and return it.

    Raises:
        ValueError: the port is taken.
    """
    host = f"[{params.host}]" if ":" in params.host else params.host
    address = f"{host}:{params.port}"
    try:
        if params.tls_certificate is None:
            return server.add_insecure_port(address)
        assert params.tls_key is not None
        pair = (Path(params.tls_key).read_bytes(), Path(params.tls_certificate).read_bytes())
        return server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    except RuntimeError as error:
        raise ValueError(f"port {params.port} of {params.host} cannot be opened: {error}. Give another.") from None
