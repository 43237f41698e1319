# %% [markdown]
# # A model, an action head and a batch handler of your own
#
# About a minute on two CPU cores. No central file is edited: a module registers its parts by name, and `--plugins` imports it
# before the config is parsed. CONTRIBUTING.md lists all that can be registered.

# %%
import json
import os
import tempfile
from pathlib import Path

os.chdir(tempfile.mkdtemp())

# %% [markdown]
# ## A language model, and how it reads a batch
# Params are a frozen dataclass; the comment above a field is its help. A model's `forward` returns a `LossOutput`: a sum and a
# count, so that a step's mean is over all of its tokens, on any number of ranks. The batch handler turns a batch into what
# `forward` takes; ours hides a share of the input tokens.

# %%
# %%writefile masked_gru.py
"""A recurrent language model that is trained with some of its input hidden."""

from dataclasses import dataclass

import torch
from torch import nn

from vla_foundry.models import register_batch_handler, register_model
from vla_foundry.models.batch_handlers import split_targets, to_device
from vla_foundry.models.losses import count_valid_targets, language_model_loss
from vla_foundry.params import register_model_params
from vla_foundry.params.models.roles import LanguageModelParams, TokenLimits


@register_model_params("masked_gru")
@dataclass(frozen=True, kw_only=True)
class MaskedGRUParams(LanguageModelParams):
    """A recurrent language model."""

    # width of tokens and states
    hidden_dim: int = 64
    # rows of the token embedding
    vocab_size: int = 4096
    # share of the input tokens to hide
    hidden_share: float = 0.1

    def token_limits(self, facts):
        """Return its vocabulary; sequences may have any length."""
        return TokenLimits(vocab_size=self.vocab_size)


class MaskedGRU(nn.Module):
    """Embedding, recurrent layer, output head."""

    def __init__(self, params):
        super().__init__()
        self.embeddings = nn.Embedding(params.vocab_size, params.hidden_dim)
        self.layer = nn.GRU(params.hidden_dim, params.hidden_dim, batch_first=True)
        self.output = nn.Linear(params.hidden_dim, params.vocab_size, bias=False)

    def forward(self, input_ids, *, targets):
        """Return the loss summed over the targets, and their number."""
        states, _ = self.layer(self.embeddings(input_ids))
        return language_model_loss(states, self.output.weight, targets)


@register_model("masked_gru")
def create_masked_gru(params, load_pretrained=True):
    """Build the model with new weights."""
    return MaskedGRU(params)


@register_batch_handler("masked_gru")
class MaskedBatchHandler:
    """Hides input tokens; which ones depends on the samples alone, so that a resumed run hides the same."""

    def __init__(self, params):
        self.share = params.model.hidden_share

    def prepare(self, batch, device):
        """Return the arguments of forward."""
        tokens, targets, _ = split_targets(batch)
        generator = torch.Generator().manual_seed(int(batch["positions"][0]))
        tokens = tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < self.share, 0)
        return {"input_ids": to_device(tokens, device), "targets": to_device(targets, device)}

    def count_targets(self, inputs):
        """Count the targets of prepared inputs."""
        return count_valid_targets(inputs["targets"])


# %%
Path("text.jsonl").write_text(
    "".join(json.dumps({"text": f"{n} and {n + 1} are {2 * n + 1}. " * 8}) + "\n" for n in range(400))
)

# %% magic_args="-e" language="bash"
# vla-foundry preprocess tokenizer --source text.jsonl --output tokenizer --vocab_size 300
# vla-foundry preprocess text --source text.jsonl --output shards --tokenizer tokenizer --seq_len 64 --num_workers 0
# vla-foundry train --plugins masked_gru --model.type masked_gru --model.vocab_size 300 --model.hidden_share 0.2 \
#     --data.type text --data.dataset_manifest shards/manifest.jsonl --data.seq_len 64 --data.num_workers 0 \
#     --hparams.global_batch_size 16 --hparams.per_gpu_batch_size 16 --hparams.precision fp32 --hparams.lr 0.01 \
#     --total_train_samples 640 --num_checkpoints 1 --log_every_n_steps 10 --name gru

# %% [markdown]
# ## An action head
# A head gets what the backbone saw, and a window of actions with masks. This one predicts straight lines: a start and a slope for
# each column of the action.

# %%
# %%writefile line_head.py
"""An action head that predicts chunks as straight lines in time."""

from dataclasses import dataclass

import torch
from torch import nn

from vla_foundry.models.action_heads.action_head import ActionHead, reduce_loss, register_action_head
from vla_foundry.params import register_model_params
from vla_foundry.params.models.action_heads import ActionHeadParams


@register_model_params("line")
@dataclass(frozen=True, kw_only=True)
class LineParams(ActionHeadParams):
    """A straight line for each column of the action."""

    # width of the hidden layer
    hidden_dim: int = 128


@register_action_head("line")
class LineHead(ActionHead):
    """Reads the mean of the backbone's tokens, and the present proprioception."""

    def __init__(self, params, widths):
        super().__init__()
        width = widths.conditioning_dim + widths.proprioception_dim
        self.layers = nn.Sequential(
            nn.Linear(width, params.hidden_dim), nn.GELU(), nn.Linear(params.hidden_dim, 2 * widths.action_dim)
        )

    def init_weights(self):
        """Give every parameter its initial value."""
        for layer in (self.layers[0], self.layers[2]):
            layer.reset_parameters()

    def blocks(self):
        """Return what is sharded and compiled as one."""
        return [self.layers]

    def predict(self, conditioning, window):
        """Return actions (B, T, A)."""
        seen = conditioning.tokens.float().mean(dim=1)
        if window.proprioception is not None:
            seen = torch.cat([seen, window.proprioception[:, -1].float()], dim=-1)
        start, slope = self.layers(seen.to(self.layers[0].weight.dtype))[:, None].chunk(2, dim=-1)
        num_steps = window.actions.shape[1]
        return start + slope * torch.linspace(0, 1, num_steps, device=start.device)[:, None]

    def forward(self, conditioning, window, key):
        """Return the summed absolute error, and the number of values."""
        return reduce_loss((self.predict(conditioning, window) - window.actions).abs(), window)

    @torch.no_grad()
    def sample(self, conditioning, window, key, num_steps):
        """Return actions; observed steps stay as they are."""
        return torch.where(window.free_mask(), self.predict(conditioning, window), window.held_actions())


# %% [markdown]
# Its data: demonstrations by a scripted expert in a simulator.

# %% magic_args="-e" language="bash"
# vla-foundry demos --tasks drawer-open-v3@half --episodes 6 --cameras workspace --image_size 32 --num_workers 0 \
#     --output_dir demos
# vla-foundry preprocess robotics --type lerobot --source_episodes demos --field_map field_maps/metaworld.yaml \
#     --output_dir robot_shards --past_lowdim_steps 0 --future_lowdim_steps 7 --image_indices "[0]" --num_workers 0

# %%
Path("policy.yaml").write_text("""
model:
  type: diffusion_policy
  vision_language_backbone:
    type: vit_backbone
    vit: {type: vit, img_size: 32, patch_size: 16, hidden_dim: 32, inter_dim: 64, n_heads: 2, n_layers: 1}
  action_head: {type: line}
data:
  type: robotics
  dataset_manifest: [robot_shards/manifest.jsonl]
  action_fields: [action.displacement, action.gripper]
  proprioception_fields: [observation.end_effector_position, observation.gripper_opening]
  image_indices: [0]
  lowdim_past_timesteps: 0
  lowdim_future_timesteps: 7
  # the gripper hardly moves in so few demonstrations: do not scale its noise up
  normalization: {range_floor: 0.01, clip: 3.0}
  num_workers: 0
  allow_multiple_epochs: true
hparams: {global_batch_size: 32, per_gpu_batch_size: 32, precision: fp32, lr: 0.003, warmup: 2}
total_train_samples: 1600
num_checkpoints: 1
log_every_n_steps: 10
wandb: false
""")

# %% magic_args="-e" language="bash"
# vla-foundry train --plugins line_head --config_path policy.yaml --name line

# %% [markdown]
# The policy acts, as robots and simulators would ask it to:

# %%
import sys

import numpy as np

from vla_foundry.inference import Policy, RobotObservation

sys.path.insert(0, os.getcwd())
import line_head  # registers the head, as --plugins does for commands

policy = Policy.from_run("experiments/line", device="cpu")
policy.reset(seed=0)
fields = {name: np.zeros(field.width, np.float32) for name, field in policy.observed.items()}
images = {camera.name: np.zeros((32, 32, 3), np.uint8) for camera in policy.cameras}
policy.act(RobotObservation(images=images, fields=fields, instruction="open the drawer"))

# %% [markdown]
# It is served, evaluated and compared like any other policy, if the same `--plugins` are named: a run folder holds data, and never
# runs code by itself.
