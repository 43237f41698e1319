"""Create the policy that vla_train.py and vla_infer.py measure, and batches for it.

The reference configuration: a vision-language model of transformer_11m and vit_tiny (224 pixels, patch 14: 256 tokens
per image) with 2 images and 32 tokens of text, whose last 4 layers condition the head at the observation token; a head
like transformer_tiny, not causal, for 16 steps of 20 dimensions, with 2 x 20 numbers of proprioception.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vla_foundry.batch import Batch, Documents
from vla_foundry.models import create_batch_handler, create_model
from vla_foundry.params import HyperParams, ModelParams, TrainExperimentParams, load_params_from_yaml
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.models.action_heads import FlowTransformerParams
from vla_foundry.params.models.backbones import VLMFoundryBackboneParams
from vla_foundry.params.models.policy import DiffusionPolicyParams

PRESET = "config_presets/models/vla_11m.yaml"
IMAGE_TOKEN = 50_000
NUM_TEXT, NUM_STEPS, NUM_PAST, WIDTH = 32, 16, 1, 20


def create_params(preset: str, *, repeats: int, time_conditioning: str, precision: str) -> TrainExperimentParams:
    """Return params of the policy and of a training step."""
    model = load_params_from_yaml(ModelParams, preset)
    assert isinstance(model, DiffusionPolicyParams)
    backbone, head = model.vision_language_backbone, model.action_head
    assert isinstance(backbone, VLMFoundryBackboneParams)
    assert isinstance(head, FlowTransformerParams)
    assert backbone.vlm is not None
    vlm = replace(backbone.vlm, image_token_id=IMAGE_TOKEN)
    head = replace(head, num_action_head_repeats=repeats, time_conditioning=time_conditioning)  # pyright: ignore
    return TrainExperimentParams(
        data=RoboticsDataParams(),
        model=replace(
            model,
            vision_language_backbone=replace(backbone, vlm=vlm),
            action_head=head,
            action_dim=WIDTH,
            proprioception_dim=WIDTH,
        ),
        hparams=HyperParams(precision=precision, grad_clip_norm=1.0),  # pyright: ignore[reportArgumentType]
    )


def create_policy(params: TrainExperimentParams) -> tuple[Any, Any]:
    """Return the model and its batch handler."""
    torch.manual_seed(0)
    return create_model(params.model), create_batch_handler(params)


def create_batch(params: TrainExperimentParams, *, num_samples: int, num_views: int) -> Batch:
    """Return samples of random images, text, proprioception and actions."""
    inputs = params.model.image_inputs()
    assert inputs.image_size is not None
    assert inputs.img_num_tokens is not None
    generator = torch.Generator().manual_seed(0)
    length = num_views * inputs.img_num_tokens + NUM_TEXT
    ids = torch.randint(1, 40_000, (num_samples, length), generator=generator).int()
    ids[:, : num_views * inputs.img_num_tokens] = IMAGE_TOKEN
    past_mask = (torch.arange(NUM_STEPS) < NUM_PAST).repeat(num_samples, 1)
    side = inputs.image_size
    pixels = torch.randint(0, 256, (num_samples * num_views, 3, side, side), generator=generator)
    return {
        "modality": "robotics",
        "positions": torch.arange(num_samples),
        "input_ids": ids,
        "documents": Documents(
            np.full(num_samples, length, np.int32), np.ones(num_samples, np.int32), np.zeros(num_samples, dtype=bool)
        ),
        "pixel_values": pixels.to(torch.uint8),
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "image_mask": torch.ones(num_samples, num_views, dtype=torch.bool),
        "actions": torch.randn(num_samples, NUM_STEPS, WIDTH, generator=generator),
        "proprioception": torch.randn(num_samples, NUM_PAST + 1, WIDTH, generator=generator),
        "past_mask": past_mask,
        "future_mask": ~past_mask,
        "is_padding": torch.zeros_like(past_mask),
        "action_dim_mask": torch.ones(num_samples, WIDTH, dtype=torch.bool),
    }
