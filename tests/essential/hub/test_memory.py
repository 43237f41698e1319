"""Counting the memory of a training step without a GPU."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vla_foundry.batch import Documents, LossOutput
from vla_foundry.hub.memory import count_activation_bytes
from vla_foundry.models import attention, create_model, losses
from vla_foundry.params.distributed import DistributedParams
from vla_foundry.params.models.transformer import TransformerParams
from vla_foundry.training.distributed import parallelize
from vla_foundry.world import World

PARAMS = TransformerParams(hidden_dim=64, n_layers=4, n_heads=2, vocab_size=128, max_seq_len=128)


def create_inputs(batch: int) -> dict[str, Any]:
    tokens = torch.randint(128, (batch, 128))
    documents = Documents(np.full(2 * batch, 64, np.int32), np.full(batch, 2, np.int32), np.zeros(2 * batch, bool))
    return {"input_ids": tokens, "targets": tokens, "documents": documents}


def count(batch: int, params: TransformerParams = PARAMS, *, device: str = "meta", **options: Any) -> int:
    with torch.device(device):
        model = create_model(params).train()
    world = World(device=device)
    parallelize(model, DistributedParams(), world=world, precision="amp_bfloat16", **options)
    return count_activation_bytes(model, create_inputs(batch))


class Squares(nn.Module):
    """A sum of squares of x times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> LossOutput:
        doubled = (x * self.scale) * 2
        return LossOutput(sum=doubled.square().sum(), count=torch.ones(()), logs={})


def test_what_operations_keep_and_make_is_counted() -> None:
    # x has 8 KB and is not counted. Most is held in the backward pass: what is squared, its gradient, which is then
    # doubled for x scaled, and the product with x for the scale; and some scalars
    counted = count_activation_bytes(Squares(), {"x": torch.randn(2048)}, precision="fp32")
    assert 4 * 8192 <= counted <= 4 * 8192 + 64


def test_bytes_grow_with_tokens_and_blocks_and_a_checkpointed_block_keeps_its_input() -> None:
    one, two = count(8), count(16)
    assert two == pytest.approx(2 * one, rel=0.05)
    # 4 blocks more, each with at least its input (bf16), the feed-forward's 3 x 256 and 4 inputs of matrices
    deeper = replace(PARAMS, n_layers=8)
    per_block = (count(8, deeper) - one) / 4
    tokens = 8 * 128
    assert per_block > tokens * 2 * (3 * 256 + 5 * 64)
    kept = (count(8, deeper, grad_checkpointing=True) - count(8, grad_checkpointing=True)) / 4
    assert kept == pytest.approx(tokens * 2 * 64, rel=0.05)


def test_nothing_of_the_model_or_of_this_process_changes() -> None:
    model = create_model(PARAMS).train()
    inputs = create_inputs(2)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.random.get_rng_state()
    assert count_activation_bytes(model, inputs) > 0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "cpu" not in attention.VARLEN_DEVICES
    assert "cpu" in losses.NEVER_WAITING
    # and a real step still works
    model(**inputs).sum.backward()


def test_a_model_that_reads_tensors_is_refused() -> None:
    class Reading(Squares):
        def forward(self, x: Tensor) -> LossOutput:
            return super().forward(x[: int(x.sum())])

    with pytest.raises(ValueError, match="memory of Reading cannot be counted: it reads values"):
        count_activation_bytes(Reading(), {"x": torch.ones(4)}, precision="fp32")
