"""The report of the quickstart's language stage."""

import numpy as np
import pytest

from vla_foundry.quickstart.llm import sketch_curve, unigram_loss


def test_unigram_loss_is_the_entropy_of_the_data_it_was_fitted_to() -> None:
    counts = np.array([4_000_000, 2_000_000, 1_000_000, 1_000_000])
    entropy = 1.75 * np.log(2)  # 1/2, 1/4, 1/8, 1/8
    assert unigram_loss(counts, counts) == pytest.approx(entropy, abs=1e-5)


def test_unigram_loss_of_an_unseen_token_is_finite() -> None:
    assert unigram_loss(np.array([98, 0]), np.array([0, 5])) == pytest.approx(np.log(100))


def test_sketch_goes_down_with_the_loss() -> None:
    lines = sketch_curve([(0, 9.0), (50, 5.0), (100, 4.0)], width=20, height=5)
    assert lines[0].strip().startswith("9.00 |*")
    assert lines[4].strip().startswith("4.00 |")
    assert lines[4].endswith("*")
