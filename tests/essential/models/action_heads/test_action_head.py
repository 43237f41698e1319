"""Heads learn what they are shown, and take every way there is to the same numbers."""

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch

from vla_foundry.models.action_heads.action_head import ActionWindow, DrawKey, HeadWidths, create_action_head
from vla_foundry.models.action_heads.noise import Guidance, draw_normals, draw_uniforms
from vla_foundry.models.backbones.backbone import Conditioning
from vla_foundry.params.models.action_heads import (
    ActionHeadParams,
    DDPMParams,
    DDPMTransformerParams,
    FlowTransformerParams,
    RegressionParams,
)
from vla_foundry.params.models.legacy import LegacyFlowParams, LegacyFlowTransformerParams
from vla_foundry.params.models.transformer import TransformerParams

B, T, A, P, D, C = 3, 6, 3, 2, 4, 8
WIDTHS = HeadWidths(action_dim=A, proprioception_dim=D, conditioning_dim=C, num_states=2)
TRANSFORMER = TransformerParams(hidden_dim=32, n_layers=2, n_heads=2, vocab_size=0, is_causal=False, max_seq_len=32)
# what a head whose times are rows of a table has
TABLE: dict[str, Any] = {"time_encoding": "table", "noise": LegacyFlowParams(num_timesteps=50)}
# name -> how a head differs
HEADS: dict[str, tuple[Any, dict[str, Any]]] = {
    "flow": (FlowTransformerParams, {}),
    "flow concat": (FlowTransformerParams, {"time_conditioning": "concat"}),
    "flow add table": (LegacyFlowTransformerParams, {"time_conditioning": "add", **TABLE}),
    "flow concat table": (LegacyFlowTransformerParams, {"time_conditioning": "concat", **TABLE}),
    "flow cross": (FlowTransformerParams, {"conditioning": "cross_attention"}),
    "flow cross concat": (FlowTransformerParams, {"conditioning": "cross_attention", "time_conditioning": "concat"}),
    "flow cross add": (FlowTransformerParams, {"conditioning": "cross_attention", "time_conditioning": "add"}),
    "ddpm": (DDPMTransformerParams, {}),
    "regression": (RegressionParams, {}),
    "regression cross": (RegressionParams, {"conditioning": "cross_attention"}),
    "flow layers": (FlowTransformerParams, {"conditioning": "joint_attention"}),
    "flow layers concat": (FlowTransformerParams, {"conditioning": "joint_attention", "time_conditioning": "concat"}),
    "flow layers add": (FlowTransformerParams, {"conditioning": "joint_attention", "time_conditioning": "add"}),
    "regression layers": (RegressionParams, {"conditioning": "joint_attention"}),
}
DRAWING = [name for name in HEADS if not name.startswith("regression")]


def create(name: str, *, is_causal: bool = False, randomized: bool = True, **changes: Any) -> Any:
    """A head in float64, whose zeros, gains and biases were given other values."""
    cls, own = HEADS[name]
    torch.manual_seed(0)
    params: ActionHeadParams = cls(
        transformer=dataclasses.replace(TRANSFORMER, is_causal=is_causal), **{**own, **changes}
    )
    head: Any = create_action_head(params, WIDTHS)
    if randomized:
        with torch.no_grad():
            for parameter_name, parameter in head.named_parameters():
                if parameter.ndim == 1 or "modulation" in parameter_name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        head.double()
    return head


def create_inputs(*, num_tokens: int = 1, is_plain: bool = False) -> tuple[Conditioning, ActionWindow]:
    """Conditioning and windows; the second sample ends in padding, the third lacks a dimension."""
    generator = torch.Generator().manual_seed(0)
    past = torch.zeros(B, T, dtype=torch.bool)
    past[:, 0] = True
    future, dims = ~past, torch.ones(B, A, dtype=torch.bool)
    mask = torch.ones(B, num_tokens, dtype=torch.bool)
    if not is_plain:
        future[1, -2:] = False
        dims[2, 2] = False
        mask[1, num_tokens // 2 + 1 :] = False
    actions = torch.randn(B, T, A, generator=generator).clamp(-1.5, 1.5) * dims[:, None]
    proprioception = torch.randn(B, P, D, generator=generator)
    step_mask = None if is_plain else past | future
    window = ActionWindow(actions, past, future, None if is_plain else dims, proprioception, step_mask)
    tokens = torch.randn(B, num_tokens, C, generator=generator)
    return Conditioning(tokens, None if is_plain or num_tokens == 1 else mask), window


def key(first: int = 0, stage: str = "training") -> DrawKey:
    return DrawKey(torch.arange(B) + first, 0, stage)


OVERFITTED = [
    *(pytest.param(name, 200, id=name) for name in ("flow", "ddpm", "regression")),
    *(
        pytest.param(name, 300, id=name, marks=pytest.mark.slow)
        for name in ("flow concat", "flow add table", "flow cross concat", "regression cross")
    ),
]


@pytest.mark.parametrize(("name", "num_steps"), OVERFITTED)
def test_a_batch_is_learned_and_its_actions_are_sampled(name: str, num_steps: int) -> None:
    draws: dict[str, Any] = {"num_action_head_repeats": 16} if name in DRAWING else {}
    head = create(name, randomized=False, **draws)
    conditioning, window = create_inputs()
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3 if name.startswith("regression") else 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for step in range(num_steps):
        output = head(conditioning, window, key(B * step))
        optimizer.zero_grad()
        (output.sum / output.count).backward()
        optimizer.step()
        schedule.step()
    head.eval()
    made = head.sample(conditioning, window, key(stage="sampling"), 10)
    error = (made - window.actions)[window.free_mask()].abs().mean()
    # the actions' own mean absolute value is 0.7
    assert error < (0.03 if name.startswith("regression") else 0.15)
    assert torch.equal(made[window.past_mask], window.actions[window.past_mask])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("name", DRAWING)
def test_draws_of_one_pass_are_those_of_several(name: str, num_tokens: int, is_causal: bool) -> None:
    conditioning, window = create_inputs(num_tokens=num_tokens)
    head = create(name, is_causal=is_causal, num_action_head_repeats=3)
    together = head(conditioning, window, key())
    noise = draw_normals(key().samples, (3, T, A), seed=0, purpose="training noise").double()
    uniforms = draw_uniforms(key().samples, 3, seed=0, purpose="training time")
    total = torch.zeros((), dtype=torch.float64)
    for draw in range(3):
        times = head.process.spread_times(uniforms[:, draw])
        noised = head.process.add_noise(window.actions.double(), noise[:, draw], times)
        noised = torch.where(window.free_mask(), noised, window.held_actions().double())
        predicted = head.predict(noised, times, head.embed_context(conditioning, window))
        errors = (predicted - head.process.target(window.actions.double(), noise[:, draw])).square()
        total += errors[window.free_mask()].sum()
    torch.testing.assert_close(together.sum, total / 3, rtol=1e-9, atol=1e-9)
    assert together.count.item() == window.free_mask().sum().item()


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("name", DRAWING)
def test_kept_keys_and_values_change_nothing(name: str, num_tokens: int) -> None:
    conditioning, window = create_inputs(num_tokens=num_tokens)
    head = create(name).eval()
    context = head.embed_context(conditioning, window)
    noised, times = torch.randn(B, T, A, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.9])
    predicted = head.predict(noised, times, context)
    assert (context.tokens is not None) == (name not in ("flow concat", "flow add table", "flow concat table"))
    if context.tokens is not None:
        kept = head.cache_context(conditioning, window, times)
        torch.testing.assert_close(head.predict(noised, times, kept), predicted, rtol=1e-9, atol=1e-9)
        assert (kept.modulations is not None) == head.is_modulated
        for place, time in enumerate(times):
            found = head.predict(noised, time.expand(B), kept, place=place)
            expected = head.predict(noised, time.expand(B), context)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", HEADS)
def test_hidden_tokens_are_not_read_and_take_no_place(name: str) -> None:
    conditioning, window = create_inputs(num_tokens=5)
    head = create(name).eval()
    mask = conditioning.mask
    assert mask is not None
    assert not mask.all()
    made = head.sample(conditioning, window, key(stage="sampling"), 3)
    spoiled = torch.where(mask[..., None], conditioning.tokens, 100.0)
    more = torch.nn.functional.pad(spoiled, (0, 0, 0, 4), value=7.0)
    longer = Conditioning(more, torch.nn.functional.pad(mask, (0, 4)))
    torch.testing.assert_close(head.sample(longer, window, key(stage="sampling"), 3), made, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_every_input_counts(name: str) -> None:
    conditioning, window = create_inputs(num_tokens=3, is_plain=True)
    # actions clamped at each step would hide a change
    changes_of_head = {"noise": DDPMParams(clamp_range=None)} if name == "ddpm" else {}
    head = create(name, **changes_of_head).eval()
    made = head.sample(conditioning, window, key(stage="sampling"), 2)
    assert window.proprioception is not None
    changes: list[tuple[Conditioning, ActionWindow]] = [
        (Conditioning(conditioning.tokens.roll(1, -1)), window),
        (Conditioning(conditioning.tokens.flip(1)), window),
        (conditioning, window._replace(actions=window.actions + 0.5)),
        (conditioning, window._replace(proprioception=window.proprioception + 0.5)),
    ]
    if name.startswith(("flow cross", "regression cross")):
        # cross-attention has no positions: there are images in it, whose tokens say where they are
        changes[1] = changes[0]
    for changed in changes:
        other = head.sample(*changed, key(stage="sampling"), 2)
        assert (other - made)[:, 1:].abs().amax(dim=(1, 2)).min() > 1e-4


@pytest.mark.parametrize("name", [name for name in DRAWING if name != "ddpm"])
def test_guidance_pulls_where_it_has_weight(name: str) -> None:
    conditioning, window = create_inputs(is_plain=True)
    head = create(name).eval()
    assert head.can_be_guided
    free = head.sample(conditioning, window, key(stage="sampling"), 4)
    weights = (torch.arange(T) < 3).double().expand(B, T)
    target = free + 0.5
    none = window._replace(guidance=Guidance(target, torch.zeros_like(weights)))
    assert torch.equal(head.sample(conditioning, none, key(stage="sampling"), 4), free)
    guided = window._replace(guidance=Guidance(target, weights))
    made = head.sample(conditioning, guided, key(stage="sampling"), 4)
    is_pulled = weights.bool() & window.future_mask
    assert ((target - made)[is_pulled].abs().mean()) < 0.25
    assert torch.equal(made[window.past_mask], window.actions[window.past_mask])
    assert not made.requires_grad


@pytest.mark.parametrize("name", ["ddpm", "regression"])
def test_other_heads_cannot_be_guided(name: str) -> None:
    assert not create(name).can_be_guided


@pytest.mark.parametrize("name", ["flow", "flow concat", "regression"])
def test_a_causal_head_does_not_look_ahead(name: str) -> None:
    conditioning, window = create_inputs(is_plain=True)
    head = create(name, is_causal=True).eval()
    past = torch.zeros(B, T, dtype=torch.bool)
    past[:, 3] = True
    window = window._replace(past_mask=past, future_mask=~past)
    made, changed = (
        head.sample(conditioning, window._replace(actions=window.actions + shift), key(stage="sampling"), 2)
        for shift in (0.0, 1.0)
    )
    assert torch.equal(made[:, :3], changed[:, :3])
    assert (made[:, 4:] != changed[:, 4:]).all()


def test_input_noise_is_added_in_training_only() -> None:
    conditioning, window = create_inputs()
    plain, noisy = (create("flow", input_noise_std=std) for std in (0.0, 0.3))
    assert plain(conditioning, window, key()).sum != noisy(conditioning, window, key()).sum
    plain.eval()
    noisy.eval()
    assert torch.equal(plain(conditioning, window, key()).sum, noisy(conditioning, window, key()).sum)


def test_a_table_of_times_starts_as_sines() -> None:
    head = create("flow add table", randomized=False)
    weight = head.time_encoding.weight
    assert weight.shape == (50, C)
    frequencies = 1e4 ** -(torch.arange(4) / 3)
    angles = torch.arange(50)[:, None] * frequencies
    torch.testing.assert_close(weight, torch.cat((angles.sin(), angles.cos()), dim=1), rtol=1e-5, atol=1e-5)


COMPILED = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("heads", sys.argv[1])
heads = importlib.util.module_from_spec(spec)
spec.loader.exec_module(heads)
conditioning, window = heads.create_inputs(num_tokens=2)
for name in heads.DRAWING:
    torch._dynamo.reset()
    head = heads.create(name).eval()
    expected = head.sample(conditioning, window, heads.key(stage="sampling"), 3)
    head.predict = torch.compile(head.predict, backend="eager", fullgraph=True)
    made = head.sample(conditioning, window, heads.key(stage="sampling"), 3)
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()
    head = heads.create(name, num_action_head_repeats=2)
    expected = head(conditioning, window, heads.key()).sum
    for block in head.blocks():
        block.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(head(conditioning, window, heads.key()).sum, expected, rtol=1e-9, atol=1e-9)
"""


@pytest.mark.slow
def test_blocks_and_what_sampling_repeats_are_one_graph_each() -> None:
    # in a process of its own: checks of types are no part of what is compiled
    command = [sys.executable, "-c", COMPILED, __file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr


def test_missing_proprioception_is_an_error() -> None:
    conditioning, window = create_inputs()
    with pytest.raises(ValueError, match=r"reads proprioception .* but the batch has none"):
        create("flow")(conditioning, window._replace(proprioception=None), key())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_action_head_repeats": 0}, "num_action_head_repeats"),
        ({"input_noise_std": -1.0}, "input_noise_std"),
        ({"time_encoding": "table"}, "time_encoding 'table' goes with"),
        ({"time_encoding": "table", "time_conditioning": "add"}, r"give noise\.num_timesteps"),
    ],
)
def test_params_that_can_not_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LegacyFlowTransformerParams(transformer=TRANSFORMER, **changes)
