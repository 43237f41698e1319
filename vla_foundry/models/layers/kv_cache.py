"""The keys and values of tokens already seen, for generation with rows of unequal length."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class CacheStep:
    """Where the T new tokens of each row go, and what they may see."""

    # int64 [B, T], slot in the cache and position of each new token
    slots: Tensor
    # first slot, where it is the same in every row
    start: int | None
    # slots that are looked at
    num_slots: int
    # bool (B or 1, 1, T, num_slots), True where a new token may look at a slot; None: everywhere
    mask: Tensor | None


class LayerCache:
    """The keys and values of one layer, (B, capacity, G, K)."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def write(self, keys: Tensor, values: Tensor, step: CacheStep | None) -> tuple[Tensor, Tensor]:
        """Store the (B, T, G, K) keys and values of the new tokens; return all that they may look at."""
        self.keys, all_keys = _write(self.keys, keys.detach(), step)
        self.values, all_values = _write(self.values, values.detach(), step)
        return (keys, values) if step is None else (all_keys, all_values)


class KVCache:
    """Row b holds its `lengths[b]` tokens in the first slots of each layer.

    Padding of a chunk lies behind its real tokens and is overwritten by the next chunk.
    """

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]
        # int64 [B]; None until the first tokens
        self.lengths: np.ndarray | None = None

    def plan(self, num_rows: int, num_tokens: int, counts: np.ndarray | None, device: torch.device) -> CacheStep | None:
        """Plan the next chunk of `num_tokens` tokens per row, and count them.

        Args:
            counts: real tokens of each row, at the front of the chunk; None: all.

        Returns:
            None for the first chunk: its tokens see each other only, and plain causal attention serves.
        """
        past = np.zeros(num_rows, dtype=np.int64) if self.lengths is None else self.lengths
        if len(past) != num_rows:
            raise ValueError(f"past_key_values holds {len(past)} rows, but {num_rows} were given. Start a new cache.")
        self.lengths = past + (num_tokens if counts is None else counts)
        if not past.any():
            return None
        num_slots = int(past.max()) + num_tokens
        is_equal = bool((past == past[0]).all())
        slots = torch.from_numpy(past[:, None] + np.arange(num_tokens)).to(device)
        mask = None
        if num_tokens > 1 or not is_equal:
            rows = slots[:1] if is_equal else slots
            mask = torch.arange(num_slots, device=device) <= rows[:, None, :, None]
        return CacheStep(slots=slots, start=int(past[0]) if is_equal else None, num_slots=num_slots, mask=mask)

    def batch_select_indices(self, rows: Tensor) -> None:
        """Keep only these rows (named as transformers names it, so that generation treats both caches alike)."""
        if self.lengths is not None:
            self.lengths = self.lengths[rows.cpu().numpy()]
        for layer in self.layers:
            if layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = layer.keys[rows], layer.values[rows]


def _write(buffer: Tensor | None, new: Tensor, step: CacheStep | None) -> tuple[Tensor, Tensor]:
    num_rows, num_tokens, *rest = new.shape
    num_slots = num_tokens if step is None else step.num_slots
    if buffer is None or buffer.shape[1] < num_slots:
        # doubling: a token at a time costs one copy of the cache per doubling, not per token
        grown = new.new_zeros(num_rows, max(2 * num_slots, 64), *rest)
        if buffer is not None:
            grown[:, : buffer.shape[1]] = buffer
        buffer = grown
    if step is None:
        buffer[:, :num_tokens] = new
    elif step.start is not None:
        buffer[:, step.start : step.start + num_tokens] = new
    else:
        buffer[torch.arange(num_rows, device=new.device)[:, None], step.slots] = new
    return buffer, buffer[:, :num_slots]
