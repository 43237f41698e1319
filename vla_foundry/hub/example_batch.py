"""A microbatch with the shapes that a config gives, without its data: to count what a step with it takes."""

from typing import Any

import numpy as np
import torch

from vla_foundry.batch import Batch, Documents
from vla_foundry.data.pipelines.rows import ROW_MULTIPLE
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.image_caption import ImageTextDataParams, InterleavedDataParams
from vla_foundry.params.data.images import ImageProcessorParams
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.models.policy import RobotPolicyParams
from vla_foundry.params.models.roles import ModelParams

# tokens of an instruction and its prompt, a guess
_NUM_INSTRUCTION = 48


def create_example_batch(data: DataParams, model: ModelParams, num_samples: int) -> Batch:
    """Return a microbatch as large as `data` may make it: no row of text or captions is shorter than data.seq_len.

    Args:
        data: resolved params of one dataset.
        model: the model's params; they say which images it takes.
        num_samples: samples of the microbatch.

    Raises:
        ValueError: the params do not say how large it is.
    """
    if isinstance(data, RoboticsDataParams):
        return _create_robot_batch(data, model, num_samples)
    if isinstance(data, ImageTextDataParams):
        num_images = 1
        if isinstance(data, InterleavedDataParams):
            num_images = data.max_images or 1
        num_images = data.video_frames or num_images
        ids = _create_rows(num_samples, data.seq_len + 1, _image_tokens(data, model) * num_images, model)
        batch = {**_create_images(data, num_samples * num_images), "input_ids": ids}
        batch["documents"] = Documents.of_counts(np.full(num_samples, data.seq_len + 1), data.seq_len + 1)
        return _finish(batch, data, num_samples)
    if isinstance(data, TextDataParams):
        return _finish({"input_ids": torch.ones(num_samples, data.seq_len + 1, dtype=torch.int32)}, data, num_samples)
    raise ValueError(f"The shapes of data.type '{data.type}' are not known.")


def _create_robot_batch(data: RoboticsDataParams, model: ModelParams, num_samples: int) -> Batch:
    if data.robot_window() is None or not isinstance(model, RobotPolicyParams):
        raise ValueError("data.lowdim_past_timesteps or data.lowdim_future_timesteps is not known without the data.")
    num_images, window = len(data.image_names), data.window
    if not num_images:
        raise ValueError("data.camera_names or data.image_indices is not known without the data.")
    # create_policy checks them
    action_dim, proprioception_dim = model.action_dim or 0, model.proprioception_dim or 0
    T, B = window.num_steps, num_samples
    steps = torch.arange(T).repeat(B, 1)
    batch: dict[str, Any] = {
        **_create_images(data, B * num_images),
        "image_mask": torch.ones(B, num_images, dtype=torch.bool),
        "actions": torch.zeros(B, T, action_dim),
        "past_mask": steps < window.anchor,
        "future_mask": steps >= window.anchor,
        "is_padding": torch.zeros(B, T, dtype=torch.bool),
        "action_dim_mask": torch.ones(B, action_dim, dtype=torch.bool),
    }
    if proprioception_dim:
        batch["proprioception"] = torch.zeros(B, window.anchor + 1, proprioception_dim)
    if data.use_language:
        num_image_tokens = _image_tokens(data, model) * num_images
        longest = data.max_text_seq_len or data.seq_len
        length = min(num_image_tokens + _NUM_INSTRUCTION, longest)
        length = -(-length // ROW_MULTIPLE) * ROW_MULTIPLE
        batch["input_ids"] = _create_rows(B, length, num_image_tokens, model)
        batch["documents"] = Documents.of_counts(np.full(B, length), length)
    return _finish(batch, data, num_samples)


def _create_images(data: ImageProcessorParams, count: int) -> Batch:
    if data.image_size is None:
        raise ValueError("A processor from Hugging Face decides on the size of images.")
    mean, std = data.colors
    pixels = torch.zeros(count, 3, data.image_size, data.image_size, dtype=torch.uint8)
    return {"pixel_values": pixels, "image_mean": mean, "image_std": std}


def _image_tokens(data: ImageProcessorParams, model: ModelParams) -> int:
    tokens = data.img_num_tokens or model.image_inputs().img_num_tokens
    if tokens is None:
        raise ValueError("A processor from Hugging Face decides on the number of an image's tokens.")
    return tokens


def _create_rows(num_rows: int, length: int, num_image_tokens: int, model: Any) -> torch.Tensor:
    """Return rows that begin with image tokens."""
    backbone = getattr(model, "vision_language_backbone", None)
    vlm = model if backbone is None else getattr(backbone, "vlm", None)
    image_token = getattr(vlm, "image_token_id", None)
    ids = torch.full((num_rows, length), 1 if image_token != 1 else 2, dtype=torch.int32)
    if image_token is not None:
        ids[:, :num_image_tokens] = image_token
    return ids


def _finish(batch: Batch, data: DataParams, num_samples: int) -> Batch:
    batch |= {"modality": data.modalities[0], "positions": torch.arange(num_samples)}
    if "input_ids" in batch:
        batch["target_mask"] = torch.ones(batch["input_ids"].shape, dtype=torch.bool)
        batch["target_mask"][:, 0] = False
    return batch
