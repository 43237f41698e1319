"""A trained policy in closed loop: observations in, actions out, for any number of robots at once.

    policy = Policy.from_run("experiments/my_run")
    policy.reset(seed=0)
    actions = policy.act(RobotObservation(images=..., fields=..., instruction="open the drawer"))   # {field: numbers}

The first call predicts a chunk of actions; `open_loop_steps` of them are executed, one a call, then the next is
predicted. Actions are in the data's units, and poses absolute. Noise is a function of the episode's seed and the step.
Nothing here knows what the robot is: it has to bring what the run's contract (robotics.json) names.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from vla_foundry.batch import Batch
from vla_foundry.data.pipelines.robotics import ChooseInstruction, EncodeRobot, PrepareCameraImages, join_robot_samples
from vla_foundry.data.robotics import inputs
from vla_foundry.data.robotics.windows import RobotWindow, WindowRequest
from vla_foundry.inference.history import EpisodeHistory, ObservedWindow, RobotObservation
from vla_foundry.inference.policy_files import PolicyFiles, load_policy_files
from vla_foundry.models.robotics_batch import RoboticsBatchHandler
from vla_foundry.randomness import draw_index
from vla_foundry.robotics.rotations import matrix_to_rotation, rotation_to_matrix
from vla_foundry.robotics.windows import compute_absolute_fields
from vla_foundry.robotics_contract import NamedContract

_NUM_SEEDS = 1 << 63


class _Client:
    """One robot's episode."""

    def __init__(self, seed: int, history: EpisodeHistory) -> None:
        self.seed = seed
        self.history = history
        # actions of the present chunk that are left
        self.chunk: list[dict[str, np.ndarray]] = []
        self.instruction = ""


class Policy:
    """Acts for robots; `from_run` loads one.

    Args:
        model: with `sample`, on its device.
        files: what the run says of its data and model.
        open_loop_steps: actions of each chunk that are executed; None: half of them.
        num_inference_steps: steps from noise to actions; None: as the model's params say.

    Raises:
        ValueError: more steps are to be executed than are predicted.
    """

    def __init__(
        self,
        model: nn.Module,
        files: PolicyFiles,
        *,
        open_loop_steps: int | None = None,
        num_inference_steps: int | None = None,
    ) -> None:
        num_predicted = files.plan.window.future + 1
        if open_loop_steps is not None and not 1 <= open_loop_steps <= num_predicted:
            raise ValueError(f"open_loop_steps ({open_loop_steps}) must be 1 .. {num_predicted}, the predicted steps.")
        self.model = model
        self.contract = files.contract
        self.open_loop_steps = open_loop_steps or (num_predicted + 1) // 2
        self.num_inference_steps = num_inference_steps
        self._files = files
        self._handler: Any = RoboticsBatchHandler(files.params)
        # chunks so far, over all clients
        self.num_predicted = 0
        self._clients: dict[Hashable, _Client] = {}
        data = files.data
        self._window, self._normalizer = files.plan.window, files.normalizer
        self._actions = files.normalizer.layout(data.action_fields)
        self._proprioception = files.normalizer.layout(data.proprioception_fields)
        self._request = _create_request(files)
        self._encode = EncodeRobot(data)
        self._processor = self._encode.load()
        self._stages = [PrepareCameraImages(data), self._encode]
        if data.use_language:
            self._stages.insert(0, ChooseInstruction(data))

    @classmethod
    def from_run(
        cls,
        path: str,
        *,
        device: str = "auto",
        use_ema: bool | None = None,
        open_loop_steps: int | None = None,
        num_inference_steps: int | None = None,
        dataset: int | None = None,
    ) -> "Policy":
        """Load the policy of a run.

        Args:
            path: run folder (its newest checkpoint) or step folder; local, s3:// or hf://.
            device: "cpu", "cuda", "cuda:N"; "auto": a GPU if there is one.
            use_ema: the averaged weights; None: if the checkpoint has them.
            open_loop_steps, num_inference_steps: see the class.
            dataset: which of the run's datasets the robot is that of, where their pictures were made differently.

        Raises:
            FileNotFoundError: there is no such run, or it lacks a file.
            ValueError: it is no run of a policy, or broken.
        """
        files = load_policy_files(path, dataset=dataset)
        # torch comes last: what is wrong so far is said at once
        model = files.load_model(path, device=device, use_ema=use_ema)
        return cls(model, files, open_loop_steps=open_loop_steps, num_inference_steps=num_inference_steps)

    @property
    def action_fields(self) -> list[str]:
        """The fields of an action, poses absolute, in the order of the model."""
        return list(self._files.plan.commanded)

    def check_robot(self, robot: NamedContract) -> None:
        """Compare what a robot says of itself with what the policy was trained on.

        Raises:
            ValueError: it lacks a camera or a field, or means something else by one; one line.
        """
        self._files.check_robot(robot)

    def reset(self, seed: int, *, client: Hashable = None) -> None:
        """Begin an episode; what was before is forgotten.

        Args:
            seed: of the episode.
            client: which robot, where there are several.
        """
        self._clients[client] = _Client(seed, EpisodeHistory(self._files.plan))

    def forget(self, client: Hashable = None) -> None:
        """Forget a robot that will not act again."""
        self._clients.pop(client, None)

    def needs_images(self, client: Hashable = None) -> bool:
        """True if the next observation must hold images: a chunk begins there, or a later one looks back on it."""
        step = self._find(client).history.num_observed
        indices, every = self._files.plan.image_indices, self.open_loop_steps
        # what lies before the start is taken from the first step
        return bool(indices) and (step == 0 or any((step - index) % every == 0 for index in indices))

    def act(self, observation: RobotObservation) -> dict[str, np.ndarray]:
        """Return the action that follows an observation: {field: (C,)}.

        Raises:
            ValueError: no episode was begun, or the observation lacks something.
        """
        return self.act_many({None: observation})[None]

    def act_many(self, observations: Mapping[Any, RobotObservation]) -> dict[Any, dict[str, np.ndarray]]:
        """Return the action of each robot; those whose chunk is used up get the next one together.

        Raises:
            ValueError: as `act`.
        """
        due = []
        for name, observation in observations.items():
            client = self._find(name)
            client.history.observe(observation)
            client.instruction = observation.instruction
            if not client.chunk:
                due.append(client)
        if due:
            self.num_predicted += len(due)
            for client, chunk in zip(due, self._predict(due), strict=True):
                client.chunk = chunk[: self.open_loop_steps]
        actions = {}
        for name in observations:
            client = self._find(name)
            actions[name] = client.chunk.pop(0)
            client.history.command(actions[name])
        return actions

    def create_batch(self, windows: Sequence[ObservedWindow], instructions: Sequence[str]) -> Batch:
        """Return windows as a batch of modality robotics; see batch.py."""
        samples = []
        for window, instruction in zip(windows, instructions, strict=True):
            sample = self._create_sample(window, instruction)
            for stage in self._stages:
                sample = stage(sample)
                assert sample is not None, "these stages drop by raising"
            samples.append(sample)
        batch = join_robot_samples(samples, self._processor, self._files.data)
        return {
            key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in batch.items()
        }

    def _find(self, client: Hashable) -> _Client:
        if client not in self._clients:
            who = "" if client is None else f" of client {client!r}"
            raise ValueError(f"No episode{who} was begun. Call reset(seed) first.")
        return self._clients[client]

    def _predict(self, clients: Sequence[_Client]) -> list[list[dict[str, np.ndarray]]]:
        windows = [client.history.window() for client in clients]
        batch = self.create_batch(windows, [client.instruction for client in clients])
        device = next(self.model.parameters()).device
        seeds = [
            draw_index(_NUM_SEEDS, seed=client.seed, position=client.history.num_observed - 1, purpose="policy.noise")
            for client in clients
        ]
        model: Any = self.model
        normalized = model.sample(
            self._handler.prepare_sampling(batch, device),
            seeds=torch.tensor(seeds, device=device),
            num_steps=self.num_inference_steps,
        )
        values = normalized.cpu().numpy()
        return [self._to_actions(chunk, client.history) for chunk, client in zip(values, clients, strict=True)]

    def _to_actions(self, normalized: np.ndarray, history: EpisodeHistory) -> list[dict[str, np.ndarray]]:
        """Return the actions of the steps to come: denormalized, poses absolute, rotations made whole."""
        anchor = self._window.anchor
        values = self._normalizer.denormalize(normalized.astype(np.float64), self._actions.fields, anchor=anchor)
        fields = {name: part[anchor:] for name, part in self._actions.split(values).items()}
        groups = [group for group in self._files.plan.pose_groups if set(group.relative_keys) <= fields.keys()]
        fields |= compute_absolute_fields(fields, history.references(), groups)
        for name in self._files.plan.commanded:
            description = self.contract.fields.get(name)
            if description is not None and description.rotation is not None and description.representation != "delta":
                # a predicted rotation is one only nearly
                matrix = rotation_to_matrix(fields[name], description.rotation, field=name)
                fields[name] = matrix_to_rotation(matrix, description.rotation, field=name)
        names = self._files.plan.commanded
        return [{name: fields[name][step] for name in names} for step in range(self._window.future + 1)]

    def _create_sample(self, window: ObservedWindow, instruction: str) -> dict[str, Any]:
        anchor, types = self._window.anchor, self._files.data.language_instruction_types
        sample: dict[str, Any] = {
            # no draw depends on them: images take their middle, and there is one prompt and one instruction
            "__seed__": 0,
            "__position__": 0,
            "__is_training__": False,
            "__url__": "",
            "request": self._request,
            "window": RobotWindow(
                episode_id="",
                anchor=anchor,
                fields=window.fields,
                past_mask=window.past_mask,
                future_mask=window.future_mask,
                is_padding=window.is_padding,
                images=window.images,
                instructions={types[0]: [instruction]} if types and instruction else {},
            ),
            "actions": np.zeros((self._window.num_steps, self._actions.width), np.float32),
            "action_dim_mask": np.ones(self._actions.width, dtype=bool),
        }
        if window.past_mask.any():
            past, _ = inputs.normalize_fields(window.fields, self._actions, self._normalizer, anchor=anchor)
            sample["actions"][:anchor] = past[:anchor]
        if self._proprioception.fields:
            sample["proprioception"], _ = inputs.normalize_fields(
                window.fields, self._proprioception, self._normalizer, anchor=anchor
            )
        return sample


def _create_request(files: PolicyFiles) -> WindowRequest:
    plan = files.plan
    sizes = [files.contract.cameras[camera.name].size for camera in plan.cameras]
    return WindowRequest(
        window=plan.window,
        padding=plan.padding,
        fields=tuple(plan.observed),
        cameras=tuple(camera.name for camera in plan.cameras),
        image_indices=plan.image_indices,
        image_sizes=tuple((height, width) for width, height in sizes) * len(plan.image_indices),
    )
