"""Chunks of actions in time: which action runs at a step, and what the next chunk must agree with.

Real-time chunking (Black, Galliker and Levine 2025, arXiv 2506.07339): a chunk of H actions is predicted while the last
one runs. It takes `delay` steps, so that many of the old actions will run; the new chunk is made to agree with them,
and less and less with the rest of the old chunk:

    step       0 ... delay ........ overlap ........ H
    weight     1       decays to 0            0
               frozen  soft                   new

Temporal ensembling (ACT; Zhao et al. 2023) averages all chunks that have an action for a step.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias, get_args, runtime_checkable

import numpy as np

# {field: (C,)}
Command: TypeAlias = Mapping[str, np.ndarray]
# (values (N, C), weights (N,) whose sum is 1) -> (C,)
Mean: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]
# see Policy
Execution: TypeAlias = Literal["sync", "async", "realtime"]

# the forecast of the next delay is the largest of so many
_NUM_DELAYS = 10


class Chunk(NamedTuple):
    """Actions predicted from one observation."""

    # the observation's step, which is that of the first action
    start: int
    actions: Sequence[Command]

    def covers(self, step: int) -> bool:
        """Return whether there is an action for a step."""
        return self.start <= step < self.start + len(self.actions)

    def rest(self, step: int) -> Sequence[Command]:
        """Return the actions from a step on."""
        return self.actions[max(0, step - self.start) :]


def count_delay_steps(seconds: float, fps: float) -> int:
    """Return how many control steps begin while a prediction takes this long."""
    # a tolerance: 0.3 s at 10 steps a second are 3 steps, not 4
    return max(0, math.ceil(seconds * fps - 1e-6))


def prefix_weights(num_steps: int, delay: int, overlap: int) -> np.ndarray:
    """Return how much each action of a new chunk has to agree with the old chunk (equation 5).

    Args:
        num_steps: actions of the new chunk (H).
        delay: steps that the prediction takes (d). With 0 every weight is 0: nothing runs meanwhile, and the chunk is
            that of synchronous execution.
        overlap: actions left of the old chunk (H - s).

    Returns:
        (num_steps,): 1 below `delay`, decaying from there to `overlap`, 0 beyond.
    """
    overlap = min(overlap, num_steps)
    delay = min(delay, overlap)
    if delay == 0:
        return np.zeros(num_steps)
    steps = np.arange(num_steps)
    share = np.clip((overlap - steps) / (overlap - delay + 1), 0, 1)
    soft = share * np.expm1(share) / math.expm1(1)
    return np.where(steps < delay, 1.0, soft)


def choose_action(
    chunks: Sequence[Chunk],
    step: int,
    *,
    ensemble_decay: float | None = None,
    means: Mapping[str, Mean] | None = None,
) -> dict[str, np.ndarray] | None:
    """Return the action for a step.

    Args:
        chunks: from the oldest to the newest.
        ensemble_decay: None: the newest chunk decides; m: all chunks with an action for the step do, with weights
            exp(-m i), i = 0 for the oldest.
        means: {field: its mean}, for fields whose mean is not that of their numbers, such as rotations.

    Returns:
        {field: (C,)}; None: the newest chunk, or with ensembling every chunk, has no action for the step.
    """
    if ensemble_decay is None:
        return dict(chunks[-1].rest(step)[0]) if chunks and chunks[-1].covers(step) else None
    votes = [chunk.rest(step)[0] for chunk in chunks if chunk.covers(step)]
    if len(votes) < 2:
        return dict(votes[0]) if votes else None
    weights = np.exp(-ensemble_decay * np.arange(len(votes)))
    weights /= weights.sum()
    found = {}
    for name in votes[0]:
        values, mean = np.stack([vote[name] for vote in votes]), (means or {}).get(name)
        value = weights @ values if mean is None else mean(values, weights)
        found[name] = value.astype(np.result_type(values, np.float32))
    return found


class DelayForecast:
    """Forecasts how many steps the next prediction takes: as many as the longest of the last ones.

    Args:
        fixed: the forecast, whatever is measured; None: measured.
    """

    def __init__(self, fixed: int | None) -> None:
        self._fixed = fixed
        self._measured: deque[int] = deque(maxlen=_NUM_DELAYS)

    def add(self, steps: int | None) -> None:
        """Take in a measured delay; None: nothing was measured."""
        if steps is not None:
            self._measured.append(steps)

    def forecast(self) -> int:
        """Return the delay to expect, in steps."""
        return max(self._measured, default=0) if self._fixed is None else self._fixed

    def describe_late(self, chunk_steps: int, open_loop_steps: int) -> str:
        """Return what to do about a chunk that was used up before the next one was there."""
        delay, spare = self.forecast(), chunk_steps - self.forecast()
        if 0 < spare < open_loop_steps:
            advice = f"lower the policy's open_loop_steps from {open_loop_steps} to {spare}"
        else:
            advice = "use execution sync, a faster machine, or a policy with longer chunks, if this goes on"
        return f"it takes {delay} steps or more, and a chunk has {chunk_steps} actions. Hold the robot, and {advice}."


@dataclass(frozen=True, kw_only=True)
class Timing:
    """When predictions begin and when their chunks are used; see Policy."""

    execution: Execution
    delay_steps: int | None
    open_loop_steps: int
    ensemble_decay: float | None

    def __post_init__(self) -> None:
        decay = self.ensemble_decay
        if self.execution not in get_args(Execution):
            raise ValueError(f"execution must be one of {', '.join(get_args(Execution))}, got '{self.execution}'.")
        if self.delay_steps is not None and self.delay_steps < 0:
            raise ValueError(f"delay_steps must be at least 0, got {self.delay_steps}.")
        if decay is not None and not (math.isfinite(decay) and decay >= 0):
            raise ValueError(f"ensemble_decay must be at least 0, got {decay}.")
        if decay is not None and self.execution == "realtime":
            raise ValueError("ensemble_decay does not go with execution 'realtime', whose chunks agree already.")

    @property
    def is_measured(self) -> bool:
        """True if predictions run beside the robot and take the time that they take."""
        return self.execution != "sync" and self.delay_steps is None


@runtime_checkable
class Running(Protocol):
    """A prediction that is being made, such as a concurrent.futures.Future."""

    def done(self) -> bool: ...
    def result(self) -> Sequence[Sequence[Command]]: ...


class _Prediction(NamedTuple):
    # the observation's step
    start: int
    # the actions of several robots, and this one's place among them
    result: Running
    place: int


class Schedule:
    """One robot's chunks: those that give actions now, and the one that is being predicted.

    Args:
        timing: when chunks begin.
        means: see `choose_action`.
    """

    def __init__(self, timing: Timing, means: Mapping[str, Mean]) -> None:
        self.timing = timing
        self.means = means
        # from the oldest to the newest; without ensembling only the newest
        self._chunks: list[Chunk] = []
        self._prediction: _Prediction | None = None

    @property
    def is_empty(self) -> bool:
        """True until the first chunk is there."""
        return not self._chunks

    @property
    def waits(self) -> bool:
        """True if the robot waits for its next prediction: with synchronous execution, and for the first chunk."""
        return self.timing.execution == "sync" or self.timing.delay_steps == 0 or self.is_empty

    def plan(self, step: int) -> dict[str, np.ndarray] | None:
        """Return the action planned for a step."""
        decay = self.timing.ensemble_decay
        return choose_action(self._chunks, step, ensemble_decay=decay, means=self.means)

    def rest(self, step: int) -> Sequence[Command]:
        """Return what is left of the newest chunk."""
        return self._chunks[-1].rest(step) if self._chunks else []

    def is_due(self, step: int) -> bool:
        """Return whether the next prediction begins at a step."""
        if self._prediction is not None:
            return False
        return not self._chunks or step >= self._chunks[-1].start + self.timing.open_loop_steps

    def may_predict_at(self, step: int) -> bool:
        """Return whether a prediction may begin at a later step."""
        if not self._chunks or self.timing.is_measured:
            return True
        num_steps = self.timing.open_loop_steps
        # a prediction begins when the one before is over
        every = num_steps if self.timing.execution == "sync" else max(num_steps, self.timing.delay_steps or 0)
        due = self._chunks[-1].start + num_steps if self._prediction is None else self._prediction.start + every
        return (step - due) % every == 0

    def begin(self, step: int, result: Running, place: int) -> None:
        """Note that a prediction from the observation of a step has begun."""
        self._prediction = _Prediction(step, result, place)

    def receive(self, step: int) -> int | None:
        """Switch to the next chunk if it is there; return how many steps it took."""
        prediction, delay_steps = self._prediction, self.timing.delay_steps
        if prediction is None:
            return None
        delay = step - prediction.start
        if not (prediction.result.done() if delay_steps is None else delay >= delay_steps):
            return None
        self._prediction = None
        self.add(Chunk(prediction.start, prediction.result.result()[prediction.place]), now=step)
        return delay

    def add(self, chunk: Chunk, *, now: int | None = None, whole: bool = False) -> None:
        """Switch to a chunk.

        Args:
            now: the current step; None: the chunk's first.
            whole: keep actions too that a synchronous robot does not execute.
        """
        if self.timing.ensemble_decay is not None:
            step = chunk.start if now is None else now
            self._chunks = [*(old for old in self._chunks if old.covers(step)), chunk]
        else:
            end = None if whole or self.timing.execution != "sync" else self.timing.open_loop_steps
            self._chunks = [chunk._replace(actions=chunk.actions[:end])]
