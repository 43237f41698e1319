"""The flow and DDPM heads of legacy checkpoints; the paper's published policies use the flow head.

The params control how it differs from action_heads/flow_transformer.py. Time may be a row of a trained table as wide as
the conditioning, added to it before both are mapped to the head's width. The final norm may be left out. Flow matching
may use a limited number of times, clamp noised actions, and pass the head a smaller time during sampling. Denoising
diffusion may predict the velocity.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vla_foundry.models.action_heads.action_head import HeadWidths, register_action_head
from vla_foundry.models.action_heads.decoder import Part, encode_sines
from vla_foundry.models.action_heads.flow_transformer import FlowTransformer
from vla_foundry.models.action_heads.noise import Actions, DenoisingDiffusion, FlowMatching, Times, register_noise
from vla_foundry.params.models.legacy import LegacyDDPMParams, LegacyFlowParams, LegacyHeadParams


@register_noise("legacy_flow")
class LegacyFlowMatching(FlowMatching):
    """Flow matching with a limited number of times, clamped actions and shifted sampling times."""

    def __init__(self, params: LegacyFlowParams) -> None:
        super().__init__(params)
        self.num_timesteps, self.clamp_range = params.num_timesteps, params.clamp_range
        self.time_shift = params.sampling_time_shift

    def spread_times(self, uniforms: Times) -> Times:
        """Map uniform draws to training times."""
        times = super().spread_times(uniforms)
        if self.num_timesteps is not None:
            times = (times * self.num_timesteps).floor() / self.num_timesteps
        return times

    def add_noise(self, actions: Actions, noise: Actions, times: Times) -> Actions:
        """Return the noised actions at these times."""
        return self._clamp(super().add_noise(actions, noise, times))

    def _tell(self, time: float) -> float:
        return max(0.0, time - self.time_shift)

    def _step(self, x: Tensor, width: float, velocity: Tensor) -> Tensor:
        return self._clamp(super()._step(x, width, velocity))

    def _clamp(self, x: Tensor) -> Tensor:
        return x if self.clamp_range is None else x.clamp(*self.clamp_range)


@register_noise("legacy_ddpm")
class LegacyDenoisingDiffusion(DenoisingDiffusion):
    """Denoising diffusion that may predict the velocity, noise - actions; its time table starts at the first step."""

    def __init__(self, params: LegacyDDPMParams) -> None:
        super().__init__(params)
        self.predicts_velocity = params.target == "velocity"

    def target(self, actions: Actions, noise: Actions) -> Actions:
        """Return the head's training target."""
        return noise - actions if self.predicts_velocity else noise

    def _to_noise(self, x: Tensor, predicted: Tensor, alpha: float) -> Tensor:
        if not self.predicts_velocity:
            return predicted
        # solve x = a actions + s noise with noise = actions + velocity
        a, s = math.sqrt(alpha), math.sqrt(1 - alpha)
        return predicted + (x - s * predicted) / (a + s)


class TimeTableTransformer(FlowTransformer):
    """A flow transformer whose times are rows of a trained table, as wide as the conditioning.

    Row r is time r / num_timesteps; for legacy_ddpm, whose first step k = 0 is time 1 / num_timesteps, row k is step k.
    """

    def create_time_encoding(self, widths: HeadWidths) -> nn.Module:
        """Create the table."""
        return nn.Embedding(self.process.params.num_timesteps, widths.conditioning_dim)

    def embed_conditioning(self, tokens: Float[Tensor, "B K C"]) -> Float[Tensor, "B K C"]:
        """Return the tokens unchanged; `add_time` maps them to the head's width after adding the time."""
        return tokens

    def embed_time(self, times: Times) -> Float[Tensor, "N C"]:
        """Take the nearest row of each time."""
        num = self.time_encoding.num_embeddings
        first = 1 if isinstance(self.process, LegacyDenoisingDiffusion) else 0
        return self.time_encoding(((times * num).round().long() - first).clamp(0, num - 1))

    def add_time(self, parts: list[Part], time: Float[Tensor, "N C"]) -> list[Part]:
        """Insert time into the joint sequence and map conditioning to the head's width."""
        (tokens, mask), *others = parts
        if self.params.time_conditioning == "concat":
            in_front: Part = (self.condition_encode(time).unsqueeze(1), None)
            return [in_front, (self.condition_encode(tokens), mask), *others]
        return [(self.condition_encode(tokens + time.unsqueeze(1)), mask), *others]

    def init_time_encoding(self) -> None:
        """Start the table as sines."""
        table: Any = self.time_encoding.weight
        table.copy_(encode_sines(torch.arange(table.shape[0], device=table.device), table.shape[1]))


@register_action_head("legacy_flow_transformer")
@register_action_head("legacy_ddpm_transformer")
def create_legacy_head(params: LegacyHeadParams, widths: HeadWidths) -> FlowTransformer:
    """Build the head; flow and DDPM heads differ only in the noise process."""
    head = TimeTableTransformer if params.time_encoding == "table" else FlowTransformer
    return head(params, widths, final_norm=params.final_norm)
