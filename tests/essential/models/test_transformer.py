"""The native transformer: names, initialisation, who sees whom, positions, cache, tied and resized embeddings."""

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vla_foundry.batch import Documents
from vla_foundry.models import attention, create_model
from vla_foundry.models.layers import swiglu_hidden_dim
from vla_foundry.models.transformer import Transformer
from vla_foundry.params.models.transformer import TransformerParams

Create = Callable[..., Transformer]


def random_ids(*shape: int) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(1))


def test_state_dict_has_the_names_and_shapes_of_published_checkpoints(create_tiny: Create) -> None:
    model = create_tiny(n_layers=1, qk_norm=True, post_embed_norm=True)
    hidden = swiglu_hidden_dim(32)
    norms = ["post_embed_norm", "layers.0.attention.q_norm", "layers.0.attention.k_norm"]
    norms += ["layers.0.attention_norm", "layers.0.ffn_norm", "norm"]
    expected = {
        "embeddings.weight": (61, 32),
        "layers.0.attention.in_proj.weight": (96, 32),
        "layers.0.attention.out_proj.weight": (32, 32),
        "layers.0.feed_forward.w12.weight": (2 * hidden, 32),
        "layers.0.feed_forward.w3.weight": (32, hidden),
        "output.weight": (61, 32),
        **{f"{norm}.{name}": (32,) for norm in norms for name in ("weight", "bias")},
    }
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected


@pytest.mark.parametrize(("dim", "width"), [(64, 256), (96, 256), (512, 1536), (1024, 2816), (2048, 5632)])
def test_swiglu_widths(dim: int, width: int) -> None:
    assert swiglu_hidden_dim(dim) == width


def test_gelu_feed_forward_and_grouped_heads_have_their_shapes(create_tiny: Create) -> None:
    state = create_tiny(n_layers=1, ffn_type="gelu", n_kv_heads=2, head_dim=6, norm_type="rms_norm").state_dict()
    assert state["layers.0.attention.in_proj.weight"].shape == ((4 + 2 + 2) * 6, 32)
    assert state["layers.0.attention.out_proj.weight"].shape == (32, 4 * 6)
    assert state["layers.0.feed_forward.0.weight"].shape == (128, 32)
    assert state["layers.0.feed_forward.2.weight"].shape == (32, 128)
    assert "norm.bias" not in state


def test_initial_weights_are_truncated_normals_that_shrink_with_depth() -> None:
    torch.manual_seed(0)
    model = create_model(TransformerParams(hidden_dim=64, n_layers=8, n_heads=4, vocab_size=512))
    state = model.state_dict()
    std = 1 / math.sqrt(64)
    # a normal cut off at 3 sigma has 0.987 of its standard deviation
    for name in ("embeddings.weight", "output.weight", "layers.7.attention.in_proj.weight"):
        assert state[name].std().item() == pytest.approx(0.987 * std, rel=0.03)
        assert state[name].abs().max() <= 3 * std
    for layer in (0, 7):
        for name in ("attention.out_proj", "feed_forward.w3"):
            deep_std = std / math.sqrt(2 * (layer + 1))
            assert state[f"layers.{layer}.{name}.weight"].std().item() == pytest.approx(0.987 * deep_std, rel=0.05)
    assert (state["norm.weight"] == 1).all()
    assert (state["norm.bias"] == 0).all()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"n_kv_heads": 2, "qk_norm": True, "norm_type": "rms_norm"},
    {"n_kv_heads": 1, "head_dim": 6, "rope_theta": 500.0, "ffn_type": "gelu"},
    {"positional_embedding_type": "rotary_float32", "rope_bf16_frequencies": True, "weight_tying": True},
    {"positional_embedding_type": "none", "post_embed_norm": True},
    {"is_causal": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_documents_are_computed_as_if_each_were_alone(
    options: dict[str, Any], create_tiny: Create, create_documents: Callable[..., Documents]
) -> None:
    model = create_tiny(**options)
    ids = random_ids(3, 12)
    documents = create_documents([5, 7], [3, 3, 4, -2], [12])
    packed = model(input_ids=ids, documents=documents).logits
    for row, start, end in [(0, 0, 5), (0, 5, 12), (1, 0, 3), (1, 3, 6), (1, 6, 10), (2, 0, 12)]:
        alone = model(input_ids=ids[row : row + 1, start:end]).logits[0]
        torch.testing.assert_close(packed[row, start:end], alone, rtol=1e-6, atol=1e-7)


def test_gradients_of_packed_documents_are_those_of_single_ones(
    create_tiny: Create, create_documents: Callable[..., Documents]
) -> None:
    model, ids, targets = create_tiny(n_kv_heads=2), random_ids(2, 12), random_ids(2, 12)
    targets[1, 10:] = -100
    parameters = list(model.parameters())
    documents = create_documents([5, 7], [4, 6, -2])
    packed = torch.autograd.grad(model(input_ids=ids, documents=documents, targets=targets).sum, parameters)
    pieces = [(0, 0, 5), (0, 5, 12), (1, 0, 4), (1, 4, 10)]
    losses = [model(input_ids=ids[r : r + 1, a:b], targets=targets[r : r + 1, a:b]).sum for r, a, b in pieces]
    single = torch.autograd.grad(sum(losses), parameters)
    torch.testing.assert_close(packed, single, rtol=1e-7, atol=1e-8)


def test_documents_never_make_a_square_of_tokens(
    create_tiny: Create, create_documents: Callable[..., Documents], record_shapes: type
) -> None:
    model = create_tiny(max_seq_len=512)
    documents = create_documents([150, 100, 100, -34])
    with record_shapes() as record:
        model(input_ids=random_ids(1, 384), documents=documents, targets=random_ids(1, 384)).sum.backward()
    assert record.shapes
    assert not [shape for shape in record.shapes if shape[-2:] == (384, 384)]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("place", ["left", "right", "middle", "both"])
def test_padding_is_never_seen_and_takes_no_position(place: str, is_causal: bool, create_tiny: Create) -> None:
    model = create_tiny(is_causal=is_causal)
    ids = random_ids(3, 10)
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[1] = torch.tensor(
        {
            "left": [0, 0, 0, 1, 1, 1, 1, 1, 1, 1],
            "right": [1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
            "middle": [1, 1, 0, 1, 1, 0, 0, 1, 1, 1],
            "both": [0, 1, 1, 1, 0, 1, 1, 1, 0, 0],
        }[place]
    )
    output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    for row in range(3):
        kept = mask[row].bool()
        alone = model(input_ids=ids[row : row + 1, kept], output_hidden_states=True)
        torch.testing.assert_close(output.logits[row, kept], alone.logits[0], rtol=1e-7, atol=1e-8)
        for state, state_alone in zip(output.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(state[row, kept], state_alone[0], rtol=1e-7, atol=1e-8)
    changed = ids.masked_fill(~mask.bool(), 7)
    again = model(input_ids=changed, attention_mask=mask).logits
    assert torch.equal(again[mask.bool()], output.logits[mask.bool()])


def test_is_causal_can_be_overridden_both_ways(create_tiny: Create) -> None:
    causal, ids = create_tiny(), random_ids(1, 8)
    open_model = create_tiny(is_causal=False)
    open_model.load_state_dict(causal.state_dict())
    of_causal, of_open = causal(input_ids=ids).logits, open_model(input_ids=ids).logits
    causal.is_causal, open_model.is_causal = False, True
    assert torch.equal(causal(input_ids=ids).logits, of_open)
    assert torch.equal(open_model(input_ids=ids).logits, of_causal)
    assert not torch.allclose(of_open, of_causal)


def test_hidden_states_are_the_embedding_each_block_and_the_norm_at_the_end(create_tiny: Create) -> None:
    model, ids = create_tiny(post_embed_norm=True), random_ids(2, 6)
    outputs: list[Tensor] = []
    for block in model.blocks():
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert model.post_embed_norm is not None
    assert model.embeddings is not None
    expected = [model.post_embed_norm(model.embeddings(ids)), outputs[0], model.norm(outputs[1])]
    assert len(states) == 3
    for state, value in zip(states, expected, strict=True):
        assert torch.equal(state, value)
    assert model(input_ids=ids).hidden_states is None


def test_grouped_queries_are_heads_that_share_their_keys(create_tiny: Create) -> None:
    grouped, full, ids = create_tiny(n_kv_heads=2), create_tiny(), random_ids(2, 9)
    state = grouped.state_dict()
    for name, value in state.items():
        if name.endswith("in_proj.weight"):
            queries, keys, values = value.split([32, 16, 16])
            repeated = [t.view(2, 1, 8, 32).expand(2, 2, 8, 32).reshape(32, 32) for t in (keys, values)]
            state[name] = torch.cat([queries, *repeated])
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(input_ids=ids).logits, full(input_ids=ids).logits)


@pytest.mark.parametrize("options", OPTIONS[:5], ids=str)
def test_cache_of_unequal_rows_gives_what_whole_rows_give(options: dict[str, Any], create_tiny: Create) -> None:
    model, ids = create_tiny(**options), random_ids(3, 20)
    # chunks of 6, 4, 1 and 1 tokens; rows have 6+4, 3+4 and 4+2 real tokens in the first two
    masks = torch.ones(3, 12, dtype=torch.long)
    masks[1, :3] = 0
    masks[2, 4:8] = 0
    cache, logits = None, []
    for start, end in [(0, 6), (6, 10), (10, 11), (11, 12)]:
        output = model.decode(ids[:, start:end], masks[:, :end], past_key_values=cache)
        cache = output.past_key_values
        logits.append(output.logits)
    assert cache.lengths.tolist() == [12, 9, 8]
    for row in range(3):
        kept = masks[row].bool()
        alone = model(input_ids=ids[row : row + 1, :12][:, kept]).logits[0]
        torch.testing.assert_close(torch.cat(logits, dim=1)[row, kept], alone, rtol=1e-6, atol=1e-7)


def test_cache_keeps_rows_and_grows(create_tiny: Create) -> None:
    model, ids = create_tiny(max_seq_len=200), random_ids(2, 150)
    whole = model(input_ids=ids[1:]).logits
    cache = model.decode(ids[:, :3]).past_key_values
    cache.batch_select_indices(torch.tensor([1]))
    for i in range(3, 150):
        output = model.decode(ids[1:, i : i + 1], past_key_values=cache)
        torch.testing.assert_close(output.logits[:, 0], whole[:, i], rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="past_key_values holds 1 rows, but 2 were given"):
        model.decode(ids[:, :1], past_key_values=cache)


def test_logits_to_keep_are_the_last(create_tiny: Create) -> None:
    model, ids = create_tiny(cast_output_to_float32=True), random_ids(2, 6)
    logits = model(input_ids=ids).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(model.decode(ids, logits_to_keep=2).logits, logits[:, -2:])


def test_embeddings_may_be_given_instead_of_tokens(create_tiny: Create) -> None:
    model, ids = create_tiny(), random_ids(2, 6)
    assert model.embeddings is not None
    embedded = model.decode(inputs_embeds=model.embeddings(ids)).logits
    assert torch.equal(embedded, model(input_ids=ids).logits)
    headless = create_tiny(vocab_size=0)
    output = headless.decode(inputs_embeds=model.embeddings(ids), output_hidden_states=True)
    assert output.logits is None
    assert output.hidden_states[-1].shape == (2, 6, 32)
    assert not [name for name in headless.state_dict() if name.startswith(("embeddings", "output"))]


def test_tied_weights_are_one_parameter_also_after_they_moved(create_tiny: Create) -> None:
    model = create_tiny(weight_tying=True)
    for moved in (model, model.float(), model.to("meta").to_empty(device="cpu")):
        assert moved.output.weight is moved.embeddings.weight
    untied = create_tiny()
    num_tied = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in untied.parameters()) - num_tied == 61 * 32


@pytest.mark.parametrize("weight_tying", [True, False])
def test_resized_embeddings_keep_their_rows_and_their_tie(weight_tying: bool, create_tiny: Create) -> None:
    model, ids = create_tiny(weight_tying=weight_tying), random_ids(2, 6)
    before = model(input_ids=ids).logits
    assert model.resize_token_embeddings(40) == 61
    assert model.resize_token_embeddings(65) == 128
    assert model.embeddings is not None
    assert model.output is not None
    assert (model.output.weight is model.embeddings.weight) == weight_tying
    after = model(input_ids=torch.cat([ids, torch.full((2, 1), 127)], dim=1)).logits
    torch.testing.assert_close(after[:, :6, :61], before)
    assert after.shape == (2, 7, 128)
    # new rows are drawn like the first ones, not left as they came from memory
    assert model.embeddings.weight[61:].std().item() == pytest.approx(1 / math.sqrt(32), rel=0.1)


def test_a_model_made_on_the_meta_device_is_whole_once_it_has_memory() -> None:
    params = TransformerParams(hidden_dim=32, n_layers=2, n_heads=4, vocab_size=61, weight_tying=True)
    torch.manual_seed(0)
    expected = create_model(params)
    with torch.device("meta"):
        model = create_model(params)
    assert all(value.is_meta for value in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()  # type: ignore[operator]
    assert torch.equal(model(input_ids=random_ids(2, 9)).logits, expected(input_ids=random_ids(2, 9)).logits)


def test_no_rows_give_no_loss_and_no_error(create_tiny: Create, create_documents: Callable[..., Documents]) -> None:
    model, empty = create_tiny(), torch.zeros(0, 8, dtype=torch.long)
    output = model(input_ids=empty, targets=empty, documents=create_documents())
    output.sum.backward()
    assert output.sum.item() == 0
    assert output.count.item() == 0


def test_flops_follow_the_weights_and_the_length(create_tiny: Create) -> None:
    model = create_tiny(n_layers=1, n_kv_heads=2)
    weights = 64 * 32 + 32 * 32 + 3 * 256 * 32 + 61 * 32
    assert model.num_flops_per_token(10) == 6 * weights + 12 * 32 * 10


COMPILED = """
import numpy as np, torch
from torch._dynamo.testing import CompileCounter
from vla_foundry.batch import Documents
from vla_foundry.models import create_model
from vla_foundry.params.models.transformer import TransformerParams

model = create_model(TransformerParams(hidden_dim=32, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=61))
ids = torch.randint(0, 61, (2, 12))
layouts = [
    Documents(np.array([12 - n, n, 3, 9 - n, n], np.int32), np.array([2, 3], np.int32), np.zeros(5, bool))
    for n in range(1, 6)
]
run = lambda documents: model(input_ids=ids, documents=documents, targets=ids).sum
expected = [run(documents) for documents in (None, *layouts)]
counter = CompileCounter()
for block in model.blocks():
    block.compile(backend=counter)
torch.testing.assert_close(run(None), expected[0])
run(layouts[0]).backward()
num_graphs = counter.frame_count
assert num_graphs >= 1, "nothing was compiled"
for documents, value in zip(layouts, expected[1:]):
    torch.testing.assert_close(run(documents), value)
assert counter.frame_count == num_graphs, "compiled again"
"""


@pytest.mark.slow
def test_blocks_compile_once_whatever_the_documents() -> None:
    # in a process of its own: the type checks that tests add cannot be traced
    result = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


def test_what_can_not_be_is_said_in_one_line(create_tiny: Create, create_documents: Callable[..., Documents]) -> None:
    model, ids = create_tiny(max_seq_len=8), random_ids(1, 9)
    with pytest.raises(ValueError, match=r"9 tokens is longer than model\.max_seq_len \(8\)"):
        model(input_ids=ids)
    assert model(input_ids=ids, documents=create_documents([4, 5])).logits.shape == (1, 9, 61)
    cache = model.decode(ids[:, :8]).past_key_values
    with pytest.raises(ValueError, match="9 tokens is longer"):
        model.decode(ids[:, 8:], past_key_values=cache)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model.decode()
    with pytest.raises(ValueError, match="documents exclude"):
        model(input_ids=ids, documents=create_documents([4, 5]), attention_mask=torch.ones(1, 9))
    model.is_causal = False
    with pytest.raises(ValueError, match="needs causal attention"):
        model.decode(ids[:, :4])


def test_variable_length_attention_reads_the_projection_without_a_copy(
    create_documents: Callable[..., Documents], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = create_model(TransformerParams(hidden_dim=32, n_layers=1, n_heads=2, vocab_size=61)).bfloat16()
    projected: list[Tensor] = []
    model.layers[0].attention.in_proj.register_forward_hook(lambda module, args, output: projected.append(output))
    given: list[Tensor] = []

    def attend(queries: Tensor, keys: Tensor, values: Tensor, *ranges: Any, **options: Any) -> Tensor:
        given.extend((queries, keys, values))
        return torch.zeros_like(queries)

    # the kernel has none for a CPU
    monkeypatch.setattr(attention, "VARLEN_DEVICES", {"cpu"})
    monkeypatch.setattr(attention, "varlen_attn", attend)
    model(input_ids=torch.zeros(2, 9, dtype=torch.int64), documents=create_documents([4, 5], [9]))
    queries, keys, values = given
    assert values.untyped_storage().data_ptr() == projected[0].untyped_storage().data_ptr()
    assert values.shape == queries.shape == keys.shape == (18, 2, 16)
    # the kernel wants the numbers of a head side by side
    assert {x.stride(-1) for x in given} == {1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dim": 30, "n_heads": 4}, r"hidden_dim \(30\) must be a multiple of n_heads \(4\)"),
        ({"n_heads": 4, "n_kv_heads": 3}, r"n_kv_heads \(3\) must divide n_heads \(4\)"),
        ({"head_dim": 7}, r"head_dim \(7\) must be even"),
        ({"n_layers": 0}, r"n_layers \(0\) must be at least 1"),
        (
            {"vocab_size": -1},
            r"vocab_size \(-1\) must be at least 0 and at most 100000000\. 0 is a model without tokens",
        ),
    ],
)
def test_params_that_fit_no_model_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TransformerParams(), **changes)
