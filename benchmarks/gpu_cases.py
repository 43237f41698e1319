"""The models of gpu.py's rows, batches of random samples for them, and the FLOPs of their steps.

FLOPs are those of real tokens, forward and backward: 6 for each matrix weight, and 12 L T D for attention over the T
tokens of a document (PaLM, appendix B). Padding does not count, nor does recomputation.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vla_foundry.batch import Batch, Documents
from vla_foundry.params import HyperParams, ModelParams, TrainExperimentParams, load_params_from_yaml
from vla_foundry.params.data.image_caption import ImageCaptionDataParams
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.models.backbones import VLMBackboneParams, VLMFoundryBackboneParams
from vla_foundry.params.models.policy import DiffusionPolicyParams
from vla_foundry.params.models.transformer import TransformerParams
from vla_foundry.params.models.vit import ViTParams
from vla_foundry.params.models.vlm import VLMParams

PRESETS = Path(__file__).resolve().parents[1] / "config_presets/models"
# distinct batches where lengths vary, so that what depends on them shows
NUM_BATCHES = 4
# of a policy: 4 cameras x 2 times, text besides the observation token, window, width of actions and proprioception
NUM_VIEWS, NUM_TEXT, NUM_STEPS, NUM_PAST, WIDTH = 8, 36, 16, 1, 20


@dataclass(frozen=True)
class Case:
    """What a row measures."""

    params: TrainExperimentParams
    batches: list[Batch]
    # per step, on average: name -> count
    units: dict[str, float]
    # (model, passes through the action head for each sample; None: the draws in training) -> FLOPs of a step
    count_flops: Callable[..., float]


def create_root(model: ModelParams, data: Any, **hparams: Any) -> TrainExperimentParams:
    """Return the config tree around a model."""
    return TrainExperimentParams(model=model, data=data, hparams=HyperParams(grad_clip_norm=1.0, **hparams))


def shrink(params: Any) -> Any:
    """Return a toy of the same architecture."""
    if isinstance(params, TransformerParams):
        sizes = {"hidden_dim": 32, "n_layers": 2, "n_heads": 2}
        return replace(params, **sizes, vocab_size=min(params.vocab_size, 512))
    if isinstance(params, ViTParams):
        return replace(params, hidden_dim=32, inter_dim=64, n_layers=2, n_heads=2, img_size=56)
    assert isinstance(params, VLMParams)
    return replace(params, vit=shrink(params.vit), transformer=shrink(params.transformer))


def load_model(name: str) -> Any:
    """Return the params of a preset."""
    return load_params_from_yaml(ModelParams, str(PRESETS / f"{name}.yaml"))


def arrange_documents(lengths: Sequence[Sequence[int]], num_tokens: int) -> Documents:
    """Return rows of these documents, each row filled with padding."""
    rests = [num_tokens - sum(row) for row in lengths]
    rows = [[*row, rest] if rest else [*row] for row, rest in zip(lengths, rests, strict=True)]
    padding = [[False] * len(row) + [True] * bool(rest) for row, rest in zip(lengths, rests, strict=True)]
    return Documents(
        lengths=np.concatenate(rows).astype(np.int32),
        num_per_row=np.array([len(row) for row in rows], np.int32),
        is_padding=np.concatenate(padding),
    )


def fill_rows(lengths: Iterable[int], num_tokens: int) -> list[list[int]]:
    """Put each document into the first row that has room, as the caption loader does."""
    rows: list[list[int]] = []
    for length in lengths:
        row = next((row for row in rows if sum(row) + length <= num_tokens), None)
        if row is None:
            rows.append(row := [])
        row.append(length)
    return rows


def create_llm_case(is_tiny: bool, *, batch: int, has_documents: bool = False, **hparams: Any) -> Case:
    """Rows of 2048 tokens: one document each, or about 8 of varying lengths."""
    params, T = load_model("foundry_llm_1.2b"), 2048
    if is_tiny:
        params, T, batch = shrink(params), 64, min(batch, 2)
    rng = np.random.default_rng(0)
    batches: list[Batch] = []
    flops_of: list[list[int]] = []
    for _ in range(NUM_BATCHES if has_documents else 1):
        tokens = torch.from_numpy(rng.integers(1, params.vocab_size, (batch, T + 1), dtype=np.int32))
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[:, 0] = False
        made: Batch = {"modality": "text", "positions": torch.arange(batch), "input_ids": tokens, "target_mask": mask}
        lengths = [[T + 1]] * batch
        if has_documents:
            lengths = [
                [int(n) for n in np.diff([0, *sorted(rng.choice(np.arange(1, T + 1), 7, False)), T + 1])]
                for _ in range(batch)
            ]
            made["documents"] = arrange_documents(lengths, T + 1)
        batches.append(made)
        flops_of.append([n for row in lengths for n in row])

    def count_flops(model: Any, _: int | None = None) -> float:
        total = sum(n * model.num_flops_per_token(n) for lengths in flops_of for n in lengths)
        # of T + 1 tokens, T are read
        return total / len(batches) * T / (T + 1)

    data = TextDataParams(dataset_manifest=["none"], seq_len=T)
    units = {"samples": batch, "tokens": batch * T}
    return Case(create_root(params, data, **hparams), batches, units, count_flops)


def create_vlm_case(is_tiny: bool, *, packed: bool) -> Case:
    """64 images with captions of 60 +- 20 tokens: in rows of 256 tokens each, or packed into rows of 1024."""
    params = load_model("foundry_vlm_1.3b")
    T, num_samples = (1024 if packed else 256), 64
    if is_tiny:
        params, T, num_samples = shrink(params), (256 if packed else 128), 4
    params = replace(params, image_token_id=params.transformer.vocab_size - 1)
    num_tokens, side = params.image_inputs().img_num_tokens, params.image_inputs().image_size
    rng = np.random.default_rng(0)
    batches: list[Batch] = []
    lengths_of: list[list[int]] = []
    for _ in range(NUM_BATCHES):
        lengths = [num_tokens + int(n) for n in rng.normal(60, 20, num_samples).clip(8, 120)]
        rows = fill_rows(lengths, T + 1) if packed else [[n] for n in lengths]
        ids = rng.integers(1, params.transformer.vocab_size - 1, (len(rows), T + 1), dtype=np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, documents in enumerate(rows):
            for end, length in zip(np.cumsum(documents), documents, strict=True):
                ids[row, end - length : end - length + num_tokens] = params.image_token_id
                mask[row, end - length + num_tokens : end] = True
        pixels = rng.integers(0, 256, (num_samples, 3, side, side), dtype=np.uint8)
        batches.append(
            {
                "modality": "image_caption",
                "positions": torch.arange(num_samples),
                "input_ids": torch.from_numpy(ids),
                "target_mask": torch.from_numpy(mask),
                "documents": arrange_documents(rows, T + 1),
                "pixel_values": torch.from_numpy(pixels),
                "image_mean": (0.5, 0.5, 0.5),
                "image_std": (0.5, 0.5, 0.5),
            }
        )
        lengths_of.append(lengths)

    def count_flops(model: Any, _: int | None = None) -> float:
        text = sum(n * model.transformer.num_flops_per_token(n) for lengths in lengths_of for n in lengths)
        return text / len(batches) + num_samples * count_image_flops(model, num_tokens)

    data = ImageCaptionDataParams(tokenizer="none", dataset_manifest=["none"], seq_len=T)
    units = {"samples": num_samples, "tokens": sum(map(sum, lengths_of)) / len(batches)}
    return Case(create_root(params, data), batches, units, count_flops)


def count_image_flops(vlm: Any, num_tokens: int) -> float:
    """Return the FLOPs of one image through encoder and projector."""
    return vlm.vit.num_flops_per_image() + 6.0 * num_tokens * vlm.projection.proj.weight.numel()


def count_block_flops(blocks: Iterable[nn.Module], *, num_tokens: int, length: int, width: int) -> float:
    """Return the FLOPs of tokens that attend to `length` tokens each."""
    blocks = list(blocks)
    weights = sum(p.numel() for block in blocks for p in block.parameters() if p.ndim == 2)
    return num_tokens * (6.0 * weights + 12.0 * len(blocks) * length * width)


def count_head_flops(head: Any, passes: int | None) -> float:
    """Return the FLOPs of one sample's passes: its sequence is conditioning, proprioception and actions."""
    T, width = 1 + NUM_PAST + 1 + NUM_STEPS, head.params.transformer.hidden_dim
    passes = passes or head.params.num_action_head_repeats
    return passes * count_block_flops(head.blocks(), num_tokens=T, length=T, width=width)


def create_robot_batch(num_samples: int, ids: torch.Tensor, pixels: torch.Tensor, extras: dict[str, Any]) -> Batch:
    """Return samples of images, text, proprioception and actions; ids are one sample's tokens."""
    generator = torch.Generator().manual_seed(0)
    past_mask = (torch.arange(NUM_STEPS) < NUM_PAST).repeat(num_samples, 1)
    return {
        "modality": "robotics",
        "positions": torch.arange(num_samples),
        "input_ids": ids.repeat(num_samples, 1),
        "documents": arrange_documents([[len(ids)]] * num_samples, len(ids)),
        "pixel_values": pixels,
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "image_mask": torch.ones(num_samples, NUM_VIEWS, dtype=torch.bool),
        "actions": torch.randn(num_samples, NUM_STEPS, WIDTH, generator=generator),
        "proprioception": torch.randn(num_samples, NUM_PAST + 1, WIDTH, generator=generator),
        "past_mask": past_mask,
        "future_mask": ~past_mask,
        "is_padding": torch.zeros_like(past_mask),
        "action_dim_mask": torch.ones(num_samples, WIDTH, dtype=torch.bool),
        **extras,
    }


def create_policy_params(preset: DiffusionPolicyParams, backbone: Any, draws: int, is_tiny: bool) -> Any:
    """Return a policy of this backbone and the preset's head."""
    head: Any = replace(preset.action_head, num_action_head_repeats=draws)  # pyright: ignore[reportCallIssue]
    if is_tiny:
        head = replace(head, transformer=shrink(head.transformer))
    widths = {"action_dim": WIDTH, "proprioception_dim": WIDTH}
    return replace(preset, vision_language_backbone=backbone, action_head=head, **widths)


def create_ids(per_image: int, image_token: int) -> torch.Tensor:
    """Return one sample's tokens: those of the images, with a token of text after each, then the rest of the text."""
    image = torch.tensor([image_token] * per_image + [1])
    return torch.cat([image.repeat(NUM_VIEWS), torch.arange(1, NUM_TEXT - NUM_VIEWS + 1)]).int()


def create_units(batch: int, num_tokens: int, draws: int) -> dict[str, float]:
    """Return what a policy's step takes; the observation token is one more token."""
    return {"samples": batch, "tokens": batch * (num_tokens + 1), "draws": batch * draws}


def create_vla_case(is_tiny: bool, *, batch: int, draws: int) -> Case:
    """The policy of 1.7 B on 8 images, 549 tokens with the observation token."""
    preset = load_model("foundry_vla_1.7b")
    backbone = preset.vision_language_backbone
    assert isinstance(backbone, VLMFoundryBackboneParams)
    vlm: Any = backbone.vlm
    if is_tiny:
        vlm, batch = shrink(vlm), min(batch, 2)
        backbone = replace(backbone, num_vlm_layers_to_use=2)
    vlm = replace(vlm, image_token_id=vlm.transformer.vocab_size - 1)
    params = create_policy_params(preset, replace(backbone, vlm=vlm, language_loss=False), draws, is_tiny)
    per_image, side = vlm.image_inputs().img_num_tokens, vlm.image_inputs().image_size
    ids = create_ids(per_image, vlm.image_token_id)
    pixels = torch.randint(0, 256, (batch * NUM_VIEWS, 3, side, side), dtype=torch.uint8)

    def count_flops(model: Any, head_passes: int | None = None) -> float:
        T, inner = len(ids) + 1, model.vision_language_backbone.model
        images = NUM_VIEWS * count_image_flops(inner, per_image)
        text = T * model.vision_language_backbone.num_flops_per_token(T)
        # its FLOPs include those of one image per row
        text -= count_image_flops(inner, 1)
        return batch * (text + images + count_head_flops(model.action_head, head_passes))

    root = create_root(params, RoboticsDataParams())
    batches = [create_robot_batch(batch, ids, pixels, {})]
    return Case(root, batches, create_units(batch, len(ids), draws), count_flops)


def create_qwen_config(is_tiny: bool) -> Any:
    """Return the architecture of Qwen3-VL-2B, or a toy of it."""
    from transformers import Qwen3VLConfig

    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True, "mrope_section": [24, 20, 20]}
    text: dict[str, Any] = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    vision: dict[str, Any] = {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [5, 11, 17],
    }
    image_token = 151655
    if is_tiny:
        text |= {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
        text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        rope["mrope_section"] = [2, 1, 1]
        vision |= {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
        vision |= {"deepstack_visual_indexes": [0]}
        image_token = 511
    text |= {"max_position_embeddings": 4096, "rope_parameters": rope, "tie_word_embeddings": True}
    vision |= {"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}
    return Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=image_token, video_token_id=0
    )


def create_qwen3vla_case(is_tiny: bool, folder: Path, *, batch: int, draws: int) -> Case:
    """The policy on Qwen3-VL-2B: 8 images of 256 pixels, each 64 tokens; a folder takes its config."""
    preset, side = load_model("foundry_qwen3vla_2.1b"), 16
    backbone = preset.vision_language_backbone
    assert isinstance(backbone, VLMBackboneParams)
    if is_tiny:
        side, batch = 4, min(batch, 2)
    config = create_qwen_config(is_tiny)
    config.save_pretrained(folder)
    backbone = replace(backbone, hf_pretrained=str(folder), hf_load_weights=False, language_loss=False)
    params = create_policy_params(preset, backbone, draws, is_tiny)
    num_patches = side * side
    ids = create_ids(num_patches // 4, config.image_token_id)
    pixels = torch.randint(0, 256, (batch * NUM_VIEWS * num_patches, 3 * 2 * 16 * 16), dtype=torch.uint8)
    extras = {
        "image_grid_thw": torch.tensor([[1, side, side]] * (batch * NUM_VIEWS)),
        "mm_token_type_ids": (ids == config.image_token_id).int().repeat(batch, 1),
    }

    def count_flops(model: Any, head_passes: int | None = None) -> float:
        inner = model.vision_language_backbone.model.model.base_model
        T, text, vision = len(ids) + 1, config.text_config, config.vision_config
        width = text.num_attention_heads * text.head_dim
        flops = count_block_flops(inner.language_model.layers, num_tokens=T, length=T, width=width)
        flops += count_block_flops(
            inner.visual.blocks, num_tokens=NUM_VIEWS * num_patches, length=num_patches, width=vision.hidden_size
        )
        return batch * (flops + count_head_flops(model.action_head, head_passes))

    root = create_root(params, RoboticsDataParams())
    batches = [create_robot_batch(batch, ids, pixels, extras)]
    return Case(root, batches, create_units(batch, len(ids), draws), count_flops)
