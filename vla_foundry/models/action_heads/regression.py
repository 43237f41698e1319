"""The regression head: predicts all steps at once with an L1 loss (after OpenVLA-OFT, Kim et al. 2025).

It is the head of `regression_policy`. Conditioning and proprioception form its context. Each step's token encodes the
step index, and for observed steps also the action.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from vla_foundry.batch import LossOutput
from vla_foundry.models.action_heads.action_head import (
    ActionWindow,
    DrawKey,
    HeadWidths,
    reduce_loss,
    register_action_head,
)
from vla_foundry.models.action_heads.decoder import Part, append_steps, join_parts, place_after, place_steps
from vla_foundry.models.action_heads.flow_transformer import READINGS, TransformerHead
from vla_foundry.models.backbones.backbone import Conditioning
from vla_foundry.params.models.action_heads import RegressionParams


@register_action_head("regression")
class RegressionHead(TransformerHead):
    """A transformer that predicts actions directly, without noise."""

    def __init__(self, params: RegressionParams, widths: HeadWidths) -> None:
        reading = READINGS.get(params.conditioning, "prefix")
        super().__init__(params, widths, reading=reading, final_norm=params.final_norm)
        self.init_weights()

    def forward(self, conditioning: Conditioning, window: ActionWindow, key: DrawKey) -> LossOutput:
        """Return the summed absolute error."""
        predicted = self.predict(conditioning, window)
        errors = (predicted - window.actions.to(predicted.dtype)).abs()
        return reduce_loss(errors.to(torch.promote_types(errors.dtype, torch.float32)), window)

    @torch.no_grad()
    def sample(
        self, conditioning: Conditioning, window: ActionWindow, key: DrawKey, num_steps: int | None
    ) -> Float[Tensor, "B T A"]:
        """Predict in one pass; `key` and `num_steps` are not used."""
        predicted = self.predict(conditioning, window).float()
        return torch.where(window.free_mask(), predicted, window.held_actions())

    def predict(self, conditioning: Conditioning, window: ActionWindow) -> Float[Tensor, "B T A"]:
        """Return the predicted actions of all steps."""
        parts: list[Part] = []
        if self.condition_encode is not None:
            parts = [(self.condition_encode(conditioning.tokens.to(self.dtype)), conditioning.mask)]
        proprioception = self.embed_proprioception(window.proprioception)
        if proprioception is not None:
            parts.append((proprioception, None))
        observed = self.action_encode(window.held_actions().to(self.dtype))
        values = self.add_steps(torch.where(window.past_mask[..., None], observed, 0.0))
        if self.condition_encode is not None:
            context = join_parts(parts)
            in_front = context if self.transformer.reading == "prefix" else None
            tokens = place_steps(values, window.step_mask, in_front)
        else:
            context, front = join_parts([conditioning[:2]]), join_parts(parts) if parts else None
            tokens = place_steps(values, window.step_mask, front)
            tokens = place_after(tokens if front is None else append_steps(front, tokens), context)
        return self.output_layer(self.transformer(tokens, context, num_outputs=values.shape[1]))
