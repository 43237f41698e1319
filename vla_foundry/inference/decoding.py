"""Generate tokens for a batch of prompts, each as if it were alone in the batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vla_foundry.randomness import draw_uniforms

_Stop: TypeAlias = Literal["end", "max_new_tokens", "max_seq_len"]


@dataclass(frozen=True)
class Continuation:
    """The tokens generated for one prompt."""

    # the new tokens, without those that ended them
    tokens: list[int]
    # an end token was drawn, max_new_tokens were generated, or the model's max_seq_len was reached
    stopped_by: _Stop


@torch.inference_mode()
def generate(
    model: Any,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Int[Tensor, "B T"] | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    end_token_ids: Sequence[int | tuple[int, ...]] = (),
    seeds: Sequence[int] | None = None,
    use_cache: bool = True,
    prompt_inputs: Mapping[str, Any] | None = None,
) -> list[Continuation]:
    """Continue each row, exactly as if it were alone in the batch.

    A finished row leaves the batch, so it costs no further computation.

    Args:
        model: a language model with `decode`; runs in evaluation mode; its previous mode is restored. Its
            `image_token_id`, if it has one, stands for an image and is never generated.
        attention_mask: 1 for the tokens of a prompt, 0 for padding, at any position.
        end_token_ids: tokens that end a row, or tuples of tokens that do so together.
        seeds: one per row, for temperature > 0; default 0, 1, ...
        use_cache: use a KV cache; False recomputes whole rows for each token.
        prompt_inputs: further arguments of the model's first call, such as images.

    Raises:
        ValueError: a prompt is empty, or leaves no room for a token.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
    seeds = range(len(input_ids)) if seeds is None else seeds
    choose = partial(choose_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    # a model that cannot ignore padding gets one row at a time
    num_rows = len(input_ids) if getattr(model, "keeps_padding", True) else 1
    was_training, model = model.training, model.eval()
    continuations: list[Continuation] = []
    for first in range(0, len(input_ids), num_rows):
        rows = slice(first, first + num_rows)
        ids, real = _pad_left(input_ids[rows], mask[rows])
        inputs = {"input_ids": ids, "attention_mask": real, **(prompt_inputs or {})}
        limits = _token_limits(real.sum(1).tolist(), getattr(model, "max_seq_len", None), max_new_tokens)
        continuations += _continue_rows(
            model, inputs, limits, choose, end_token_ids=end_token_ids, seeds=seeds[rows], use_cache=use_cache
        )
    model.train(was_training)
    return continuations


def _continue_rows(
    model: Any,
    inputs: dict[str, Any],
    limits: Sequence[tuple[int, _Stop]],
    choose: Callable[..., Tensor],
    *,
    end_token_ids: Sequence[int | tuple[int, ...]],
    seeds: Sequence[int],
    use_cache: bool,
) -> list[Continuation]:
    """Continue rows together.

    Args:
        inputs: arguments of the model's first call; rows are padded on the left.
        limits: most tokens of each row, and what stops it there.
        choose: `choose_tokens` with its settings.
    """
    ends = [[end] if isinstance(end, int) else list(end) for end in end_token_ids]
    image_token_id: int | None = getattr(model, "image_token_id", None)
    alive = list(range(len(limits)))
    tokens: list[list[int]] = [[] for _ in alive]
    stops: list[_Stop] = ["end" for _ in alive]
    for step in range(max(limit for limit, _ in limits)):
        output = model.decode(**inputs, use_cache=use_cache, logits_to_keep=1)
        logits = output.logits[:, -1].float()
        if image_token_id is not None:
            # the token may have no row in the table
            logits[:, image_token_id : image_token_id + 1] = -torch.inf
        new = choose(logits, seeds=[seeds[row] for row in alive], step=step)
        kept = []
        for place, (row, token) in enumerate(zip(alive, new.tolist(), strict=True)):
            tokens[row].append(token)
            end = next((end for end in ends if tokens[row][-len(end) :] == end), None)
            if end is not None:
                del tokens[row][-len(end) :]
            elif len(tokens[row]) < limits[row][0]:
                kept.append(place)
            else:
                stops[row] = limits[row][1]
        if not kept:
            break
        inputs = _next_inputs(inputs, new, output.past_key_values if use_cache else None, kept)
        alive = [alive[place] for place in kept]
    return [Continuation(row, stop) for row, stop in zip(tokens, stops, strict=True)]


def _pad_left(input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move padding to the front, so that every row ends with its prompt; drop columns that are all padding."""
    order = mask.argsort(dim=1, stable=True)
    longest = max(1, int(mask.sum(1).max()))
    return input_ids.gather(1, order)[:, -longest:], mask.gather(1, order)[:, -longest:]


def _token_limits(lengths: list[int], max_seq_len: int | None, max_new_tokens: int) -> list[tuple[int, _Stop]]:
    """Return the most tokens that each row may get, and what stops it there."""
    for length in lengths:
        if length == 0:
            raise ValueError("A prompt has no tokens. Give it at least one.")
        if max_seq_len is not None and length >= max_seq_len:
            raise ValueError(
                f"A prompt of {length} tokens leaves no room in model.max_seq_len ({max_seq_len}). Shorten it."
            )
    return [
        (max_new_tokens, "max_new_tokens")
        if max_seq_len is None or max_new_tokens <= max_seq_len - length
        else (max_seq_len - length, "max_seq_len")
        for length in lengths
    ]


def _next_inputs(inputs: dict[str, Any], new: Tensor, cache: Any, kept: list[int]) -> dict[str, Any]:
    """Return the next call's arguments for the rows that continue."""
    mask, input_ids = inputs["attention_mask"], inputs["input_ids"]
    if len(kept) < len(new):
        rows = torch.tensor(kept, device=new.device)
        new, mask, input_ids = new[rows], mask[rows], input_ids[rows]
        if cache is not None:
            cache.batch_select_indices(rows)
    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    column = new.unsqueeze(1).to(input_ids.dtype)
    if cache is None:
        types = {name: value for name, value in inputs.items() if name.endswith("token_type_ids")}
        inputs = inputs | {name: F.pad(value[kept], (0, 1)) for name, value in types.items()}
        return {**inputs, "input_ids": torch.cat([input_ids, column], dim=1), "attention_mask": mask}
    return {"input_ids": column, "attention_mask": mask, "past_key_values": cache}


def choose_tokens(
    logits: Float[Tensor, "B V"],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    seeds: Sequence[int],
    step: int,
) -> Int[Tensor, " B"]:
    """Choose one token per row.

    Args:
        temperature: 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens; 0 draws among all.
        top_p: draw among the likeliest tokens that together have this probability (nucleus sampling).
        seeds: one per row; with `step` it determines the draw, independently of the other rows.
        step: number of tokens drawn before.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities, tokens = (logits.double() / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    dropped = before >= top_p
    if top_k:
        dropped[:, top_k:] = True
    # always keep the likeliest token
    dropped[:, 0] = False
    cumulative = probabilities.masked_fill(dropped, 0).cumsum(dim=-1)
    uniforms = [draw_uniforms(1, seed=seed, position=step, purpose="next token")[0] for seed in seeds]
    draws = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)
    limits = draws[:, None] * cumulative[:, -1:]
    ranks = (cumulative <= limits).sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return tokens.gather(1, ranks).squeeze(1)
