"""A trained policy in closed loop: observations in, actions out, for any number of robots at once.

    policy = Policy.from_run("experiments/my_run")
    policy.reset(seed=0)
    actions = policy.act(RobotObservation(images=..., fields=..., instruction="open the drawer"))   # {field: numbers}

The first call predicts a chunk of actions; `open_loop_steps` of them are executed, one a call, then the next is
predicted. Actions are in the data's units, and poses absolute. Noise is a function of the episode's seed and the step.
Any robot will do that has the cameras and fields in the run's spec (robotics.json).

With `execution="async"` or "realtime" a prediction runs in a thread while the rest of the last chunk is executed:

    observation     0 ......... s ......... s + d
    chunk of 0      actions 0 ............. s + d - 1 | never executed
    chunk of s                  prediction            | actions d ...         d: the measured delay
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from vla_foundry.batch import Batch
from vla_foundry.client.chunks import Chunk, Command, DelayForecast, Execution, Schedule, Timing, count_delay_steps
from vla_foundry.client.messages import join_rows
from vla_foundry.client.observation import RobotObservation, RobotSteps
from vla_foundry.inference.cuda_graphs import GraphedSampler, Sample
from vla_foundry.inference.image_features import ReusedFeatures
from vla_foundry.inference.observations import Camera, EpisodeHistory, ObservationEncoder, RobotEpisode
from vla_foundry.inference.policy_files import PolicyFiles, load_policy_files
from vla_foundry.inference.window_actions import decode_commands, encode_guidance, encode_past
from vla_foundry.models.batch_handlers import to_device
from vla_foundry.models.policy import RoboticsBatchHandler
from vla_foundry.models.registry import list_blocks
from vla_foundry.randomness import draw_index
from vla_foundry.robotics.rotations import mean_rotation
from vla_foundry.robotics.spec import FieldDescription, NamedSpec

Precision = Literal["fp32", "bf16"]
_NUM_SEEDS = 1 << 63


class Policy:
    """Acts for robots; `from_run` loads one.

    Args:
        model: a model with `sample`, on its device.
        files: the run's params, normalizer and spec.
        open_loop_steps: actions of each chunk to execute; None: half of them.
        num_inference_steps: solver steps from noise to actions; None: the model's params decide.
        execution: sync: `act` waits for each prediction. async: a prediction runs while the robot acts, and only the
            first is waited for. realtime: async, and each chunk goes on where the last one is (real-time chunking).
        delay_steps: None: predictions take the time that they take, and the delay is measured. Otherwise a chunk is
            used this many steps after its observation, whatever the machine's speed: for simulations.
        ensemble_decay: average the chunks that have an action for a step, with weights exp(-ensemble_decay i), i = 0
            for the oldest (temporal ensembling); None: the newest chunk decides.
        precision: what the model computes in; bf16: autocast, faster on a GPU.
        cuda_graphs: replay predictions as CUDA graphs.
        reuse_image_features: do not encode images again that earlier predictions of the robot looked at.
        batch_size: robots in each prediction, exactly (the last one is repeated), so that bits do not depend on who
            else asks; None: all who ask.

    Raises:
        ValueError: open_loop_steps exceeds the predicted steps, or the model does not fit the execution.
    """

    def __init__(
        self,
        model: nn.Module,
        files: PolicyFiles,
        *,
        open_loop_steps: int | None = None,
        num_inference_steps: int | None = None,
        execution: Execution = "sync",
        delay_steps: int | None = None,
        ensemble_decay: float | None = None,
        precision: Precision = "fp32",
        cuda_graphs: bool = False,
        reuse_image_features: bool = False,
        batch_size: int | None = None,
    ) -> None:
        self.model: Any = model
        if cuda_graphs and self.device.type != "cuda":
            raise ValueError(f"cuda_graphs needs a GPU, but the policy is on the device '{self.device}'. Leave it out.")
        self._sample: Sample = GraphedSampler(self._run_model) if cuda_graphs else self._run_model
        self.spec = files.spec
        self.open_loop_steps = files.choose_open_loop_steps(open_loop_steps)
        self._timing = Timing(
            execution=execution,
            delay_steps=delay_steps,
            open_loop_steps=self.open_loop_steps,
            ensemble_decay=ensemble_decay,
        )
        if execution == "realtime" and not self.can_be_guided:
            raise ValueError("execution 'realtime' needs an action head with flow matching. Use execution 'async'.")
        turns = files.actions.rotations
        self._means = {name: partial(mean_rotation, rotation_format=turns[name]) for name in turns}
        self._delays = DelayForecast(delay_steps)
        # one thread: predictions do not compete
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")
        self.num_inference_steps = num_inference_steps
        self.precision, self._batch_size = precision, batch_size
        self.predicted: list[Hashable] = []  # for whom, when actions were last chosen
        self._files = files
        self._handler: Any = RoboticsBatchHandler(files.params)
        # chunks so far, over all clients
        self.num_predicted = 0
        self._clients: dict[Hashable, RobotEpisode] = {}
        self._encoder = ObservationEncoder(files.data, files.window_spec, files.normalizer, files.processor)
        self._window = files.window_spec.window
        self._features: ReusedFeatures | None = None
        if reuse_image_features:
            capacity = len(files.cameras) * (1 - min(self.image_indices, default=0))
            is_low = precision == "bf16"
            self._features = ReusedFeatures(model, capacity=capacity, is_low=is_low, cuda_graphs=cuda_graphs)

    @classmethod
    def from_run(
        cls,
        path: str,
        *,
        device: str = "auto",
        use_ema: bool | None = None,
        dataset: int | str | None = None,
        precision: Precision | None = "fp32",
        compile_blocks: bool = False,
        **options: Any,
    ) -> "Policy":
        """Load the policy of a run.

        Args:
            path: run folder (its newest checkpoint) or step folder; local, s3:// or hf://.
            device: "cpu", "cuda", "cuda:N"; "auto": a GPU if there is one.
            use_ema: use the averaged weights; None: if the checkpoint has them.
            dataset: the robot's dataset: its name in a mixture (default: the first robot), or its index, if the run's
                datasets were preprocessed with different image options.
            precision: what the model computes in; None: bf16 on a GPU, fp32 on the CPU.
            compile_blocks: torch.compile each block; the first predictions are slow.
            options: other keyword arguments of the class.

        Raises:
            FileNotFoundError: the run does not exist or lacks a file.
            ValueError: the run is not a policy's, or a file is broken.
        """
        # the weights come last, so that other errors appear at once
        files = load_policy_files(path, dataset=dataset)
        model = files.load_model(path, device=device, use_ema=use_ema)
        if compile_blocks:
            for block in list_blocks(model):
                block.compile()
        chosen = precision or ("bf16" if next(model.parameters()).is_cuda else "fp32")
        return cls(model, files, precision=chosen, **options)

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
    def image_indices(self) -> tuple[int, ...]:
        """Which steps' images a prediction looks at; 0: the last observation's."""
        return tuple(self._files.window_spec.image_indices)

    @property
    def follows_instructions(self) -> bool:
        """True if an observation must hold an instruction."""
        data = self._files.data
        return bool(data.use_language and data.language_instruction_types)

    def set_delay_steps(self, steps: int) -> None:
        """Change `delay_steps` of episodes that begin later."""
        self._timing = replace(self._timing, delay_steps=steps)
        self._delays = DelayForecast(steps)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    @property
    def can_be_guided(self) -> bool:
        """True if real-time chunking is possible."""
        return self.model.action_head.can_be_guided

    def warm_up(self) -> None:
        """Predict from black images, so that the first robot does not wait for what the device prepares."""
        client = object()
        self.reset(seed=0, client=client)
        self.act_many({client: self._files.imagine_observation()})
        if self.can_be_guided:
            # the first guided prediction is slow too
            self._prepare([self._find(client)], delay_steps=1)()
        self.forget(client)
        self._delays = DelayForecast(self._timing.delay_steps)

    def check_robot(self, robot: NamedSpec) -> None:
        """Check that a robot has the cameras and fields of the training data, with the same meaning.

        Raises:
            ValueError: it lacks one, or means something else by it; one line.
        """
        self._files.check_robot(robot)

    def reset(self, seed: int, *, client: Hashable = None) -> None:
        """Begin an episode with this seed and forget the previous one; `client` is the robot, if there are several."""
        self._clients[client] = self._begin_episode(seed)

    def _begin_episode(self, seed: int) -> RobotEpisode:
        files = self._files
        history = EpisodeHistory(files.window_spec, files.cameras, pads_images=files.data.pad_missing_images)
        return RobotEpisode(seed, history, Schedule(self._timing, self._means))

    def forget(self, client: Hashable = None) -> None:
        """Discard the episode of a robot that will not act again."""
        self._clients.pop(client, None)

    def needs_images(self, client: Hashable = None) -> bool:
        """True if the next observation must hold images: a chunk begins there, or a later one looks back at it."""
        return self._find(client).may_predict(self.image_indices)

    def predicts_next(self, client: Hashable = None) -> bool:
        """True if a chunk may begin at the next observation."""
        return self._find(client).may_predict([0])

    def act(self, observation: RobotObservation) -> dict[str, np.ndarray]:
        """Return the action that follows an observation: {field: (C,)}.

        Raises:
            ValueError: no episode was begun, or the observation lacks something.
            TimeoutError: the chunk is used up, and the next prediction, which runs in a thread, is late.
        """
        actions = self.act_many({None: observation})
        if None not in actions:
            late = self._delays.describe_late(self.chunk_steps, self.open_loop_steps)
            raise TimeoutError(f"The next chunk is late: {late}")
        return actions[None]

    def act_many(self, observations: Mapping[Any, RobotObservation]) -> dict[Any, dict[str, np.ndarray]]:
        """Return the action of each robot; new chunks are predicted in one batch. A robot whose chunk is late has none.

        Raises:
            ValueError: as `act`; no robot's observation was taken in then.
        """
        seen: list[Hashable] = []
        try:
            for name, observation in observations.items():
                self.observe(observation, client=name)
                seen.append(name)
            return self.choose_actions(seen)
        except ValueError:
            for name in seen:
                self.retract(name)
            raise

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
        planned = [found.schedule.plan(found.step + 1 + number) for number in range(min(num_skipped, self.chunk_steps))]
        skipped = [action for action in planned if action is not None]
        found.history.observe(observation, skipped=skipped, num_skipped=num_skipped)
        found.instruction = instruction

    def retract(self, client: Hashable = None) -> None:
        """Discard the last observation of a robot: its action could not be chosen."""
        self._find(client).history.retract()

    def choose_actions(self, clients: Sequence[Hashable]) -> dict[Any, dict[str, np.ndarray]]:
        """Return the action that follows each robot's last observation; new chunks are predicted in one batch.

        A robot whose chunk is late has none.

        Raises:
            ValueError: an observation lacks an image; nothing has changed then.
        """
        found = {name: self._find(name) for name in clients}
        for client in found.values():
            self._delays.add(client.schedule.receive(client.step))
        self.predicted = [name for name, client in found.items() if client.schedule.is_due(client.step)]
        due = [found[name] for name in self.predicted]
        waiting = [client for client in due if client.schedule.waits]
        for group in self._encoder.group(waiting, self._batch_size):
            for client, actions in zip(group, self._predict(group), strict=True):
                client.schedule.add(Chunk(client.step, actions))
        for group in self._encoder.group([client for client in due if client not in waiting], self._batch_size):
            self._begin(group)
        actions = {}
        for name, client in found.items():
            action = client.schedule.plan(client.step)
            # a late robot does what it did before, unless `correct` says otherwise
            client.history.command(action)
            if action is not None:
                actions[name] = action
        return actions

    def predict_chunk(self, client: Hashable = None) -> dict[str, np.ndarray]:
        """Return all actions predicted from a robot's last observation: {field: (steps, C)}, the first one for now.

        Raises:
            ValueError: the observation lacks an image; nothing has changed then.
        """
        found = self._find(client)
        (actions,) = self._predict([found])
        found.schedule = Schedule(self._timing, self._means)
        found.schedule.add(Chunk(found.step, actions), whole=True)
        found.history.command(actions[0])
        return join_rows(actions)

    def predict_from(self, robot: RobotSteps, *, client: Hashable = None) -> dict[str, np.ndarray]:
        """Return all actions predicted for a robot that keeps its own chunks: {field: (steps, C)}, the first for now.

        Only its episode's seed (and features of images) are remembered here: requests may get lost, or come twice.

        Raises:
            ValueError: no episode was begun, or what the robot tells lacks something.
        """
        if robot.rest and not self.can_be_guided:
            raise ValueError("real-time chunking needs an action head with flow matching. Use execution 'async'.")
        known = self._find(client)
        episode = self._begin_episode(known.seed)
        episode.image_features = known.image_features
        episode.history.replay(robot)
        episode.instruction = self._read_instruction(robot.observations[-1])
        episode.schedule.add(Chunk(robot.step, robot.rest), whole=True)
        (actions,) = self._prepare([episode], delay_steps=robot.delay_steps)()
        return join_rows(actions)

    def _begin(self, clients: Sequence[RobotEpisode]) -> None:
        """Begin a prediction, to be used when it is there, or after `delay_steps`."""
        predict = self._prepare(clients)
        if self._timing.is_measured:
            result = self._thread.submit(predict)
        else:
            result: Future[Sequence[Sequence[Command]]] = Future()
            result.set_result(predict())
        for place, client in enumerate(clients):
            client.schedule.begin(client.step, result, place)

    def correct(self, action: Mapping[str, np.ndarray], *, client: Hashable = None) -> None:
        """Record the action that the robot executed instead of the last one from `act`: {field: (C,)}."""
        self._find(client).history.command(action)

    def encode(self, clients: Sequence[Hashable] = (None,)) -> Batch:
        """Return the robots' current windows as a training batch (batch.py): the input of a prediction.

        It holds only the actions before the anchor.
        """
        return self._encode([self._find(client) for client in clients])

    def _find(self, client: Hashable) -> RobotEpisode:
        if client not in self._clients:
            who = "" if client is None else f" of client {client!r}"
            raise ValueError(f"No episode{who} was begun. Call reset(seed) first.")
        return self._clients[client]

    def _read_instruction(self, observation: RobotObservation) -> str:
        if self.follows_instructions and not observation.instruction:
            raise ValueError("observation: the instruction is empty, but the policy follows instructions. Give one.")
        return observation.instruction

    def _predict(self, clients: Sequence[RobotEpisode]) -> Sequence[Sequence[Command]]:
        """Predict now."""
        predict, start = self._prepare(clients), time.perf_counter()
        if not self._timing.is_measured:
            return predict()
        actions = self._thread.submit(predict).result()
        fps = self.spec.fps
        self._delays.add(1 if fps is None else count_delay_steps(time.perf_counter() - start, fps))
        return actions

    def _prepare(
        self, clients: Sequence[RobotEpisode], *, delay_steps: int | None = None
    ) -> Callable[[], Sequence[Sequence[Command]]]:
        """Return the prediction from the clients' last observations, which later ones do not change."""
        references = [client.history.references() for client in clients]
        self.num_predicted += len(clients)
        clients = [*clients, *[clients[-1]] * ((self._batch_size or 0) - len(clients))]
        batch = self._encode(clients)
        inputs = self._handler.prepare_sampling(batch, self.device)
        memories = [client.image_features for client in clients]
        if delay_steps is None and self._timing.execution == "realtime":
            delay_steps = self._delays.forecast()
        if delay_steps:
            rests = [(client.schedule.rest(client.step), client.history.references()) for client in clients]
            inputs["guidance"] = encode_guidance(rests, delay_steps, self._window, self._files.actions, self.device)
        seeds = [
            draw_index(_NUM_SEEDS, seed=client.seed, position=client.step, purpose="policy.noise") for client in clients
        ]

        def predict() -> Sequence[Sequence[Command]]:
            given = inputs if self._features is None else self._features.put(inputs, batch, memories)
            values = self._sample(given, to_device(torch.tensor(seeds), self.device)).cpu().numpy()
            pairs = zip(values, references, strict=False)  # without those that are repeated
            return [decode_commands(*pair, self._files.actions, self.commanded) for pair in pairs]

        return predict

    def _run_model(self, inputs: dict[str, Any], seeds: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model.sample(inputs, seeds=seeds, num_steps=self.num_inference_steps).float()

    def _encode(self, clients: Sequence[RobotEpisode]) -> Batch:
        batch = self._encoder.encode([client.history.window(client.instruction) for client in clients])
        if batch["past_mask"].any():
            past = [encode_past(client.history.past_actions(), self._window, self._files.actions) for client in clients]
            batch["actions"] = torch.from_numpy(np.stack(past))
        return batch
