"""Flow matching (Lipman et al. 2023) along straight lines.

t = 0 is data and t = 1 is noise:   x_t = (1 - t) x_0 + t noise,   velocity dx/dt = noise - x_0.
Sampling integrates the velocity from t = 1 to t = 0.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vla_foundry.models.noise.base import Predict, register_noise
from vla_foundry.params.models.noise import FlowParams

_NUM_QUANTILES = 2048


@register_noise("flow")
class FlowMatching:
    """The process; the head predicts the velocity."""

    def __init__(self, params: FlowParams) -> None:
        self.params = params
        self._quantiles: Tensor | None = None
        if params.time_distribution == "beta":
            self._quantiles = torch.from_numpy(beta_quantiles(params.beta_a, params.beta_b))

    def spread_times(self, uniforms: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Turn uniform draws into the times of training, by the inverse of their distribution function."""
        params, times = self.params, uniforms
        if params.time_distribution == "logit_normal":
            normals = math.sqrt(2) * torch.erfinv(2 * times.clamp(2**-24, 1 - 2**-24) - 1)
            times = torch.sigmoid(params.logit_mean + params.logit_std * normals)
        elif self._quantiles is not None:
            self._quantiles = self._quantiles.to(times.device)
            places = times * (_NUM_QUANTILES - 1)
            below = places.long()
            low, high = self._quantiles[below], self._quantiles[below + 1]
            times = torch.lerp(low, high, places - below)
        if params.num_timesteps is not None:
            times = (times * params.num_timesteps).floor() / params.num_timesteps
        return times

    def add_noise(
        self, actions: Float[Tensor, "N T A"], noise: Float[Tensor, "N T A"], times: Float[Tensor, " N"]
    ) -> Float[Tensor, "N T A"]:
        """Return the noised actions at these times."""
        return self._clamp(actions + times[:, None, None].to(actions.dtype) * (noise - actions))

    def target(self, actions: Float[Tensor, "N T A"], noise: Float[Tensor, "N T A"]) -> Float[Tensor, "N T A"]:
        """Return the velocity."""
        return noise - actions

    def sample(
        self, predict: Predict, noise: Float[Tensor, "B T A"], num_steps: int, hold: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "B T A"]:
        """Integrate the velocity from noise to actions, by steps that cover [0, 1] exactly, whatever their number."""
        B = noise.shape[0]
        # on the host: nothing is read back, and each step has its own constants
        times = [1 - step / num_steps for step in range(num_steps + 1)]
        x = hold(noise)
        for time, next_time in pairwise(times):
            width = time - next_time
            velocity = predict(x, self._label(x, B, time))
            if self.params.solver == "heun":
                ahead = hold(self._clamp(x - width * velocity))
                velocity = (velocity + predict(ahead, self._label(x, B, next_time))) / 2
            x = hold(self._clamp(x - width * velocity))
        return x

    def _label(self, x: Tensor, num_rows: int, time: float) -> Tensor:
        return torch.full((num_rows,), max(0.0, time - self.params.sampling_time_shift), device=x.device)

    def _clamp(self, x: Tensor) -> Tensor:
        return x if self.params.clamp_range is None else x.clamp(*self.params.clamp_range)


def beta_quantiles(a: float, b: float) -> np.ndarray:
    """The inverse distribution function of Beta(a, b) at evenly spaced probabilities from 0 to 1, float32."""
    # t = sin^2(angle) takes the poles out of the density for a, b >= 1/2
    num_cells = 1 << 16
    angles = (np.arange(num_cells) + 0.5) * (np.pi / 2 / num_cells)
    mass = np.sin(angles) ** (2 * a - 1) * np.cos(angles) ** (2 * b - 1)
    distribution = np.concatenate(([0.0], np.cumsum(mass)))
    edges = np.arange(num_cells + 1) * (np.pi / 2 / num_cells)
    found = np.interp(np.linspace(0, 1, _NUM_QUANTILES), distribution / distribution[-1], edges)
    return (np.sin(found) ** 2).astype(np.float32)
