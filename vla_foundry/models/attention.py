"""Attention kernels for rows split into segments (documents, padding) that do not see each other, and the KV cache.

No dense T x T mask is ever built: the CPU attends segment by segment, a GPU uses variable-length attention.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from vla_foundry.batch import Documents

# torch releases differ in how variable-length attention takes the causal flag and grouped queries
_VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)
# where it has kernels
VARLEN_DEVICES = {"cuda"}


class _Run(NamedTuple):
    """Neighbouring ranges of one shape, attended in one call."""

    num_ranges: int
    num_queries: int
    num_keys: int
    is_padding: bool


class _Ranges(NamedTuple):
    """Ranges of tokens in a flat list; the queries of a range see its keys."""

    # on the host
    runs: tuple[_Run, ...]
    # int32 [num_ranges + 1], start of each range, then the end of the last; on the batch's device
    query_starts: Tensor
    key_starts: Tensor
    # the longest range, rounded up: it changes less often, and compiled blocks are compiled again when it first does
    max_queries: int
    max_keys: int


class _Ahead(NamedTuple):
    """The tokens that see more than a causal mask allows: all of a range."""

    # int64, indices of the ranges' queries and keys in the flat batch
    queries: Tensor
    keys: Tensor
    ranges: _Ranges


@dataclass(frozen=True, eq=False)
class Segments:
    """How the tokens of a (B, T) batch, in row-major order, divide into segments."""

    ranges: _Ranges
    # tokens of the longest segment
    max_length: int
    # int64 [B, T], position of each token within its segment; on the batch's device
    positions: Tensor
    # None: a causal mask is right for all
    ahead: _Ahead | None = None


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
    return Segments(
        ranges=_create_ranges(lengths, lengths, documents.is_padding, device),
        max_length=int(lengths.max()),
        positions=_to_device(positions.reshape(len(documents.num_per_row), -1), device),
        ahead=None if sees_ahead is None else _find_ahead(sees_ahead.reshape(-1), lengths, device),
    )


def _create_ranges(
    num_queries: np.ndarray, num_keys: np.ndarray, is_padding: np.ndarray, device: torch.device
) -> _Ranges:
    shapes = np.stack([num_queries, num_keys, is_padding], axis=1)
    first = np.flatnonzero(np.append(True, (np.diff(shapes, axis=0) != 0).any(1)))
    sizes = np.diff(np.append(first, len(shapes)))
    starts = [
        _to_device(np.append(0, np.cumsum(counts)).astype(np.int32), device) for counts in (num_queries, num_keys)
    ]
    return _Ranges(
        runs=tuple(
            _Run(int(n), int(q), int(k), bool(p)) for n, (q, k, p) in zip(sizes, shapes[first].tolist(), strict=True)
        ),
        query_starts=starts[0],
        key_starts=starts[0] if num_queries is num_keys else starts[1],  # kernels ask for the same tensor
        max_queries=-(-int(num_queries.max()) // 128) * 128,
        max_keys=-(-int(num_keys.max()) // 128) * 128,
    )


def _find_ahead(sees_ahead: np.ndarray, lengths: np.ndarray, device: torch.device) -> _Ahead:
    """Find the unbroken stretches of tokens that see ahead, those of one shape side by side."""
    ends = np.cumsum(lengths)
    segment = np.repeat(np.arange(len(lengths)), lengths)
    # a stretch ends where the next token is in another segment or does not see ahead
    is_start = sees_ahead.copy()
    is_start[1:] &= ~sees_ahead[:-1] | (segment[1:] != segment[:-1])
    is_end = sees_ahead.copy()
    is_end[:-1] &= ~sees_ahead[1:] | (segment[1:] != segment[:-1])
    starts, stops = np.flatnonzero(is_start), np.flatnonzero(is_end) + 1
    begins = (ends - lengths)[segment[starts]]
    # a caption batch has few shapes because its samples begin alike
    order = np.lexsort((stops - begins, stops - starts))
    starts, stops, begins = starts[order], stops[order], begins[order]
    return _Ahead(
        _to_device(_join_ranges(starts, stops), device),
        _to_device(_join_ranges(begins, stops), device),
        _create_ranges(stops - starts, stops - begins, np.zeros(len(starts), dtype=bool), device),
    )


def _join_ranges(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Return the numbers of all ranges, one range after the other."""
    lengths = stops - starts
    return np.arange(lengths.sum()) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)


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
    key = (array.shape, array.dtype.str, array.tobytes(), device) if constants is not None else None
    if constants is not None and key in constants:
        return constants[key]
    tensor = torch.from_numpy(array)
    # a copy from pageable memory would synchronise with the device
    tensor = (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
    # compiled blocks take any number of documents from the start
    torch._dynamo.maybe_mark_dynamic(tensor, 0)
    if constants is not None:
        constants[key] = tensor
    return tensor


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
    device_type, shape = queries.device.type, queries.shape[:2]
    if device_type not in VARLEN_DEVICES and queries.dtype == torch.bfloat16 and queries.requires_grad:
        # on the CPU the bf16 backward is about four times slower than fp32 (64 to 256 tokens, head width 32)
        wide = (queries.float(), keys.float(), values.float())
        with torch.autocast(device_type, enabled=False):
            output = attend(*wide, segments=segments, is_causal=is_causal, dropout=dropout, scale=scale, window=window)
        return output.to(queries.dtype)
    if segments is None:
        assert window is None, "a window is for segments"
        return _attend_rows(queries, keys, values, is_causal=is_causal, dropout=dropout, scale=scale)
    can_varlen = dropout == 0.0 and _can_varlen(queries, values)
    if torch.compiler.is_compiling() and not can_varlen:
        # lengths are not known when a block is compiled
        mask = _mask_rows(segments, is_causal, window)
        return _attend_rows(queries, keys, values, is_causal=False, dropout=dropout, scale=scale, mask=mask)
    run = _attend_varlen if can_varlen else partial(_attend_runs, dropout=dropout)
    queries, keys, values = (x.flatten(0, 1) for x in (queries, keys, values))  # (B T, H, K)
    output = run(queries, keys, values, segments.ranges, is_causal, scale, window)
    if segments.ahead is not None and is_causal:
        assert window is None, "what sees ahead has no window"
        asking, seen, ranges = segments.ahead
        wider = run(queries[asking], keys[seen], values[seen], ranges, False, scale, None)
        output = output.index_copy(0, asking, wider)
    return output.unflatten(0, shape)


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


def _mask_rows(segments: Segments, is_causal: bool, window: int | None) -> Tensor:
    """Return a mask (B, 1, T, T), True where a token sees another."""
    positions, ahead = segments.positions, segments.ahead
    number = (positions == 0).cumsum(1)
    mask = number[:, :, None] == number[:, None]
    if is_causal:
        mask &= mask.new_ones(mask.shape[1:]).tril()
    if window is not None:
        mask &= positions[:, :, None] - positions[:, None] < window
    if ahead is not None and is_causal:
        counts = torch.arange(ahead.queries.shape[0], device=mask.device)
        stretch = torch.searchsorted(ahead.ranges.query_starts, counts, right=True)  # from 1 on
        stretch = torch.zeros_like(number).flatten().index_copy(0, ahead.queries, stretch).view_as(number)
        mask |= (stretch[:, :, None] == stretch[:, None]) & (stretch[:, None] > 0)
    return mask[:, None]


def _can_varlen(queries: Tensor, values: Tensor) -> bool:
    """Return True if torch's variable-length attention takes them."""
    width = queries.shape[-1]
    if queries.device.type not in VARLEN_DEVICES or queries.dtype not in (torch.bfloat16, torch.float16):
        return False
    return width % 8 == 0 and width <= 256 and values.shape[-1] == width


def _attend_varlen(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    ranges: _Ranges,
    is_causal: bool,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """(n, H, K) x (m, G, K) -> (n, H, M)."""
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
    output: Any = varlen_attn(queries, keys, values, *ranges[1:], **options)
    return output


def _attend_runs(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    ranges: _Ranges,
    is_causal: bool,
    scale: float | None,
    window: int | None,
    *,
    dropout: float,
) -> Tensor:
    """(n, H, K) x (m, G, K) -> (n, H, M), in runs of ranges of one shape; zeros at padding."""
    runs = ranges.runs
    num_queries = [run.num_ranges * run.num_queries for run in runs]
    num_keys = [run.num_ranges * run.num_keys for run in runs]
    outputs = []
    # use split: the gradient of each slice would be as large as the batch
    parts = (queries.split(num_queries), keys.split(num_keys), values.split(num_keys))
    for run, q, k, v in zip(runs, *parts, strict=True):
        if run.is_padding:
            outputs.append(torch.zeros_like(q))
            continue
        mask = None
        if window is not None and window < run.num_keys:
            near = torch.ones(run.num_queries, run.num_keys, dtype=torch.bool, device=q.device)
            mask = near.tril().triu(1 - window)
        output = _attend_rows(
            *(x.unflatten(0, (run.num_ranges, -1)) for x in (q, k, v)),
            is_causal=is_causal and mask is None,
            dropout=dropout,
            scale=scale,
            mask=mask,
        )
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)


def attend_cached(
    queries: Float[Tensor, "B T H K"],
    keys: Float[Tensor, "B S G K"],
    values: Float[Tensor, "B S G K"],
    mask: Tensor | None,
) -> Float[Tensor, "B T H K"]:
    """Attend from new tokens to cached tokens and themselves; `mask` (B or 1, 1, T, S) is True where allowed."""
    return _attend_rows(queries, keys, values, is_causal=False, mask=mask)


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
