"""A trained policy as what acts in rollouts: it sees what simulators sense, under the names of its data."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vla_foundry.evaluation.robot import create_action_layout, describe_robot, name_observation
from vla_foundry.evaluation.rollout_worker import Reply, RobotFacts
from vla_foundry.inference.history import RobotObservation
from vla_foundry.inference.loading import find_run_folder
from vla_foundry.inference.policy import Policy
from vla_foundry.params.commands.evaluation import EvaluateParams
from vla_foundry.randomness import draw_index
from vla_foundry.robotics.layout import FieldLayout
from vla_foundry.robotics.spec import NamedSpec
from vla_foundry.shards import sha256_of
from vla_foundry.storage.uri import is_remote, name_of

_NUM_SEEDS = 1 << 62


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainedPolicy:
    """The policy of a checkpoint, and what simulators have to give it."""

    policy: Policy
    run_name: str
    # SHA-256 of its weights; None: they are remote
    digest: str | None
    # of the simulators
    cameras: tuple[str, ...]
    # of the pictures, pixels
    image_size: int
    # of its noise
    seed: int

    @classmethod
    def load(cls, params: EvaluateParams) -> "TrainedPolicy":
        """Load the policy of `params.checkpoint`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no policy, or its pictures are not square and of one size.
        """
        assert params.checkpoint is not None
        policy = Policy.from_run(
            params.checkpoint,
            device=params.device,
            use_ema=params.use_ema,
            open_loop_steps=params.open_loop_steps,
            num_inference_steps=params.num_inference_steps,
        )
        cameras = policy.spec.cameras
        sizes = {camera.original_size or camera.size for camera in cameras.values()}
        if len(sizes) > 1 or any(width != height for width, height in sizes):
            raise ValueError(
                f"The policy's cameras have pictures of {sorted(sizes)}; simulators draw squares of one size."
            )
        return cls(
            policy=policy,
            run_name=name_of(find_run_folder(params.checkpoint)),
            digest=_digest(params.checkpoint, params.use_ema),
            cameras=tuple(name.rpartition(".")[2] for name in cameras),
            image_size=next(iter(sizes), (0, 0))[0],
            seed=params.seed,
        )

    def create_actor(self, facts: RobotFacts, *, shows_other_episode: bool) -> "PolicyActor":
        """Return what acts for a robot.

        Raises:
            ValueError: the policy was not trained for such a robot.
        """
        robot = NamedSpec(facts.robot, describe_robot(facts, self.cameras, self.image_size))
        self.policy.check_robot(robot)
        layout = create_action_layout(facts, self.policy.action_fields)
        return PolicyActor(self.policy, layout, seed=self.seed, shows_other_episode=shows_other_episode)


class PolicyActor:
    """Acts in the episodes of a batch, one client each.

    Args:
        policy: which acts.
        layout: of the robot's action.
        seed: of its noise, beside that of an episode.
        shows_other_episode: each slot sees the pictures of the next one.
    """

    def __init__(self, policy: Policy, layout: FieldLayout, *, seed: int, shows_other_episode: bool) -> None:
        self.policy = policy
        self.layout = layout
        self.seed = seed
        self.shows_other_episode = shows_other_episode
        self._instruction = ""
        self._slots: list[int] = []
        # last pictures of each slot
        self._images: dict[int, dict[str, np.ndarray]] = {}
        self._latencies: dict[int, list[float]] = {}

    def begin(self, seeds: Mapping[int, int], instruction: str) -> None:
        """See Actor."""
        for slot in self._slots:
            self.policy.forget(slot)
        self._instruction, self._slots = instruction, list(seeds)
        self._images, self._latencies = {}, {slot: [] for slot in seeds}
        for slot, episode in seeds.items():
            seed = draw_index(_NUM_SEEDS, seed=self.seed, position=episode, purpose="evaluated episode")
            self.policy.reset(seed, client=slot)

    def needs_images(self, slot: int) -> bool:
        """See Actor."""
        return self.policy.needs_images(slot)

    def act(self, observed: Mapping[int, Reply]) -> dict[int, np.ndarray | None]:
        """See Actor."""
        observations: dict[int, RobotObservation] = {}
        named = {slot: name_observation(reply.images, reply.fields) for slot, reply in observed.items()}
        self._images |= {slot: images for slot, (images, _) in named.items() if images}
        for slot, (images, fields) in named.items():
            if images and self.shows_other_episode:
                images = self._images[self._neighbour(slot)]
            observations[slot] = RobotObservation(images=images, fields=fields, instruction=self._instruction)
        num_predicted = self.policy.num_predicted
        start = time.perf_counter()
        actions = self.policy.act_many(observations)
        if self.policy.num_predicted > num_predicted:
            # episodes of a batch are in step: all of them had to wait
            for slot in observed:
                self._latencies[slot].append(1000 * (time.perf_counter() - start))
        return {slot: self.layout.concatenate(action).astype(np.float32) for slot, action in actions.items()}

    def mean_latency_ms(self, slot: int) -> float | None:
        """See Actor."""
        found = self._latencies[slot]
        return float(np.mean(found)) if found else None

    def _neighbour(self, slot: int) -> int:
        """The next slot that has shown anything; the slot itself if no other has."""
        after = [other for other in self._slots if other > slot] + [other for other in self._slots if other <= slot]
        return next(other for other in after if other in self._images)


def _digest(checkpoint: str, use_ema: bool | None) -> str | None:
    from vla_foundry.models.weights import find_weights_file, has_ema

    if is_remote(checkpoint):
        return None
    with find_weights_file(checkpoint, use_ema=has_ema(checkpoint) if use_ema is None else use_ema).open("rb") as file:
        return sha256_of(file)
