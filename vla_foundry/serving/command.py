"""`vla-foundry serve`: serve a policy to robots and simulators over the network, until SIGTERM or Ctrl-C."""

import asyncio
import signal
import ssl
import sys
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
from vla_foundry.serving.engine import Engine
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


def _read_token(params: ServeParams) -> str | None:
    if params.token_file is None:
        return None
    token = Path(params.token_file).read_text(encoding="utf-8").strip()
    if not token:
        raise ValueError(f"token_file {params.token_file} is empty. Write a long random token into it.")
    return token


async def _serve(params: ServeParams, served: Served, token: str | None) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
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
                f"vla-eval {scheme}://{host}:{self.websocket}/vla_eval",
            ]
        return ", ".join(lines)


@asynccontextmanager
async def open_server(params: ServeParams, served: Served, token: str | None = None) -> AsyncIterator[Ports]:
    """Serve a policy while the block runs; at its end requests that have begun are answered.

    Raises:
        ValueError: a port is taken, or a certificate is broken.
    """
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
            websocket = await _open_websocket(params, service, served, token)
            await server.start()
            try:
                yield Ports(port, None if websocket is None else websocket.sockets[0].getsockname()[1])
            finally:
                service.is_draining = True
                await server.stop(_GRACE_S)
                if websocket is not None:
                    websocket.close()
                    await websocket.wait_closed()


async def _open_websocket(
    params: ServeParams, service: PolicyService, served: Served, token: str | None
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
    tls = None
    if params.tls_certificate is not None:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(params.tls_certificate, params.tls_key)
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
        raise ValueError(f"port {params.port} of {params.host} cannot be opened: {error}. Give another port.") from None
