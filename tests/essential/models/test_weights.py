"""Weights are loaded whole or not at all, from every kind of checkpoint, without running what a file holds."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vla_foundry.models import create_model, load_model_checkpoint
from vla_foundry.models.transformer import Transformer
from vla_foundry.models.weights import find_tied_names, has_ema
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
