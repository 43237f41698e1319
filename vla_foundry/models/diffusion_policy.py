"""The robot policy (VLA): a backbone encodes images and instruction, an action head predicts a chunk of actions.

conditioning = backbone(observation)
loss         = action head(conditioning, window of actions and proprioception)
actions      = action head.sample(conditioning, window)
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vla_foundry.batch import LossOutput
from vla_foundry.models.action_heads.base import ActionWindow, DrawKey, HeadWidths, create_action_head
from vla_foundry.models.backbones.base import create_backbone
from vla_foundry.models.registry import register_model
from vla_foundry.params.models.diffusion_policy import DiffusionPolicyParams


class DiffusionPolicy(nn.Module):
    """Observations to a loss, or to actions."""

    def __init__(self, vision_language_backbone: Any, action_head: Any) -> None:
        super().__init__()
        # any of several classes each
        self.vision_language_backbone: Any = vision_language_backbone
        self.action_head: Any = action_head

    def forward(
        self,
        *,
        observation: dict[str, Any],
        actions: Float[Tensor, "B T A"],
        past_mask: Bool[Tensor, "B T"],
        future_mask: Bool[Tensor, "B T"],
        samples: Int[Tensor, " B"],
        seed: int,
        proprioception: Float[Tensor, "B P D"] | None = None,
        action_dim_mask: Bool[Tensor, "B A"] | None = None,
        step_mask: Bool[Tensor, "B T"] | None = None,
    ) -> LossOutput:
        """Return the loss; RoboticsBatchHandler makes the arguments from a batch.

        Noise and times are a function of (seed, sample), and of whether the model is in training: in validation the
        same sample always gets the same ones.

        Args:
            observation: what the backbone takes.
            samples: position of each sample in the plan.
            seed: of the run.
            step_mask: True at steps that are no padding; None: none is.

        Returns:
            LossOutput whose count is the number of valid numbers: steps to be predicted x dimensions that are there.
        """
        window = ActionWindow(actions, past_mask, future_mask, action_dim_mask, proprioception, step_mask)
        conditioning = self.vision_language_backbone(**observation)
        stage = "training" if self.training else "validation"
        return self.action_head(conditioning, window, DrawKey(samples, seed, stage))

    @torch.no_grad()
    def sample(
        self,
        inputs: dict[str, Any],
        *,
        seeds: Int[Tensor, " B"],
        num_steps: int | None = None,
    ) -> Float[Tensor, "B T A"]:
        """Return normalised actions, fp32: observed steps as they are, and those to be predicted.

        Args:
            inputs: what RoboticsBatchHandler.prepare makes of a batch. `actions` may be left out if no step is
                observed (past_mask); of others only the observed steps are read.
            seeds: of each sample, alone decide its noise: what else is in the batch changes nothing.
            num_steps: steps from noise to actions; None: as the params of the noise process say.
        """
        observation, window = inputs["observation"], self._window(inputs)
        conditioning = self.vision_language_backbone(**observation)
        return self.action_head.sample(conditioning, window, DrawKey(seeds, 0, "sampling"), num_steps)

    def _window(self, inputs: dict[str, Any]) -> ActionWindow:
        past_mask: Tensor = inputs["past_mask"]
        actions: Tensor | None = inputs.get("actions")
        if actions is None:
            shape = (*past_mask.shape, self.action_head.output_layer.out_features)
            actions = torch.zeros(shape, device=past_mask.device)
        return ActionWindow(
            actions.float(),
            past_mask,
            inputs["future_mask"],
            inputs.get("action_dim_mask"),
            inputs.get("proprioception"),
            inputs.get("step_mask"),
        )

    def blocks(self) -> list[nn.Module]:
        """Those of the backbone, and those of the head."""
        return [*self.vision_language_backbone.blocks(), *self.action_head.blocks()]

    def init_weights(self) -> None:
        """Draw the weights of both parts."""
        self.vision_language_backbone.init_weights()
        self.action_head.init_weights()

    def num_flops_per_token(self, seq_len: int) -> float:
        """Those of the backbone; the head, whose tokens are no tokens of a row, is left out."""
        return self.vision_language_backbone.num_flops_per_token(seq_len)

    def save_files(self, folder: Path) -> None:
        """Write the architecture of Hugging Face parts (DiffusionPolicyParams.with_model_files reads it)."""
        self.vision_language_backbone.save_files(folder)


@register_model("diffusion_policy")
def create_diffusion_policy(params: DiffusionPolicyParams, load_pretrained: bool = True) -> DiffusionPolicy:
    """Build the policy; a backbone that names a checkpoint starts from its weights.

    Raises:
        ValueError: a width is missing, or a checkpoint does not fit.
        FileNotFoundError: there is no such checkpoint.
    """
    if params.action_dim is None or params.proprioception_dim is None:
        name = "action_dim" if params.action_dim is None else "proprioception_dim"
        raise ValueError(f"model.{name} is missing. Give --model.{name} N, or data of type robotics.")
    backbone = create_backbone(params.vision_language_backbone, load_pretrained)
    widths = HeadWidths(
        action_dim=params.action_dim,
        proprioception_dim=params.proprioception_dim,
        conditioning_dim=backbone.conditioning_dim,
    )
    return DiffusionPolicy(backbone, create_action_head(params.action_head, widths))
