"""Join encoded samples into the rows of a microbatch: their tokens, and their images in the same order."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from vla_foundry.batch import Batch, Documents
from vla_foundry.data.pipelines.stages import Sample
from vla_foundry.images.processor import TOKEN_KEYS, Processor

# row length - 1 is a multiple of this: few enough lengths for compiled models, and little padding
ROW_MULTIPLE = 16
# keys of `encode` that are not simply concatenated along their first dimension
_OWN_KEYS = (*TOKEN_KEYS, "image_index", "pixel_maps")


def bucket(longest: int, seq_len: int) -> int:
    """Return the length of rows that hold one sample each: a multiple of ROW_MULTIPLE, plus 1, or seq_len + 1."""
    return min(-(-(longest - 1) // ROW_MULTIPLE) * ROW_MULTIPLE, max(seq_len, longest - 1)) + 1


def join_samples(
    samples: Sequence[Sample], rows: Sequence[Sequence[int]], length: int, *, processor: Processor
) -> Batch:
    """Pack encoded samples into rows, with their images in the same order.

    Args:
        samples: each with `inputs` from `Processor.encode`, and `color_factors` if all samples have them.
        rows: for each row, the numbers of its samples in order.
        length: tokens in a row.
        processor: the processor that encoded the samples.

    Raises:
        ValueError: the images differ in size.
    """
    order = [number for row in rows for number in row]
    inputs = [samples[number]["inputs"] for number in order]
    batch = _lay_tokens(inputs, [len(row) for row in rows], length, processor)
    for name in dict.fromkeys(name for each in inputs for name in each):  # a sample may have no images
        if name not in _OWN_KEYS:
            batch[name] = _join_tensors(name, [each[name] for each in inputs if name in each])
    batch["image_mean"], batch["image_std"] = tuple(processor.image_mean), tuple(processor.image_std)
    if "color_factors" in samples[0]:
        indices = [each["image_index"].numpy() if "image_index" in each else np.zeros(0, np.int32) for each in inputs]
        num_images = np.asarray([int(index.max(initial=-1)) + 1 for index in indices])
        factors = [  # one row for all images of a sample, or one for each
            np.broadcast_to(samples[number]["color_factors"], (count, 4))[index]
            for number, count, index in zip(order, num_images, indices, strict=True)
        ]
        batch["color_factors"] = np.concatenate(factors)
        if num_images.sum() < len(batch["color_factors"]):
            firsts = np.cumsum(num_images) - num_images
            parts = [index + first for index, first in zip(indices, firsts, strict=True)]
            batch["image_index"] = np.concatenate(parts).astype(np.int32)
    return batch


def _lay_tokens(inputs: Sequence[Mapping[str, Any]], counts: Sequence[int], length: int, processor: Processor) -> Batch:
    """Return the batch entries with one value per token; `counts` holds the number of samples in each row."""
    batch: Batch = {}
    for name in (name for name in TOKEN_KEYS if name in inputs[0]):
        filler = processor.pad_token_id if name == "input_ids" else 0
        dtype = np.bool_ if name == "target_mask" else np.int32
        batch[name] = np.full((len(counts), length), filler, dtype=dtype)
    segments: list[int] = []
    is_padding: list[bool] = []
    num_per_row = []
    waiting = iter(inputs)
    for row, count in enumerate(counts):
        place = 0
        for _ in range(count):
            sample = next(waiting)
            size = len(sample["input_ids"])
            for name in TOKEN_KEYS:
                if name in batch:
                    batch[name][row, place : place + size] = sample[name].numpy()
            if "target_mask" in batch:
                batch["target_mask"][row, place] = False
            place += size
            segments.append(size)
        is_padding += [False] * count
        if place < length:
            segments.append(length - place)
            is_padding.append(True)
        num_per_row.append(count + (place < length))
    batch["documents"] = Documents(
        lengths=np.asarray(segments, dtype=np.int32),
        num_per_row=np.asarray(num_per_row, dtype=np.int32),
        is_padding=np.asarray(is_padding, dtype=np.bool_),
    )
    return batch


def _join_tensors(name: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(
            f"data.processor makes {name} of several sizes ({', '.join(map(str, sorted(shapes)))}). "
            "Fix them with data.processor_kwargs, e.g. {size: {height: 224, width: 224}}."
        )
    if tensors[0].ndim == 4 and tensors[0].is_contiguous(memory_format=torch.channels_last):
        # copied as rows of bytes, five times as fast
        return torch.cat([tensor.movedim(1, -1) for tensor in tensors]).movedim(-1, 1)
    return torch.cat(list(tensors))
