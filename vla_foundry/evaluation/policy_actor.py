"""Evaluate a trained policy: it sees what simulators sense, under the field names of its data."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vla_foundry.client.chunks import count_delay_steps
from vla_foundry.evaluation.actors import Actor, Candidate
from vla_foundry.evaluation.rollout_worker import Reply, RobotFacts
from vla_foundry.inference.loading import find_run_folder
from vla_foundry.inference.observations import RobotObservation
from vla_foundry.inference.policy import Policy
from vla_foundry.models.weights import digest_weights
from vla_foundry.params.commands.evaluation import EvaluateParams
from vla_foundry.randomness import draw_index
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.spec import (
    CameraDescription,
    DatasetSpec,
    FieldDescription,
    NamedSpec,
    format_spec,
    parse_spec,
)
from vla_foundry.robotics.transforms import SelectFields
from vla_foundry.simulators import ACTION, IMAGES, OBSERVATION, STATE, name_observation
from vla_foundry.storage.uri import name_of, read_text

_NUM_SEEDS = 1 << 62


def load_candidate(params: EvaluateParams, camera: str) -> Candidate:
    """Load the policy of `params.checkpoint`, or connect to that of `params.policy_server`.

    Args:
        camera: camera of the contact sheet, if the policy has none.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ConnectionError: the server does not answer.
        ValueError: it is not a policy.
    """
    subject = _load_checkpoint(params, params.checkpoint) if params.checkpoint is not None else _connect(params)
    policy, spec = subject.policy, subject.spec
    sizes = {camera.original_size or camera.size for camera in spec.cameras.values()}
    cameras = tuple(name.rpartition(".")[2] for name in spec.cameras)
    image_size = next(iter(sizes), (params.image_size, params.image_size))

    does_not_fit = f"The policy of {subject.origin} does not fit simulator '{params.simulator}'."

    def create_actor(facts: RobotFacts) -> Actor:
        faults = [] if facts.camera_fault is None else [facts.camera_fault]
        if len(sizes) > 1:
            faults.append(
                f"Its cameras {', '.join(cameras)} have pictures of {sorted(sizes)}, but simulators render one size."
            )
        try:
            subject.check_robot(NamedSpec(facts.robot, describe_robot(facts, cameras, image_size)))
            layout = create_action_layout(facts, policy.action_fields)
            pauses = None if params.simulated_latency_ms is None else Pauses.create(params, facts)
        except ValueError as error:
            raise ValueError(" ".join([does_not_fit, *faults, str(error)])) from None
        if faults:
            raise ValueError(" ".join([does_not_fit, *faults]))
        if pauses is not None and not pauses.is_blocking and pauses.num_steps >= subject.chunk_steps:
            raise ValueError(
                f"simulated_latency_ms ({params.simulated_latency_ms:g}) is {pauses.num_steps} control steps, and a "
                f"chunk has {subject.chunk_steps} actions, so with execution '{params.execution}' each comes too late. "
                "Use execution blocking, or a lower latency."
            )
        return PolicyActor(policy, layout, seed=params.seed, pauses=pauses)

    return Candidate(
        name=params.name or subject.name,
        cameras=cameras,
        picture_camera=cameras[0] if cameras else camera,
        image_size=image_size,
        settings={
            "weights_sha256": subject.weights_sha256,
            "open_loop_steps": policy.open_loop_steps,
            "num_inference_steps": params.num_inference_steps,
            "images": params.images,
            "batch_size": params.batch_size,
            "batch_shape": "fixed",  # earlier versions predicted for as many as ran
            "simulated_latency_ms": params.simulated_latency_ms,
            # it makes no difference while the simulator waits
            "execution": None if params.simulated_latency_ms is None else params.execution,
            "ensemble_decay": params.ensemble_decay,
        },
        create_actor=create_actor,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Subject:
    """A policy in this process or behind a server, and what is known of it."""

    policy: Any
    # the checkpoint or the server, for messages
    origin: str
    name: str
    spec: DatasetSpec
    # predicted actions of a chunk
    chunk_steps: int
    check_robot: Callable[[NamedSpec], None]
    weights_sha256: str | None


def _load_checkpoint(params: EvaluateParams, checkpoint: str) -> _Subject:
    policy = Policy.from_run(
        checkpoint,
        device=params.device,
        use_ema=params.use_ema,
        open_loop_steps=params.open_loop_steps,
        num_inference_steps=params.num_inference_steps,
        execution="sync" if params.execution == "blocking" else params.execution,
        # until the robot's rate is known
        delay_steps=0,
        ensemble_decay=params.ensemble_decay,
        batch_size=params.batch_size,
    )
    return _Subject(
        policy=policy,
        origin=checkpoint,
        name=name_of(find_run_folder(checkpoint)),
        spec=policy.spec,
        chunk_steps=policy.chunk_steps,
        check_robot=policy.check_robot,
        weights_sha256=digest_weights(checkpoint, params.use_ema),
    )


def _connect(params: EvaluateParams) -> _Subject:
    """Connect to the server of `params.policy_server`.

    Raises:
        OSError: it does not answer, or refuses the token.
        ValueError: its policy has no dataset spec.
    """
    from vla_foundry.client import RemotePolicy

    assert params.policy_server is not None
    token = None if params.server_token_file is None else read_text(params.server_token_file).strip()
    has_no_latency = params.simulated_latency_ms is None
    policy = RemotePolicy(
        params.policy_server,
        timeout_s=params.server_timeout_s,
        token=token,
        tls_certificate=params.server_certificate,
        # with chunks of its own it knows when a prediction begins; without delay that changes no action
        execution=params.execution if params.execution != "blocking" else "sync" if has_no_latency else "async",
        # until the robot's rate is known
        delay_steps=None if has_no_latency else 0,
    )
    if not policy.metadata.spec_json:
        raise ValueError(
            f"policy_server {params.policy_server} serves a policy without a dataset spec, not a checkpoint."
        )
    return _Subject(
        policy=policy,
        origin=params.policy_server,
        name=policy.metadata.name,
        spec=parse_spec(policy.metadata.spec_json, f"the spec of {params.policy_server}"),
        chunk_steps=policy.metadata.chunk_steps,
        check_robot=lambda robot: policy.check_robot(robot.name, format_spec(robot.spec)),
        weights_sha256=policy.metadata.info.get("weights_sha256"),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Pauses:
    """What a robot does while the policy thinks."""

    # control steps that pass during a prediction
    num_steps: int
    # it holds still; False: the policy goes on with its last chunk
    is_blocking: bool
    # (A,), True where 0 holds the robot still: changes; elsewhere the last target does
    is_delta: np.ndarray

    @classmethod
    def create(cls, params: EvaluateParams, facts: RobotFacts) -> "Pauses":
        """Create them from the simulated latency and the robot's rate.

        Raises:
            ValueError: it is not known which actions hold the robot still.
        """
        assert params.simulated_latency_ms is not None
        if not facts.action_parts:
            raise ValueError("It does not describe its action_parts, so simulated_latency_ms cannot hold the robot.")
        parts = [np.full(part.width, part.representation == "delta") for part in facts.action_parts.values()]
        return cls(
            num_steps=count_delay_steps(params.simulated_latency_ms / 1000, float(facts.fps)),
            is_blocking=params.execution == "blocking",
            is_delta=np.concatenate(parts),
        )


class PolicyActor:
    """Acts with a policy; each slot is one client of the policy.

    Args:
        policy: a Policy, or a RemotePolicy.
        layout: layout of the robot's action.
        seed: seed of the policy's noise, combined with the episode's.
        pauses: what the robot does during predictions, except the first: an episode's time begins with its first
            action. None: predictions take no time.
    """

    def __init__(
        self,
        policy: Any,
        layout: SelectFields,
        *,
        seed: int,
        pauses: Pauses | None = None,
    ) -> None:
        self.policy = policy
        self.layout = layout
        self.seed = seed
        self._instructions: dict[int, str] = {}
        self._latencies: dict[int, list[float]] = {}
        self.pauses = pauses
        # actions sent last, and those of robots that hold still, with the number of steps to hold
        self._sent: dict[int, np.ndarray] = {}
        self._held: dict[int, tuple[int, np.ndarray]] = {}

    def begin(self, slot: int, seed: int, instruction: str) -> None:
        """See Actor."""
        self._instructions[slot], self._latencies[slot] = instruction, []
        for values in (self._sent, self._held):
            values.pop(slot, None)
        if self.pauses is not None:
            self.policy.set_delay_steps(0 if self.pauses.is_blocking else self.pauses.num_steps)
        noise = draw_index(_NUM_SEEDS, seed=self.seed, position=seed, purpose="evaluated episode")
        self.policy.reset(noise, client=slot)

    def end(self, slot: int) -> Sequence[float]:
        """See Actor."""
        self.policy.forget(slot)
        return self._latencies.pop(slot)

    def needs_images(self, slot: int) -> bool:
        """See Actor."""
        return slot not in self._held and self.policy.needs_images(slot)

    def predicts_next(self, slot: int) -> bool:
        """See Actor."""
        return slot not in self._held and self.policy.predicts_next(slot)

    def act(self, observed: Mapping[int, Reply]) -> dict[int, np.ndarray | None]:
        """See Actor."""
        actions: dict[int, np.ndarray | None] = {slot: self._hold(slot) for slot in observed if slot in self._held}
        actions |= self._ask({slot: reply for slot, reply in observed.items() if slot not in actions})
        return actions

    def _hold(self, slot: int) -> np.ndarray:
        """Return the next action of a robot that holds still, or has done so long enough."""
        num_steps, action = self._held.pop(slot)
        if num_steps > 0:
            self._held[slot] = (num_steps - 1, action)
            action = self._stay(slot)
        self._sent[slot] = action
        return action

    def _stay(self, slot: int) -> np.ndarray:
        """Return the action that holds the robot still."""
        assert self.pauses is not None
        return np.where(self.pauses.is_delta, np.float32(0), self._sent[slot])

    def _ask(self, observed: Mapping[int, Reply]) -> dict[int, np.ndarray]:
        """Return the policy's actions."""
        if not observed:
            return {}
        observations: dict[int, RobotObservation] = {}
        for slot, reply in observed.items():
            images, fields = name_observation(reply.images, reply.fields)
            observations[slot] = RobotObservation(images=images, fields=fields, instruction=self._instructions[slot])
        start = time.perf_counter()
        actions = self.policy.act_many(observations)
        predicted = self.policy.predicted
        for slot in predicted:
            self._latencies[slot].append(1000 * (time.perf_counter() - start))
        result = {slot: self.layout.apply(action)[0].astype(np.float32) for slot, action in actions.items()}
        for slot in observed:
            if slot not in result:
                # the policy is late
                result[slot] = self._stay(slot)
                self.policy.correct(self.layout.invert(result[slot]), client=slot)
            elif slot in predicted and self.pauses is not None and self.pauses.is_blocking and slot in self._sent:
                self._held[slot] = (self.pauses.num_steps, result[slot])
                result[slot] = self._hold(slot)
            self._sent[slot] = result[slot]
        return result


def describe_robot(facts: RobotFacts, cameras: Sequence[str], image_size: tuple[int, int]) -> DatasetSpec:
    """Return a simulated robot's spec, to compare with the one that a policy was trained on."""
    fields = {
        f"{OBSERVATION}.{name}": FieldDescription(shape=(len(parts),)) for name, parts in facts.field_names.items()
    }
    fields[STATE] = FieldDescription(shape=(sum(len(parts) for parts in facts.field_names.values()),))
    fields[ACTION] = FieldDescription(shape=(facts.action_dim,), role="action")
    fields |= {f"{ACTION}.{name}": replace(part, role="action") for name, part in facts.action_parts.items()}
    # a simulator renders any size, so the size is not compared
    camera = CameraDescription(size=image_size, original_size=None)
    return DatasetSpec(
        layout="episodes",
        fps=float(facts.fps),
        past_lowdim_steps=0,
        future_lowdim_steps=0,
        image_indices=(0,),
        padding_strategy="copy",
        cameras={f"{IMAGES}.{name}": camera for name in cameras},
        fields=fields,
    )


def create_action_layout(facts: RobotFacts, action_fields: Sequence[str]) -> SelectFields:
    """Return the layout that joins the fields that a policy predicts to a robot's action.

    Raises:
        ValueError: the robot lacks a field, or the policy does not predict the whole action.
    """
    if list(action_fields) == [ACTION]:
        return SelectFields((ACTION,), (facts.action_dim,))
    parts = {f"{ACTION}.{name}": part.width for name, part in facts.action_parts.items()}
    for field in action_fields:
        if field not in parts:
            raise ValueError(unknown_name_message(f"action field of {facts.robot}", field, [ACTION, *parts]))
    missing = [name for name in parts if name not in action_fields]
    if missing:
        raise ValueError(f"The policy predicts {', '.join(action_fields)}, but {facts.robot} needs {missing[0]} too.")
    return SelectFields(tuple(parts), tuple(parts.values()))
