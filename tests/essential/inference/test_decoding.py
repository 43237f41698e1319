"""Draws follow the asked-for distribution, and each row's stream is its own."""

from typing import Any

import pytest
import torch
from torch import Tensor

from vla_foundry.batch import LanguageModelOutput
from vla_foundry.inference.decoding import choose_tokens, generate

LOGITS = torch.tensor([0.5, 2.0, 1.0, -1.0])


def sample(num_draws: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The share of each token among many draws."""
    rows = LOGITS.expand(num_draws, -1)
    tokens = choose_tokens(
        rows, temperature=temperature, top_k=top_k, top_p=top_p, seeds=list(range(num_draws)), step=3
    )
    return tokens.bincount(minlength=4) / num_draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_shares_follow_the_softmax(temperature: float) -> None:
    torch.testing.assert_close(
        sample(4000, temperature=temperature), (LOGITS / temperature).softmax(0), rtol=0, atol=0.03
    )


def test_top_k_and_top_p_leave_out_the_unlikely() -> None:
    likely = LOGITS.softmax(0)
    kept = torch.tensor([0.0, likely[1], likely[2], 0.0])
    torch.testing.assert_close(sample(4000, top_k=2), kept / kept.sum(), rtol=0, atol=0.03)
    # the two likeliest have 0.83 together, the likeliest alone 0.61
    torch.testing.assert_close(sample(4000, top_p=0.8), kept / kept.sum(), rtol=0, atol=0.03)
    assert sample(200, top_p=1e-9)[1] == 1
    assert sample(200, top_k=1)[1] == 1


def test_temperature_zero_takes_the_likeliest() -> None:
    assert sample(5, temperature=0.0)[1] == 1


def test_a_row_draws_the_same_whatever_the_others_are() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    options = {"temperature": 1.0, "top_k": 0, "top_p": 0.9}
    together = choose_tokens(logits, seeds=range(6), step=2, **options)
    for row in (0, 3, 5):
        assert choose_tokens(logits[row : row + 1], seeds=[row], step=2, **options)[0] == together[row]


def test_draws_differ_by_seed_and_step() -> None:
    logits = torch.zeros(1, 10**5)
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    # seeds are hashes of 64 bits: their last bits must count too
    draws = {
        int(choose_tokens(logits, seeds=[seed], step=step, **options)[0])
        for seed in (0, 1, 2**64 - 2, 2**64 - 1)
        for step in range(3)
    }
    assert len(draws) == 12
    again = choose_tokens(logits, seeds=[2**64 - 1], step=2, **options)
    assert int(again[0]) in draws


class Mute(torch.nn.Module):
    """A model that finds its image token the likeliest, whatever it reads."""

    def __init__(self, image_token_id: int) -> None:
        super().__init__()
        self.image_token_id = image_token_id

    def decode(self, input_ids: Tensor, **_inputs: Any) -> LanguageModelOutput:
        logits = torch.tensor([0.0, 1.0, 2.0, 3.0]).index_fill(0, torch.tensor([self.image_token_id % 4]), 9.0)
        return LanguageModelOutput(logits.expand(len(input_ids), 1, 4), None, None)


# the last one has no row in the table
@pytest.mark.parametrize(("image_token_id", "expected"), [(1, 3), (3, 2), (0, 3), (4, 0)])
@pytest.mark.parametrize("temperature", [0.0, 0.01])
def test_the_image_token_is_never_generated(image_token_id: int, expected: int, temperature: float) -> None:
    rows = generate(
        Mute(image_token_id), torch.ones(2, 3).long(), max_new_tokens=3, temperature=temperature, use_cache=False
    )
    assert [row.tokens for row in rows] == [[expected] * 3] * 2
