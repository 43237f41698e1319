"""The learning rate over the steps of a run."""

import math

import numpy as np
import pytest

from vla_foundry.params.hparams import HyperParams
from vla_foundry.training.optimization.schedules import learning_rates


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "warmup_constant_decay"])
@pytest.mark.parametrize("warmup", [0.0, 10.0, 0.2, 100.0])
@pytest.mark.parametrize("total_steps", [100, 1000])
def test_decaying_shapes_start_at_the_peak_and_end_at_the_end_value(scheduler, warmup, total_steps: int) -> None:
    params = HyperParams(lr=2.0, lr_cooldown_end=0.5, lr_scheduler=scheduler, warmup=warmup, decay=0.0)
    if scheduler == "warmup_constant_decay" and warmup != 100.0:
        params = HyperParams(lr=2.0, lr_cooldown_end=0.5, lr_scheduler=scheduler, warmup=warmup, decay=0.3)
    rates = learning_rates(params, total_steps)
    warmup_steps = round(warmup * total_steps) if warmup < 1 else int(warmup)
    assert rates.shape == (total_steps,)
    np.testing.assert_allclose(rates[:warmup_steps], 2.0 * np.arange(1, warmup_steps + 1) / max(warmup_steps, 1))
    assert np.all(np.diff(rates[warmup_steps:]) <= 1e-12)
    is_flat = scheduler == "warmup_constant_decay" and params.decay == 0
    assert rates[-1] == pytest.approx(2.0 if warmup_steps == total_steps or is_flat else 0.5)


def test_shapes_equal_their_formulas() -> None:
    cosine = learning_rates(HyperParams(lr=1.0, warmup=4.0, lr_scheduler="cosine"), 20)
    linear = learning_rates(HyperParams(lr=1.0, warmup=4.0, lr_scheduler="linear"), 20)
    decay = learning_rates(HyperParams(lr=1.0, warmup=4.0, lr_scheduler="warmup_constant_decay", decay=5.0), 20)
    constant = learning_rates(HyperParams(lr=1.0, warmup=4.0, lr_scheduler="constant"), 20)
    for step in range(4, 20):
        done = (step - 4 + 1) / 16
        assert cosine[step] == pytest.approx(0.5 * (1 + math.cos(math.pi * done)))
        assert linear[step] == pytest.approx(1 - done)
        falling = max(0, step - 15 + 1) / 5
        assert decay[step] == pytest.approx(0.5 * (1 + math.cos(math.pi * falling)))
        assert constant[step] == 1.0


def test_cosine_stays_above_its_floor_after_warm_up() -> None:
    rates = learning_rates(HyperParams(lr=1.0, warmup=10.0, force_min_lr=0.25), 100)
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:].min() == 0.25


def test_a_warm_up_or_decay_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hparams.warmup \(1000\) is 1000 steps, more than the run's 50"):
        learning_rates(HyperParams(warmup=1000.0), 50)
    with pytest.raises(ValueError, match=r"hparams.decay \(30 steps\)"):
        learning_rates(HyperParams(warmup=30.0, decay=30.0, lr_scheduler="warmup_constant_decay"), 50)
