"""The memory of a run is predicted without a GPU and without its data, and what does not fit is told a remedy."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from vla_foundry.hub.plan import main

PRESETS = Path(__file__).resolve().parents[3] / "config_presets/models"
ROBOT = (
    "--data.type robotics --data.camera_names [one,two] --data.image_indices [0] --data.lowdim_past_timesteps 1 "
    "--data.lowdim_future_timesteps 6 --model.action_dim 4 --model.proprioception_dim 3"
)
PLANNED = {
    "llm": ("transformer_11m", "--data.type text --data.seq_len 128"),
    "vlm": ("vlm_11m", "--data.type image_caption --data.seq_len 512"),
    "vla": ("vla_11m", ROBOT),
}


def plan(capsys: pytest.CaptureFixture[str], words: str) -> dict[str, Any]:
    main([*shlex.split(words), "--json", "--hparams.global_batch_size", "32", "--total_train_samples", "320"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", PLANNED)
def test_a_run_without_its_data_is_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    preset, words = PLANNED[name]
    words = f'--model "include {PRESETS}/{preset}.yaml" {words} --ema.enabled true'
    one = plan(capsys, words)
    assert "uncounted" not in one
    parts, num_trained = one["parts"], one["num_trained"]
    assert parts["weights"] == 4 * one["num_weights"]
    assert parts["gradients"] == parts["average"] == 4 * num_trained
    assert 8 * num_trained < parts["moments"] < 8.01 * num_trained
    assert one["settings"] == [
        {"flags": [], "bytes": sum(parts.values()), "fits": True, "largest_per_gpu_batch_size": 32}
    ]


def test_more_ranks_and_smaller_microbatches_need_less(capsys: pytest.CaptureFixture[str]) -> None:
    words = f'--model "include {PRESETS}/transformer_11m.yaml" --data.type text --data.seq_len 512'
    whole = plan(capsys, words)["parts"]
    parts = plan(capsys, f"{words} --hparams.per_gpu_batch_size 2 --gpus 4 --distributed.fsdp true")["parts"]
    assert parts["activations"] < 0.7 * whole["activations"]
    assert parts["moments"] == pytest.approx(whole["moments"] / 4, rel=0.1)


def test_what_does_not_fit_is_told_what_to_add(capsys: pytest.CaptureFixture[str]) -> None:
    words = f'--model "include {PRESETS}/transformer_11m.yaml" --data.type text --data.seq_len 512'
    needed = plan(capsys, words)["settings"][0]["bytes"] / 0.9 / 2**30
    command = [*shlex.split(words), "--hparams.global_batch_size", "32", "--gpu_memory"]
    main([*command, str(needed * 1.01)])
    assert "It fits as configured." in capsys.readouterr().out
    main([*command, str(needed * 0.99)])
    assert "It does not fit as configured. Add --hparams.grad_checkpointing true.\n" in capsys.readouterr().out
    main([*command, "1e-6"])
    assert "It does not fit on 1 GPUs, whatever is set." in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"global_batch_size \(32\) must be a multiple of num_ranks \(3\)"):
        main([*command, "80", "--gpus", "3"])


def test_what_the_count_leaves_out_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    words = f'--model "include {PRESETS}/transformer_11m.yaml" --data.type text --data.seq_len 512'
    assert plan(capsys, f"{words} --hparams.torchcompile false")["left_out"] == []
    left = " --hparams.activation_budget 0.5 --hparams.fp8 tensorwise"
    needed = plan(capsys, words + left)["settings"][0]["bytes"] / 0.9 / 2**30
    main([*shlex.split(words + left), "--hparams.global_batch_size", "32", "--gpu_memory", str(needed * 0.99)])
    output = capsys.readouterr().out
    assert "Add --hparams.grad_checkpointing true --hparams.activation_budget 1.\n" in output
    said = "Activations are counted without that compiled blocks keep less (--hparams.torchcompile); "
    said += "--hparams.activation_budget 0.5, with which they keep less again; --hparams.fp8 tensorwise."
    assert said in output.splitlines()


def test_activations_that_cannot_be_counted_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    robot = ROBOT.replace("--data.image_indices [0]", "")
    main(shlex.split(f'--model "include {PRESETS}/vla_11m.yaml" {robot} --hparams.global_batch_size 32'))
    lines = capsys.readouterr().out.splitlines()
    assert "It fits as configured, without activations." in lines
    assert "come on top: data.camera_names or data.image_indices is not known" in lines[-2]


def test_a_policy_whose_data_is_not_there_yet_is_told_so(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.jsonl"
    words = shlex.split(ROBOT.replace(" --model.action_dim 4 --model.proprioception_dim 3", ""))
    words += ["--model", f"include {PRESETS}/vla_11m.yaml", "--data.dataset_manifest", str(manifest)]
    words += ["--data.action_fields", "[a]", "--data.proprioception_fields", "[b]"]
    words += ["--data.tokenizer", "nowhere", "--data.seq_len", "1024"]
    message = rf"data\.action_dim needs {tmp_path}/robotics\.json\. Preprocess the data first, or give"
    with pytest.raises(ValueError, match=message):
        main([*words, "--hparams.global_batch_size", "32", "--total_train_samples", "3200"])
