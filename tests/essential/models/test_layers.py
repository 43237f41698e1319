"""Norms and rotary positions against formulas written out here."""

import pytest
import torch
from torch import nn

from vla_foundry.models.layers import (
    Attention,
    LoRALinear,
    RotaryTables,
    add_adapters,
    create_norm,
    merge_adapters,
    rotate,
)
from vla_foundry.params.models.roles import LoRAParams
from vla_foundry.params.models.transformer import TransformerParams


def create_tables(**changes: object) -> RotaryTables:
    values = {"max_seq_len": 2048, "theta": 10000.0, "bf16_frequencies": False, "rotate_in_float32": False, **changes}
    return RotaryTables(8, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "norm_type",
    [
        "default_layer_norm",
        "lp_layer_norm",
        "gain_only_lp_layer_norm",
        "gain_only_layer_norm",
        "no_wb_layer_norm",
        "rms_norm",
    ],
)
def test_norms_follow_their_formulas(norm_type: str) -> None:
    norm = create_norm(norm_type, 6, 1e-3).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    centred = x if norm_type == "rms_norm" else x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    parameters = dict(norm.named_parameters())
    assert set(parameters) == {
        "default_layer_norm": {"weight", "bias"},
        "lp_layer_norm": {"weight", "bias"},
        "no_wb_layer_norm": set(),
    }.get(norm_type, {"weight"})
    expected = expected * parameters.get("weight", 1) + parameters.get("bias", 0)
    torch.testing.assert_close(norm(x), expected)


def test_only_low_precision_norms_follow_autocast() -> None:
    x = torch.randn(2, 3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert create_norm("lp_layer_norm", 6, 1e-5)(x).dtype == torch.bfloat16
        assert create_norm("default_layer_norm", 6, 1e-5)(x).dtype == torch.float32
        assert create_norm("rms_norm", 6, 1e-5)(x.bfloat16()).dtype == torch.float32


def test_rotary_turns_pairs_by_position_times_frequency() -> None:
    x = torch.randn(1, 5, 2, 8, dtype=torch.float64)
    rotated = rotate(x, create_tables(theta=100.0)(5))
    pairs = torch.complex(x[..., :4], x[..., 4:])
    frequencies = 100.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    angles = torch.arange(5, dtype=torch.float64)[:, None, None] * frequencies
    expected = pairs * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(rotated, torch.cat([expected.real, expected.imag], dim=-1), rtol=1e-6, atol=1e-6)


def test_positions_may_differ_by_row() -> None:
    tables, x = create_tables(), torch.randn(2, 3, 1, 8)
    positions = torch.tensor([[0, 1, 2], [7, 8, 9]])
    rotated = rotate(x, tables(positions))
    torch.testing.assert_close(rotated[:1], rotate(x[:1], tables(3)))
    whole = rotate(torch.cat([torch.zeros(1, 7, 1, 8), x[1:]], dim=1), tables(10))
    torch.testing.assert_close(rotated[1:], whole[:, 7:])


def test_tables_stay_fp32_and_equal_in_a_model_of_another_dtype() -> None:
    tables = create_tables()
    model = nn.Sequential(create_tables(), nn.Linear(2, 2)).bfloat16()
    assert model[1].weight.dtype == torch.bfloat16
    assert torch.equal(model[0].cos, tables.cos)
    assert torch.equal(model[0].sin, tables.sin)
    assert model[0].cos.dtype == torch.float32
    assert not model[0].state_dict()


def test_bf16_frequencies_give_other_angles_far_out() -> None:
    exact, rounded = create_tables(), create_tables(bf16_frequencies=True)
    frequencies = (10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)).bfloat16().double()
    angles = torch.arange(2048, dtype=torch.float64)[:, None] * frequencies
    torch.testing.assert_close(rounded.cos, angles.cos().float(), rtol=0, atol=0)
    assert (exact.cos - rounded.cos)[:8].abs().max() < 0.02 < 0.1 < (exact.cos - rounded.cos).abs().max()


def test_rotary_float32_rotates_bf16_in_fp32() -> None:
    x = torch.randn(1, 64, 2, 8).bfloat16()
    exact = rotate(x.float(), create_tables()(64))
    in_float32 = rotate(x, create_tables(rotate_in_float32=True)(64))
    assert in_float32.dtype == torch.bfloat16
    assert torch.equal(in_float32, exact.bfloat16())
    assert not torch.equal(rotate(x, create_tables()(64)), exact.bfloat16())


@torch.no_grad()
def test_one_query_token_passes_the_adapters_as_all_tokens_do() -> None:
    attention = Attention(TransformerParams(hidden_dim=16, n_heads=4, n_kv_heads=2)).double()
    add_adapters(attention, LoRAParams(targets=["in_proj"]))
    assert isinstance(attention.in_proj, LoRALinear)
    nn.init.normal_(attention.in_proj.lora_b.weight)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    queries, keys, values = attention.project(x, None)
    for _ in ("adapters", "merged"):
        one_query, same_keys, same_values = attention.project(x, None, x[:, 3:4])
        torch.testing.assert_close(one_query, queries[:, 3:4])
        torch.testing.assert_close((same_keys, same_values), (keys, values))
        merge_adapters(attention)
