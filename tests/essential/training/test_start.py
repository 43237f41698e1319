"""A policy trains on robot data by name, and its run keeps what it takes to use it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.essential.robot_data import create_recording as create_recording
from tests.essential.robot_data import tokenizer_folder as tokenizer_folder
from tests.essential.robot_data import write_robot_data as write_robot_data
from vla_foundry.config.command_line import parse
from vla_foundry.config.resolve import resolve, resolve_known
from vla_foundry.data.facts import read_facts
from vla_foundry.data.robotics import load_normalizer, load_spec
from vla_foundry.params import TrainExperimentParams, load_experiment_params_from_yaml
from vla_foundry.training.experiment import train
from vla_foundry.world import World

CONFIG = """
model:
  type: diffusion_policy
  vision_language_backbone: {type: BACKBONE}
  action_head:
    type: flow_transformer
    transformer: {hidden_dim: 32, n_layers: 1, n_heads: 2, max_seq_len: 256, vocab_size: 0}
data:
  type: robotics
  action_fields: [robot__action__poses__left::panda__xyz_relative, robot__action__grippers__left::panda_hand]
  proprioception_fields: [robot__actual__poses__left::panda__xyz]
  num_workers: 0
  seq_len: 128
  allow_multiple_epochs: true
hparams: {global_batch_size: 4, per_gpu_batch_size: 2, precision: fp32, lr: 1e-3, warmup: 0}
num_checkpoints: 2
total_train_samples: 12
total_val_samples: 5
"""
VIT = "vit: {hidden_dim: 32, inter_dim: 48, n_layers: 1, n_heads: 4, patch_size: 4, img_size: 16}"
VLM = (
    "vlm: {vit: {hidden_dim: 32, inter_dim: 48, n_layers: 1, n_heads: 4, patch_size: 4, img_size: 16},"
    " transformer: {hidden_dim: 32, n_layers: 2, n_heads: 4, max_seq_len: 192}}, num_vlm_layers_to_use: 1"
)


@pytest.mark.parametrize("has_language", [False, True])
def test_a_policy_trains_and_goes_on(
    tmp_path: Path,
    create_recording: Callable[..., Any],
    write_robot_data: Callable[..., Path],
    tokenizer_folder: Path,
    has_language: bool,
) -> None:
    manifest = write_robot_data(tmp_path / "data", [create_recording(number, 6) for number in range(3)])
    backbone = f"vlm_foundry_backbone, {VLM}" if has_language else f"vit_backbone, {VIT}"
    (tmp_path / "train.yaml").write_text(CONFIG.replace("BACKBONE", backbone), encoding="utf-8")
    words = ["--config_path", str(tmp_path / "train.yaml"), "--save_path", str(tmp_path / "runs"), "--name", "policy"]
    words += ["--data.dataset_manifest", str(manifest), "--data.val_dataset_manifest", str(manifest)]
    words += ["--data.tokenizer", str(tokenizer_folder)] if has_language else []
    params = parse(TrainExperimentParams, words, prog="train").params
    params = resolve(params, read_facts(params, 1))
    train(params, World())
    run = tmp_path / "runs" / "policy"
    saved = load_experiment_params_from_yaml(str(run / "config.yaml")).data
    assert saved.robot_widths() == {"action_dim": 4, "proprioception_dim": 3}
    assert saved.image_names == ["Scene.Left_t-1", "wrist_t-1", "Scene.Left_t0", "wrist_t0"]  # pyright: ignore[reportAttributeAccessIssue]
    assert (run / "processor").is_dir() is has_language
    assert list(load_spec(run).cameras) == ["Scene.Left", "wrist"]
    assert set(load_normalizer(run).scales) == {*params.data.action_fields, *params.data.proprioception_fields}  # pyright: ignore[reportAttributeAccessIssue]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    # of the anchors 0 to 4 of 6 frames: 4, 4, 4, 3 and 2 steps of 4 numbers
    assert {line["targets"] for line in metrics if line["kind"] == "validation"} == {68}
    # the run goes on; with other cameras than it has learned by, it does not
    words += ["--total_train_samples", "20", "--resume", "auto"]
    damage = [path for path in run.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    for path in damage:
        path.write_bytes(b"\0")
    params = parse(TrainExperimentParams, words, prog="train").params
    train(resolve(params, read_facts(params, 1)), World())
    for path in damage:
        assert path.read_bytes() != b"\0", path
    words += ["--model.resume_from_checkpoint", str(run)]
    params = parse(TrainExperimentParams, [*words, "--data.camera_names", "[wrist, Scene.Left]"], prog="train").params
    with pytest.raises(ValueError, match=r"which was trained on Scene\.Left, wrist\. Use that order"):
        resolve(params, read_facts(params, 1))
    check_statistics(words, run, create_recording, write_robot_data, tmp_path)


def check_statistics(words: list[str], run: Path, create_recording: Any, write_robot_data: Any, folder: Path) -> None:
    """A policy continues on other statistics than those it learned by only if this is accepted."""
    manifest = write_robot_data(folder / "other", [create_recording(number, 6) for number in range(5, 8)])
    words = [*words, "--name", "tuned", "--data.dataset_manifest", str(manifest)]

    def notices(*more: str, offline: bool = False) -> list[str]:
        params = parse(TrainExperimentParams, [*words, *more], prog="train").params
        return resolve_known(params, read_facts(params, 1, offline=offline)).notices

    with pytest.raises(
        ValueError, match=r"is normalized with center .* in .*runs/policy, and .*--data\.dataset_statist"
    ):
        notices()
    assert "is normalized with center" in " ".join(notices("--data.accept_contradictions", "true"))
    assert "normalize" not in " ".join(notices("--data.dataset_statistics", f"[{run / 'stats.json'}]"))
    # a step folder knows them wherever it is copied
    (step,) = sorted((run / "checkpoints").glob("step_*"))[-1:]
    alone = Path(shutil.copytree(step, folder / "alone" / "step"))
    with pytest.raises(
        ValueError, match=rf"center .* in {alone}, and .*statistics the run's stats\.json\. Or continue"
    ):
        notices("--model.resume_from_checkpoint", str(alone))
    (alone / "state.json").unlink()
    words += ["--model.resume_from_checkpoint", str(alone)]
    assert f"{alone} keeps no normalizer.json, so its statistics are not compared" in " ".join(notices())
    words = words[:-2]
    with pytest.raises(
        ValueError, match=r"data\.normalization: field .* cover 1 past and 3 future .* not 1 and 200\. Use"
    ):
        notices("--data.normalization.scope", "per_timestep", "--data.lowdim_future_timesteps", "200")
    (manifest.parent / "stats.json").unlink()
    for offline in (False, True):
        with pytest.raises(FileNotFoundError, match=r"data\.dataset_statistics: there is no .*stats\.json\. Make it "):
            notices(offline=offline)
    manifest.parent.rename(folder / "elsewhere")
    notices("--data.proprioception_dim", "3", offline=True)
