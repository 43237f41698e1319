"""Batches of robot data into the inputs of a policy: predict the actions of a window from what is observed."""

from typing import Any

import torch
from torch import Tensor

from vla_foundry.batch import Batch
from vla_foundry.models.backbones.base import OBSERVATIONS, to_device
from vla_foundry.models.registry import register_batch_handler
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.params.models.diffusion_policy import DiffusionPolicyParams


@register_batch_handler("diffusion_policy")
class RoboticsBatchHandler:
    """Samples of images, an instruction, proprioception and a window of actions."""

    def __init__(self, params: TrainExperimentParams) -> None:
        if not isinstance(params.model, DiffusionPolicyParams):
            raise ValueError(f"model.type '{params.model.type}' is no policy. Use --model.type diffusion_policy.")
        self.backbone = params.model.vision_language_backbone
        self.seed = params.hparams.seed
        self._prepare_observation = OBSERVATIONS.get(self.backbone.type)

    def prepare(self, batch: Batch, device: torch.device | str) -> dict[str, Any]:
        """Return what DiffusionPolicy.forward takes."""
        positions = torch.as_tensor(batch["positions"], dtype=torch.int64)
        return {
            **self.prepare_sampling(batch, device),
            "samples": to_device(positions, device),
            "seed": self.seed,
        }

    def prepare_sampling(self, batch: Batch, device: torch.device | str) -> dict[str, Any]:
        """Return what DiffusionPolicy.sample takes; the batch need not have positions, nor actions of steps to come.

        Raises:
            ValueError: steps are observed, but there are no actions.
        """
        past_mask, future_mask = batch["past_mask"], batch["future_mask"]
        if batch.get("actions") is None and past_mask.any():
            raise ValueError("past_mask says that steps are observed, but there are no actions.")
        inputs: dict[str, Any] = {
            "observation": self._prepare_observation(self.backbone, batch, device),
            "past_mask": to_device(past_mask, device),
            "future_mask": to_device(future_mask, device),
        }
        # seen on the host: without padding nothing is masked, which is faster
        step_mask = past_mask | future_mask
        inputs["step_mask"] = None if step_mask.all() else to_device(step_mask, device)
        action_dim_mask: Tensor | None = batch.get("action_dim_mask")
        if action_dim_mask is not None and not action_dim_mask.all():
            inputs["action_dim_mask"] = to_device(action_dim_mask, device)
        for name in ("actions", "proprioception"):
            if batch.get(name) is not None:
                inputs[name] = to_device(batch[name], device)
        return inputs

    def count_targets(self, inputs: dict[str, Any]) -> Tensor:
        """The number of valid numbers: steps to be predicted x dimensions that are there."""
        future_mask: Tensor = inputs["future_mask"]
        num_steps = future_mask.sum(1)
        action_dim_mask: Tensor | None = inputs.get("action_dim_mask")
        if action_dim_mask is None:
            return num_steps.sum() * inputs["actions"].shape[-1]
        return (num_steps * action_dim_mask.sum(1)).sum()
