"""Attention kernels for rows split into segments (documents, padding) that do not see each other, and the KV cache.

No dense T x T mask is ever built: the CPU attends segment by segment, a GPU uses variable-length attention.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from vla_foundry.batch import Documents

# torch releases differ in how variable-length attention takes the causal flag and grouped queries
_VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)


class _Run(NamedTuple):
    """Neighbouring segments of one length, attended in one call."""

    num_segments: int
    length: int
    is_padding: bool


class _Stretches(NamedTuple):
    """Stretches of one shape whose tokens also see later tokens of their stretch; (G, n) and (G, m)."""

    # int64, indices of each stretch's tokens in the flat batch
    queries: Tensor
    # int64, the tokens they see: from the start of the segment to the end of the stretch
    keys: Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """How the tokens of a (B, T) batch, in row-major order, divide into segments."""

    # neighbouring segments of one length
    runs: tuple[_Run, ...]
    # int32 [num_segments + 1], start of each segment, then the end of the last; on the batch's device
    starts: Tensor
    # tokens of the longest segment
    max_length: int
    # max_length rounded up: it changes less often, and compiled blocks recompile whenever it does
    bound: int
    # int64 [B, T], position of each token within its segment; on the batch's device
    positions: Tensor
    # tokens that see more than a causal mask allows
    stretches: tuple[_Stretches, ...] = ()


def create_segments(
    documents: Documents | None,
    is_causal: bool,
    device: torch.device,
    *,
    sees_ahead: np.ndarray | None = None,
) -> Segments | None:
    """Lay out a batch's documents for attention; None where plain attention over whole rows gives the same result.

    This holds for rows of one document, and under a causal mask also for one document followed by padding, because it
    never looks ahead. Does not synchronise with the device.

    Args:
        sees_ahead: bool (B, T), True at tokens that under a causal mask also see the tokens after them, up to the end
            of their unbroken stretch of such tokens; on the host.
    """
    if sees_ahead is not None and (not is_causal or not sees_ahead.any()):
        sees_ahead = None
    if sees_ahead is not None and documents is None:
        B, T = sees_ahead.shape
        documents = Documents(np.full(B, T, np.int32), np.ones(B, np.int32), np.zeros(B, dtype=bool))
    if documents is None or (sees_ahead is None and _are_whole_rows(documents, is_causal)):
        return None
    lengths = documents.lengths.astype(np.int64)
    ends = np.cumsum(lengths)
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    is_new_run = np.ones(len(lengths), dtype=bool)
    is_new_run[1:] = (np.diff(lengths) != 0) | (np.diff(documents.is_padding) != 0)
    first = np.flatnonzero(is_new_run)
    sizes = np.diff(np.append(first, len(lengths)))
    return Segments(
        runs=tuple(
            _Run(int(n), int(lengths[i]), bool(documents.is_padding[i])) for i, n in zip(first, sizes, strict=True)
        ),
        starts=_to_device(np.concatenate(([0], ends)).astype(np.int32), device),
        max_length=int(lengths.max()),
        bound=-(-int(lengths.max()) // 128) * 128,
        positions=_to_device(positions.reshape(len(documents.num_per_row), -1), device),
        stretches=() if sees_ahead is None else _find_stretches(sees_ahead.reshape(-1), lengths, device),
    )


def _find_stretches(sees_ahead: np.ndarray, lengths: np.ndarray, device: torch.device) -> tuple[_Stretches, ...]:
    """Group stretches by shape. A caption batch has few groups because its samples begin alike."""
    ends = np.cumsum(lengths)
    segment = np.repeat(np.arange(len(lengths)), lengths)
    # number the stretches: one ends where the next token is in another segment or does not see ahead
    is_start = sees_ahead.copy()
    is_start[1:] &= ~sees_ahead[:-1] | (segment[1:] != segment[:-1])
    is_end = sees_ahead.copy()
    is_end[:-1] &= ~sees_ahead[1:] | (segment[1:] != segment[:-1])
    starts, stops = np.flatnonzero(is_start), np.flatnonzero(is_end) + 1
    begins = (ends - lengths)[segment[starts]]
    groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for start, stop, begin in zip(starts.tolist(), stops.tolist(), begins.tolist(), strict=True):
        groups.setdefault((stop - start, stop - begin), []).append((start, begin))
    stretches = []
    for (num_queries, num_keys), places in groups.items():
        first = np.array(places, dtype=np.int64)  # (G, 2)
        queries, keys = first[:, :1] + np.arange(num_queries), first[:, 1:] + np.arange(num_keys)
        stretches.append(_Stretches(_to_device(queries, device), _to_device(keys, device)))
    return tuple(stretches)


def _are_whole_rows(documents: Documents, is_causal: bool) -> bool:
    firsts = np.cumsum(documents.num_per_row) - documents.num_per_row
    may_follow = documents.is_padding if is_causal else np.zeros_like(documents.is_padding)
    is_first = np.zeros(len(documents.lengths), dtype=bool)
    is_first[firsts] = True
    # at most one segment of padding after the first segment
    return bool((documents.num_per_row <= 2).all() and (is_first | may_follow).all())


# None: they are copied each time
_CONSTANTS: ContextVar[dict[Any, Tensor] | None] = ContextVar("constants", default=None)


@contextmanager
def keep_constants() -> Iterator[dict[Any, Tensor]]:
    """Copy layouts of the same values to a device once, while the block runs; a CUDA graph copies nothing."""
    constants: dict[Any, Tensor] = {}
    before = _CONSTANTS.set(constants)
    try:
        yield constants
    finally:
        _CONSTANTS.reset(before)


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    constants = _CONSTANTS.get()
    if constants is None:
        return _copy(array, device)
    key = (array.shape, array.dtype.str, array.tobytes(), device)
    if key not in constants:
        constants[key] = _copy(array, device)
    return constants[key]


def _copy(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    # a copy from pageable memory would synchronise with the device
    return tensor.pin_memory().to(device, non_blocking=True)


def attend(
    queries: Float[Tensor, "B T H K"],
    keys: Float[Tensor, "B T G K"],
    values: Float[Tensor, "B T G M"],
    *,
    segments: Segments | None,
    is_causal: bool,
    dropout: float = 0.0,
    scale: float | None = None,
    window: int | None = None,
) -> Float[Tensor, "B T H M"]:
    """Compute scaled dot-product attention within segments; G key heads serve H = n x G query heads.

    Args:
        segments: None treats each row as one segment. Outputs at padding are zeros or attention among padding.
        scale: factor on the scores; None: 1/sqrt(K).
        window: within segments, a token sees itself and the window - 1 tokens before it (causal only).
    """
    if queries.device.type == "cpu" and queries.dtype == torch.bfloat16 and queries.requires_grad:
        # on the CPU the bf16 backward is about four times slower than fp32 (64 to 256 tokens, head width 32)
        wide = (queries.float(), keys.float(), values.float())
        with torch.autocast("cpu", enabled=False):
            output = attend(*wide, segments=segments, is_causal=is_causal, dropout=dropout, scale=scale, window=window)
        return output.to(queries.dtype)
    if segments is None:
        assert window is None, "a window is for segments"
        return _attend_rows(queries, keys, values, is_causal=is_causal, dropout=dropout, scale=scale)
    flat = tuple(x.flatten(0, 1) for x in (queries, keys, values))  # (B T, H, K)
    head_dim = queries.shape[-1]
    can_varlen = queries.is_cuda and queries.dtype in (torch.bfloat16, torch.float16) and dropout == 0.0
    if can_varlen and head_dim % 8 == 0 and head_dim <= 256 and values.shape[-1] == head_dim:
        output = _attend_varlen(*flat, segments=segments, is_causal=is_causal, scale=scale, window=window)
    else:
        output = _attend_runs_untraced(*flat, segments, is_causal, dropout, scale, window)
    if segments.stretches and is_causal:
        assert window is None, "what sees ahead has no window"
        output = _attend_stretches_untraced(*flat, output, segments.stretches, dropout, scale)
    return output.unflatten(0, queries.shape[:2])


def _attend_rows(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    is_causal: bool,
    dropout: float = 0.0,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """(B, T, H, K) x (B, S, G, K) -> (B, T, H, K). `mask` is True where a query may see a key."""
    output = F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=queries.shape[2] != keys.shape[2],
    )
    return output.transpose(1, 2)


def _attend_runs(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Segments,
    is_causal: bool,
    dropout: float,
    scale: float | None,
    window: int | None,
) -> Tensor:
    # use split: the gradient of each slice would be as large as the batch
    sizes = [run.num_segments * run.length for run in segments.runs]
    outputs = []
    for run, q, k, v in zip(segments.runs, queries.split(sizes), keys.split(sizes), values.split(sizes), strict=True):
        if run.is_padding:
            outputs.append(torch.zeros_like(q))
            continue
        shape = (run.num_segments, run.length)
        mask = None
        if window is not None and window < run.length:
            near = torch.ones(run.length, run.length, dtype=torch.bool, device=q.device)
            mask = near.tril().triu(1 - window)
        output = _attend_rows(
            *(x.unflatten(0, shape) for x in (q, k, v)),
            is_causal=is_causal and mask is None,
            dropout=dropout,
            scale=scale,
            mask=mask,
        )
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)


# lengths change with every batch; tracing them would recompile the block each time
_attend_runs_untraced: Any = torch.compiler.disable(_attend_runs)


def _attend_stretches(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    stretches: tuple[_Stretches, ...],
    dropout: float,
    scale: float | None,
) -> Tensor:
    """Write the attention of tokens that see ahead to `output`. Each sees a whole range of keys: no mask needed."""
    for group in stretches:
        seen = _attend_rows(
            queries[group.queries],
            keys[group.keys],
            values[group.keys],
            is_causal=False,
            dropout=dropout,
            scale=scale,
        )
        output = output.index_copy(0, group.queries.flatten(), seen.flatten(0, 1))
    return output


_attend_stretches_untraced: Any = torch.compiler.disable(_attend_stretches)


def _attend_varlen(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    segments: Segments,
    is_causal: bool,
    scale: float | None,
    window: int | None,
) -> Tensor:
    options: dict[str, Any] = {} if scale is None else {"scale": scale}
    if is_causal and "window_size" in _VARLEN_OPTIONS:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif is_causal:
        assert window is None, "this release of torch has no sliding windows"
        options["is_causal"] = True
    if queries.shape[1] != keys.shape[1]:
        if "enable_gqa" in _VARLEN_OPTIONS:
            options["enable_gqa"] = True
        else:
            repeats = queries.shape[1] // keys.shape[1]
            keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
    starts = segments.starts
    output = varlen_attn(queries, keys, values, starts, starts, segments.bound, segments.bound, **options)
    assert isinstance(output, Tensor)
    return output


def attend_cached(
    queries: Float[Tensor, "B T H K"],
    keys: Float[Tensor, "B S G K"],
    values: Float[Tensor, "B S G K"],
    mask: Tensor | None,
) -> Float[Tensor, "B T H K"]:
    """Attend from new tokens to cached tokens and themselves; `mask` (B or 1, 1, T, S) is True where allowed."""
    return _attend_rows(queries, keys, values, is_causal=False, mask=mask)


class MaskedRows(NamedTuple):
    """The row layout that a padding mask describes."""

    # each row as one document followed by padding, after sorting by `order`
    documents: Documents
    # int64 [B], real tokens
    counts: np.ndarray
    # int64 [B, T], permutation that moves real tokens to the front; None if they are already there
    order: np.ndarray | None


def read_mask(attention_mask: Shaped[Tensor, "B T"]) -> MaskedRows | None:
    """Describe a mask that is 0 at padding anywhere in a row; None if nothing is masked. Synchronises the device."""
    is_real = attention_mask.cpu().numpy().astype(bool)
    num_tokens = is_real.shape[1]
    counts = is_real.sum(1)
    if (counts == num_tokens).all():
        return None
    order = np.argsort(~is_real, axis=1, kind="stable")
    is_in_place = bool((order == np.arange(num_tokens)).all())
    return MaskedRows(Documents.of_counts(counts, num_tokens), counts, None if is_in_place else order)


@dataclass(frozen=True, eq=False)
class CacheStep:
    """Cache slots of the T new tokens of each row, and what these tokens may see."""

    # int64 [B, T], slot in the cache and position of each new token
    slots: Tensor
    # first slot, if it is the same in every row
    start: int | None
    # number of slots to read
    num_slots: int
    # bool (B or 1, 1, T, num_slots), True where a new token may see a slot; None: all visible
    mask: Tensor | None


class LayerCache:
    """The keys and values of one layer, (B, capacity, G, K)."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def write(self, keys: Tensor, values: Tensor, step: CacheStep | None) -> tuple[Tensor, Tensor]:
        """Store the (B, T, G, K) keys and values of the new tokens; return all keys and values they may see."""
        self.keys, all_keys = _write(self.keys, keys.detach(), step)
        self.values, all_values = _write(self.values, values.detach(), step)
        return (keys, values) if step is None else (all_keys, all_values)


class KVCache:
    """The keys and values of the tokens seen so far, for generation with rows of unequal length.

    Row b keeps its `lengths[b]` tokens in the first slots of each layer. Padding follows a chunk's real tokens and is
    overwritten by the next chunk.
    """

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]
        # int64 [B]; None until the first tokens
        self.lengths: np.ndarray | None = None

    def advance(
        self, num_rows: int, num_tokens: int, counts: np.ndarray | None, device: torch.device
    ) -> CacheStep | None:
        """Make room for the next chunk of `num_tokens` tokens per row, and count them.

        Args:
            counts: real tokens of each row, at the front of the chunk; None: all.

        Returns:
            None for the first chunk: its tokens see only each other, so plain causal attention suffices.
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
        """Keep only these rows. Named as in transformers' cache, so that generation treats both alike."""
        if self.lengths is not None:
            self.lengths = self.lengths[rows.cpu().numpy()]
        for layer in self.layers:
            if layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = layer.keys[rows], layer.values[rows]


def _write(buffer: Tensor | None, new: Tensor, step: CacheStep | None) -> tuple[Tensor, Tensor]:
    num_rows, num_tokens, *rest = new.shape
    num_slots = num_tokens if step is None else step.num_slots
    if buffer is None or buffer.shape[1] < num_slots:
        # grow by doubling: generating token by token copies the cache once per doubling, not once per token
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
