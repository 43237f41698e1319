"""Weights are loaded whole or not at all, from every kind of checkpoint, without running what a file holds."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vla_foundry.batch import IGNORE_INDEX, LossOutput
from vla_foundry.inference.decoding import generate
from vla_foundry.models import create_model, load_model_checkpoint
from vla_foundry.models.transformer import Transformer
from vla_foundry.models.weights import digest_weights, find_tied_names, has_ema
from vla_foundry.params import ModelParams, load_params_from_yaml
from vla_foundry.params.models.transformer import TransformerParams
from vla_foundry.run_folder import COMPLETE_NAME, EMA_WEIGHTS_NAME, MODEL_WEIGHTS_NAME, step_folder_name

PARAMS = TransformerParams(hidden_dim=16, n_layers=1, n_heads=2, vocab_size=11)


def create(**changes: Any) -> Transformer:
    values = {"hidden_dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 11, **changes}
    model = create_model(TransformerParams(**values))
    assert isinstance(model, Transformer)
    return model


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weights as checkpoints hold them: a tied one once."""
    tied = find_tied_names(model)
    return {name: value.clone() for name, value in model.state_dict().items() if name not in tied}


def are_equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(name == other_name and torch.equal(value, other) for (name, value), (other_name, other) in pairs)


def write_step(run: Path, step: int, files: dict[str, dict[str, Tensor]], *, is_complete: bool = True) -> Path:
    folder = run / "checkpoints" / step_folder_name(step)
    folder.mkdir(parents=True)
    entries = {}
    for name, tensors in files.items():
        save_file(tensors, folder / name)
        content = (folder / name).read_bytes()
        entries[name] = [len(content), hashlib.sha256(content).hexdigest()]
    if is_complete:
        (folder / COMPLETE_NAME).write_text(json.dumps(entries), encoding="utf-8")
    return folder


@pytest.mark.parametrize("weight_tying", [False, True])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_come_back_tied_ones_too(tmp_path: Path, suffix: str, weight_tying: bool) -> None:
    saved, model = create(weight_tying=weight_tying), create(weight_tying=weight_tying)
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights_of(saved), path)
    assert not are_equal(saved, model)
    load_model_checkpoint(model, path)
    assert are_equal(saved, model)
    assert (model.output.weight is model.embeddings.weight) == weight_tying  # type: ignore[union-attr]


def test_a_file_that_holds_both_tied_names_loads(tmp_path: Path) -> None:
    saved, model = create(weight_tying=True), create(weight_tying=True)
    both = {name: value.clone() for name, value in saved.state_dict().items()}
    assert "output.weight" in both
    save_file(both, tmp_path / "w.safetensors")
    load_model_checkpoint(model, tmp_path / "w.safetensors")
    assert are_equal(saved, model)
    only_second = {name: value for name, value in both.items() if name != "embeddings.weight"}
    save_file(only_second, tmp_path / "second.safetensors")
    model = create(weight_tying=True)
    load_model_checkpoint(model, tmp_path / "second.safetensors")
    assert are_equal(saved, model)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_checkpoints_of_earlier_code_load(tmp_path: Path, prefix: str) -> None:
    saved, model = create(), create()
    state = {f"{prefix}{name}": value.bfloat16() for name, value in saved.state_dict().items()}
    state[f"{prefix}layers.0.attention.pos_embed.inv_freq"] = torch.ones(4)
    content = {"checkpoint_num": 1, "state_dict": state, "datastrings": ["a"], "samples_seen": 3}
    torch.save(content, tmp_path / "checkpoint_1.pt")
    load_model_checkpoint(model, tmp_path / "checkpoint_1.pt")
    assert are_equal(saved.bfloat16(), model.bfloat16())
    assert next(create().parameters()).dtype == torch.float32


def test_names_that_compiled_blocks_had_are_cleaned(tmp_path: Path) -> None:
    saved, model = create(), create()
    state = {name.replace("layers.0.", "layers.0._orig_mod."): value for name, value in weights_of(saved).items()}
    save_file(state, tmp_path / "w.safetensors")
    load_model_checkpoint(model, tmp_path / "w.safetensors")
    assert are_equal(saved, model)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "was_run"),)

    torch.save({"state_dict": {"a": torch.ones(1)}, "payload": Payload()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="cannot be read safely") as caught:
        load_model_checkpoint(create(), tmp_path / "bad.pt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_broken_file_is_an_error_of_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no weights here")
    with pytest.raises(ValueError, match=name) as caught:
        load_model_checkpoint(create(), tmp_path / name)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    state = weights_of(create(n_layers=2, vocab_size=12))
    del state["norm.weight"], state["norm.bias"]
    save_file(state, tmp_path / "w.safetensors")
    model = create()
    before = weights_of(model)
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        load_model_checkpoint(model, tmp_path / "w.safetensors")
    message = str(caught.value)
    assert "missing: norm.bias, norm.weight;" in message
    assert "unexpected: layers.1.attention.in_proj.weight, " in message
    assert "and 5 more" in message
    assert "of another shape: embeddings.weight [12, 16], in the model [11, 16], output.weight" in message
    assert "\n" not in message
    assert all(torch.equal(value, before[name]) for name, value in weights_of(model).items())


def test_a_run_folder_means_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    models = [create() for _ in range(3)]
    for step, model in zip((9, 10, 11), models, strict=True):
        write_step(tmp_path, step, {MODEL_WEIGHTS_NAME: weights_of(model)}, is_complete=step < 11)
    model = create()
    load_model_checkpoint(model, tmp_path)
    assert are_equal(model, models[1])
    load_model_checkpoint(model, tmp_path / "checkpoints" / step_folder_name(9))
    assert are_equal(model, models[0])
    with pytest.raises(ValueError, match="never finished"):
        load_model_checkpoint(model, tmp_path / "checkpoints" / step_folder_name(11))


@pytest.mark.parametrize("damaged", ["model-00002-of-00002.safetensors", "model.safetensors.index.json"])
def test_a_newest_checkpoint_with_a_damaged_part_is_skipped_for_an_older_one(tmp_path: Path, damaged: str) -> None:
    models = [create(), create()]
    for step, model in enumerate(models):
        names = list(weights_of(model))
        parts = [{name: weights_of(model)[name] for name in half} for half in (names[::2], names[1::2])]
        files = {f"model-0000{number + 1}-of-00002.safetensors": part for number, part in enumerate(parts)}
        folder = write_step(tmp_path, step, files)
        index = json.dumps({"files": list(files)}).encode()
        (folder / "model.safetensors.index.json").write_bytes(index)
        listed = json.loads((folder / COMPLETE_NAME).read_text(encoding="utf-8"))
        listed["model.safetensors.index.json"] = [len(index), hashlib.sha256(index).hexdigest()]
        (folder / COMPLETE_NAME).write_text(json.dumps(listed), encoding="utf-8")
    loaded = create()
    load_model_checkpoint(loaded, tmp_path)
    assert are_equal(loaded, models[1])
    del listed["model-00001-of-00002.safetensors"]
    (folder / COMPLETE_NAME).write_text(json.dumps(listed), encoding="utf-8")
    with pytest.raises(ValueError, match=r"does not list model-00001-of-00002\.safetensors, which"):
        digest_weights(str(folder), use_ema=False)
    (folder / damaged).write_bytes(b"")
    load_model_checkpoint(loaded, tmp_path)
    assert are_equal(loaded, models[0])


def test_averaged_weights_are_taken_where_asked_for(tmp_path: Path) -> None:
    plain, average, model = create(), create(), create()
    with_ema = {MODEL_WEIGHTS_NAME: weights_of(plain), EMA_WEIGHTS_NAME: weights_of(average)}
    write_step(tmp_path / "with", 1, with_ema)
    write_step(tmp_path / "without", 1, {MODEL_WEIGHTS_NAME: weights_of(plain)})
    assert has_ema(tmp_path / "with")
    assert not has_ema(tmp_path / "without")
    load_model_checkpoint(model, tmp_path / "with", use_ema=True)
    assert are_equal(model, average)
    load_model_checkpoint(model, tmp_path / "with")
    assert are_equal(model, plain)
    with pytest.raises(ValueError, match=r"no ema\.safetensors.*ema\.enabled"):
        load_model_checkpoint(model, tmp_path / "without", use_ema=True)


def test_checkpoints_of_an_earlier_run_are_ordered_by_number(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    models = {number: create() for number in (2, 9, 10)}
    for number, model in models.items():
        torch.save({"state_dict": weights_of(model)}, tmp_path / "checkpoints" / f"checkpoint_{number}.pt")
        average = {"ema_state_dict": weights_of(models[2])}
        torch.save(average, tmp_path / "checkpoints" / f"ema_{number}.pt")
    model = create()
    load_model_checkpoint(model, tmp_path)
    assert are_equal(model, models[10])
    load_model_checkpoint(model, tmp_path, use_ema=True)
    assert are_equal(model, models[2])


@pytest.mark.parametrize("name", ["nothing", "nothing.pt", "nothing.safetensors"])
def test_a_missing_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=name):
        load_model_checkpoint(create(), tmp_path / name)


def test_create_model_starts_from_a_checkpoint_and_freezes(tmp_path: Path) -> None:
    saved = create()
    save_file(weights_of(saved), tmp_path / "w.safetensors")
    start = TransformerParams(
        hidden_dim=16, n_layers=1, n_heads=2, vocab_size=11, resume_from_checkpoint=str(tmp_path / "w.safetensors")
    )
    assert are_equal(create_model(start), saved)
    assert not are_equal(create_model(start, load_pretrained=False), saved)
    frozen: Callable[[torch.nn.Module], set[bool]] = lambda model: {p.requires_grad for p in model.parameters()}  # noqa: E731
    assert frozen(create(freeze=True)) == {False}
    assert frozen(create()) == {True}


CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Published:
    """The checkpoint with what was recorded of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs = load_file(folder / "inputs.safetensors")
        self.outputs = load_file(folder / "outputs.safetensors")
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))

    def load(self, **changes: Any) -> Any:
        params = load_params_from_yaml(ModelParams, str(self.folder / "config_model.yaml"))
        model = create_model(dataclasses.replace(params, **changes))
        load_model_checkpoint(model, self.folder)
        return model.eval()


@pytest.fixture
def published(shared_data: Path) -> Published:
    return Published(shared_data / "parity" / "transformer_base")


def mean_loss(output: LossOutput) -> Tensor:
    return output.sum / output.count


@pytest.mark.shared_data
def test_logits_and_hidden_states(published: Published) -> None:
    model, states = published.load(), []
    for block in model.blocks():
        block.register_forward_hook(lambda _module, _inputs, output: states.append(output))
    output = model(input_ids=published.inputs["input_ids"], output_hidden_states=True)
    torch.testing.assert_close(output.logits, published.outputs["logits"], **CLOSE)
    # what was recorded is each block's own output; ours are the same but for the last, which is taken after the norm
    for i, state in enumerate(states):
        torch.testing.assert_close(state, published.outputs[f"hidden_{i}"], **CLOSE)
    for i in (1, 2):
        torch.testing.assert_close(output.hidden_states[i], published.outputs[f"hidden_{i - 1}"], **CLOSE)
    torch.testing.assert_close(output.hidden_states[3], model.norm(published.outputs["hidden_2"]), **CLOSE)


@pytest.mark.shared_data
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens(published: Published, use_cache: bool) -> None:
    expected = published.outputs["greedy_tokens_cache" if use_cache else "greedy_tokens_nocache"]
    prompts = published.inputs["input_ids"][:2]
    length = next(n for n in range(32, 0, -1) if torch.equal(expected[:, :n], prompts[:, :n]))
    assert 0 < length < 21
    made = generate(published.load(), prompts[:, :length], max_new_tokens=21 - length, use_cache=use_cache)
    assert [row.tokens for row in made] == expected[:, length:].tolist()


@pytest.mark.shared_data
def test_left_padded_rows_with_a_cache(published: Published) -> None:
    mask = published.inputs["attention_mask_leftpad"]
    output = published.load().decode(published.inputs["input_ids"], mask)
    is_real = mask.bool()
    # Only the difference of two positions enters a logit, so that it does not matter that padding took positions when
    # these were recorded; the rotated keys of the padded row differ for it, those of the others do not.
    expected = published.outputs["logits_attnmask_use_cache"]
    torch.testing.assert_close(output.logits[is_real], expected[is_real], **CLOSE)
    keys, values = output.past_key_values.layers[0].keys[:, :32], output.past_key_values.layers[0].values[:, :32]
    full = is_real.all(1)
    torch.testing.assert_close(keys[full], published.outputs["kv0_k"][full], **CLOSE)
    torch.testing.assert_close(values[full], published.outputs["kv0_v"][full], **CLOSE)
    torch.testing.assert_close(values[1, :26], published.outputs["kv0_v"][1, 6:], **CLOSE)


@pytest.mark.shared_data
def test_losses_and_gradients(published: Published) -> None:
    model, ids, targets = published.load(), published.inputs["input_ids"], published.inputs["targets"]
    ignored = published.inputs["loss_mask_True_is_ignored"]
    loss = mean_loss(model(input_ids=ids, targets=targets))
    masked = model(input_ids=ids, targets=targets.masked_fill(ignored, IGNORE_INDEX))
    assert loss.item() == pytest.approx(published.meta["loss"], rel=1e-6)
    assert mean_loss(masked).item() == pytest.approx(published.meta["loss_masked"], rel=1e-6)
    with_z = model(input_ids=ids, targets=targets, z_loss_coefficient=1e-3)
    assert mean_loss(with_z).item() == pytest.approx(published.meta["loss_zloss_1e-3"], rel=1e-6)
    # the recorded masked z-loss is averaged over masked places too, which ours is not
    all_z = (with_z.logs["z_loss"] / with_z.count).item()
    assert mean_loss(masked).item() + all_z == pytest.approx(published.meta["loss_zloss_masked_1e-3"], rel=1e-6)
    loss.backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert norms == pytest.approx(published.meta["grad_norms"], rel=1e-4)


@pytest.mark.shared_data
def test_training_five_steps(published: Published) -> None:
    model, ids, targets = published.load(), published.inputs["input_ids"], published.inputs["targets"]
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": gains, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(5):
        loss = mean_loss(model(input_ids=ids, targets=targets))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
    assert losses == pytest.approx(published.meta["train_losses_5steps"], rel=1e-5)
    torch.testing.assert_close(
        model(input_ids=ids).logits, published.outputs["logits_after_5steps"], rtol=1e-3, atol=1e-4
    )


def learning_rate(step: int) -> float:
    """Warm-up over 2 steps, then a cosine over 33."""
    if step < 2:
        return 1e-2 * (step + 1) / 2
    return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step - 2) / 31)).item()) * 1e-2


@pytest.mark.shared_data
@pytest.mark.parametrize("rounds_frequencies", [True, False])
def test_bf16_compute(published: Published, rounds_frequencies: bool) -> None:
    model = published.load(rope_bf16_frequencies=rounds_frequencies)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=published.inputs["input_ids"]).logits.float()
    difference = (logits - published.outputs["logits_bf16_autocast"]).abs()
    # bf16 has 8 bits; the logits reach 3
    assert difference.max() < 0.08
    assert difference.mean() < 0.01


VLM_CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class PublishedVLM:
    """The checkpoint with what was recorded of it."""

    def __init__(self, folder: Path) -> None:
        self.inputs = load_file(folder / "inputs.safetensors")
        self.outputs = load_file(folder / "outputs.safetensors")
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.model: Any = create_model(load_params_from_yaml(ModelParams, str(folder / "config_model.yaml")))
        load_model_checkpoint(self.model, folder)
        self.model.eval()


@pytest.fixture(scope="module")
def published_vlm(shared_data: Path) -> PublishedVLM:
    return PublishedVLM(shared_data / "parity" / "vlm_ps2")


@pytest.mark.shared_data
def test_image_tokens(published_vlm: PublishedVLM) -> None:
    pixels = published_vlm.inputs["pixel_values"]
    torch.testing.assert_close(published_vlm.model.vit(pixels), published_vlm.outputs["vit"], **VLM_CLOSE)
    torch.testing.assert_close(
        published_vlm.model.encode_images(pixels), published_vlm.outputs["projected"], **VLM_CLOSE
    )


@pytest.mark.shared_data
def test_logits_and_hidden_states_of_a_vlm(published_vlm: PublishedVLM) -> None:
    states: list[torch.Tensor] = []
    hook = published_vlm.model.transformer.layers[-1].register_forward_hook(lambda _m, _i, out: states.append(out))
    inputs = {"input_ids": published_vlm.inputs["input_ids"], "pixel_values": published_vlm.inputs["pixel_values"]}
    logits = published_vlm.model(**inputs).logits
    hook.remove()
    torch.testing.assert_close(logits, published_vlm.outputs["logits"], **VLM_CLOSE)
    # what was recorded is the last block's own output, before the norm
    torch.testing.assert_close(states[0], published_vlm.outputs["hidden_last"], **VLM_CLOSE)
    # padding behind a row changes nothing in front of it
    mask = published_vlm.inputs["attention_mask"]
    masked = published_vlm.model(**inputs, attention_mask=mask).logits
    is_real = mask.bool()
    torch.testing.assert_close(masked[is_real], published_vlm.outputs["logits"][is_real], **VLM_CLOSE)


@pytest.mark.shared_data
@pytest.mark.parametrize("layout", ["5d", "flat4d"])
def test_two_images_a_sample(published_vlm: PublishedVLM, layout: str) -> None:
    pixels = published_vlm.inputs["pixel_values_2img_5d"]
    pixels = pixels if layout == "5d" else pixels.flatten(0, 1)
    logits = published_vlm.model(input_ids=published_vlm.inputs["input_ids_2img"], pixel_values=pixels).logits
    torch.testing.assert_close(logits, published_vlm.outputs[f"logits_2img_{layout}"], **VLM_CLOSE)


@pytest.mark.shared_data
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens_of_a_vlm(published_vlm: PublishedVLM, use_cache: bool) -> None:
    expected, prompt = published_vlm.outputs["greedy_tokens"][0], published_vlm.inputs["input_ids"][0]
    length = next(n for n in range(len(expected), 0, -1) if torch.equal(expected[:n], prompt[:n]))
    assert 20 < length < 38
    made = generate(
        published_vlm.model,
        prompt[None, :length],
        max_new_tokens=38 - length,
        use_cache=use_cache,
        prompt_inputs={"pixel_values": published_vlm.inputs["pixel_values"][:1]},
    )
    assert made[0].tokens == expected[length:].tolist()


@pytest.mark.shared_data
def test_loss_and_gradients_of_a_vlm(published_vlm: PublishedVLM) -> None:
    targets = published_vlm.inputs["targets"]
    ignored = (targets == published_vlm.meta["pad_token_id"]) | (targets == published_vlm.meta["image_token_id"])
    output = published_vlm.model(
        input_ids=published_vlm.inputs["input_ids"],
        pixel_values=published_vlm.inputs["pixel_values"],
        targets=targets.masked_fill(ignored, IGNORE_INDEX),
    )
    loss = output.sum / output.count
    assert loss.item() == pytest.approx(published_vlm.meta["loss_masked"], rel=1e-6)
    loss.backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in published_vlm.model.named_parameters()}
    assert norms == pytest.approx(published_vlm.meta["grad_norms"], rel=1e-5)
