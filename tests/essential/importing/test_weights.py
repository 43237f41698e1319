"""Runs imported from published checkpoints give the outputs that were recorded of these, and can be trained from."""

import io
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

from vla_foundry.importing.command import import_checkpoint
from vla_foundry.inference.caption import Question, answer, load_captioner
from vla_foundry.inference.generate import main as generate
from vla_foundry.inference.loading import load_run_model
from vla_foundry.main import main as train
from vla_foundry.models.action_heads.action_head import ActionWindow
from vla_foundry.models.backbones.backbone import Conditioning
from vla_foundry.models.backbones.vlm_foundry import prepare_observation
from vla_foundry.params import ModelParams, load_params_from_yaml
from vla_foundry.params.commands.runs import ImportParams
from vla_foundry.preprocessing.text.packing import RecordPacker, write_records
from vla_foundry.run_folder import find_checkpoint
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
    find_checkpoint(run.folder)
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
    velocity = head.predict(noised, times, head.embed_context(conditioning, window))
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


def write_tokens(folder: Path) -> None:
    """Write a dataset of 8 records of 17 tokens."""
    folder.mkdir()
    packer = RecordPacker(17, "uint16")
    packer.add(np.random.default_rng(0).integers(0, 257, 8 * 17), np.asarray([8 * 17]))
    entry = write_records(str(folder), "shard_000000", packer.take(8))
    (folder / "manifest.jsonl").write_text(format_manifest([entry]), encoding="utf-8")


def test_training_starts_from_an_imported_run(parity: Path, tmp_path: Path) -> None:
    run = Imported(parity / "transformer_base", tmp_path / "run")
    text = tmp_path / "tokens"
    write_tokens(text)
    words = ["--model.resume_from_checkpoint", str(run.folder), "--model", f"include {run.folder}/config_model.yaml"]
    words += ["--data.type", "text", "--data.dataset_manifest", str(text / "manifest.jsonl"), "--data.seq_len", "16"]
    words += ["--data.num_workers", "0", "--hparams.global_batch_size", "2", "--hparams.per_gpu_batch_size", "2"]
    words += ["--hparams.lr", "1e-9", "--hparams.warmup", "0", "--hparams.precision", "fp32", "--wandb", "false"]
    words += ["--total_train_samples", "4", "--save_path", str(tmp_path), "--num_checkpoints", "1"]
    with pytest.raises(ValueError, match=r"holds only weights, so .* --model\.resume_weights_only true"):
        train([*words, "--name", "whole"])
    train([*words, "--name", "weights", "--model.resume_weights_only", "true"])
    made = load_file(find_checkpoint(tmp_path / "weights") / "model.safetensors")
    for name, value in load_file(find_checkpoint(run.folder) / "model.safetensors").items():
        torch.testing.assert_close(made[name], value, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_policy_on_an_image_encoder_alone(parity: Path, save_source: Callable[..., None], tmp_path: Path) -> None:
    vit = yaml.safe_load((parity / "vlm_ps2" / "config_model.yaml").read_text(encoding="utf-8"))["vit"]
    config = yaml.safe_load((parity / "vla_foundry_flow" / "config_model.yaml").read_text(encoding="utf-8"))
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
