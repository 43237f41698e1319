"""The moving average of the weights."""

import pytest
import torch
from torch import nn

from vla_foundry.params.ema import EMAParams
from vla_foundry.training.distributed import named_parameters
from vla_foundry.training.optimization.ema import EMA, ema_decay


def decay(params: EMAParams, updates: int) -> float:
    return float(ema_decay(params, torch.tensor([updates])))


def test_the_decay_grows_as_its_formula_says() -> None:
    params = EMAParams(update_after_step=3, inv_gamma=2.0, power=0.6, min_value=0.1, max_value=0.9)
    for updates in range(60):
        steps = max(0, updates - 3 - 1)
        expected = 0.0 if steps == 0 else min(max(1 - (1 + steps / 2.0) ** -0.6, 0.1), 0.9)
        assert decay(params, updates) == pytest.approx(expected, rel=1e-12)


def test_vanilla_copies_first_and_then_decays_at_its_rate() -> None:
    assert [decay(EMAParams(type="vanilla", alpha=0.999), n) for n in (0, 1, 500)] == [0.0, 0.999, 0.999]
    assert [decay(EMAParams(type="vanilla", update_after_step=2), n) for n in (2, 3)] == [0.0, 0.999]


def test_a_tied_weight_is_averaged_once() -> None:
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    ema = EMA(EMAParams(type="vanilla", alpha=0.9), named_parameters(model))
    assert list(ema.averages) == ["0.weight"]
    ema.update(torch.tensor([0]), torch.tensor(0.0))
    start = first.weight.detach().clone()
    with torch.no_grad():
        first.weight += 1.0
    ema.update(torch.tensor([1]), torch.tensor(0.0))
    torch.testing.assert_close(ema.averages["0.weight"], start + 0.1)


def test_copies_and_skips_are_exact() -> None:
    layer = nn.Linear(30, 30)
    ema = EMA(EMAParams(type="vanilla", alpha=0.9), named_parameters(layer))
    with torch.no_grad():
        layer.weight.mul_(1.7)
    before = ema.averages["weight"].clone()
    ema.update(torch.tensor([5]), torch.tensor(1.0))
    assert torch.equal(ema.averages["weight"], before)
    ema.update(torch.tensor([0]), torch.tensor(0.0))
    assert torch.equal(ema.averages["weight"], layer.weight)


def test_swapping_in_gives_the_weights_back_bit_by_bit_even_after_an_error() -> None:
    layer = nn.Linear(4, 4).bfloat16()
    ema = EMA(EMAParams(), named_parameters(layer))
    assert ema.averages["weight"].dtype == torch.float32
    for average in ema.averages.values():
        average.add_(1.001)
    before = layer.weight.detach().clone()

    def fail() -> None:
        with ema.swapped_in():
            torch.testing.assert_close(layer.weight.float(), before.float() + 1.001, rtol=0.01, atol=0.01)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(layer.weight, before)
