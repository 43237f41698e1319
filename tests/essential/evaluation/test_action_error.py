"""Errors of predicted actions: by step, without padding, against the best constant action."""

import numpy as np
import pytest

from vla_foundry.evaluation.action_error import format_action_errors, measure_field


def test_errors_are_of_each_step_and_without_padding() -> None:
    true = np.array([[[1.0, 0.0], [2.0, 0.0]], [[3.0, 0.0], [99.0, 99.0]]])
    predicted = true + np.array([[[0.5, 0.5], [1.0, 1.0]], [[0.5, 0.5], [7.0, 7.0]]])
    is_valid = np.array([[True, True], [True, False]])
    error = measure_field(predicted, true, is_valid)
    np.testing.assert_allclose(error.policy, [0.25, 1.0])
    # the mean action of step 0 is (2, 0): off by 1 in one of two columns; step 1 has one sample
    np.testing.assert_allclose(error.mean_action, [0.5, 0.0])
    assert error.num_samples.tolist() == [2, 1]
    assert error.ratio == pytest.approx((2 * 0.25 + 1.0) / (2 * 0.5))


def test_a_policy_that_says_the_mean_is_no_better_than_it() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=(50, 4, 3))
    mean = np.broadcast_to(true.mean(0), true.shape)
    error = measure_field(mean, true, np.ones((50, 4), dtype=bool))
    assert error.ratio == pytest.approx(1.0)
    assert measure_field(true, true, np.ones((50, 4), dtype=bool)).ratio == 0.0


def test_the_table_shows_both_in_the_unit_of_the_field() -> None:
    true = np.array([[[0.0]], [[4.0]]])
    lines = format_action_errors({"action.x": measure_field(true + 1.0, true, np.ones((2, 1), dtype=bool))})
    assert lines[1].split() == ["action.x", "1.000/2.000", "1.000/2.000", "0.25"]
    # a goal belongs to the quickstart, not to any dataset
    assert "goal" not in "\n".join(lines)
