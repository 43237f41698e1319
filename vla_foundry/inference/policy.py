"""A trained policy in closed loop: observations in, actions out, for any number of robots at once.

    policy = Policy.from_run("experiments/my_run")
    policy.reset(seed=0)
    actions = policy.act(RobotObservation(images=..., fields=..., instruction="open the drawer"))   # {field: numbers}

The first call predicts a chunk of actions; `open_loop_steps` of them are executed, one a call, then the next is
predicted. Actions are in the data's units, and poses absolute. Noise is a function of the episode's seed and the step.
Any robot will do that has the cameras and fields in the run's spec (robotics.json).
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from vla_foundry.batch import Batch
from vla_foundry.inference.observations import Camera, EpisodeHistory, ObservationEncoder, RobotObservation
from vla_foundry.inference.policy_files import PolicyFiles, load_policy_files
from vla_foundry.models.policy import RoboticsBatchHandler
from vla_foundry.randomness import draw_index
from vla_foundry.robotics.rotations import matrix_to_rotation
from vla_foundry.robotics.spec import FieldDescription, NamedSpec

_NUM_SEEDS = 1 << 63


class _Client:
    """One robot's episode."""

    def __init__(self, seed: int, history: EpisodeHistory) -> None:
        self.seed = seed
        self.history = history
        # remaining actions of the current chunk
        self.chunk: list[dict[str, np.ndarray]] = []
        self.instruction = ""


class Policy:
    """Acts for robots; `from_run` loads one.

    Args:
        model: a model with `sample`, on its device.
        files: the run's params, normalizer and spec.
        open_loop_steps: actions of each chunk to execute; None: half of them.
        num_inference_steps: solver steps from noise to actions; None: the model's params decide.

    Raises:
        ValueError: open_loop_steps exceeds the predicted steps.
    """

    def __init__(
        self,
        model: nn.Module,
        files: PolicyFiles,
        *,
        open_loop_steps: int | None = None,
        num_inference_steps: int | None = None,
    ) -> None:
        self.model = model
        self.spec = files.spec
        self.open_loop_steps = files.choose_open_loop_steps(open_loop_steps)
        self.num_inference_steps = num_inference_steps
        self._files = files
        self._handler: Any = RoboticsBatchHandler(files.params)
        # chunks so far, over all clients
        self.num_predicted = 0
        self._clients: dict[Hashable, _Client] = {}
        self._encoder = ObservationEncoder(files.data, files.window_spec, files.normalizer, files.processor)
        self._window = files.window_spec.window

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
            use_ema: use the averaged weights; None: if the checkpoint has them.
            open_loop_steps, num_inference_steps: see the class.
            dataset: index of the robot's dataset, if the run's datasets were preprocessed with different image options.

        Raises:
            FileNotFoundError: the run does not exist or lacks a file.
            ValueError: the run is not a policy's, or a file is broken.
        """
        # the weights come last, so that other errors appear at once
        files = load_policy_files(path, dataset=dataset)
        model = files.load_model(path, device=device, use_ema=use_ema)
        return cls(model, files, open_loop_steps=open_loop_steps, num_inference_steps=num_inference_steps)

    @property
    def action_fields(self) -> list[str]:
        """The fields of an action in the model's order; poses are absolute."""
        return list(self._files.window_spec.commanded)

    @property
    def cameras(self) -> tuple[Camera, ...]:
        """The cameras of an observation, in the model's order."""
        return self._files.cameras

    @property
    def observed(self) -> dict[str, FieldDescription]:
        """The fields of an observation."""
        return dict(self._files.window_spec.observed)

    @property
    def commanded(self) -> dict[str, FieldDescription]:
        """The fields of an action, in the model's order; poses are absolute."""
        return dict(self._files.window_spec.commanded)

    @property
    def chunk_steps(self) -> int:
        """Predicted actions of a chunk."""
        return self._window.future + 1

    @property
    def steps_back(self) -> int:
        """How many steps before the last observation a prediction looks at."""
        return self._files.window_spec.num_steps_back

    @property
    def follows_instructions(self) -> bool:
        """True if an observation must hold an instruction."""
        data = self._files.data
        return bool(data.use_language and data.language_instruction_types)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    def warm_up(self) -> None:
        """Predict once from black images, so that the first robot does not wait for what the device prepares."""
        fields = {}
        for name, field in self.observed.items():
            turn = field.rotation
            fields[name] = np.zeros(field.width) if turn is None else matrix_to_rotation(np.eye(3), turn)
        images = {}
        for camera in self.cameras:
            width, height = camera.original_size or self.spec.cameras[camera.name].size
            images[camera.name] = np.zeros((height, width, 3), np.uint8)
        client = object()
        self.reset(seed=0, client=client)
        self.act_many({client: RobotObservation(images=images, fields=fields, instruction="warm up")})
        self.forget(client)

    def check_robot(self, robot: NamedSpec) -> None:
        """Check that a robot has the cameras and fields of the training data, with the same meaning.

        Raises:
            ValueError: it lacks one, or means something else by it; one line.
        """
        self._files.check_robot(robot)

    def reset(self, seed: int, *, client: Hashable = None) -> None:
        """Begin an episode and forget the previous one.

        Args:
            seed: the episode's seed.
            client: the robot, if there are several.
        """
        files = self._files
        history = EpisodeHistory(files.window_spec, files.cameras, pads_images=files.data.pad_missing_images)
        self._clients[client] = _Client(seed, history)

    def forget(self, client: Hashable = None) -> None:
        """Discard the episode of a robot that will not act again."""
        self._clients.pop(client, None)

    def needs_images(self, client: Hashable = None) -> bool:
        """True if the next observation must hold images: a chunk begins there, or a later one looks back at it."""
        found = self._find(client)
        step = found.history.num_observed
        indices, every = self._files.window_spec.image_indices, self.open_loop_steps
        # steps before the start are padded with the first step's images
        due = step + len(found.chunk)
        return bool(indices) and (step == 0 or any((step - index - due) % every == 0 for index in indices))

    def act(self, observation: RobotObservation) -> dict[str, np.ndarray]:
        """Return the action that follows an observation: {field: (C,)}.

        Raises:
            ValueError: no episode was begun, or the observation lacks something.
        """
        return self.act_many({None: observation})[None]

    def act_many(self, observations: Mapping[Any, RobotObservation]) -> dict[Any, dict[str, np.ndarray]]:
        """Return the action of each robot; new chunks are predicted in one batch.

        Raises:
            ValueError: as `act`.
        """
        for name, observation in observations.items():
            self.observe(observation, client=name)
        return self.choose_actions(list(observations))

    def observe(self, observation: RobotObservation, *, client: Hashable = None, step: int | None = None) -> None:
        """Take in a robot's next observation, without choosing its action.

        Args:
            observation: what the robot senses.
            client: the robot.
            step: number of the control step in the episode; None: the next. Steps left out (an answer came too late)
                are filled with this observation and with the actions that were planned for them.

        Raises:
            ValueError: no episode was begun, the step has passed, or the observation lacks something.
        """
        found = self._find(client)
        instruction = self._read_instruction(observation)
        num_skipped = 0 if step is None else found.history.count_skipped(step)
        found.history.observe(observation, skipped=[*found.chunk[:num_skipped]], num_skipped=num_skipped)
        del found.chunk[:num_skipped]
        found.instruction = instruction

    def retract(self, client: Hashable = None) -> None:
        """Discard the last observation of a robot: its action could not be chosen."""
        self._find(client).history.retract()

    def choose_actions(self, clients: Sequence[Hashable]) -> dict[Any, dict[str, np.ndarray]]:
        """Return the action that follows each robot's last observation; new chunks are predicted in one batch.

        Raises:
            ValueError: an observation lacks an image; nothing has changed then.
        """
        due = [client for client in map(self._find, clients) if not client.chunk]
        if due:
            for client, chunk in zip(due, self._predict(due), strict=True):
                client.chunk = chunk[: self.open_loop_steps]
        return {name: self._pop_action(name) for name in clients}

    def predict_chunk(self, client: Hashable = None) -> dict[str, np.ndarray]:
        """Return all actions predicted from a robot's last observation: {field: (steps, C)}, the first one for now.

        Raises:
            ValueError: the observation lacks an image; nothing has changed then.
        """
        found = self._find(client)
        (chunk,) = self._predict([found])
        found.chunk = list(chunk)
        self._pop_action(client)
        return {name: np.stack([step[name] for step in chunk]) for name in chunk[0]}

    def _pop_action(self, client: Hashable) -> dict[str, np.ndarray]:
        found = self._find(client)
        action = found.chunk.pop(0)
        found.history.command(action)
        return action

    def correct(self, action: Mapping[str, np.ndarray], *, client: Hashable = None) -> None:
        """Record the action that the robot executed instead of the last one from `act`: {field: (C,)}."""
        self._find(client).history.command(action)

    def encode(self, clients: Sequence[Hashable] = (None,)) -> Batch:
        """Return the robots' current windows as a training batch (batch.py): the input of a prediction.

        It holds only the actions before the anchor.
        """
        return self._encode([self._find(client) for client in clients])

    def _find(self, client: Hashable) -> _Client:
        if client not in self._clients:
            who = "" if client is None else f" of client {client!r}"
            raise ValueError(f"No episode{who} was begun. Call reset(seed) first.")
        return self._clients[client]

    def _read_instruction(self, observation: RobotObservation) -> str:
        if self.follows_instructions and not observation.instruction:
            raise ValueError("observation: the instruction is empty, but the policy follows instructions. Give one.")
        return observation.instruction

    def _predict(self, clients: Sequence[_Client]) -> list[list[dict[str, np.ndarray]]]:
        batch = self._encode(clients)
        device = self.device
        seeds = [
            draw_index(_NUM_SEEDS, seed=client.seed, position=client.history.num_observed - 1, purpose="policy.noise")
            for client in clients
        ]
        self.num_predicted += len(clients)
        model: Any = self.model
        normalized = model.sample(
            self._handler.prepare_sampling(batch, device),
            seeds=torch.tensor(seeds, device=device),
            num_steps=self.num_inference_steps,
        )
        values = normalized.cpu().numpy()
        return [self._to_commands(chunk, client.history) for chunk, client in zip(values, clients, strict=True)]

    def _to_commands(self, normalized: np.ndarray, history: EpisodeHistory) -> list[dict[str, np.ndarray]]:
        """Return the commands from the anchor on."""
        commands = self._files.actions.invert(normalized, history.references())
        return [{name: values[step] for name, values in commands.items()} for step in range(self._window.future + 1)]

    def _encode(self, clients: Sequence[_Client]) -> Batch:
        batch = self._encoder.encode([client.history.window(client.instruction) for client in clients])
        if batch["past_mask"].any():
            batch["actions"] = torch.from_numpy(np.stack([self._encode_past(client.history) for client in clients]))
        return batch

    def _encode_past(self, history: EpisodeHistory) -> np.ndarray:
        transform, anchor = self._files.actions, self._window.anchor
        actions = np.zeros((self._window.num_steps, transform.fields.select.width), np.float32)
        past = history.past_actions()
        if past is not None:
            actions[:anchor] = transform.apply(past)[0][:anchor]
        return actions
