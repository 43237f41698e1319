"""An episode of a robot that infers while it acts: its latest steps, and the chunks that a server predicts for it."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vla_foundry.client.chunks import Command, Schedule, Timing
from vla_foundry.client.messages import (
    Image,
    Metadata,
    PredictRequest,
    PredictResponse,
    Step,
    join_rows,
    read_arrays,
    split_rows,
    write_arrays,
)
from vla_foundry.client.observation import RobotObservation


@dataclass(kw_only=True)
class _Observed:
    images: dict[str, np.ndarray]
    fields: Mapping[str, np.ndarray]
    # what the robot did then; None: not yet known
    action: Command | None = None


class RemoteEpisode:
    """One robot's episode; see RemotePolicy.

    Args:
        name: the session's name.
        timing: when predictions begin.
        metadata: what the policy looks at.
    """

    def __init__(self, name: str, timing: Timing, metadata: Metadata) -> None:
        self.name = name
        # of the last observation
        self.step = -1
        self.schedule = Schedule(timing, {})
        # why the last prediction did not come
        self.error: Exception | None = None
        self._num_lost = 0
        self._instruction = ""
        self._indices = [int(index) for index in metadata.image_indices]
        # the latest steps, as far back as the policy looks
        self._steps: deque[_Observed] = deque(maxlen=metadata.steps_back + 1)

    @property
    def needs_images(self) -> bool:
        """True if the next observation must hold images: a chunk begins there, or a later one looks back at it."""
        following = self.step + 1
        # steps before the start are padded with the first step's images
        return bool(self._indices) and (
            following == 0 or any(self.schedule.may_predict_at(following - index) for index in self._indices)
        )

    def observe(self, observation: RobotObservation) -> None:
        """Take in the next observation; until the first chunk is there, the episode begins with the latest."""
        if self.schedule.is_empty:
            self._steps.clear()
            self.step, self._num_lost = -1, 0
        self._instruction = observation.instruction
        # a client may reuse the arrays for its next observation
        images = {name: np.array(image) for name, image in observation.images.items()}
        fields = {name: np.array(values) for name, values in observation.fields.items()}
        observed = _Observed(images=images, fields=fields)
        for past in range(self.step + 1 - self._num_lost, self.step + 1):
            # it stands for those that were lost
            self._steps.append(replace(observed))
            self.command(self.schedule.plan(past))
        self._steps.append(observed)
        self.step, self._num_lost = self.step + 1, 0

    def command(self, action: Command | None) -> None:
        """Record what the robot does after the last observation; None: what it did before."""
        before = self._steps[-2].action if len(self._steps) > 1 else None
        self._steps[-1].action = before if action is None else action

    def lose(self) -> None:
        """Discard the last observation, of which nothing came; its step has passed."""
        self._steps.pop()
        self._num_lost += 1

    def ask(self, delay_steps: int, encode_image: Callable[[str, np.ndarray], Image]) -> PredictRequest:
        """Return the request for a chunk that begins at the last observation.

        Args:
            delay_steps: how long it will take; 0: the chunk need not go on from the last one.
            encode_image: makes a message of a camera's image.

        Raises:
            ValueError: the observation cannot be sent.
        """
        first = self.step + 1 - len(self._steps)
        # before the episode's start policies see its first images
        seen = {max(0, self.step + index) - first for index in self._indices}
        steps = [
            Step(
                images=[encode_image(*pair) for pair in observed.images.items()] if number in seen else [],
                fields=write_arrays(observed.fields),
                actions=[] if observed.action is None else write_arrays(observed.action),
            )
            for number, observed in enumerate(self._steps)
        ]
        rest = self.schedule.rest(self.step) if delay_steps else []
        return PredictRequest(
            client=self.name,
            step=self.step,
            steps=steps,
            instruction=self._instruction,
            rest=write_arrays(join_rows(rest), ndim=2),
            delay_steps=delay_steps,
        )


class Answer:
    """A chunk that a server is asked for.

    Args:
        is_done: returns whether the answer, or an error, is there.
        wait: returns the answer, or raises.
    """

    def __init__(self, is_done: Callable[[], bool], wait: Callable[[], PredictResponse]) -> None:
        self.done = is_done
        self._wait = wait

    def result(self) -> Sequence[Sequence[Command]]:
        """Return the chunk, of one robot."""
        return [split_rows(read_arrays(self._wait().actions, ndim=2))]
