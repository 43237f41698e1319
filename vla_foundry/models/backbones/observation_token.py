"""The observation token: appended to each row's text; the policy reads the model's hidden state there."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vla_foundry.batch import Batch, Documents


class Rows(NamedTuple):
    """Rows of one sample each, on the host."""

    # int64 (B, W), 0 in padding and at the observation token
    input_ids: Tensor
    # int64 (B,), number of tokens in each row, including the observation token
    lengths: Tensor
    # int64 (B,), position of the observation token; None if absent
    places: Tensor | None


def arrange_rows(batch: Batch, *, has_observation_token: bool, is_trimmed: bool) -> Rows:
    """Lay out the rows of a batch, with room for an observation token right after each text.

    Args:
        is_trimmed: drop columns that are padding in every row; false: keep the batch's width, which takes few
            distinct values.

    Raises:
        ValueError: a row holds several samples.
    """
    tokens: Tensor = batch["input_ids"]
    B, T = tokens.shape
    lengths = torch.full((B,), T)
    documents: Documents | None = batch.get("documents")
    if documents is not None:
        rows = np.repeat(np.arange(B), documents.num_per_row)
        if np.bincount(rows[~documents.is_padding], minlength=B).max(initial=0) > 1:
            raise ValueError("A row of robot data holds several samples. Set --data.pack false.")
        lengths = torch.from_numpy(np.bincount(rows, np.where(documents.is_padding, 0, documents.lengths), B)).long()
    places = lengths if has_observation_token else None
    lengths = lengths + int(has_observation_token)
    longest = int(lengths.max()) if B else 0
    width = max(1, longest) if is_trimmed else max(T, longest)
    ids = torch.zeros(B, width, dtype=torch.int64)
    ids[:, :T] = tokens[:, :width]
    is_text = torch.arange(width) < (lengths if places is None else places)[:, None]
    return Rows(ids * is_text, lengths, places)


def extend_columns(values: Tensor, width: int) -> Tensor:
    """Pad token types (B, T) with 0 to the row width."""
    grown = torch.zeros(values.shape[0], width, dtype=values.dtype)
    grown[:, : values.shape[1]] = values[:, :width]
    return grown


def mask_of(rows: Rows) -> Tensor:
    """Return a bool mask (B, W), True at tokens."""
    return torch.arange(rows.input_ids.shape[1]) < rows.lengths[:, None]


def drop_missing_images(batch: Batch, image_token_id: int) -> Batch:
    """Return the batch without the images that `image_mask` hides and without their tokens."""
    image_mask: Tensor | None = batch.get("image_mask")
    if image_mask is None or image_mask.all():
        return batch
    rows = arrange_rows(batch, has_observation_token=False, is_trimmed=False)
    is_text = mask_of(rows)
    is_image = (rows.input_ids == image_token_id) & is_text
    tokens_per_image = max(1, int(is_image.sum()) // image_mask.numel())
    image = (is_image.cumsum(1) - 1).clamp(min=0) // tokens_per_image
    is_kept = is_text & (~is_image | image_mask.gather(1, image.clamp(max=image_mask.shape[1] - 1)))
    order = torch.argsort(~is_kept, dim=1, stable=True)
    kept = rows._replace(input_ids=rows.input_ids.gather(1, order), lengths=is_kept.sum(1))
    changed = {name: batch[name][image_mask.flatten()] for name in ("pixel_values", "color_factors") if name in batch}
    return {**batch, **changed, "input_ids": kept.input_ids, "documents": documents_of(kept)}


def documents_of(rows: Rows) -> Documents:
    """Return each row as one document followed by padding."""
    lengths = rows.lengths.numpy()
    pairs = np.stack([lengths, rows.input_ids.shape[1] - lengths], axis=1)
    return Documents(
        lengths=pairs[pairs > 0].astype(np.int32),
        num_per_row=(pairs > 0).sum(1).astype(np.int32),
        is_padding=np.tile([False, True], (len(lengths), 1))[pairs > 0],
    )


def put_token(embeds: Tensor, token: Tensor, places: Tensor) -> Tensor:
    """Replace the embedding at one position of each row of (B, W, D) with `token` (D,)."""
    flat_places = torch.arange(embeds.shape[0], device=places.device) * embeds.shape[1] + places
    rows: Any = token.to(embeds.dtype).expand(embeds.shape[0], -1)
    return embeds.flatten(0, 1).index_copy(0, flat_places, rows).view_as(embeds)
