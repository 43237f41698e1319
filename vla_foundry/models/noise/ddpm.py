"""Denoising diffusion: trained as in DDPM (Ho et al. 2020), sampled by DDIM (Song et al. 2021) without new noise.

x_k = sqrt(alpha_k) x_0 + sqrt(1 - alpha_k) noise for k = 0 .. K - 1, alpha the cumulative product of 1 - beta; the head
predicts the noise. As time in (0, 1], k is told as (k + 1) / K; time 0 is data.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from vla_foundry.models.noise.base import Predict, register_noise
from vla_foundry.params.models.noise import DDPMParams

_COSINE_OFFSET = 0.008
_LARGEST_BETA = 0.999


@register_noise("ddpm")
class DenoisingDiffusion:
    """The process; the head predicts the noise."""

    def __init__(self, params: DDPMParams) -> None:
        self.params = params
        # [K + 1], alpha at times 0, 1/K, ..., 1: before the first step there is no noise
        self.alphas = [1.0]
        for beta in _betas(params):
            self.alphas.append(self.alphas[-1] * (1 - beta))
        # kept on the device that was used last
        self._table = torch.tensor(self.alphas, dtype=torch.float64)

    def spread_times(self, uniforms: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Turn uniform draws into times: each of the K is as likely."""
        num = self.params.num_timesteps
        return ((uniforms * num).floor() + 1) / num

    def add_noise(
        self, actions: Float[Tensor, "N T A"], noise: Float[Tensor, "N T A"], times: Float[Tensor, " N"]
    ) -> Float[Tensor, "N T A"]:
        """Return the noised actions at these times."""
        self._table = self._table.to(times.device)
        alpha = self._table[(times * self.params.num_timesteps).round().long(), None, None]
        return alpha.sqrt().to(actions.dtype) * actions + (1 - alpha).sqrt().to(actions.dtype) * noise

    def target(self, actions: Float[Tensor, "N T A"], noise: Float[Tensor, "N T A"]) -> Float[Tensor, "N T A"]:
        """Return the noise."""
        return noise

    def sample(
        self, predict: Predict, noise: Float[Tensor, "B T A"], num_steps: int, hold: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "B T A"]:
        """Go from noise to actions by DDIM, over times spread evenly from 1 to 0."""
        num = self.params.num_timesteps
        if num_steps > num:
            raise ValueError(
                f"num_steps ({num_steps}) must be at most model.action_head.noise.num_timesteps ({num}), the steps "
                "that the head was trained on."
            )
        places = [round(num * (1 - step / num_steps)) for step in range(num_steps + 1)]
        x = hold(noise)
        for place, next_place in pairwise(places):
            alpha, next_alpha = self.alphas[place], self.alphas[next_place]
            found = predict(x, torch.full((x.shape[0],), place / num, device=x.device))
            actions = self._clamp((x - math.sqrt(1 - alpha) * found) / math.sqrt(alpha))
            if self.params.clamp_range is not None:
                # the noise that goes with the clamped actions
                found = (x - math.sqrt(alpha) * actions) / math.sqrt(1 - alpha)
            x = hold(math.sqrt(next_alpha) * actions + math.sqrt(1 - next_alpha) * found)
        return x

    def _clamp(self, x: Tensor) -> Tensor:
        return x if self.params.clamp_range is None else x.clamp(*self.params.clamp_range)


def _betas(params: DDPMParams) -> list[float]:
    num = params.num_timesteps
    if params.beta_schedule == "linear":
        widths = max(1, num - 1)
        return [params.beta_start + (params.beta_end - params.beta_start) * k / widths for k in range(num)]

    def level(time: float) -> float:
        return math.cos((time + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * math.pi / 2) ** 2

    return [min(1 - level((k + 1) / num) / level(k / num), _LARGEST_BETA) for k in range(num)]
