"""Which parameters decay, and the gradient norm."""

import pytest
import torch
from torch import nn

from vla_foundry.params.ema import EMAParams
from vla_foundry.params.hparams import HyperParams
from vla_foundry.training.optimizer import clip_gradients, decayed_parameters, gradient_norm
from vla_foundry.training.state import create_train_state, update_weights


class Everything(nn.Module):
    """One of each kind of parameter, with names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Embedding(5, 4)
        self.b = nn.Linear(4, 4)
        self.c = nn.LayerNorm(4)
        self.d = nn.Conv2d(3, 4, 2)
        self.e = nn.Linear(4, 5, bias=False)
        self.f = nn.Linear(4, 5, bias=False)
        self.f.weight = self.a.weight
        self.g = nn.Parameter(torch.zeros(1, 7, 4))
        self.h = nn.MultiheadAttention(4, 2)
        self.i = nn.RMSNorm(4)
        self.j = nn.GroupNorm(2, 4)


def test_only_matrices_between_features_decay() -> None:
    model = Everything()
    decayed = decayed_parameters(model)
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter in decayed}
    assert names == {"b.weight", "d.weight", "e.weight", "h.in_proj_weight", "h.out_proj.weight"}


def test_hugging_face_linear_layers_decay() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer = conv1d(3, 4)
    assert decayed_parameters(layer) == {layer.weight}


def test_norm_and_clipping_are_over_all_gradients() -> None:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.tensor([1.0, 2.0, 2.0])
    parameters[1].grad = torch.full((2, 2), 2.0)
    norm = gradient_norm(parameters)
    assert float(norm) == 5.0
    clip_gradients(parameters[:2], 10.0, norm)
    assert parameters[0].grad.tolist() == [1.0, 2.0, 2.0]
    clip_gradients(parameters[:2], 2.5, norm)
    torch.testing.assert_close(parameters[1].grad, torch.full((2, 2), 1.0))


def updated(lr_multipliers: dict[str, float]) -> dict[str, torch.Tensor]:
    """How far the first update of AdamW moves each weight of two layers; without decay that is its learning rate."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    hparams = HyperParams(lr=1e-2, wd=0.0, warmup=0.0, lr_scheduler="constant", lr_multipliers=lr_multipliers)
    state = create_train_state(model, model, hparams=hparams, ema=EMAParams(), total_steps=10)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    update_weights(state, torch.zeros(()), max_norm=None)
    return {name: (before[name] - value.detach()).mean() for name, value in model.named_parameters()}


def test_parts_have_learning_rates_of_their_own_by_the_longest_name() -> None:
    moved = updated({"1": 0.1, "1.1": 2.0})
    expected = {"0.weight": 1e-2, "0.bias": 1e-2, "1.0.weight": 1e-3, "1.0.bias": 1e-3, "1.1.weight": 2e-2}
    for name, value in expected.items():
        assert moved[name].item() == pytest.approx(value, rel=1e-3), name


def test_a_multiplier_of_no_part_is_named() -> None:
    with pytest.raises(ValueError, match=r"hparams\.lr_multipliers.*'vti'"):
        updated({"vti": 0.1})
    with pytest.raises(ValueError, match=r"lr_multipliers\.vit \(0\.0\) must be above 0"):
        HyperParams(lr_multipliers={"vit": 0.0})
