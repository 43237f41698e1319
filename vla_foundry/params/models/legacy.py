"""Params of heads that only legacy checkpoints need; the importer, or what an older config says, chooses them."""

from dataclasses import dataclass, field
from typing import Literal

from vla_foundry.params.models.action_heads import DDPMParams, DenoisingHeadParams, FlowParams, check_range
from vla_foundry.params.models.roles import register_model_params


@register_model_params("legacy_flow")
@dataclass(frozen=True, kw_only=True)
class LegacyFlowParams(FlowParams):
    """Flow matching at a limited number of times, with clamped actions."""

    is_offered = False

    # keep noised actions within this range, in training and after each step of sampling; null: do not
    clamp_range: tuple[float, float] | None = None
    # train only at this many times, t = 0, 1/n, ..., (n-1)/n; null: at all between 0 and 1
    num_timesteps: int | None = None
    # while sampling, tell the head a time that is less by this
    sampling_time_shift: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("clamp_range", self.clamp_range)
        if self.num_timesteps is not None and self.num_timesteps < 1:
            raise ValueError(f"num_timesteps ({self.num_timesteps}) must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class LegacyHeadParams(DenoisingHeadParams):
    """What a denoising head needs to compute what legacy checkpoints computed."""

    is_offered = False

    # encoding of the time: sines and a small network, or a trained table with a row per time (noise.num_timesteps)
    time_encoding: Literal["mlp", "table"] = "mlp"
    # normalise the output of the last block
    final_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_encoding == "table" and (
            self.time_conditioning == "adaln_zero" or self.conditioning == "cross_attention"
        ):
            raise ValueError(
                "time_encoding 'table' goes with conditioning 'tokens' and time_conditioning 'concat' or 'add'. "
                "Use time_encoding mlp."
            )


@register_model_params("legacy_flow_transformer")
@dataclass(frozen=True, kw_only=True)
class LegacyFlowTransformerParams(LegacyHeadParams):
    """The flow transformer of legacy checkpoints, those of the paper among them."""

    noise: LegacyFlowParams = field(default_factory=LegacyFlowParams)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_encoding == "table" and self.noise.num_timesteps is None:
            raise ValueError("time_encoding 'table' has a row for each time: give noise.num_timesteps.")


@register_model_params("legacy_ddpm_transformer")
@dataclass(frozen=True, kw_only=True)
class LegacyDDPMTransformerParams(LegacyHeadParams):
    """The DDPM transformer of legacy checkpoints."""

    noise: DDPMParams = field(default_factory=DDPMParams)
