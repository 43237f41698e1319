"""Runs imported from published checkpoints give the outputs that were recorded of these; nothing else is imported."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from vla_foundry.cli import main as run_cli
from vla_foundry.importing.command import import_checkpoint
from vla_foundry.inference.caption import Question, answer, load_captioner
from vla_foundry.inference.generate import main as generate
from vla_foundry.inference.loading import load_run_model
from vla_foundry.main import main as train
from vla_foundry.models.action_heads.base import ActionWindow
from vla_foundry.models.backbones.base import Conditioning
from vla_foundry.models.backbones.vlm_foundry import prepare_observation
from vla_foundry.params import ModelParams, load_params_from_yaml
from vla_foundry.params.importing import ImportParams
from vla_foundry.preprocessing.text.packing import RecordPacker, write_records
from vla_foundry.run_folder import find_checkpoint, verify
from vla_foundry.shards import format_manifest
from vla_foundry.text.tokenizers import load_tokenizer

pytestmark = pytest.mark.shared_data

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


class Imported:
    """A run imported from a published checkpoint, and what was recorded of that."""

    def __init__(self, source: Path, output: Path, **options: Any) -> None:
        self.lines = import_checkpoint(ImportParams(source=str(source), output=str(output), **options))
        self.folder = output
        # what was recorded, where that is
        files = {name: source / f"{name}.safetensors" for name in ("inputs", "outputs")}
        self.inputs, self.outputs = (load_file(path) if path.is_file() else {} for path in files.values())

    def load(self, *, use_ema: bool | None = None) -> Any:
        params = load_params_from_yaml(ModelParams, str(self.folder / "config_model.yaml"))
        return load_run_model(params, str(self.folder), str(self.folder), use_ema, torch.device("cpu"))


@torch.no_grad()
def test_a_language_model_gives_the_same_logits_and_text(
    parity: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Imported(parity / "transformer_base", tmp_path / "run", tokenizer=str(tokenizer))
    verify(find_checkpoint(run.folder))
    logits = run.load()(input_ids=run.inputs["input_ids"]).logits
    torch.testing.assert_close(logits, run.outputs["logits"], **CLOSE)
    expected = run.outputs["greedy_tokens_cache"][0]
    length = next(n for n in range(20, 0, -1) if torch.equal(expected[:n], run.inputs["input_ids"][0, :n]))
    words = load_tokenizer(str(tokenizer)).convert_ids_to_tokens(expected.tolist())
    assert all(word.startswith("w") for word in words)
    prompt = " ".join(words[:length])
    limits = ["--max_new_tokens", str(len(words) - length), "--temperature", "0", "--device", "cpu"]
    generate(["--checkpoint", str(run.folder), "--prompt", prompt, *limits])
    assert re.findall(r"w\d+", capsys.readouterr().out) == words
    assert "layers.0.attention.pos_embed.inv_freq and 2 more left out: rotary tables are computed." in run.lines


@torch.no_grad()
def test_a_vision_language_model_gives_the_same_logits_and_captions(
    parity: Path, tokenizer: Path, tmp_path: Path
) -> None:
    run = Imported(parity / "vlm_ps2", tmp_path / "run", tokenizer=str(tokenizer))
    inputs = {name: run.inputs[name] for name in ("input_ids", "pixel_values")}
    torch.testing.assert_close(run.load()(**inputs).logits, run.outputs["logits"], **CLOSE)
    assert "model.processor is left out: data.processor names it." in run.lines
    captioner = load_captioner(str(run.folder), device="cpu")
    assert captioner.processor.image_token_id == 200
    assert captioner.data.image_size == 56
    assert captioner.data.img_num_tokens == 4
    picture = io.BytesIO()
    Image.new("RGB", (60, 40), (200, 30, 30)).save(picture, "PNG")
    said = answer(captioner, [Question((picture.getvalue(),), captioner.default_prompt)], max_new_tokens=3)
    assert re.fullmatch(r"(w\d+){3}", said[0])


@torch.no_grad()
def test_a_policy_gives_the_same_velocity_and_actions(parity: Path, tmp_path: Path) -> None:
    run = Imported(parity / "vla_foundry_flow", tmp_path / "run")
    model, inputs = run.load(), run.inputs
    conditioning = condition(run, model)
    torch.testing.assert_close(conditioning.tokens, run.outputs["conditioning"], **CLOSE)
    past_mask = ~inputs["future_mask"]
    window = ActionWindow(inputs["actions"], past_mask, ~past_mask, None, inputs["proprioception"], None)
    head = model.action_head
    times = inputs["timesteps"] / head.process.params.num_timesteps
    noised = head.process.add_noise(inputs["actions"], inputs["noise"], times)
    noised = torch.where(window.free_mask(), noised, window.held_actions())
    velocity = head.predict(noised, times, head.observe(conditioning, window))
    torch.testing.assert_close(velocity, run.outputs["predicted_direction"], **CLOSE)
    window = window._replace(past_mask=inputs["past_mask"], future_mask=~inputs["past_mask"])
    made = head.sample_from(inputs["sampling_noise"], conditioning, window, 10)
    torch.testing.assert_close(made, run.outputs["actions_10steps_pastmask"], **CLOSE)
    for line in (
        "parity: model.action_head.final_norm is false",
        "parity: model.action_head.noise.sampling_time_shift is 0.01",
        "transformer.norm.weight and 1 more left out: the action head's last state was read before this norm.",
    ):
        assert line in run.lines


def condition(run: Imported, model: Any) -> Conditioning:
    """Encode the recorded observation, whose padding was read like text."""
    params: Any = load_params_from_yaml(ModelParams, str(run.folder / "config_model.yaml"))
    batch = {"input_ids": run.inputs["input_ids"].int()}
    observation = prepare_observation(params.vision_language_backbone, batch, "cpu")
    return model.vision_language_backbone(**{**observation, "pixel_values": run.inputs["pixel_values"].flatten(0, 1)})


@torch.no_grad()
def test_the_average_the_step_and_names_of_wrappers_are_taken_over(
    copy_source: Callable[[str], Path], change_checkpoint: Callable[..., None], tmp_path: Path
) -> None:
    source = copy_source("transformer_base")
    weights = source / "checkpoints" / "checkpoint_1.pt"
    for name in ("checkpoint_2.pt", "checkpoint_10.pt", "ema_10.pt"):
        (source / "checkpoints" / name).write_bytes(weights.read_bytes())

    def wrap(content: dict[str, Any]) -> None:
        content["global_step"] = 500
        state = content["state_dict"]
        content["state_dict"] = {f"module._orig_mod.{name}": value for name, value in state.items()}
        for name in [name for name in content["state_dict"] if name.endswith("inv_freq")]:
            content["state_dict"][name] = content["state_dict"][name].bfloat16()

    def average(content: dict[str, Any]) -> None:
        state = {name: value * 0 for name, value in content.pop("state_dict").items()}
        content["ema_state_dict"] = state

    change_checkpoint(source, wrap, "checkpoint_10.pt")
    change_checkpoint(source, average, "ema_10.pt")
    run = Imported(source, tmp_path / "run")
    step_folder = find_checkpoint(run.folder)
    assert step_folder.name == "step_00000500"
    params: Any = load_params_from_yaml(ModelParams, str(run.folder / "config_model.yaml"))
    # bf16 tables say that training rounded the frequencies
    assert params.rope_bf16_frequencies
    assert "parity: model.rope_bf16_frequencies is true (trained in bf16)" in run.lines
    ids = run.inputs["input_ids"]
    assert run.load(use_ema=False)(input_ids=ids).logits.any()
    assert not run.load()(input_ids=ids).logits.any()
    older = Imported(source, tmp_path / "older", checkpoint=2)
    assert find_checkpoint(older.folder).name == "step_00000000"
    assert json.loads((older.folder / "provenance.json").read_text())["imported"]["checkpoint"] == "checkpoint_2.pt"


def add_weight(content: dict[str, Any]) -> None:
    content["state_dict"]["layers.7.gate"] = torch.zeros(2)


def remove_weight(content: dict[str, Any]) -> None:
    del content["state_dict"]["norm.weight"]


def drop_state(content: dict[str, Any]) -> None:
    del content["state_dict"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_weight, r"does not fit the model: unexpected: layers\.7\.gate"),
        (remove_weight, r"does not fit the model: missing: norm\.weight"),
        (drop_state, "is no checkpoint of the earlier implementation: it has no state_dict"),
    ],
)
def test_weights_that_are_not_understood_leave_nothing(
    change: Callable[[dict[str, Any]], None],
    message: str,
    copy_source: Callable[[str], Path],
    change_checkpoint: Callable[..., None],
    tmp_path: Path,
) -> None:
    source = copy_source("transformer_base")
    change_checkpoint(source, change)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(ImportParams(source=str(source), output=str(tmp_path / "runs" / "run")))
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("transformer_base", "num_experts: 8", r"config_model\.yaml: model\.num_experts is unknown for model\.type"),
        ("vla_foundry_flow", "guidance: 2.0", r"config_model\.yaml: model\.guidance is unknown\. Known here: "),
        ("transformer_base", "n_heads: [", r"config_model\.yaml is not YAML"),
    ],
)
def test_a_config_that_is_not_understood_leaves_nothing(
    name: str, text: str, message: str, copy_source: Callable[[str], Path], tmp_path: Path
) -> None:
    copy_source("vlm_ps2")
    source = copy_source(name)
    with (source / "config_model.yaml").open("a") as file:
        file.write(f"{text}\n")
    with pytest.raises(ValueError, match=message):
        import_checkpoint(ImportParams(source=str(source), output=str(tmp_path / "run")))
    assert not list(tmp_path.glob("*run*"))


def test_what_is_there_is_kept_and_what_is_not_is_named(copy_source: Callable[[str], Path], tmp_path: Path) -> None:
    source = copy_source("vla_foundry_flow")
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=r"output .*run exists\. Choose another name, or delete it"):
        import_checkpoint(ImportParams(source=str(source), output=str(tmp_path / "run")))
    params = ImportParams(source=str(source), output=str(tmp_path / "new"))
    with pytest.raises(FileNotFoundError, match=r"is in none of .*Say where it is with --vlm_source FOLDER"):
        import_checkpoint(params)
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint_7\.pt\. There are 1 \(--checkpoint\)"):
        import_checkpoint(ImportParams(source=str(source), output=str(tmp_path / "new"), checkpoint=7))
    with pytest.raises(FileNotFoundError, match="is no run of the earlier implementation: it has neither"):
        import_checkpoint(ImportParams(source=str(tmp_path / "nowhere"), output=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


def test_the_command_ends_with_one_line(
    copy_source: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy_source("transformer_base")
    words = ["import-checkpoint", "--source", str(source), "--output", str(tmp_path / "run")]
    run_cli(words)
    assert capsys.readouterr().out.splitlines()[-1] == f"Run folder {tmp_path / 'run'}"
    with pytest.raises(SystemExit) as stopped:
        run_cli(words)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def write_tokens(folder: Path) -> None:
    """Write a dataset of 8 records of 17 tokens."""
    folder.mkdir()
    packer = RecordPacker(17, "uint16")
    packer.add(np.random.default_rng(0).integers(0, 257, 8 * 17), np.asarray([8 * 17]))
    entry = write_records(str(folder), "shard_000000", packer.take(8))
    (folder / "manifest.jsonl").write_text(format_manifest([entry]))


def test_training_starts_from_an_imported_run(parity: Path, tmp_path: Path) -> None:
    run = Imported(parity / "transformer_base", tmp_path / "run")
    text = tmp_path / "tokens"
    write_tokens(text)
    words = ["--model.resume_from_checkpoint", str(run.folder), "--model", f"include {run.folder}/config_model.yaml"]
    words += ["--data.type", "text", "--data.dataset_manifest", str(text / "manifest.jsonl"), "--data.seq_len", "16"]
    words += ["--data.num_workers", "0", "--hparams.global_batch_size", "2", "--hparams.per_gpu_batch_size", "2"]
    words += ["--hparams.lr", "1e-9", "--hparams.warmup", "0", "--hparams.precision", "fp32", "--wandb", "false"]
    words += ["--total_train_samples", "4", "--save_path", str(tmp_path), "--num_checkpoints", "1"]
    with pytest.raises(ValueError, match=r"holds weights alone\. Add --model\.resume_weights_only true"):
        train([*words, "--name", "whole"])
    train([*words, "--name", "weights", "--model.resume_weights_only", "true"])
    made = load_file(find_checkpoint(tmp_path / "weights") / "model.safetensors")
    for name, value in load_file(find_checkpoint(run.folder) / "model.safetensors").items():
        torch.testing.assert_close(made[name], value, rtol=1e-4, atol=1e-6)


def save_source(folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config_model.yaml").write_text(yaml.safe_dump(config))
    torch.save({"checkpoint_num": 3, "state_dict": state}, folder / "checkpoints" / "checkpoint_3.pt")


@torch.no_grad()
def test_a_policy_on_an_image_encoder_alone(parity: Path, tmp_path: Path) -> None:
    vit = yaml.safe_load((parity / "vlm_ps2" / "config_model.yaml").read_text())["vit"]
    config = yaml.safe_load((parity / "vla_foundry_flow" / "config_model.yaml").read_text())
    config["vision_language_backbone"] = {**vit, "type": "vit_backbone"}
    stored = torch.load(parity / "vla_foundry_flow" / "checkpoints" / "checkpoint_1.pt", weights_only=True)
    front = "vision_language_backbone._model."
    state = {
        (f"{front}{inner.removeprefix('vit.')}" if (inner := name.removeprefix(front)) != name else name): value
        for name, value in stored["state_dict"].items()
        if not name.startswith(front) or name.startswith(f"{front}vit.")
    }
    # the encoder is narrower than the states of two layers
    state |= {"time_encoding.weight": torch.randn(100, 48), "condition_encode.weight": torch.randn(48, 48)}
    save_source(tmp_path / "source", config, state)
    alone = Imported(tmp_path / "source", tmp_path / "run")
    whole = Imported(parity / "vla_foundry_flow", tmp_path / "whole")
    pixels = whole.inputs["pixel_values"].flatten(0, 1)
    tokens = alone.load().vision_language_backbone(pixels, num_images=2, image_mask=None).tokens
    expected = whole.load().vision_language_backbone.model.vit(pixels)
    torch.testing.assert_close(tokens, expected.unflatten(0, (-1, 2)).flatten(1, 2), **CLOSE)


@torch.no_grad()
def test_a_hugging_face_model_keeps_its_architecture(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    published = LlamaForCausalLM(LlamaConfig(vocab_size=20, **tiny)).eval()
    published.config.save_pretrained(tmp_path / "published")
    config = {"type": "transformer_hf", "hf_pretrained": str(tmp_path / "published")}
    state = {f"model.{name}": value.bfloat16() for name, value in published.state_dict().items()}
    save_source(tmp_path / "source", config, state)
    run = Imported(tmp_path / "source", tmp_path / "run")
    (tmp_path / "published" / "config.json").unlink()
    published.load_state_dict({name.removeprefix("model."): value.float() for name, value in state.items()})
    ids = torch.arange(10)[None]
    torch.testing.assert_close(run.load()(input_ids=ids).logits, published(input_ids=ids).logits, **CLOSE)
