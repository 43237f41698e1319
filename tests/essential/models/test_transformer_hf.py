"""Hugging Face models behave as the native one does: logits, losses, documents, padding, cache, meta device."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vla_foundry.batch import IGNORE_INDEX, Documents
from vla_foundry.inference.decoding import generate
from vla_foundry.models import create_model
from vla_foundry.models.transformer_hf import TransformerHF
from vla_foundry.params.models.transformer import TransformerHFParams

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}


def create_original(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    if name == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)).eval()
    if name == "gemma3":
        return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **WINDOWS)).eval()
    assert name == "gemma2"
    return Gemma2ForCausalLM(Gemma2Config(**SIZES)).eval()


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, str]:
    original = create_original(request.param)
    folder = str(tmp_path_factory.mktemp(request.param))
    original.save_pretrained(folder)
    return original, folder


def load(folder: str, **changes: Any) -> Any:
    return create_model(TransformerHFParams(hf_pretrained=folder, **changes)).eval()


def random_ids(*shape: int) -> Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(1))


def test_logits_are_those_of_the_original(saved: tuple[PreTrainedModel, str]) -> None:
    original, folder = saved
    model, ids = load(folder), random_ids(2, 12)
    output = model(input_ids=ids.int(), output_hidden_states=True)
    assert torch.equal(output.logits, original(ids).logits)
    assert next(model.parameters()).dtype == torch.float32
    states = output.hidden_states
    assert len(states) == 3
    torch.testing.assert_close(model.model.lm_head(states[-1]), output.logits)
    torch.testing.assert_close(model.model.get_input_embeddings()(ids), states[0])


def test_loss_is_cross_entropy_of_the_logits(saved: tuple[PreTrainedModel, str]) -> None:
    original, folder = saved
    model, ids, targets = load(folder), random_ids(2, 12), random_ids(2, 12)
    targets[0, 3:7] = IGNORE_INDEX
    output = model(input_ids=ids, targets=targets)
    expected = torch.nn.functional.cross_entropy(
        original(ids).logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    torch.testing.assert_close(output.sum, expected)
    assert output.count.item() == 20
    output.sum.backward()
    expected.backward()
    gradients = {name.removeprefix("model."): p.grad for name, p in model.named_parameters() if p.requires_grad}
    wanted = {name: p.grad for name, p in original.named_parameters()}
    original.zero_grad()
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5)


def test_documents_are_computed_as_if_each_were_alone(
    saved: tuple[PreTrainedModel, str], create_documents: Callable[..., Documents], record_shapes: type
) -> None:
    original, folder = saved
    model, ids = load(folder), random_ids(2, 29)
    documents = create_documents([11, 18], [7, 16, -6])
    with record_shapes() as record:
        packed = model(input_ids=ids, documents=documents).logits
    for row, start, end in [(0, 0, 11), (0, 11, 29), (1, 0, 7), (1, 7, 23)]:
        alone = original(ids[row : row + 1, start:end]).logits[0]
        torch.testing.assert_close(packed[row, start:end], alone, rtol=1e-4, atol=1e-6)
    assert not [shape for shape in record.shapes if shape[-2:] == (29, 29)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_position(saved: tuple[PreTrainedModel, str], side: str) -> None:
    original, folder = saved
    model, ids = load(folder), random_ids(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, slice(0, 4) if side == "left" else slice(5, 9)] = 0
    logits = model(input_ids=ids, attention_mask=mask).logits
    alone = original(ids[1:, mask[1].bool()]).logits[0]
    torch.testing.assert_close(logits[1, mask[1].bool()], alone, rtol=1e-4, atol=1e-6)


def test_architecture_alone_gives_new_weights(saved: tuple[PreTrainedModel, str]) -> None:
    original, folder = saved
    state = load(folder, hf_load_weights=False).state_dict()
    assert state.keys() == {f"model.{name}" for name in original.state_dict()}
    assert not torch.equal(state["model.model.embed_tokens.weight"], original.get_input_embeddings().weight)
    unloaded = create_model(TransformerHFParams(hf_pretrained=folder), load_pretrained=False).state_dict()
    assert not torch.equal(unloaded["model.model.embed_tokens.weight"], original.get_input_embeddings().weight)


def test_a_model_made_on_the_meta_device_is_whole_once_it_has_memory(saved: tuple[PreTrainedModel, str]) -> None:
    original, folder = saved
    with torch.device("meta"):
        model: Any = create_model(TransformerHFParams(hf_pretrained=folder), load_pretrained=False)
    model.to_empty(device="cpu")
    model.init_weights()
    assert model.model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    model.model.load_state_dict(original.state_dict())
    assert torch.equal(model.eval()(input_ids=random_ids(2, 9)).logits, original(random_ids(2, 9)).logits)


def test_rotary_frequencies_stay_fp32(saved: tuple[PreTrainedModel, str]) -> None:
    _, folder = saved
    model = load(folder)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert before
    model.bfloat16()
    assert next(model.parameters()).dtype == torch.bfloat16
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_blocks_flops_and_resizing() -> None:
    model = TransformerHF(create_original("llama"))
    assert [type(block).__name__ for block in model.blocks()] == ["LlamaDecoderLayer"] * 2
    weights = 2 * (32 * 32 * 2 + 16 * 32 * 2 + 3 * 32 * 48) + 97 * 32
    assert model.num_flops_per_token(10) == 6 * weights + 12 * 2 * 32 * 10
    assert model.resize_token_embeddings(90) == 97
    assert model.resize_token_embeddings(100) == 128
    assert model(input_ids=random_ids(1, 3)).logits.shape == (1, 3, 128)


def test_capped_logits_have_the_right_loss_and_no_documents(create_documents: Callable[..., Documents]) -> None:
    original = create_original("gemma2")
    with torch.no_grad():
        # large logits, so that a loss without the cap would be another one
        original.get_input_embeddings().weight.mul_(300)
    model, ids, targets = TransformerHF(original), random_ids(2, 6), random_ids(2, 6)
    output = model(input_ids=ids, targets=targets)
    expected = torch.nn.functional.cross_entropy(original(ids).logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert original(ids).logits.abs().max() > 25
    torch.testing.assert_close(output.sum, expected)
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM cannot keep .* --data\.mask_documents false"):
        model(input_ids=ids, documents=create_documents([2, 4], [6]))


def test_an_unknown_model_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.hf_pretrained '.*nothing' cannot be loaded") as caught:
        create_model(TransformerHFParams(hf_pretrained=str(tmp_path / "nothing")))
    assert "\n" not in str(caught.value)


# architectures that are trained with documents kept apart, and those whose rows must hold one document or mix them
KEEPING = [
    "afmoe", "apertus", "arcee", "cohere", "ctrl", "ernie4_5", "ernie4_5_moe", "exaone4", "gemma", "gemma3_text",
    "glm", "gpt2", "gpt_neox", "granite", "granitemoe", "helium", "jetmoe", "llama", "mistral", "mixtral", "moshi",
    "olmo2", "olmo3", "olmoe", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3",
    "starcoder2",
]  # fmt: skip
MIXING = [
    "bart", "bloom", "codegen", "falcon", "falcon_mamba", "gemma2", "gpt_oss", "gptj", "llama4_text", "mamba",
    "mpt", "nemotron", "openai-gpt", "phimoe", "recurrent_gemma", "roberta", "rwkv", "stablelm", "xglm",
]  # fmt: skip
SIZES_BY_ANY_NAME: dict[str, Any] = {
    **SIZES,
    **dict.fromkeys(["n_embd", "d_model", "lru_width", "embedding_size", "word_embed_proj_dim"], 32),
    **dict.fromkeys(["n_head", "num_heads", "decoder_attention_heads", "encoder_attention_heads", "n_heads"], 4),
    **dict.fromkeys(["n_layer", "num_layers", "decoder_layers", "encoder_layers", "n_layers"], 2),
    **dict.fromkeys(["n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"], 48),
    **dict.fromkeys(["n_positions", "max_seq_len"], 64),
    **dict.fromkeys(["num_local_experts", "num_experts", "num_experts_per_tok", "moe_num_experts"], 4),
    "moe_intermediate_size": 24,
    "sliding_window": 4,
    "attention_window_size": 4,
    "rotary_dim": 4,
    "pad_token_id": 0,
    "is_decoder": True,
}


def create_architecture(kind: str) -> PreTrainedModel:
    """A tiny model of any architecture, with weights large enough to tell right from wrong."""
    cls = CONFIG_MAPPING[kind]
    accepted = {*inspect.signature(cls).parameters, *getattr(cls, "attribute_map", ())}
    config = cls(**{name: value for name, value in SIZES_BY_ANY_NAME.items() if name in accepted})
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    assert model.num_parameters() < 2e6
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KEEPING, *MIXING])
def test_every_architecture_has_its_own_loss_and_continues_as_if_alone(
    kind: str, create_documents: Callable[..., Documents]
) -> None:
    original = create_architecture(kind)
    ids, targets = random_ids(2, 9), random_ids(2, 9)
    own = original(ids).logits.detach()
    model: Any = TransformerHF(original).eval()
    expected = torch.nn.functional.cross_entropy(own.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(model(input_ids=ids, targets=targets).sum, expected, rtol=1e-5, atol=1e-4)
    assert model.num_flops_per_token(9) > 0

    documents = create_documents([4, 5], [9])
    if kind in KEEPING:
        alone = [original(part).logits for part in (ids[:1, :4], ids[:1, 4:])]
        packed = model(input_ids=ids, documents=documents).logits[:1]
        torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-3, atol=1e-4)
    else:
        with pytest.raises(ValueError, match=r"cannot keep the documents of a row apart. Set --data.mask_documents"):
            model(input_ids=ids, documents=documents)

    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    rows = [ids[:1], ids[1:, 4:]]
    for _ in range(5):
        rows = [torch.cat([row, original(row).logits[:, -1:].argmax(-1)], 1) for row in rows]
    wanted = [row[0, -5:].tolist() for row in rows]
    for use_cache in (True, False):
        found = generate(model, ids, mask, max_new_tokens=5, use_cache=use_cache)
        assert [row.tokens for row in found] == wanted
    single = [generate(model, row[:, :-5], max_new_tokens=5)[0].tokens for row in rows]
    assert single == wanted


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    sizes = {**SIZES, "is_decoder": False}
    with pytest.raises(ValueError, match=r"BertLMHeadModel tokens see later ones.* set is_decoder to true"):
        TransformerHF(AutoModelForCausalLM.from_config(CONFIG_MAPPING["bert"](**sizes)))


def test_a_cache_that_fails_is_not_used_and_a_forward_that_fails_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = CONFIG_MAPPING["bart"](
        **SIZES, d_model=32, decoder_layers=3, decoder_attention_heads=4, decoder_ffn_dim=48
    )
    model: Any = TransformerHF(AutoModelForCausalLM.from_config(config)).eval()
    ids = random_ids(1, 9)
    assert not model.keeps_cache  # transformers makes it for num_hidden_layers
    assert len(generate(model, ids, max_new_tokens=3)[0].tokens) == 3
    with pytest.raises(ValueError, match=r"hf_pretrained: XmodForCausalLM cannot compute .*Input language unknown"):
        TransformerHF(AutoModelForCausalLM.from_config(CONFIG_MAPPING["xmod"](**SIZES, is_decoder=True)))

    gemma: Any = TransformerHF(create_original("gemma2"))
    for _ in range(2):
        gemma(input_ids=ids, targets=ids)
    assert capsys.readouterr().err.count("note: Gemma2ForCausalLM does more than project its logits") == 1


def test_damaged_weights_are_said_to_be_damaged() -> None:
    original = create_original("llama")
    torch.nn.init.constant_(original.model.norm.weight, torch.nan)
    with pytest.raises(ValueError, match="LlamaForCausalLM gives logits that are not finite: its weights are damaged"):
        TransformerHF(original)


@pytest.mark.parametrize("fault", ["missing", "misnamed", "of another shape"])
def test_published_weights_that_are_not_all_there_are_named(fault: str, tmp_path: Path) -> None:
    create_original("llama").save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    tensor = tensors.pop(name)
    if fault != "missing":
        tensors |= {f"x{name}": tensor} if fault == "misnamed" else {name: tensor[:40].clone()}
    save_file(tensors, file, metadata={"format": "pt"})
    says = {
        "missing": rf"1 weights are missing, such as {name}\. To start",
        "misnamed": rf"1 weights are missing, such as {name}; 1 have unknown names, such as x{name}",
        "of another shape": rf"such as {name} \(has shape \(40, 32\), needs \(48, 32\)\)",
    }
    with pytest.raises(ValueError, match=says[fault]) as caught:
        load(str(tmp_path))
    assert "\n" not in str(caught.value)
    model = load(str(tmp_path), hf_new_weights=["model.layers.1.mlp.*"])
    assert torch.equal(model.state_dict()["model.model.norm.weight"], tensors["model.norm.weight"])


def test_published_weights_that_have_no_place_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create_original("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    load(str(tmp_path))
    assert "note: " not in capsys.readouterr().err
    extra = {name.replace("layers.1", "layers.2"): each for name, each in tensors.items() if "layers.1.mlp" in name}
    save_file(tensors | {f"{name}.2": each.clone() for name, each in extra.items()}, file, metadata={"format": "pt"})
    load(str(tmp_path))
    (note,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("note: "))
    assert "LlamaForCausalLM has no place for are left out: model.layers.2.mlp.down_proj.weight" in note


@pytest.mark.parametrize(
    "index", ["{}", "[]", '{"weight_map": null}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}']
)
def test_a_broken_index_of_weights_is_an_error_of_one_line(index: str, tmp_path: Path) -> None:
    create_original("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"model\.hf_pretrained '.*' cannot be loaded: its content is not as expected"
    ) as caught:
        load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_damaged_weights_file_is_an_error_of_one_line(tmp_path: Path) -> None:
    create_original("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.hf_pretrained '.*' cannot be loaded: ") as caught:
        load(str(tmp_path))
    assert "\n" not in str(caught.value)
