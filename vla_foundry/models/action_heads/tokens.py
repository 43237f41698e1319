"""Heads that write actions as tokens, which the backbone's language model predicts one after another.

    row  = [images and instruction | observation token | proprioception | action tokens]
    loss = cross-entropy of each action token given what comes before it, averaged over a chunk's tokens

An action token is a row of the head's own two tables, which extend those of the language model; its other tokens can
not be drawn. What a token stands for is the tokenizer's business (robotics/action_tokens.py): FAST tokens stand for
parts of a compressed chunk, bins for one value each. Sampling takes the likeliest token each time, among those that
stand for no more values than the chunk still lacks. So every row ends with a full chunk.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vla_foundry.batch import IGNORE_INDEX, Batch, LossOutput
from vla_foundry.models.action_heads.action_head import (
    ActionHead,
    ActionWindow,
    DrawKey,
    HeadWidths,
    register_action_head,
)
from vla_foundry.models.action_heads.decoder import init_maps
from vla_foundry.models.backbones.backbone import Conditioning, LanguageModelBackbone, Suffix
from vla_foundry.models.layers import init_normal
from vla_foundry.params.models.action_heads import DiscreteBinsParams, FastTokensParams, TokenHeadParams
from vla_foundry.robotics.action_tokens import ActionTokenizer, BinTokenizer, read_fast_tokenizer

# on a GPU, rows have few different widths
_ROUND_TOKENS = 8


def create_action_tokenizer(params: TokenHeadParams, action_dim: int) -> ActionTokenizer:
    """Create the tokenizer that a head writes with.

    Raises:
        FileNotFoundError: its file does not exist.
        ValueError: its file is damaged, or for actions of another width.
    """
    if isinstance(params, DiscreteBinsParams):
        if params.num_steps is None:
            raise ValueError("model.action_head.num_steps is missing. Give it, or data of type robotics.")
        return BinTokenizer(params.num_bins, params.limits, num_steps=params.num_steps, action_dim=action_dim)
    assert isinstance(params, FastTokensParams)
    tokenizer = read_fast_tokenizer(params.tokenizer)
    if tokenizer.action_dim != action_dim:
        raise ValueError(
            f"{params.tokenizer} is for actions of {tokenizer.action_dim} values, not model.action_dim ({action_dim})."
        )
    return tokenizer


def tokenize_actions(tokenizer: ActionTokenizer, batch: Batch, *, is_rounded: bool) -> Int[Tensor, "B K"]:
    """Return the tokens of the steps to predict, IGNORE_INDEX after each row's last.

    Steps past the end of an episode repeat its last action.

    Args:
        is_rounded: pad K, so that it takes few different values.
    """
    future, steps = batch["future_mask"].numpy(), np.arange(batch["future_mask"].shape[1])
    last = np.maximum.accumulate(np.where(future, steps, 0), axis=1)[:, -tokenizer.num_steps :]
    chunks = np.take_along_axis(batch["actions"].detach().numpy(), last[..., None], axis=1)
    if batch.get("action_dim_mask") is not None:
        chunks = np.where(batch["action_dim_mask"].numpy()[:, None], chunks, 0.0)
    tokens = tokenizer.encode(chunks)
    longest = max((len(row) for row in tokens), default=1)
    longest = -(-longest // _ROUND_TOKENS) * _ROUND_TOKENS if is_rounded else longest
    found = torch.full((len(tokens), longest), IGNORE_INDEX)
    for row, ids in enumerate(tokens):
        found[row, : len(ids)] = torch.tensor(ids)
    return found


@register_action_head("fast_tokens")
@register_action_head("discrete_bins")
class TokenHead(ActionHead):
    """The tables of action tokens, and the map of proprioception to a token for each step."""

    def __init__(self, params: TokenHeadParams, widths: HeadWidths) -> None:
        super().__init__()
        self.tokenizer = create_action_tokenizer(params, widths.action_dim)
        num_tokens = len(self.tokenizer.lengths)
        self.embeddings = nn.Embedding(num_tokens, widths.token_dim)
        self.output = nn.Linear(widths.token_dim, num_tokens, bias=False)
        self.proprioception_encode = None
        if widths.proprioception_dim:
            self.proprioception_encode = nn.Linear(widths.proprioception_dim, widths.token_dim)
        self.init_weights()

    def forward(self, conditioning: Conditioning, window: ActionWindow, key: DrawKey) -> LossOutput:
        """Return the cross-entropy of each sample's tokens, averaged over them and counted once per action value."""
        assert conditioning.suffix_states is not None
        assert window.tokens is not None
        targets = window.tokens
        states = conditioning.suffix_states[:, -1 - targets.shape[1] : -1]
        logits = self.output(states.to(self.output.weight.dtype))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
        is_token = targets != IGNORE_INDEX
        hits = ((logits.argmax(-1) == targets) & is_token).sum(1)
        values, num_tokens = window.free_mask().sum((1, 2)), is_token.sum(1).clamp(min=1)
        total = (losses.view_as(targets).sum(1) / num_tokens * values).sum()
        accuracy = (hits / num_tokens * values).sum()
        return LossOutput(sum=total, count=values.sum(), logs={"token_accuracy": accuracy.detach()})

    def embed_suffix(self, window: ActionWindow, tokens: Int[Tensor, "B K"] | None) -> Float[Tensor, "B S D"]:
        """Return the embeddings of proprioception and of action tokens."""
        weight = self.embeddings.weight
        parts = []
        if self.proprioception_encode is not None:
            assert window.proprioception is not None, "RoboticsBatchHandler checks it"
            parts.append(self.proprioception_encode(window.proprioception.to(weight.dtype)))
        if tokens is not None:
            parts.append(self.embeddings(tokens.clamp(min=0)))
        B = window.past_mask.shape[0]
        return torch.cat(parts, dim=1) if parts else weight.new_zeros(B, 0, weight.shape[1])

    @torch.no_grad()
    def write(self, backbone: LanguageModelBackbone, observation: dict[str, Any], window: ActionWindow) -> Tensor:
        """Return actions like `sample`, written token by token; every row ends with a full chunk."""
        starts = observation["suffix_starts"]
        inputs = {name: value for name, value in observation.items() if name != "suffix_starts"}
        writing = backbone.start_writing(**inputs, suffix=Suffix(self.embed_suffix(window, None), starts))
        lengths = torch.from_numpy(self.tokenizer.lengths).to(starts.device)
        num_values = self.tokenizer.num_steps * self.tokenizer.action_dim
        missing = torch.full_like(starts, num_values)
        written: list[Tensor] = []
        while True:
            logits = self.output(writing.state.to(self.output.weight.dtype)).float()
            fits = lengths <= missing.clamp(min=1)[:, None]
            token = logits.nan_to_num().masked_fill(~fits, -torch.inf).argmax(-1)
            # rows that have their chunk write on, into nothing
            written.append(token.masked_fill(missing == 0, -1))
            missing = (missing - lengths[token]).clamp(min=0)
            if not missing.any():
                break
            writing = backbone.continue_writing(writing, self.embeddings(token))
        tokens = torch.stack(written, dim=1).tolist()
        chunks = np.stack([self.tokenizer.decode([token for token in row if token >= 0]) for row in tokens])
        past = window.past_mask.shape[1] - self.tokenizer.num_steps
        predicted = F.pad(torch.from_numpy(chunks).float(), (0, 0, past, 0)).to(starts.device)
        return torch.where(window.free_mask(), predicted, window.held_actions())

    def blocks(self) -> list[nn.Module]:
        """Return no blocks: the language model has them."""
        return []

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise the tables like those of the native language model."""
        for table in (self.embeddings, self.output):
            init_normal(table.weight, table.weight.shape[1] ** -0.5)
        init_maps(self.proprioception_encode)
