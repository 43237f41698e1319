"""The learning rate as a pure function of the step."""

import numpy as np

from vla_foundry.params.hparams import HyperParams, count_decay_steps, count_warmup_steps


def learning_rates(params: HyperParams, total_steps: int) -> np.ndarray:
    """Return the learning rate of every step of a run, float64 (total_steps,).

    The rate rises linearly and reaches the peak with the last warm-up step; decaying shapes reach their end value
    with the last step of the run (a run or decay of a single step is at the end value).

    Raises:
        ValueError: warm-up and decay do not fit into the run.
    """
    steps = np.arange(total_steps)
    warmup_steps = count_warmup_steps(params, total_steps)
    decay_steps = count_decay_steps(params, total_steps)
    decay_start = total_steps - decay_steps
    warming = np.minimum((steps + 1) / max(warmup_steps, 1), 1.0)
    progress = np.clip((steps - decay_start + 1) / max(decay_steps, 1), 0.0, 1.0)
    if params.lr_scheduler == "linear":
        left = 1.0 - progress
    else:
        left = 0.5 * (1.0 + np.cos(np.pi * progress))
    rates = np.where(
        steps < warmup_steps, params.lr * warming, params.lr_cooldown_end + left * (params.lr - params.lr_cooldown_end)
    )
    if params.lr_scheduler == "cosine":
        rates = np.where(steps < warmup_steps, rates, np.maximum(rates, params.force_min_lr))
    return rates
