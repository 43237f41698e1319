"""Params of action heads: what predicts actions from what the backbone makes of an observation."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vla_foundry.config.schema import ChoiceParams, Derived
from vla_foundry.params.facts import Facts
from vla_foundry.params.models.base import register_model_params
from vla_foundry.params.models.noise import DDPMParams, FlowParams, NoiseParams
from vla_foundry.params.models.transformer import TransformerParams


@dataclass(frozen=True, kw_only=True)
class ActionHeadParams(ChoiceParams):
    """Role: anything that maps the backbone's conditioning and proprioception to a chunk of actions."""

    _choice_registry = {}
    choice_path = "model.action_head.type"
    native_type = "flow_transformer"


@dataclass(frozen=True, kw_only=True)
class TransformerHeadParams(ActionHeadParams):
    """What heads that are transformers share: one token a step of actions, predicted in parallel."""

    # the head's blocks; is_causal: an action's token sees only those before it
    transformer: TransformerParams
    # conditioning comes as tokens in front of the actions, or by cross-attention in each block
    conditioning: Literal["tokens", "cross_attention"] = "tokens"
    # normalise what the last block gives; false: imported checkpoints
    final_norm: bool = True

    def derive(self, root: Any, facts: Facts) -> dict[str, Derived]:
        """A head has no vocabulary, whatever the size it was taken from."""
        if self.transformer.vocab_size == 0:
            return {}
        return {"transformer": Derived(replace(self.transformer, vocab_size=0), "an action head has no vocabulary")}


@dataclass(frozen=True, kw_only=True)
class DenoisingHeadParams(TransformerHeadParams):
    """What heads that turn noise into actions share."""

    # how the head is told the time: a token in front, added to the conditioning, or by its norms (adaptive layer norm);
    # with the last one, or with cross-attention, conditioning is encoded once for all steps of sampling
    time_conditioning: Literal["concat", "add", "adaptive_norm"] = "adaptive_norm"
    # encoding of the time: sines and a small network, or a trained table with a row per time (noise.num_timesteps)
    time_encoding: Literal["mlp", "table"] = "mlp"
    # draws of noise and time for each sample and pass of the backbone
    num_action_head_repeats: int = 1
    # standard deviation of noise added to the head's noised actions and encoded proprioception in training
    input_noise_std: float = 0.0

    def noise_params(self) -> NoiseParams:
        """Params of its noise process."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        if self.num_action_head_repeats < 1:
            raise ValueError(f"num_action_head_repeats ({self.num_action_head_repeats}) must be at least 1.")
        if self.input_noise_std < 0:
            raise ValueError(f"input_noise_std ({self.input_noise_std:g}) must be at least 0.")
        if self.time_encoding == "table" and (
            self.time_conditioning == "adaptive_norm" or self.conditioning == "cross_attention"
        ):
            raise ValueError(
                "time_encoding 'table' goes with conditioning 'tokens' and time_conditioning 'concat' or 'add'. "
                "Use time_encoding mlp."
            )


@register_model_params("flow_transformer")
@dataclass(frozen=True, kw_only=True)
class FlowTransformerParams(DenoisingHeadParams):
    """A transformer that predicts the velocity of flow matching."""

    noise: FlowParams = field(default_factory=FlowParams)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_encoding == "table" and self.noise.num_timesteps is None:
            raise ValueError("time_encoding 'table' has a row for each time: give noise.num_timesteps.")

    def noise_params(self) -> NoiseParams:
        """Flow matching's."""
        return self.noise


@register_model_params("ddpm_transformer")
@dataclass(frozen=True, kw_only=True)
class DDPMTransformerParams(DenoisingHeadParams):
    """A transformer that predicts the noise of denoising diffusion."""

    noise: DDPMParams = field(default_factory=DDPMParams)

    def noise_params(self) -> NoiseParams:
        """Denoising diffusion's."""
        return self.noise


@register_model_params("regression")
@dataclass(frozen=True, kw_only=True)
class RegressionParams(TransformerHeadParams):
    """A transformer that predicts all actions at once, trained on their absolute error (after OpenVLA-OFT, 2025)."""
