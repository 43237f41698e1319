"""Noise processes of denoising heads (flow matching and denoising diffusion) and their random draws.

Time 0 is actions, time 1 is standard normal noise.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vla_foundry.params.models.action_heads import DDPMParams, FlowParams, NoiseParams
from vla_foundry.randomness import FACTORS, GOLDEN, create_key
from vla_foundry.registry import Registry

# actions, noise and times of N rows
Actions = Float[Tensor, "N T A"]
Times = Float[Tensor, " N"]
# (noised actions (B, T, A), their time) -> what the head predicts, (B, T, A)
Predict = Callable[[Tensor, float], Tensor]

# resolution of Beta's inverse distribution function
_NUM_QUANTILES = 2048
# offset of the cosine schedule (Nichol and Dhariwal 2021)
_COSINE_OFFSET = 0.008
_LARGEST_BETA = 0.999
# largest guidance weight of real-time chunking (beta); keeps few solver steps stable
_MAX_GUIDANCE = 5.0


class Guidance(NamedTuple):
    """Actions that a sample is pulled towards, normalised; see FlowMatching.guide."""

    # (B, T, A)
    target: Tensor
    # (B, T), 0: free, 1: frozen
    weights: Tensor


class NoiseProcess:
    """Defines how actions become noise, what a head learns to predict, and how its predictions give actions."""

    params: Any
    # `guide` works
    can_be_guided = False

    def spread_times(self, uniforms: Times) -> Times:
        """Map uniform draws to training times."""
        raise NotImplementedError

    def add_noise(self, actions: Actions, noise: Actions, times: Times) -> Actions:
        """Return the noised actions at these times."""
        raise NotImplementedError

    def target(self, actions: Actions, noise: Actions) -> Actions:
        """Return the head's training target."""
        raise NotImplementedError

    def sampling_times(self, num_steps: int) -> list[float]:
        """Return the times that `sample` tells the head, each once."""
        raise NotImplementedError

    def sample(self, predict: Predict, noise: Actions, num_steps: int, hold: Callable[[Tensor], Tensor]) -> Actions:
        """Sample actions from noise.

        Args:
            predict: the head.
            noise: the starting point, at time 1.
            hold: inserts known values into noised actions: observed steps, and 0 in dimensions that a robot lacks.
                Applied to every input of `predict` and to the result.
        """
        raise NotImplementedError

    def guide(self, predict: Predict, target: Actions, weights: Actions) -> Predict:
        """Return the head with predictions that pull samples towards `target`, where weights (0 to 1) are not 0."""
        raise NotImplementedError


NOISES: "Registry[Callable[[Any], NoiseProcess]]" = Registry(
    "model.action_head.noise.type", package="vla_foundry.models", decorator="register_noise"
)


# register a factory of params as the noise process of this name
register_noise = NOISES.register


def create_noise(params: NoiseParams) -> NoiseProcess:
    """Build the noise process that `params` describe."""
    return NOISES.get(params.type)(params)


@register_noise("flow")
class FlowMatching(NoiseProcess):
    """Flow matching (Lipman et al. 2023) along straight lines: the head predicts the velocity.

    x_t = (1 - t) actions + t noise,   velocity dx/dt = noise - actions; sampling integrates it from t = 1 to t = 0.
    """

    can_be_guided = True

    def __init__(self, params: FlowParams) -> None:
        self.params: FlowParams = params
        self._quantiles: Tensor | None = None
        if params.time_distribution == "beta":
            self._quantiles = torch.from_numpy(beta_quantiles(params.beta_a, params.beta_b))

    def spread_times(self, uniforms: Times) -> Times:
        """Map uniform draws to training times with the inverse distribution function."""
        params, times = self.params, uniforms
        if params.time_distribution == "logit_normal":
            normals = math.sqrt(2) * torch.erfinv(2 * times.clamp(2**-24, 1 - 2**-24) - 1)
            return torch.sigmoid(params.logit_mean + params.logit_std * normals)
        if self._quantiles is not None:
            self._quantiles = self._quantiles.to(times.device)
            places = times * (_NUM_QUANTILES - 1)
            below = places.long()
            return torch.lerp(self._quantiles[below], self._quantiles[below + 1], places - below)
        return times

    def add_noise(self, actions: Actions, noise: Actions, times: Times) -> Actions:
        """Return the noised actions at these times."""
        return actions + times[:, None, None].to(actions.dtype) * (noise - actions)

    def target(self, actions: Actions, noise: Actions) -> Actions:
        """Return the velocity."""
        return noise - actions

    def sampling_times(self, num_steps: int) -> list[float]:
        """Return the times of the solver's calls."""
        times = self._times(num_steps)
        asked = times if self.params.solver == "heun" else times[:-1]
        return list(dict.fromkeys(map(self._tell, asked)))

    def _times(self, num_steps: int) -> list[float]:
        """Return the ends of the solver's steps, from 1 to 0."""
        # on the host: nothing is read back, and each step has constants of its own
        return [1 - step / num_steps for step in range(num_steps + 1)]

    def sample(self, predict: Predict, noise: Actions, num_steps: int, hold: Callable[[Tensor], Tensor]) -> Actions:
        """Integrate the velocity from noise to actions; any number of steps covers [0, 1] exactly."""
        x = hold(noise)
        for time, next_time in pairwise(self._times(num_steps)):
            width = time - next_time
            velocity = predict(x, self._tell(time))
            if self.params.solver == "heun":
                ahead = hold(self._step(x, width, velocity))
                velocity = (velocity + predict(ahead, self._tell(next_time))) / 2
            x = hold(self._step(x, width, velocity))
        return x

    def guide(self, predict: Predict, target: Actions, weights: Actions) -> Predict:
        """Guide the velocity v (Black et al. 2025, equations 2 to 4), with the denoised estimate a = x - t v:

        v - min(beta, (t^2 + (1 - t)^2) / (t (1 - t))) (weights (target - a))^T da/dx
        """

        def guided(x: Tensor, t: float) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                velocity = predict(x, t)
                estimate = x - t * velocity
                (pull,) = torch.autograd.grad(estimate, x, weights * (target - estimate.detach()))
            strength = min(_MAX_GUIDANCE, (t**2 + (1 - t) ** 2) / (t * (1 - t))) if 0 < t < 1 else _MAX_GUIDANCE
            return velocity.detach() - strength * pull

        return guided

    def _tell(self, time: float) -> float:
        """Return the time passed to the head."""
        return time

    def _step(self, x: Tensor, width: float, velocity: Tensor) -> Tensor:
        return x - width * velocity


def beta_quantiles(a: float, b: float) -> np.ndarray:
    """Return Beta(a, b)'s inverse distribution function at evenly spaced probabilities from 0 to 1, float32."""
    # substituting t = sin^2(angle) removes the poles of the density for a, b >= 1/2
    num_cells = 1 << 16
    angles = (np.arange(num_cells) + 0.5) * (np.pi / 2 / num_cells)
    mass = np.sin(angles) ** (2 * a - 1) * np.cos(angles) ** (2 * b - 1)
    distribution = np.concatenate(([0.0], np.cumsum(mass)))
    edges = np.arange(num_cells + 1) * (np.pi / 2 / num_cells)
    found = np.interp(np.linspace(0, 1, _NUM_QUANTILES), distribution / distribution[-1], edges)
    return (np.sin(found) ** 2).astype(np.float32)


@register_noise("ddpm")
class DenoisingDiffusion(NoiseProcess):
    """Denoising diffusion, trained as DDPM (Ho et al. 2020) and sampled with deterministic DDIM (Song et al. 2021).

    x_k = sqrt(alpha_k) actions + sqrt(1 - alpha_k) noise for k = 0 .. K - 1, alpha the cumulative product of 1 - beta;
    the head predicts the noise. It receives k as the time (k + 1) / K; time 0 is data.
    """

    def __init__(self, params: DDPMParams) -> None:
        self.params: DDPMParams = params
        # [K + 1], alpha at times 0, 1/K, ..., 1; no noise at time 0
        self.alphas = [1.0]
        for beta in _betas(params):
            self.alphas.append(self.alphas[-1] * (1 - beta))
        # stays on the device used last
        self._table = torch.tensor(self.alphas, dtype=torch.float64, device="cpu")

    def spread_times(self, uniforms: Times) -> Times:
        """Map uniform draws to the K times, all equally likely."""
        num = self.params.num_timesteps
        return ((uniforms * num).floor() + 1) / num

    def add_noise(self, actions: Actions, noise: Actions, times: Times) -> Actions:
        """Return the noised actions at these times."""
        self._table = self._table.to(times.device)
        alpha = self._table[(times * self.params.num_timesteps).round().long(), None, None]
        return alpha.sqrt().to(actions.dtype) * actions + (1 - alpha).sqrt().to(actions.dtype) * noise

    def target(self, actions: Actions, noise: Actions) -> Actions:
        """Return the noise."""
        return noise

    def sampling_times(self, num_steps: int) -> list[float]:
        """Return times spaced evenly from 1 to 0, without 0."""
        return [place / self.params.num_timesteps for place in self._places(num_steps)[:-1]]

    def _places(self, num_steps: int) -> list[int]:
        num = self.params.num_timesteps
        return [round(num * (1 - step / num_steps)) for step in range(num_steps + 1)]

    def sample(self, predict: Predict, noise: Actions, num_steps: int, hold: Callable[[Tensor], Tensor]) -> Actions:
        """Sample actions with DDIM at times spaced evenly from 1 to 0."""
        num, limits = self.params.num_timesteps, self.params.clamp_range
        if num_steps > num:
            raise ValueError(
                f"num_steps ({num_steps}) must be at most model.action_head.noise.num_timesteps ({num}), the steps "
                "that the head was trained on."
            )
        x = hold(noise)
        for place, next_place in pairwise(self._places(num_steps)):
            alpha, next_alpha = self.alphas[place], self.alphas[next_place]
            found = self._to_noise(x, predict(x, place / num), alpha)
            actions = (x - math.sqrt(1 - alpha) * found) / math.sqrt(alpha)
            if limits is not None:
                actions = actions.clamp(*limits)
                # the noise that corresponds to the clamped actions
                found = (x - math.sqrt(alpha) * actions) / math.sqrt(1 - alpha)
            x = hold(math.sqrt(next_alpha) * actions + math.sqrt(1 - next_alpha) * found)
        return x

    def _to_noise(self, x: Tensor, predicted: Tensor, alpha: float) -> Tensor:
        """Return the noise in x, given the head's prediction."""
        return predicted


def _betas(params: DDPMParams) -> list[float]:
    num = params.num_timesteps
    if params.beta_schedule == "linear":
        widths = max(1, num - 1)
        return [params.beta_start + (params.beta_end - params.beta_start) * k / widths for k in range(num)]

    def level(time: float) -> float:
        return math.cos((time + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * math.pi / 2) ** 2

    return [min(1 - level((k + 1) / num) / level(k / num), _LARGEST_BETA) for k in range(num)]


# On-device draws depend only on (seed, sample, purpose), never on the batch, the rank or earlier draws. The words are
# those of randomness.py, vectorised: sample s draws word n = 1, 2, ... as mix(start_s + n * golden), with
# start_s = mix(key(seed, purpose) + golden * (s + 1)) and SplitMix64's finalizer as mix, all modulo 2^64.


def draw_uniforms(samples: Int[Tensor, " S"], count: int, *, seed: int, purpose: str) -> Float[Tensor, "S {count}"]:
    """Return numbers in [0, 1) for each sample, fp32; a larger `count` only appends to a smaller one."""
    return _shift(_draw_words(samples, count, seed=seed, purpose=purpose), 40).float() * 2.0**-24


def draw_normals(
    samples: Int[Tensor, " S"], shape: Sequence[int], *, seed: int, purpose: str
) -> Float[Tensor, "S *shape"]:
    """Return standard normal numbers of `shape` for each sample, fp32 (Box and Muller 1958); |x| < 5.9."""
    count = math.prod(shape)
    words = _draw_words(samples, -(-count // 2), seed=seed, purpose=purpose)
    # two 24-bit numbers from the two halves of a word; the first is never 0
    first = (_shift(words, 40).float() + 0.5) * 2.0**-24
    second = ((words >> 8) & 0xFFFFFF).float() * (2.0**-24 * 2 * math.pi)
    radius = (-2 * first.log()).sqrt()
    pairs = torch.stack((radius * second.cos(), radius * second.sin()), dim=-1)
    return pairs.flatten(1)[:, :count].reshape(-1, *shape)


def _draw_words(samples: Tensor, count: int, *, seed: int, purpose: str) -> Int[Tensor, "S {count}"]:
    """Return `count` words of 64 random bits for each sample."""
    start = _mix((samples.long() + 1) * _GOLDEN + _signed(create_key(seed, purpose)))
    numbers = torch.arange(1, count + 1, device=samples.device) * _GOLDEN
    return _mix(start[:, None] + numbers)


def _signed(value: int) -> int:
    """Return the int64 with the same bits."""
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = _signed(GOLDEN)
_FACTORS = tuple(map(_signed, FACTORS))


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * _FACTORS[0]
    value = (value ^ _shift(value, 27)) * _FACTORS[1]
    return value ^ _shift(value, 31)
