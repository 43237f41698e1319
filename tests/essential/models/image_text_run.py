"""Tiny language and image-text models of Hugging Face and our own, and a few steps of training on any number of ranks.

Imported by the tests through the fixture `image_text`; run by torchrun as a script:
    torchrun --nproc_per_node 2 image_text_run.py FOLDER
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from vla_foundry.batch import Documents
from vla_foundry.models import create_batch_handler, create_model
from vla_foundry.params.data.image_caption import ImageCaptionDataParams
from vla_foundry.params.distributed import DistributedParams
from vla_foundry.params.ema import EMAParams
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.params.hparams import HyperParams
from vla_foundry.params.models.roles import ModelParams
from vla_foundry.params.models.transformer import TransformerHFParams, TransformerParams
from vla_foundry.params.models.vit import ViTHFParams, ViTParams
from vla_foundry.params.models.vlm import VLMHFParams, VLMParams
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

IMAGE = 90
# tokens that an image becomes
PER_IMAGE = {"qwen3_vl": 4, "paligemma": 16, "smolvlm2": 4, "native": 4, "native_siglip": 4}
# those that are trained on two ranks; the last two read no images
TRAINED = [*PER_IMAGE, "llama", "native_text"]
_TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}


def create_original(name: str) -> PreTrainedModel:
    """Build one of the models, with seeded weights."""
    torch.manual_seed(0)
    if name == "qwen3_vl":
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
        vision = {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        }
        text = {**_TEXT, "rope_parameters": rope}
        config = Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=91)
        return Qwen3VLForConditionalGeneration(config)
    if name == "paligemma":
        vision = {**_VISION, "model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": 32}
        text = {**_TEXT, "model_type": "gemma"}
        sizes = {"image_token_id": IMAGE, "projection_dim": 32, "hidden_size": 32}
        return PaliGemmaForConditionalGeneration(PaliGemmaConfig(text_config=text, vision_config=vision, **sizes))
    if name == "native_siglip":  # the image encoder of a model of our own
        return SiglipVisionModel(SiglipVisionConfig(**_VISION))
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**_TEXT))
    text = {**_TEXT, "model_type": "llama"}
    sizes = {"image_token_id": IMAGE, "scale_factor": 2, "pad_token_id": 0}
    return SmolVLMForConditionalGeneration(SmolVLMConfig(text_config=text, vision_config=_VISION, **sizes))


def create_images(name: str, count: int, seed: int) -> dict[str, torch.Tensor]:
    """uint8 images, as the processor of this family gives them."""
    shape = (16 * count, 3 * 2 * 4 * 4) if name == "qwen3_vl" else (count, 3, 28, 28)
    pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    extras = {"image_grid_thw": torch.tensor([[1, 4, 4]] * count)} if name == "qwen3_vl" else {}
    return {"pixel_values": pixels, **extras}


def create_batch(name: str, seed: int, *, has_images: bool = True) -> dict[str, Any]:
    """Two rows of which the second ends with three tokens of padding."""
    has_images = has_images and name in PER_IMAGE
    width = 12 + PER_IMAGE.get(name, 0)
    ids = torch.randint(3, 89, (2, width), generator=torch.Generator().manual_seed(seed)).int()
    mask = torch.zeros(2, width, dtype=torch.bool)
    mask[:, -8:] = True
    mask[1, -3:] = False
    if has_images:
        ids[:, 1 : 1 + PER_IMAGE[name]] = IMAGE
    images = create_images(name, 2, seed) if has_images else {}
    types: dict[str, Any] = {}
    if name == "paligemma":
        types = {"token_type_ids": mask.int().cummax(1).values.int()}
    elif name == "qwen3_vl" and has_images:
        types = {"mm_token_type_ids": (ids == IMAGE).int()}
    return {
        "modality": "image_caption",
        "positions": torch.arange(2),
        "input_ids": ids,
        "target_mask": mask,
        "documents": Documents(
            lengths=np.array([width, width - 3, 3], dtype=np.int32),
            num_per_row=np.array([1, 2], dtype=np.int32),
            is_padding=np.array([False, False, True]),
        ),
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        **images,
        **types,
    }


def global_batch(name: str, step: int) -> list[dict[str, Any]]:
    """Two microbatches; in one step the second is of text alone, so that one of two ranks has no images."""
    return [
        create_batch(name, 10 * step),
        create_batch(name, 10 * step + 1, has_images=step != 1),
    ]


def create_model_params(name: str, folder: Path) -> ModelParams:
    if name == "llama":
        return TransformerHFParams(hf_pretrained=str(folder / name))
    if not name.startswith("native"):
        return VLMHFParams(hf_pretrained=str(folder / name))
    sizes = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4}
    transformer = TransformerParams(**sizes, vocab_size=96, max_seq_len=64)
    if name == "native_text":
        return transformer
    vit = ViTParams(**sizes, inter_dim=48, patch_size=7, img_size=28, projector_pixel_shuffle_factor=2)
    if name == "native_siglip":
        vit = ViTHFParams(hf_pretrained=str(folder / name), projector_pixel_shuffle_factor=2)
    return VLMParams(
        vit=vit,
        transformer=transformer,
        image_token_id=IMAGE,
        image_attention="bidirectional",
    )


def create_params(name: str, folder: Path) -> TrainExperimentParams:
    return TrainExperimentParams(
        total_train_samples=4 * HyperParams().global_batch_size,
        data=ImageCaptionDataParams(tokenizer="t"),
        model=create_model_params(name, folder),
        hparams=HyperParams(
            precision="fp32", lr=1e-2, warmup=0.0, lr_scheduler="constant", wd=0.1, grad_clip_norm=1.0, seed=0
        ),
        distributed=DistributedParams(fsdp=True),
    )


def create_state(params: TrainExperimentParams, world: World, *, is_restored: bool = False) -> TrainState:
    if world.world_size > 1:
        return experiment.create_state(params, world, is_restored=is_restored)
    torch.manual_seed(0)
    model = create_model(params.model, load_pretrained=not is_restored)
    return create_train_state(model, model, hparams=params.hparams, ema=EMAParams(), total_steps=4)


def count_different(state: TrainState, params: TrainExperimentParams) -> int:
    """The tensors of this rank that are not rows of the ones that a whole model starts with."""
    torch.manual_seed(0)
    own, whole = experiment.list_tensors(state.model), experiment.list_tensors(create_model(params.model))
    assert own.keys() == whole.keys()
    parts = ((local_shard(own[name]), whole[name], local_rows(own[name])) for name in own)
    return sum(not torch.equal(part, value if rows == slice(None) else value[rows]) for part, value, rows in parts)


def train(name: str, folder: Path, run_folder: Path, world: World) -> list[float]:
    """Train two steps, save, and resume in a new model, and train two steps without sharding.

    Returns:
        The loss of each step, then the FLOPs of a token, and `count_different` at the start.
    """
    params = create_params(name, folder)
    handler = create_batch_handler(params)

    def step(state: TrainState) -> float:
        batches: Sequence[Any] = global_batch(name, state.step)[world.rank :: world.world_size]
        return train_step(state, batches, handler=handler, hparams=params.hparams, world=world).loss.item()

    state = create_state(params, world)
    different = count_different(state, params)
    losses = [step(state), step(state)]
    checkpoint = save_checkpoint(run_folder, state, world=world, facts={})
    losses.append(step(state))
    resumed = create_state(params, world, is_restored=True)
    load_checkpoint(checkpoint, resumed)
    flops: Any = state.model.num_flops_per_token  # also of a sharded model
    whole = create_state(dataclasses.replace(params, distributed=DistributedParams()), world)
    return [*losses, step(resumed), step(whole), step(whole), flops(20), different]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world = read_world(0)
    start_process_group(DistributedParams(fsdp=True), world)
    losses = {name: train(name, folder, folder / f"sharded_{name}", world) for name in TRAINED}
    (folder / f"losses.{world.rank}.json").write_text(json.dumps(losses), encoding="utf-8")
    stop_process_group()
    leave_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
