"""Chunks in time: masks are monotone, no action is stale, and without delay all is synchronous."""

import itertools
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import pytest

from vla_foundry.client.chunks import (
    Chunk,
    DelayForecast,
    Schedule,
    Timing,
    choose_action,
    count_delay_steps,
    prefix_weights,
)
from vla_foundry.robotics.rotations import matrix_to_rotation, mean_rotation, rotation_to_matrix

H = 8


def test_masks_are_frozen_then_decay_then_free() -> None:
    for delay, overlap in itertools.product(range(H + 3), range(H + 3)):
        weights = prefix_weights(H, delay, overlap)
        reach = min(overlap, H)
        assert weights.shape == (H,)
        assert (np.diff(weights) <= 0).all()
        assert (weights[reach:] == 0).all()
        if delay == 0:
            assert not weights.any()
            continue
        frozen = min(delay, reach)
        assert (weights[:frozen] == 1).all()
        assert ((weights[frozen:reach] > 0) & (weights[frozen:reach] < 1)).all()
        # a longer delay never loosens, a longer overlap neither
        assert (prefix_weights(H, delay + 1, overlap) >= weights).all()
        assert (prefix_weights(H, delay, overlap + 1) >= weights).all()


def test_masks_are_those_of_the_paper() -> None:
    # H = 8, d = 2, s = 3: c_i = (H - s - i) / (H - s - d + 1)
    c = np.array([3, 2, 1]) / 4
    expected = [1, 1, *(c * (np.exp(c) - 1) / (np.e - 1)), 0, 0, 0]
    np.testing.assert_allclose(prefix_weights(8, 2, 5), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("seconds", "steps"), [(0.0, 0), (1e-3, 1), (0.1, 1), (0.1001, 2), (0.3, 3), (0.7, 7), (0.75, 8)]
)
def test_a_delay_is_the_number_of_steps_that_begin(seconds: float, steps: int) -> None:
    assert count_delay_steps(seconds, 10.0) == steps


def label(start: int) -> Chunk:
    """A chunk whose actions say where they come from and what they are for."""
    return Chunk(start, [{"a": np.array([start, start + number])} for number in range(H)])


def run(timing: Timing, delays: list[int], num_steps: int) -> list[tuple[int, int] | None]:
    """Run an episode; with measured delays, prediction n is done after delays[n] steps."""
    schedule, pending, executed = Schedule(timing, {}), [], []
    left = iter(delays)
    for step in range(num_steps):
        for at, start, result in pending:
            if at == step and not result.done():
                result.set_result([[], list(label(start).actions)])
        schedule.receive(step)
        if schedule.is_due(step):
            if schedule.waits:
                schedule.add(label(step))
            else:
                result: Future[Any] = Future()
                if timing.delay_steps is None:
                    pending.append((step + next(left), step, result))
                else:
                    result.set_result([[], list(label(step).actions)])
                schedule.begin(step, result, 1)
        action = schedule.plan(step)
        executed.append(None if action is None else tuple(action["a"]))
    return executed


def timing(execution: str, delay_steps: int | None, open_loop_steps: int = 3, decay: float | None = None) -> Timing:
    values: dict[str, Any] = {"execution": execution, "delay_steps": delay_steps, "ensemble_decay": decay}
    return Timing(open_loop_steps=open_loop_steps, **values)


@pytest.mark.parametrize("seed", range(8))
def test_no_action_is_stale_after_a_switch(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_open = int(rng.integers(1, H + 1))
    delays = rng.integers(1, 11, 60).tolist()
    executed = run(timing("async", None, num_open), delays, 60)
    newest = 0
    for step, action in enumerate(executed):
        if action is None:
            # only when the newest chunk is used up
            assert step >= newest + H
            continue
        start, meant_for = action
        assert meant_for == step
        assert newest <= start <= step < start + H
        newest = start
    assert executed[0] == (0, 0)
    # the second chunk begins when it is there, at the action for that step
    second = next((step for step, action in enumerate(executed) if action is not None and action[0] > 0), None)
    assert second == num_open + delays[0] or delays[0] > H


def test_without_delay_every_execution_is_synchronous() -> None:
    for num_open in range(1, H + 1):
        expected = run(timing("sync", None, num_open), [], 40)
        assert expected == [(step // num_open * num_open, step) for step in range(40)]
        for execution in ("async", "realtime"):
            assert run(timing(execution, 0, num_open), [], 40) == expected


def test_a_given_delay_repeats_and_tells_when_predictions_begin() -> None:
    for num_open, delay in itertools.product(range(1, H + 1), range(1, H)):
        executed = run(timing("async", delay, num_open), [], 40)
        switches = [step for step in range(1, 40) if executed[step] and executed[step] != executed[step - 1]]
        starts = sorted({executed[step][0] for step in switches})  # pyright: ignore[reportOptionalSubscript]
        every = max(num_open, delay)
        assert starts == [0, *range(num_open, 40 - delay, every)][: len(starts)]
        # what `may_predict_at` says before each step
        schedule = Schedule(timing("async", delay, num_open), {})
        begun = []
        for step in range(30):
            is_expected = schedule.may_predict_at(step)
            schedule.receive(step)
            if schedule.is_due(step):
                assert is_expected
                begun.append(step)
                if schedule.waits:
                    schedule.add(label(step))
                else:
                    result: Future[Any] = Future()
                    result.set_result([list(label(step).actions)])
                    schedule.begin(step, result, 0)
            else:
                assert not is_expected
        assert begun == [0, *range(num_open, 30, every)]


def test_ensembling_averages_the_chunks_that_cover_a_step() -> None:
    executed = run(timing("sync", None, 2, decay=0.5), [], 12)
    for step, action in enumerate(executed):
        assert action is not None
        starts = np.array([start for start in range(0, step + 1, 2) if step < start + H])
        weights = np.exp(-0.5 * np.arange(len(starts)))
        np.testing.assert_allclose(action, [weights @ starts / weights.sum(), step])


def test_the_mean_of_rotations_is_a_rotation() -> None:
    turns = np.array([[0, 0, 0.2], [0, 0, 1.0]])
    for rotation in ("quaternion_xyzw", "rot_6d_rows", "axis_angle", "matrix"):
        values = matrix_to_rotation(rotation_to_matrix(turns, "axis_angle"), rotation)
        # the same rotation with the other sign
        values[1] *= -1 if rotation.startswith("quaternion") else 1
        chunks = [Chunk(0, [{"turn": value}]) for value in values]
        means = {"turn": partial(mean_rotation, rotation_format=rotation)}
        mean = choose_action(chunks, 0, ensemble_decay=0.0, means=means)
        assert mean is not None
        expected = rotation_to_matrix(np.array([0, 0, 0.6]), "axis_angle")
        np.testing.assert_allclose(rotation_to_matrix(mean["turn"], rotation), expected, atol=1e-9)


def test_timings_that_make_no_sense_are_refused() -> None:
    cases: list[tuple[tuple[Any, ...], str]] = [
        (("async", -1), r"delay_steps must be at least 0, got -1"),
        (("sync", None, 3, float("nan")), r"ensemble_decay must be at least 0, got nan"),
        (("realtime", 1, 3, 0.1), r"ensemble_decay does not go with execution 'realtime'"),
    ]
    for values, message in cases:
        with pytest.raises(ValueError, match=message):
            timing(*values)


def test_the_forecast_is_the_longest_of_the_last_delays() -> None:
    forecast = DelayForecast(None)
    assert forecast.forecast() == 0
    for delay in (9, *[2] * 9, None):
        forecast.add(delay)
    assert forecast.forecast() == 9
    forecast.add(3)
    assert forecast.forecast() == 3
    fixed = DelayForecast(4)
    fixed.add(7)
    assert fixed.forecast() == 4
