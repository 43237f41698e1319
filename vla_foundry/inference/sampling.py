"""Choose next tokens from logits; each row draws from its own counter-based stream."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vla_foundry.randomness import draw_uniforms


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
        temperature: 0: the likeliest token.
        top_k: draw among the k likeliest; 0: among all.
        top_p: draw among the likeliest tokens that together have this probability (nucleus sampling).
        seeds: one per row; with `step` it determines the draw, whatever the other rows are.
        step: number of tokens drawn before.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities, tokens = (logits.double() / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    dropped = before >= top_p
    if top_k:
        dropped[:, top_k:] = True
    # the likeliest token always stays
    dropped[:, 0] = False
    cumulative = probabilities.masked_fill(dropped, 0).cumsum(dim=-1)
    uniforms = [draw_uniforms(1, seed=seed, position=step, purpose="next token")[0] for seed in seeds]
    draws = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)
    limits = draws[:, None] * cumulative[:, -1:]
    ranks = (cumulative <= limits).sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return tokens.gather(1, ranks).squeeze(1)
