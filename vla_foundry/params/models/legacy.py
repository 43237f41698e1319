"""Params of heads that only legacy checkpoints need; the importer and older configs select them."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from vla_foundry.config.schema import Bounds, Finite, Size
from vla_foundry.params.models.action_heads import DDPMParams, DenoisingHeadParams, FlowParams, check_range
from vla_foundry.params.models.roles import register_model_params


@register_model_params("legacy_flow")
@dataclass(frozen=True, kw_only=True)
class LegacyFlowParams(FlowParams):
    """Flow matching at a limited number of times, with clamped actions."""

    is_offered = False

    # clamp noised actions to this range, in training and after each sampling step; null: no clamping
    clamp_range: tuple[Finite, Finite] | None = None
    # train only at this many times, t = 0, 1/n, ..., (n-1)/n; null: all times between 0 and 1
    num_timesteps: Size | None = None
    # subtract this from the time that the head receives during sampling
    sampling_time_shift: Annotated[float, Bounds(least=-1, most=1)] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("clamp_range", self.clamp_range)


@register_model_params("legacy_ddpm")
@dataclass(frozen=True, kw_only=True)
class LegacyDDPMParams(DDPMParams):
    """Denoising diffusion whose time table has row k for the noise of step k = 0 .. num_timesteps - 1."""

    is_offered = False

    # what the head predicts: noise, or velocity (noise - actions)
    target: Literal["noise", "velocity"] = "noise"


@dataclass(frozen=True, kw_only=True)
class LegacyHeadParams(DenoisingHeadParams):
    """Options that reproduce the denoising heads of legacy checkpoints."""

    is_offered = False

    # time encoding: sines and a small network, or a trained table with one row per time (noise.num_timesteps)
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
    """The flow transformer of legacy checkpoints, including the paper's."""

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
