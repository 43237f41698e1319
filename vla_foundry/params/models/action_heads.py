"""Params of action heads, which predict actions from the backbone's conditioning, and of their noise processes."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vla_foundry.config.schema import LEGACY, ChoiceParams, Derived
from vla_foundry.params.facts import Facts
from vla_foundry.params.models.roles import register_model_params
from vla_foundry.params.models.transformer import TransformerParams


@dataclass(frozen=True, kw_only=True)
class NoiseParams(ChoiceParams):
    """Role: the process between actions (time 0) and noise (time 1)."""

    _choice_registry = {}
    choice_path = "model.action_head.noise.type"

    # steps of sampling, unless the caller gives a number
    num_inference_steps: int = 10

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps ({self.num_inference_steps}) must be at least 1.")


@register_model_params("flow")
@dataclass(frozen=True, kw_only=True)
class FlowParams(NoiseParams):
    """Flow matching: straight lines from actions to noise."""

    # distribution of the times in training; beta and logit_normal have fields of their own
    time_distribution: Literal["uniform", "beta", "logit_normal"] = "uniform"
    # beta: density ~ t^(a-1) (1-t)^(b-1); a above b prefers noise
    beta_a: float = 1.5
    # beta: its other exponent
    beta_b: float = 1.0
    # logit_normal: mean of log(t / (1-t)); above 0 prefers noise
    logit_mean: float = 0.0
    # logit_normal: its standard deviation
    logit_std: float = 1.0
    # how to integrate the velocity from noise to actions; heun runs the head twice a step
    solver: Literal["euler", "heun"] = "euler"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta_a", "beta_b"):
            if getattr(self, name) < 0.5:
                raise ValueError(f"{name} ({getattr(self, name):g}) must be at least 0.5.")
        if self.logit_std <= 0:
            raise ValueError(f"logit_std ({self.logit_std:g}) must be above 0.")


@register_model_params("ddpm")
@dataclass(frozen=True, kw_only=True)
class DDPMParams(NoiseParams):
    """Denoising diffusion: trained to predict the noise (Ho et al. 2020), sampled by DDIM (Song et al. 2021)."""

    # clamp the actions that each step of sampling predicts: those of the first steps are far off; null: do not
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
        check_range("clamp_range", self.clamp_range)
        if self.num_timesteps < 1:
            raise ValueError(f"num_timesteps ({self.num_timesteps}) must be at least 1.")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start ({self.beta_start:g}) and beta_end ({self.beta_end:g}) must be in 0 .. 1, in this order."
            )


def check_range(name: str, limits: tuple[float, float] | None) -> None:
    """Check that a range is in order.

    Raises:
        ValueError: it is not.
    """
    if limits is not None and not limits[0] < limits[1]:
        raise ValueError(f"{name} ({list(limits)}) must be [smallest, largest].")


@dataclass(frozen=True, kw_only=True)
class ActionHeadParams(ChoiceParams):
    """Role: anything that maps the backbone's conditioning and proprioception to a chunk of actions."""

    _choice_registry = {}
    choice_path = "model.action_head.type"
    native_type = "flow_transformer"


@dataclass(frozen=True, kw_only=True)
class TransformerHeadParams(ActionHeadParams):
    """What heads that are transformers share: one token per action step, predicted in parallel."""

    # the head's blocks; is_causal: an action's token sees only those before it
    transformer: TransformerParams
    # conditioning comes as tokens in front of the actions, or by cross-attention in each block
    conditioning: Literal["tokens", "cross_attention"] = "tokens"

    def derive(self, root: Any, facts: Facts) -> dict[str, Derived]:
        """A head has no vocabulary, even if its size is taken from a language model's."""
        if self.transformer.vocab_size == 0:
            return {}
        return {"transformer": Derived(replace(self.transformer, vocab_size=0), "an action head has no vocabulary")}


@dataclass(frozen=True, kw_only=True)
class DenoisingHeadParams(TransformerHeadParams):
    """What heads that turn noise into actions share."""

    # how the head is told the time: by a token in front, added to the conditioning, or by adaLN-Zero (scale, shift and
    # gate in each block). With adaLN-Zero or cross-attention, conditioning is encoded once for all steps of sampling
    time_conditioning: Literal["concat", "add", "adaln_zero"] = "adaln_zero"
    # draws of noise and time for each sample and pass of the backbone
    num_action_head_repeats: int = 1
    # standard deviation of noise added to the head's noised actions and encoded proprioception in training
    input_noise_std: float = 0.0

    def __post_init__(self) -> None:
        if self.num_action_head_repeats < 1:
            raise ValueError(f"num_action_head_repeats ({self.num_action_head_repeats}) must be at least 1.")
        if self.input_noise_std < 0:
            raise ValueError(f"input_noise_std ({self.input_noise_std:g}) must be at least 0.")


@register_model_params("flow_transformer")
@dataclass(frozen=True, kw_only=True)
class FlowTransformerParams(DenoisingHeadParams):
    """A transformer that predicts the velocity of flow matching."""

    noise: FlowParams = field(default_factory=FlowParams)


@register_model_params("ddpm_transformer")
@dataclass(frozen=True, kw_only=True)
class DDPMTransformerParams(DenoisingHeadParams):
    """A transformer that predicts the noise of denoising diffusion."""

    noise: DDPMParams = field(default_factory=DDPMParams)


@register_model_params("regression")
@dataclass(frozen=True, kw_only=True)
class RegressionParams(TransformerHeadParams):
    """A transformer that predicts all actions at once, trained on their absolute error (after OpenVLA-OFT, 2025)."""

    # the head of model.type regression_policy, not offered to others
    is_offered = False

    # legacy checkpoints: false leaves out the norm after the last block
    final_norm: bool = field(default=True, metadata=LEGACY)
