"""Which parameters decay, and the gradient norm."""

from typing import Any

import pytest
import torch
from torch import nn

from vla_foundry.params.ema import EMAParams
from vla_foundry.params.hparams import HyperParams, ParameterGroup
from vla_foundry.training.optimization.optimizer import (
    decayed_parameters,
    describe_groups,
    freeze_weights,
    gradient_norm,
    summarize_names,
)
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
        self.k = Experts()


class Experts(nn.Module):
    """A mixture's experts and router as plain parameters, as Hugging Face stores them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(3, 4, 8))
        self.shared_proj = nn.Parameter(torch.zeros(1, 4, 8))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(3, 8))
        self.weight = nn.Parameter(torch.zeros(3, 4))
        self.latents = nn.Parameter(torch.zeros(6, 4))
        self.A_log = nn.Parameter(torch.zeros(4, 16))
        self.time_mix_key = nn.Parameter(torch.zeros(1, 1, 4))
        self.rel_pos_h = nn.Parameter(torch.zeros(7, 4))
        self.D = nn.Parameter(torch.zeros(2, 8))


def test_only_matrices_between_features_decay() -> None:
    model = Everything()
    decayed = decayed_parameters(model)
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter in decayed}
    features = {"b.weight", "d.weight", "e.weight", "h.in_proj_weight", "h.out_proj.weight"}
    assert names == features | {"k.gate_up_proj", "k.shared_proj", "k.weight"}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 24}),
        ("gpt_oss", {"num_local_experts": 4}),
        (
            "deepseek_v3",
            {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 0,
             "moe_intermediate_size": 24, "q_lora_rank": 8, "kv_lora_rank": 8},
        ),
        ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2}),
    ],
)  # fmt: skip
def test_all_matrices_of_published_models_decay_and_nothing_else(kind: str, sizes: dict[str, int]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    decayed = decayed_parameters(model)
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not any(word in name for word in ("embed", "wte", "wpe", "bias"))
        assert (parameter in decayed) is is_matrix, name


def test_the_table_says_what_decays_and_what_is_frozen() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    model[0].requires_grad_(False)
    state = create_train_state(
        model,
        model,
        hparams=HyperParams(wd=0.1, lr=0.01, warmup=1.0, lr_multipliers={"1": 0.5}),
        ema=EMAParams(),
        total_steps=1,
    )
    assert describe_groups(state.optimizer, state.parameters, 0.01) == [
        "weight decay 0.1, lr 0.005: 1 tensors, 16 weights (1.weight)",
        "weight decay 0, lr 0.005: 1 tensors, 4 weights (1.bias)",
        "weight decay 0, lr 0.01: 2 tensors, 8 weights (2.weight, 2.bias)",
        "frozen: 2 tensors, 20 weights (0.weight, 0.bias)",
    ]
    assert summarize_names([f"layers.{i}.{part}" for i in range(3) for part in "abcdef"], 4) == (
        "layers.*.a, layers.*.b, layers.*.c, layers.*.d and 2 more"
    )


def test_the_norm_is_over_all_gradients() -> None:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.tensor([1.0, 2.0, 2.0])
    parameters[1].grad = torch.full((2, 2), 2.0)
    assert float(gradient_norm(parameters)) == 5.0


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_takes_the_clipped_gradients(max_norm: float, dtype: torch.dtype, optimizer: Any) -> None:
    weights = []
    for is_clipped_before in (False, True):
        torch.manual_seed(0)
        model: Any = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(6, 6) for _ in range(2))}).to(dtype)
        hparams = HyperParams(lr=1e-2, eps=1.0, warmup=0.0, optimizer=optimizer, precision="fp32")
        state = create_train_state(model, model, hparams=hparams, ema=EMAParams(), total_steps=10)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            if is_clipped_before:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            update_weights(state, torch.zeros(()), max_norm=None if is_clipped_before else max_norm)
        weights.append([parameter.detach() for parameter in model.parameters()])
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-7)


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
    with pytest.raises(ValueError, match=r"lr_multipliers\.vit \(0\) must be above 0"):
        HyperParams(lr_multipliers={"vit": 0.0})


def grouped(**groups: ParameterGroup) -> list[str]:
    """The table of a model of three layers with these groups."""
    model = nn.ModuleDict({"vit": nn.Linear(2, 2), "text": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    hparams = HyperParams(
        lr=0.01, wd=0.1, warmup=0.0, lr_multipliers={"text": 0.5}, parameter_groups=groups, lr_scheduler="constant"
    )
    freeze_weights(model, hparams)
    state = create_train_state(model, model, hparams=hparams, ema=EMAParams(), total_steps=10)
    return describe_groups(state.optimizer, state.parameters, hparams.lr)


def test_groups_by_pattern_have_their_own_rate_decay_and_freezing() -> None:
    table = grouped(
        all_biases=ParameterGroup(patterns=["*.bias"], lr=0.02),
        text=ParameterGroup(patterns=["te?t.*"], wd=0.0),
        vision=ParameterGroup(patterns=["vit.*"], freeze=True),
    )
    assert table == [
        "weight decay 0, lr 0.005: 2 tensors, 6 weights (text.weight, text.bias)",
        "weight decay 0.1, lr 0.01: 1 tensors, 4 weights (head.weight)",
        "weight decay 0, lr 0.02: 1 tensors, 2 weights (head.bias)",
        "frozen: 2 tensors, 6 weights (vit.weight, vit.bias)",
    ]


def test_groups_that_would_do_nothing_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"parameter_groups\.vision\.patterns: 'vti\.\*' matches no weight.*vit\.weight"
    ):
        grouped(vision=ParameterGroup(patterns=["vti.*"], freeze=True))
    with pytest.raises(ValueError, match=r"parameter_groups\.a has no weights left"):
        grouped(a=ParameterGroup(patterns=["vit.*"], lr=0.1), b=ParameterGroup(patterns=["*"], lr=0.1))
    with pytest.raises(ValueError, match="No weight of the model is trainable"):
        grouped(a=ParameterGroup(patterns=["*"], freeze=True))
    with pytest.raises(ValueError, match="freeze is true"):
        ParameterGroup(patterns=["*"], freeze=True, lr=0.1)
    with pytest.raises(ValueError, match="patterns is empty"):
        ParameterGroup(lr=0.1)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    hparams = HyperParams(warmup=0.0, parameter_groups={"first": ParameterGroup(patterns=["0.*"], lr=0.1)})
    with pytest.raises(ValueError, match=r"parameter_groups\.first has frozen weights only"):
        freeze_weights(model, hparams)
