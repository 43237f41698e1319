"""Muon: what it updates, by how much, and what a skipped update leaves."""

import copy

import pytest
import torch
from torch import nn

from vla_foundry.params.ema import EMAParams
from vla_foundry.params.hparams import HyperParams
from vla_foundry.training.optimization.muon import MuonAdamW, orthogonalize
from vla_foundry.training.optimization.optimizer import describe_groups
from vla_foundry.training.state import TrainState, create_train_state, update_weights


class Model(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 4), nn.Conv1d(4, 6, 1)) for _ in range(2))
        self.head = nn.Linear(6, 10)


def create_state(**changes: object) -> TrainState:
    torch.manual_seed(0)
    model = Model()
    values = {
        "optimizer": "muon",
        "precision": "fp32",
        "lr": 0.01,
        "lr_scheduler": "constant",
        "warmup": 0.0,
        "wd": 0.1,
    }
    hparams = HyperParams(**values | changes)  # pyright: ignore[reportArgumentType]
    state = create_train_state(model, model, hparams=hparams, ema=EMAParams(), total_steps=10)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return state


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (3, 5, 7)])
def test_singular_values_follow_the_polynomial(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(*shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values = values / torch.linalg.matrix_norm(matrices).unsqueeze(-1)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(orthogonalize(matrices), left * values.unsqueeze(-2) @ right, rtol=1e-6, atol=1e-6)
    assert 0.6 < values.min() < values.max() < 1.3


def test_matrices_in_blocks_move_as_by_torch_and_the_rest_as_by_adamw() -> None:
    state, plain = create_state(), create_state(optimizer="adamw")
    weight = state.parameters["blocks.0.0.weight"]
    expected = nn.Parameter(weight.detach().clone())
    torchs = torch.optim.Muon([expected], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        expected.grad = weight.grad.clone()  # pyright: ignore[reportOptionalMemberAccess]
        torchs.step()
        update_weights(state, torch.zeros(()), max_norm=None)
        update_weights(plain, torch.zeros(()), max_norm=None)
    # torch orthogonalizes in bfloat16
    torch.testing.assert_close(weight, expected, rtol=0, atol=4e-4)
    moved = {name for name, value in state.parameters.items() if not torch.equal(value, plain.parameters[name])}
    assert moved == {"blocks.0.0.weight", "blocks.1.0.weight"}
    assert describe_groups(state.optimizer, state.parameters, 0.01) == [
        "weight decay 0, lr 0.01: 6 tensors, 90 weights (embedding.weight, blocks.*.*.bias, head.bias)",
        "Muon, weight decay 0.1, lr 0.01: 2 tensors, 48 weights (blocks.*.*.weight)",
        "weight decay 0.1, lr 0.01: 3 tensors, 108 weights (blocks.*.*.weight, head.weight)",
    ]


def test_an_update_that_is_skipped_changes_no_bit() -> None:
    state = create_state()
    update_weights(state, torch.zeros(()), max_norm=None)
    before = copy.deepcopy((state.model.state_dict(), state.optimizer.state_dict()["state"]))
    state.parameters["blocks.0.0.weight"].grad.fill_(torch.nan)  # pyright: ignore[reportOptionalMemberAccess]
    assert update_weights(state, torch.zeros(()), max_norm=1.0)[1] == 1
    torch.testing.assert_close(
        (state.model.state_dict(), state.optimizer.state_dict()["state"]), before, rtol=0, atol=0
    )


def test_muon_without_matrices_is_refused() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"hparams\.optimizer muon: no matrix in a block of the model is trainable"):
        create_train_state(
            model, model, hparams=HyperParams(optimizer="muon", warmup=0.0), ema=EMAParams(), total_steps=10
        )
    assert isinstance(create_state().optimizer, MuonAdamW)
