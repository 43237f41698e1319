"""Params of action heads, which predict actions from the backbone's conditioning, and of their noise processes."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from vla_foundry.config.schema import LEGACY, Bounds, ChoiceParams, Derived, Finite, Location, Size, Unavailable
from vla_foundry.params.facts import Facts
from vla_foundry.params.models.roles import register_model_params
from vla_foundry.params.models.transformer import TransformerParams
from vla_foundry.robotics.fields import Window


@dataclass(frozen=True, kw_only=True)
class NoiseParams(ChoiceParams):
    """Role: the process between actions (time 0) and noise (time 1)."""

    _choice_registry = {}
    choice_path = "model.action_head.noise.type"

    # default number of sampling steps
    num_inference_steps: Size = 10


_Exponent = Annotated[float, Bounds(least=0.5, most=1000)]
# the sigmoid of more is 0 or 1
_Logit = Annotated[float, Bounds(least=-30, most=30)]
_Variance = Annotated[float, Bounds(above=0, below=1)]


@register_model_params("flow")
@dataclass(frozen=True, kw_only=True)
class FlowParams(NoiseParams):
    """Flow matching: straight lines from actions to noise."""

    # distribution of training times; beta and logit_normal have their own fields below
    time_distribution: Literal["uniform", "beta", "logit_normal"] = "uniform"
    # beta: density ~ t^(a-1) (1-t)^(b-1); a above b prefers noise
    beta_a: _Exponent = 1.5
    # beta: exponent b
    beta_b: _Exponent = 1.0
    # logit_normal: mean of log(t / (1-t)); above 0 prefers noise
    logit_mean: _Logit = 0.0
    # logit_normal: its standard deviation
    logit_std: Annotated[float, Bounds(above=0, most=30)] = 1.0
    # integrator of the velocity from noise to actions; heun runs the head twice per step
    solver: Literal["euler", "heun"] = "euler"


@register_model_params("ddpm")
@dataclass(frozen=True, kw_only=True)
class DDPMParams(NoiseParams):
    """Denoising diffusion: trained to predict the noise (Ho et al. 2020), sampled by DDIM (Song et al. 2021)."""

    # clamp the actions predicted at each sampling step, because early predictions are far off; null: no clamping
    clamp_range: tuple[Finite, Finite] | None = (-5.0, 5.0)
    # number of diffusion steps in training
    num_timesteps: Size = 100
    # variance schedule: cosine (Nichol and Dhariwal 2021), or linear from beta_start to beta_end
    beta_schedule: Literal["cosine", "linear"] = "cosine"
    # linear: variance of the first step
    beta_start: _Variance = 1e-4
    # linear: variance of the last step
    beta_end: _Variance = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("clamp_range", self.clamp_range)
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start ({self.beta_start}) must not be above beta_end ({self.beta_end}).")

    def check(self, root: Any, facts: Facts, path: str) -> list[str]:
        """Check that sampling takes no more steps than there are."""
        if self.num_inference_steps > self.num_timesteps:
            raise ValueError(
                f"{path}.num_inference_steps ({self.num_inference_steps}) must be at most {path}.num_timesteps "
                f"({self.num_timesteps})."
            )
        return []


def check_range(name: str, limits: tuple[float, float] | None) -> None:
    """Check that a range is ascending.

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
    """Shared by transformer heads: one token per action step, predicted in parallel."""

    # the head's blocks; with is_causal, an action token sees only earlier action tokens
    transformer: TransformerParams
    # conditioning enters as tokens before the actions, by cross-attention in each block, or each block's attention
    # includes one of the backbone's last layers (joint_attention; needs its `conditioning: prefix`)
    conditioning: Literal["tokens", "cross_attention", "joint_attention"] = "tokens"

    def count_tokens(self, window: Window, *, has_proprioception: bool) -> int:
        """Return the least length of the head's sequence; its conditioning may be longer than one token."""
        return window.num_steps

    def derive(self, root: Any, facts: Facts) -> dict[str, Derived]:
        """Set the vocabulary size to 0, even if the transformer copies a language model's config."""
        if self.transformer.vocab_size == 0:
            return {}
        return {"transformer": Derived(replace(self.transformer, vocab_size=0), "an action head has no vocabulary")}


@dataclass(frozen=True, kw_only=True)
class DenoisingHeadParams(TransformerHeadParams):
    """Shared by heads that turn noise into actions."""

    # how time enters the head: as a first token, added to the conditioning, or by adaLN-Zero (scale, shift and gate in
    # each block); with adaLN-Zero or cross-attention, conditioning is encoded once for all sampling steps
    time_conditioning: Literal["concat", "add", "adaln_zero"] = "adaln_zero"
    # draws of noise and time per sample in each backbone pass
    num_action_head_repeats: Size = 1
    # training only: standard deviation of noise added to noised actions and encoded proprioception
    input_noise_std: Annotated[float, Bounds(least=0, most=1000)] = 0.0

    def count_tokens(self, window: Window, *, has_proprioception: bool) -> int:
        """Return the least length of the head's sequence; its conditioning may be longer than one token."""
        time = int(self.time_conditioning == "concat")
        if self.conditioning == "cross_attention":
            return time + window.num_steps
        if self.conditioning == "joint_attention":
            return time + has_proprioception * (window.past + 1) + window.num_steps
        # with adaLN-Zero, conditioning and proprioception are a sequence of their own
        is_joint = self.time_conditioning != "adaln_zero"
        return time + is_joint * (1 + has_proprioception * (window.past + 1)) + window.num_steps


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

    # only for model.type regression_policy
    is_offered = False

    # legacy checkpoints: false leaves out the norm after the last block
    final_norm: bool = field(default=True, metadata=LEGACY)


@dataclass(frozen=True, kw_only=True)
class TokenHeadParams(ActionHeadParams):
    """Shared by heads that write actions as tokens, one after another, with the backbone's language model."""


@register_model_params("fast_tokens")
@dataclass(frozen=True, kw_only=True)
class FastTokensParams(TokenHeadParams):
    """Actions as FAST tokens: a compressed chunk, in the words of a tokenizer trained on the dataset (2025)."""

    # file of `vla-foundry data action-tokenizer`, made for the same fields, steps and normalization
    tokenizer: Location


@register_model_params("discrete_bins")
@dataclass(frozen=True, kw_only=True)
class DiscreteBinsParams(TokenHeadParams):
    """Actions as numbers of bins, one token for each value (as in OpenVLA, 2024)."""

    # steps to predict; null: as in the data
    num_steps: Size | None = None
    # number of bins of a value
    num_bins: Annotated[int, Bounds(least=2, most=100_000)] = 256
    # normalized values of the first bin's start and the last bin's end; values outside are clipped
    limits: tuple[Finite, Finite] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("limits", self.limits)

    def derive(self, root: Any, facts: Facts) -> dict[str, Derived]:
        """Derive the number of steps from the data."""
        if self.num_steps is not None:
            return {}
        window = root.data.robot_window()
        needs = Unavailable("data of type robotics, or --model.action_head.num_steps N")
        return {"num_steps": Derived(needs if window is None else window.future + 1, "the data")}
