"""Tiny policies with every backbone and head, batches for them, and a few steps of training on any number of ranks.

Imported by the tests through the fixture `policies`; run by torchrun as a script:
    torchrun --nproc_per_node 2 policy_run.py FOLDER
"""

import dataclasses
import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from vla_foundry.batch import Documents
from vla_foundry.models import create_batch_handler, create_model
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.distributed import DistributedParams
from vla_foundry.params.ema import EMAParams
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.params.hparams import HyperParams
from vla_foundry.params.models.action_heads import (
    ActionHeadParams,
    DDPMTransformerParams,
    DiscreteBinsParams,
    FastTokensParams,
    FlowTransformerParams,
    RegressionParams,
    TokenHeadParams,
)
from vla_foundry.params.models.backbones import (
    BackboneParams,
    CLIPBackboneParams,
    ViTBackboneParams,
    VLMBackboneParams,
    VLMFoundryBackboneParams,
)
from vla_foundry.params.models.legacy import LegacyFlowParams, LegacyFlowTransformerParams
from vla_foundry.params.models.policy import DiffusionPolicyParams, RegressionPolicyParams
from vla_foundry.params.models.transformer import TransformerParams
from vla_foundry.params.models.vit import ViTParams
from vla_foundry.params.models.vlm import VLMParams
from vla_foundry.robotics.action_tokens import FastTokenizer
from vla_foundry.training import experiment
from vla_foundry.training.checkpoint import load_checkpoint
from vla_foundry.training.checkpoint_writer import save_checkpoint
from vla_foundry.training.distributed import (
    leave_process,
    local_rows,
    local_shard,
    start_process_group,
    stop_process_group,
)
from vla_foundry.training.loop import train_step
from vla_foundry.training.state import TrainState, create_train_state
from vla_foundry.world import World, read_world

# of a window: one step before the anchor, four after it
STEPS, PAST, ACTIONS, PROPRIOCEPTION = 6, 1, 3, 4
IMAGE = 90
IMAGES_PER_SAMPLE = 2
_SIZES: dict[str, Any] = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4}
VIT = ViTParams(**_SIZES, inter_dim=48, patch_size=7, img_size=28, projector_pixel_shuffle_factor=2)
VLM = VLMParams(
    vit=VIT,
    transformer=TransformerParams(hidden_dim=32, n_layers=3, n_heads=4, vocab_size=96, max_seq_len=64),
    image_token_id=IMAGE,
)
# name -> how a head differs
HEADS: dict[str, tuple[type[ActionHeadParams], dict[str, Any]]] = {
    "flow adaptive": (FlowTransformerParams, {}),
    "flow concat": (FlowTransformerParams, {"time_conditioning": "concat"}),
    "flow add": (
        LegacyFlowTransformerParams,
        {"time_conditioning": "add", "time_encoding": "table", "noise": LegacyFlowParams(num_timesteps=50)},
    ),
    "flow cross": (FlowTransformerParams, {"conditioning": "cross_attention"}),
    "flow cross concat": (FlowTransformerParams, {"conditioning": "cross_attention", "time_conditioning": "concat"}),
    "ddpm": (DDPMTransformerParams, {}),
    "regression": (RegressionParams, {}),
    "regression cross": (RegressionParams, {"conditioning": "cross_attention"}),
    "flow layers": (FlowTransformerParams, {"conditioning": "joint_attention"}),
    "flow layers concat": (
        FlowTransformerParams,
        {"conditioning": "joint_attention", "time_conditioning": "concat"},
    ),
    "regression layers": (RegressionParams, {"conditioning": "joint_attention"}),
    "flow insulated": (FlowTransformerParams, {}),
    "fast tokens": (FastTokensParams, {}),
    "discrete bins": (DiscreteBinsParams, {"num_steps": STEPS - PAST, "num_bins": 16, "limits": (-2.0, 2.0)}),
}
# heads, and backbones under one of them, that are trained on two ranks: every way that a head reads conditioning and is
# told the time
TRAINED = ["flow adaptive", "flow add", "flow cross concat", "ddpm", "regression", "vit", "clip"]
TRAINED += ["flow layers concat", "flow insulated", "fast tokens", "discrete bins"]


@functools.cache
def create_fast_tokenizer() -> tuple[Any, str]:
    """A folder that is removed at the end, and in it the file of a tokenizer for these windows."""
    folder = tempfile.TemporaryDirectory()
    chunks = np.random.default_rng(0).normal(size=(200, STEPS - PAST, ACTIONS)).clip(-2, 2)
    tokenizer = FastTokenizer.train(chunks, vocab_size=96, scale=4.0)
    path = Path(folder.name) / "fast_tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    return folder, str(path)


def create_head_params(name: str, *, num_draws: int = 2, is_causal: bool = False) -> ActionHeadParams:
    """Params of a head; `num_draws` for those that draw."""
    cls, changes = HEADS[name]
    if cls is FastTokensParams:
        return FastTokensParams(tokenizer=create_fast_tokenizer()[1])
    if issubclass(cls, TokenHeadParams):
        return cls(**changes)
    transformer = TransformerParams(
        hidden_dim=32, n_layers=2, n_heads=2, vocab_size=0, is_causal=is_causal, max_seq_len=64
    )
    draws = {} if cls is RegressionParams else {"num_action_head_repeats": num_draws}
    return cls(transformer=transformer, **draws, **changes)  # pyright: ignore[reportCallIssue]


def create_backbone_params(name: str, folder: Path | None = None) -> BackboneParams:
    """Params of a backbone; Hugging Face models are read from `folder`."""
    if name == "vlm":
        return VLMFoundryBackboneParams(vlm=VLM, num_vlm_layers_to_use=2)
    if name == "vlm prefix":
        return VLMFoundryBackboneParams(vlm=VLM, num_vlm_layers_to_use=1, conditioning="prefix")
    if name == "vlm layers":
        return VLMFoundryBackboneParams(vlm=VLM, num_vlm_layers_to_use=2, conditioning="prefix")
    if name == "vit":
        return ViTBackboneParams(vit=VIT)
    if name == "clip":
        return CLIPBackboneParams(hf_pretrained=f"{folder}/clip")
    return VLMBackboneParams(hf_pretrained=f"{folder}/{name}", num_vlm_layers_to_use=2)


def create_clip() -> CLIPModel:
    """A tiny CLIP model, with seeded weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 96, "max_position_embeddings": 32, "eos_token_id": 95, "bos_token_id": 1}
    vision = {**sizes, "image_size": 28, "patch_size": 7}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))


def create_params(
    backbone: BackboneParams, head: ActionHeadParams, *, is_insulated: bool = False, **changes: Any
) -> TrainExperimentParams:
    """Params of a policy.

    Args:
        is_insulated: FAST tokens train the backbone, the head does not.
        changes: of hparams.
    """
    insulation: dict[str, Any] = {}
    if is_insulated:
        tokens = FastTokensParams(tokenizer=create_fast_tokenizer()[1])
        insulation = {"insulate_backbone": True, "action_tokens": tokens}
    hparams = {
        "precision": "fp32",
        "lr": 1e-2,
        "warmup": 0.0,
        "lr_scheduler": "constant",
        "wd": 0.1,
        "seed": 0,
        **changes,
    }
    return TrainExperimentParams(
        data=RoboticsDataParams(),
        model=(RegressionPolicyParams if isinstance(head, RegressionParams) else DiffusionPolicyParams)(
            vision_language_backbone=backbone,
            action_head=head,  # pyright: ignore[reportArgumentType]
            action_dim=ACTIONS,
            proprioception_dim=PROPRIOCEPTION,
            **insulation,
        ),
        hparams=HyperParams(**hparams),
        distributed=DistributedParams(fsdp=True),
    )


def create_batch(seed: int, *, num_samples: int = 2, lengths: list[int] | None = None, is_plain: bool = False) -> Any:
    """Samples of two images and an instruction of some length; the second ends in padding and lacks a dimension.

    Args:
        lengths: tokens of each row, images among them.
        is_plain: no steps are padding, every image and every dimension is there.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = lengths or [14 + 2 * (row % 2) for row in range(num_samples)]
    width = max(lengths) + 3
    ids = torch.randint(3, 89, (num_samples, width), generator=generator).int()
    # an image becomes 4 tokens
    ids[:, 1 : 1 + 4 * IMAGES_PER_SAMPLE] = IMAGE
    past_mask = (torch.arange(STEPS) < PAST).repeat(num_samples, 1)
    future_mask = ~past_mask
    action_dim_mask = torch.ones(num_samples, ACTIONS, dtype=torch.bool)
    image_mask = torch.ones(num_samples, IMAGES_PER_SAMPLE, dtype=torch.bool)
    if not is_plain:
        past_mask[0, 0] = False
        future_mask[1::2, -2:] = False
        action_dim_mask[1::2, 2] = False
        image_mask[1::2, 0] = False
    actions = torch.randn(num_samples, STEPS, ACTIONS, generator=generator).clamp(-2, 2) * action_dim_mask[:, None]
    pairs = [(length, width - length) for length in lengths]
    pixels = torch.randint(0, 256, (num_samples * IMAGES_PER_SAMPLE, 3, 28, 28), generator=generator)
    return {
        "modality": "robotics",
        "positions": torch.arange(num_samples) + 100 * seed,
        "input_ids": ids,
        "documents": Documents(
            lengths=np.array(pairs, dtype=np.int32).reshape(-1),
            num_per_row=np.full(num_samples, 2, dtype=np.int32),
            is_padding=np.tile([False, True], num_samples),
        ),
        "pixel_values": pixels.to(torch.uint8),
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "image_mask": image_mask,
        "actions": actions,
        "proprioception": torch.randn(num_samples, PAST + 1, PROPRIOCEPTION, generator=generator),
        "past_mask": past_mask,
        "future_mask": future_mask,
        "is_padding": ~(past_mask | future_mask),
        "action_dim_mask": action_dim_mask,
    }


def change(params: Any, **values: Any) -> Any:
    """The same params with other values."""
    return dataclasses.replace(params, **values)


def free_mask(batch: dict[str, Tensor]) -> Tensor:
    """True at the numbers that are to be predicted."""
    return batch["future_mask"][..., None] & batch["action_dim_mask"][:, None]


def create_policy(params: TrainExperimentParams, *, load_pretrained: bool = True) -> Any:
    torch.manual_seed(0)
    return create_model(params.model, load_pretrained=load_pretrained)


def create_state(params: TrainExperimentParams, world: World, *, is_restored: bool = False) -> TrainState:
    if world.world_size > 1:
        budget = change(params, total_train_samples=4 * params.hparams.global_batch_size)
        return experiment.create_state(budget, world, is_restored=is_restored)
    model = create_policy(params, load_pretrained=not is_restored)
    return create_train_state(model, model, hparams=params.hparams, ema=EMAParams(), total_steps=4)


def count_different(state: TrainState, params: TrainExperimentParams) -> int:
    """The tensors of this rank that are not rows of the ones that a whole model starts with."""
    own, whole = experiment.list_tensors(state.model), experiment.list_tensors(create_policy(params))
    assert own.keys() == whole.keys()
    parts = ((local_shard(own[name]), whole[name], local_rows(own[name])) for name in own)
    return sum(not torch.equal(part, value if rows == slice(None) else value[rows]) for part, value, rows in parts)


def train(name: str, folder: Path, world: World) -> list[float]:
    """Train two steps on two microbatches, save, and resume in a new model; train two steps without sharding.

    Returns:
        The loss of each step, then the FLOPs of a token, and `count_different` at the start.
    """
    if name in HEADS:
        backbone = "vlm layers" if "layers" in name else "vlm prefix" if "cross" in name else "vlm"
        params = create_params(
            create_backbone_params(backbone),
            create_head_params(name),
            is_insulated="insulated" in name,
            grad_clip_norm=1.0,
        )
    else:
        params = create_params(create_backbone_params(name, folder), create_head_params("flow adaptive"))
    handler = create_batch_handler(params)

    def step(state: TrainState) -> float:
        batches = [create_batch(10 * state.step + index) for index in range(2)][world.rank :: world.world_size]
        return train_step(state, batches, handler=handler, hparams=params.hparams, world=world).loss.item()

    state = create_state(params, world)
    different = count_different(state, params)
    losses = [step(state), step(state)]
    checkpoint = save_checkpoint(folder / f"{world.world_size} x {name}", state, world=world, facts={})
    losses.append(step(state))
    resumed = create_state(params, world, is_restored=True)
    load_checkpoint(checkpoint, resumed)
    flops: Any = state.model.num_flops_per_token  # also of a sharded model
    whole = create_state(change(params, distributed=DistributedParams()), world)
    return [*losses, step(resumed), step(whole), step(whole), flops(20), different]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world = read_world(0)
    start_process_group(DistributedParams(fsdp=True), world)
    losses = {name: train(name, folder, world) for name in TRAINED}
    (folder / f"losses.{world.rank}.json").write_text(json.dumps(losses), encoding="utf-8")
    stop_process_group()
    leave_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
