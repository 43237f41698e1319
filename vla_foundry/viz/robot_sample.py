"""Take one sample out of a robot batch, with its actions both normalized and in the units of the data."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla_foundry.batch import Batch
from vla_foundry.data.pipelines.robotics import RoboticsPipeline
from vla_foundry.images.colors import normalize_images
from vla_foundry.robotics.spec import FieldDescription
from vla_foundry.robotics.transforms import FieldTransform


@dataclass(frozen=True, eq=False, kw_only=True)
class FieldValues:
    """A field over the steps of a window."""

    name: str
    # what its numbers mean; None: unknown
    description: FieldDescription | None
    # (T, C), in the unit of the data
    raw: np.ndarray
    # (T, C), as the model gets it
    normalized: np.ndarray


@dataclass(frozen=True, eq=False, kw_only=True)
class RobotSample:
    """A sample, of T steps and N images."""

    episode_id: str
    # frame of the episode
    anchor: int
    shard: str
    # position in the training order
    position: int
    instruction: str
    # index of the anchor among the steps
    anchor_index: int
    cameras: list[str]
    # frame offsets of the images from the anchor
    image_indices: list[int]
    # uint8 (H, W, 3), time-major, cameras within a time; empty if the processor cuts images into patches
    images: list[np.ndarray]
    # (N,) bool, False if the model does not see the image
    image_mask: np.ndarray
    # (T,) bool; exactly one mask is True at each step
    past_mask: np.ndarray
    future_mask: np.ndarray
    is_padding: np.ndarray
    actions: list[FieldValues]
    # P + 1 steps; the last is the anchor
    proprioception: list[FieldValues]
    # False: fields are left unchanged
    is_normalized: bool
    # why earlier candidates were dropped; empty: this is the requested sample
    dropped: list[str]


def take_sample(batch: Batch, row: int, pipeline: RoboticsPipeline, fields: dict[str, FieldDescription]) -> RobotSample:
    """Take a row out of a batch.

    Args:
        batch: a batch of the loader.
        row: index of the sample.
        pipeline: the pipeline that made the batch.
        fields: descriptions of the fields.
    """
    params = pipeline.params
    anchor = params.window.anchor

    def take_fields(key: str, names: Sequence[str]) -> list[FieldValues]:
        if not names:
            return []
        transform = FieldTransform.create(names, pipeline.normalizer, anchor=anchor)
        values = np.asarray(batch[key][row], dtype=np.float64)
        raw, normalized = transform.invert(values), transform.select.invert(values)
        return [
            FieldValues(name=name, description=fields.get(name), raw=raw[name], normalized=normalized[name])
            for name in names
        ]

    return RobotSample(
        episode_id=batch["episode_ids"][row],
        anchor=int(batch["anchors"][row]),
        shard=batch["shards"][row],
        position=int(batch["positions"][row]),
        instruction=batch["instructions"][row],
        anchor_index=anchor,
        cameras=list(params.camera_names or []),
        image_indices=list(params.image_indices or []),
        images=_take_images(batch, row, len(params.image_names)),
        image_mask=np.asarray(batch["image_mask"][row]),
        past_mask=np.asarray(batch["past_mask"][row]),
        future_mask=np.asarray(batch["future_mask"][row]),
        is_padding=np.asarray(batch["is_padding"][row]),
        actions=take_fields("actions", params.action_fields),
        proprioception=take_fields("proprioception", params.proprioception_fields),
        is_normalized=params.normalization.enabled,
        dropped=list(batch.get("dropped", {})),
    )


def _take_images(batch: Batch, row: int, num_images: int) -> list[np.ndarray]:
    """Return a sample's images as the model sees them, colour augmentation included."""
    pixels = batch["pixel_values"]
    if num_images == 0 or pixels.ndim != 4 or len(pixels) != len(batch["episode_ids"]) * num_images:
        return []
    rows = slice(row * num_images, (row + 1) * num_images)
    factors = batch["color_factors"][rows] if "color_factors" in batch else None
    # scale to 0 .. 1 with the function that the model's inputs go through
    values = normalize_images(pixels[rows], (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), color_factors=factors)
    return [(image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8) for image in values]
