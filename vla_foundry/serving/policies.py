"""The policies that a server can serve: a run's, or any class with reset and act."""

import importlib
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from vla_foundry.client.messages import PROTOCOL_VERSION, CameraInfo, FieldInfo, Metadata
from vla_foundry.client.observation import RobotObservation, RobotSteps
from vla_foundry.config.command_line import search_working_directory
from vla_foundry.inference.loading import find_run_folder
from vla_foundry.params.commands.serving import ServeParams
from vla_foundry.robotics.spec import FieldDescription, NamedSpec, format_spec, parse_spec
from vla_foundry.serving.engine import Actions, PolicyFailedError, ServedPolicy, attempt
from vla_foundry.storage.uri import name_of


class Served(NamedTuple):
    """A policy, and what the server needs to know of it."""

    policy: ServedPolicy
    metadata: Metadata
    # checks that it fits a robot: name, robotics.json
    check_robot: Callable[[str, str], None]
    batching: Literal["exact", "fast"]


def load_policy(params: ServeParams) -> Served:
    """Load the policy of a checkpoint, or the user's class.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: it is not a policy, or the class cannot be used; one line.
    """
    return _load_class(params) if params.checkpoint is None else _load_run(params, params.checkpoint)


def _load_run(params: ServeParams, checkpoint: str) -> Served:
    from vla_foundry.inference.policy import Policy
    from vla_foundry.models.weights import digest_weights

    policy = Policy.from_run(
        checkpoint,
        device=params.device,
        use_ema=params.use_ema,
        open_loop_steps=params.open_loop_steps,
        num_inference_steps=params.num_inference_steps,
        dataset=params.dataset,
        precision=None if params.precision == "auto" else params.precision,
        compile_blocks=params.compile,
        cuda_graphs=params.cuda_graphs,
        reuse_image_features=params.reuse_image_features,
    )
    name = params.name or name_of(find_run_folder(checkpoint))
    info = {
        "checkpoint": name_of(checkpoint),
        "weights_sha256": digest_weights(checkpoint, params.use_ema) or "",
        "precision": policy.precision,
    }
    policy.warm_up()

    def check_robot(robot: str, spec_json: str) -> None:
        policy.check_robot(NamedSpec(robot, parse_spec(spec_json, robot)))

    metadata = Metadata(
        name=name,
        protocol_version=PROTOCOL_VERSION,
        fps=policy.spec.fps or 0.0,
        cameras=[
            CameraInfo(camera.name, *(camera.original_size or (0, 0)))  # 0: any size
            for camera in policy.cameras
        ],
        fields=[_describe(name, field) for name, field in policy.observed.items()],
        actions=[_describe(name, field) for name, field in policy.commanded.items()],
        chunk_steps=policy.chunk_steps,
        open_loop_steps=policy.open_loop_steps,
        follows_instructions=policy.follows_instructions,
        spec_json=format_spec(policy.spec),
        info=info,
        steps_back=policy.steps_back,
        image_indices=policy.image_indices,
        executions=["async", "realtime"] if policy.can_be_guided else ["async"],
    )
    # a graph for each number of clients would be many
    is_fast = policy.device.type == "cuda" and not params.cuda_graphs
    return Served(policy, metadata, check_robot, "fast" if is_fast else "exact")


def _describe(name: str, field: FieldDescription) -> FieldInfo:
    return FieldInfo(
        name=name,
        width=field.width,
        dtype=field.dtype,
        unit=field.unit or "",
        rotation=field.rotation or "",
        representation=field.representation,
        columns=field.names,
    )


def _load_class(params: ServeParams) -> Served:
    assert params.policy is not None
    module, _, name = params.policy.partition(":")
    search_working_directory()
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ValueError(f"policy '{params.policy}' cannot be imported: {error}.") from None
    try:
        first = factory(**params.policy_args)
    except TypeError as error:
        given = f"policy_args {params.policy_args}"
        raise ValueError(f"policy '{params.policy}' cannot be created with {given}: {error}.") from None
    for method in ("reset", "act"):
        if not callable(getattr(first, method, None)):
            raise ValueError(f"policy '{params.policy}' has no method {method}: see docs/serving.md.")
    described = dict(first.describe()) if hasattr(first, "describe") else {}
    metadata = Metadata(
        name=params.name or name,
        protocol_version=PROTOCOL_VERSION,
        fps=float(described.get("fps", 0.0)),
        cameras=[CameraInfo(camera) for camera in described.get("cameras", ())],
        fields=[FieldInfo(field, width, "float64") for field, width in described.get("fields", {}).items()],
        actions=[FieldInfo(field, width, "float64") for field, width in described.get("actions", {}).items()],
        chunk_steps=1,
        open_loop_steps=1,
        follows_instructions=bool(described.get("follows_instructions", False)),
        info={"class": params.policy},
    )
    policy = _PerClient(lambda: factory(**params.policy_args), first)
    return Served(policy, metadata, lambda robot, spec_json: None, "exact")


class _PerClient:
    """A policy for many clients from a class for one: each client has an object of its own.

    Args:
        create: creates an object.
        first: an object that is there already.
    """

    def __init__(self, create: Callable[[], Any], first: Any) -> None:
        self._create = create
        self._spare = [first]
        self._clients: dict[Hashable, Any] = {}
        self._observed: dict[Hashable, RobotObservation] = {}

    def reset(self, seed: int, *, client: Hashable = None) -> None:
        if client not in self._clients:
            self._clients[client] = self._spare.pop() if self._spare else self._create()
        self._clients[client].reset(seed)

    def forget(self, client: Hashable = None) -> None:
        if client in self._clients:
            # a policy may hold a model: keep one object
            self._spare = [self._clients.pop(client)]
        self._observed.pop(client, None)

    def observe(self, observation: RobotObservation, *, client: Hashable = None, step: int | None = None) -> None:
        if client not in self._clients:
            raise ValueError("No episode was begun. Reset first.")
        self._observed[client] = observation

    def retract(self, client: Hashable = None) -> None:
        self._observed.pop(client, None)

    def choose_actions(self, clients: Sequence[Hashable]) -> dict[Any, Actions | Exception]:
        # each acts once, whatever becomes of the others
        return {client: attempt(partial(self._act, client)) for client in clients}

    def predict_chunk(self, client: Hashable = None) -> Actions:
        return {name: values[None] for name, values in self._act(client).items()}

    def predict_from(self, robot: RobotSteps, *, client: Hashable = None) -> Actions:
        raise ValueError("the policy predicts no chunks: it knows one action at a time.")

    def needs_images(self, client: Hashable = None) -> bool:
        needs = getattr(self._clients[client], "needs_images", None)
        return True if needs is None else bool(needs())

    def _act(self, client: Hashable) -> Actions:
        actions = self._clients[client].act(self._observed[client])
        try:
            found = {name: np.atleast_1d(np.asarray(values, dtype=np.float64)) for name, values in actions.items()}
        except (AttributeError, TypeError, ValueError):
            found = {"": np.empty((0, 0))}
        if any(values.ndim != 1 for values in found.values()):
            raise PolicyFailedError(
                f"the policy failed: act must return {{field: numbers}}, it returned {actions!r:.80}."
            )
        return found
