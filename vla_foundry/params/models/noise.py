"""Params of noise processes: how actions become noise, and how a denoising head finds the way back."""

from dataclasses import dataclass
from typing import Literal

from vla_foundry.config.schema import ChoiceParams
from vla_foundry.params.models.base import register_model_params


@dataclass(frozen=True, kw_only=True)
class NoiseParams(ChoiceParams):
    """Role: what lies between actions (time 0) and noise (time 1)."""

    _choice_registry = {}
    choice_path = "model.action_head.noise.type"

    # steps of sampling, unless the caller says how many
    num_inference_steps: int = 10
    # values are kept within this range, see each type; null: not
    clamp_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps ({self.num_inference_steps}) must be at least 1.")
        if self.clamp_range is not None and not self.clamp_range[0] < self.clamp_range[1]:
            raise ValueError(f"clamp_range ({list(self.clamp_range)}) must be [smallest, largest].")


@register_model_params("flow")
@dataclass(frozen=True, kw_only=True)
class FlowParams(NoiseParams):
    """Flow matching: straight lines from actions to noise."""

    # keep noised actions within this range, in training and after each step of sampling; null: not
    clamp_range: tuple[float, float] | None = None
    # which times are trained on; beta and logit_normal have their own fields
    time_distribution: Literal["uniform", "beta", "logit_normal"] = "uniform"
    # beta: density ~ t^(a-1) (1-t)^(b-1); a above b prefers noise
    beta_a: float = 1.5
    # beta: its other exponent
    beta_b: float = 1.0
    # logit_normal: mean of log(t / (1-t)); above 0 prefers noise
    logit_mean: float = 0.0
    # logit_normal: its standard deviation
    logit_std: float = 1.0
    # train on this many times only, t = 0, 1/n, ..., (n-1)/n; null: on all between 0 and 1
    num_timesteps: int | None = None
    # how the velocity is integrated from noise to actions; heun asks the head twice a step
    solver: Literal["euler", "heun"] = "euler"
    # imported checkpoints: while sampling, tell the head a time that is less by this (theirs was off by one step)
    sampling_time_shift: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta_a", "beta_b"):
            if getattr(self, name) < 0.5:
                raise ValueError(f"{name} ({getattr(self, name):g}) must be at least 0.5.")
        if self.logit_std <= 0:
            raise ValueError(f"logit_std ({self.logit_std:g}) must be above 0.")
        if self.num_timesteps is not None and self.num_timesteps < 1:
            raise ValueError(f"num_timesteps ({self.num_timesteps}) must be at least 1.")


@register_model_params("ddpm")
@dataclass(frozen=True, kw_only=True)
class DDPMParams(NoiseParams):
    """Denoising diffusion: trained to tell the noise (Ho et al. 2020), sampled by DDIM (Song et al. 2021)."""

    # keep the actions that each step of sampling arrives at within this range: the first steps are far off; null: not
    clamp_range: tuple[float, float] | None = (-5.0, 5.0)
    # steps of the process in training
    num_timesteps: int = 100
    # how variance grows: cosine (Nichol and Dhariwal 2021), or linear from beta_start to beta_end
    beta_schedule: Literal["cosine", "linear"] = "cosine"
    # linear: variance of the first step
    beta_start: float = 1e-4
    # linear: variance of the last step
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_timesteps < 1:
            raise ValueError(f"num_timesteps ({self.num_timesteps}) must be at least 1.")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start ({self.beta_start:g}) and beta_end ({self.beta_end:g}) must be in 0 .. 1, in this order."
            )
