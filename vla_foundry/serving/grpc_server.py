"""The gRPC services: ours (client/policy.proto), the LBM simulator's, and the standard health check."""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from vla_foundry.client.messages import (
    METHODS,
    SERVICE,
    TOKEN_KEY,
    ActRequest,
    ActResponse,
    CheckRobotRequest,
    Empty,
    ForgetRequest,
    Metadata,
    MetadataRequest,
    PredictRequest,
    PredictResponse,
    ResetRequest,
    read_arrays,
    write_arrays,
)
from vla_foundry.client.wire import WireError, decode, encode, wire
from vla_foundry.serving import lbm
from vla_foundry.serving.engine import FullError, NoSessionError, PolicyFailedError
from vla_foundry.serving.service import DrainingError, PolicyService, describe_error

_SERVING, _NOT_SERVING = 1, 2


class UnknownServiceError(LookupError):
    """A client asks for the health of a service that does not exist."""


# exception -> status
_CODES: list[tuple[type[Exception], grpc.StatusCode]] = [
    (NoSessionError, grpc.StatusCode.FAILED_PRECONDITION),
    (ValueError, grpc.StatusCode.INVALID_ARGUMENT),
    (FullError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DrainingError, grpc.StatusCode.UNAVAILABLE),
    (PolicyFailedError, grpc.StatusCode.INTERNAL),
    (TimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (UnknownServiceError, grpc.StatusCode.NOT_FOUND),
]

Handler = Callable[[Any], Awaitable[Any]]


@dataclass
class HealthRequest:
    """grpc.health.v1.HealthCheckRequest."""

    service: str = wire(1, "string")


@dataclass
class HealthResponse:
    """grpc.health.v1.HealthCheckResponse; SERVING is 1, NOT_SERVING 2."""

    status: int = wire(1, "enum")


def create_grpc_server(
    service: PolicyService,
    *,
    check_robot: Callable[[str, str], None],
    token: str | None,
    max_message_bytes: int,
) -> grpc.aio.Server:
    """Create a server with all services, without a port.

    Args:
        service: the policy.
        check_robot: see RemotePolicy.check_robot.
        token: what clients must show; None: nothing.
        max_message_bytes: larger messages are refused.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            # two servers on one port would share its clients
            ("grpc.so_reuseport", 0),
        ]
    )
    own, simulator = _OwnService(service, check_robot), _LbmService(service)

    async def check_health(request: HealthRequest) -> HealthResponse:
        if request.service and request.service not in handlers:
            raise UnknownServiceError(f"there is no service '{request.service}'.")
        return HealthResponse(status=_NOT_SERVING if service.is_draining else _SERVING)

    handlers: dict[str, dict[str, tuple[type, Handler]]] = {
        SERVICE: {name: (METHODS[name][0], getattr(own, _snake(name))) for name in METHODS},
        f"{lbm.PACKAGE}.PolicyStepService": {"PolicyStep": (lbm.PolicyStepRequest, simulator.step)},
        f"{lbm.PACKAGE}.PolicyResetService": {"PolicyReset": (lbm.PolicyResetRequest, simulator.reset)},
        f"{lbm.PACKAGE}.GetPolicyMetadataService": {
            "GetPolicyMetadata": (lbm.GetPolicyMetadataRequest, simulator.get_metadata)
        },
        "grpc.health.v1.Health": {"Check": (HealthRequest, check_health)},
    }
    for name, methods in handlers.items():
        needs_token = None if name.startswith("grpc.health") else token
        server.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(
                    name, {method: _wrap(*methods[method], token=needs_token) for method in methods}
                )
            ]
        )
    return server


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


def _wrap(request_type: type, handler: Handler, *, token: str | None) -> grpc.RpcMethodHandler:
    """Make a gRPC method of a handler: check the token, decode, turn errors into statuses, and encode."""

    async def call(data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        shown = dict(context.invocation_metadata() or ()).get(TOKEN_KEY, "")
        if token is not None and not hmac.compare_digest(str(shown).encode(), f"Bearer {token}".encode()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is missing or wrong.")
        try:
            request = decode(request_type, data)
        except WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the message is broken: {error}.")
            raise
        try:
            answer = await asyncio.wait_for(handler(request), context.time_remaining())
            return answer if isinstance(answer, bytes) else encode(answer)
        except tuple(kind for kind, _ in _CODES) as error:
            code = next(code for kind, code in _CODES if isinstance(error, kind))
            await context.abort(code, describe_error(error))
            raise

    return grpc.unary_unary_rpc_method_handler(call)


class _OwnService:
    """Our own service; see client/policy.proto."""

    def __init__(self, service: PolicyService, check_robot: Callable[[str, str], None]) -> None:
        self._service = service
        self._check_robot = check_robot

    async def get_metadata(self, request: MetadataRequest) -> Metadata:
        return self._service.metadata

    async def check_robot(self, request: CheckRobotRequest) -> Empty:
        self._check_robot(request.robot, request.spec_json)
        return Empty()

    async def reset(self, request: ResetRequest) -> Empty:
        await self._service.reset("grpc", request.client, request.seed)
        return Empty()

    async def forget(self, request: ForgetRequest) -> Empty:
        await self._service.forget("grpc", request.client)
        return Empty()

    async def act(self, request: ActRequest) -> bytes:
        reply = await self._service.act(
            "grpc",
            request.client,
            images=request.images,
            fields=read_arrays(request.fields),
            instruction=request.instruction,
            step=request.step,
        )
        with self._service.times.measured("encode"):
            return encode(
                ActResponse(
                    actions=write_arrays(reply.actions),
                    needs_images=reply.needs_images,
                    queue_ms=reply.queue_ms,
                    policy_ms=reply.policy_ms,
                )
            )

    async def predict(self, request: PredictRequest) -> bytes:
        reply = await self._service.predict("grpc", request.client, request)
        with self._service.times.measured("encode"):
            actions = write_arrays(reply.actions, ndim=2)
            return encode(PredictResponse(actions=actions, queue_ms=reply.queue_ms, policy_ms=reply.policy_ms))


class _LbmService:
    """The three services of the LBM simulator."""

    def __init__(self, service: PolicyService) -> None:
        self._service = service

    async def step(self, request: lbm.PolicyStepRequest) -> bytes:
        try:
            images, fields, instruction = lbm.read_observation(request.observation or lbm.MultiarmObservation())
        except ValueError as error:
            raise ValueError(f"client {request.client_identifier}: {error}") from None
        reply = await self._service.act(
            "lbm", request.client_identifier, images=images, fields=fields, instruction=instruction
        )
        with self._service.times.measured("encode"):
            return encode(lbm.PolicyStepResponse(success=True, action=lbm.write_action(reply.actions)))

    async def reset(self, request: lbm.PolicyResetRequest) -> lbm.PolicyResetResponse:
        lbm.check_actions([field.name for field in self._service.metadata.actions])
        await self._service.reset("lbm", request.client_identifier, request.seed)
        return lbm.PolicyResetResponse(success=True)

    async def get_metadata(self, request: lbm.GetPolicyMetadataRequest) -> lbm.GetPolicyMetadataResponse:
        metadata = self._service.metadata
        return lbm.GetPolicyMetadataResponse(
            success=True,
            policy_metadata=lbm.PolicyMetadata(
                name=metadata.name,
                skill_type="LanguageConditionedManipulation" if metadata.follows_instructions else "Manipulation",
                checkpoint_path=metadata.info.get("checkpoint", ""),
                # JSON is YAML
                raw_policy_config=json.dumps({"open_loop_steps": metadata.open_loop_steps}),
                is_language_conditioned=metadata.follows_instructions,
                runtime_information=dict(metadata.info),
            ),
        )
