"""Runs on text, captions, documents and robots: one process, DDP, FSDP2 and a run that was killed train alike."""

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.essential.data.conftest import write_records as write_records
from tests.essential.data.conftest import write_samples as write_samples
from tests.essential.robot_data import ACTIONS, PROPRIOCEPTION
from tests.essential.robot_data import create_recording as create_recording
from tests.essential.robot_data import tokenizer_folder as tokenizer_folder
from tests.essential.robot_data import write_robot_data as write_robot_data
from vla_foundry.config.command_line import parse
from vla_foundry.config.resolve import resolve
from vla_foundry.data import create_dataloader
from vla_foundry.data.facts import read_facts
from vla_foundry.params import TrainExperimentParams
from vla_foundry.training.experiment import train
from vla_foundry.world import World

_SCRIPT = Path(__file__).with_name("mixture_run.py")
SHARES = {"robots": 0.4, "captions": 0.2, "documents": 0.2, "text": 0.2}
SIZES = {"robots": 45, "captions": 16, "documents": 12, "text": 30}
STEPS, BATCH, BLOCK = 6, 16, 8
CONFIG = """
model:
  type: diffusion_policy
  vision_language_backbone:
    type: vlm_foundry_backbone
    num_vlm_layers_to_use: 2
    vlm:
      vit: {{hidden_dim: 32, inter_dim: 48, n_layers: 1, n_heads: 4, patch_size: 4, img_size: 16}}
      transformer: {{hidden_dim: 32, n_layers: 2, n_heads: 4, max_seq_len: 192, vocab_size: 264}}
  action_head:
    type: flow_transformer
    transformer: {{hidden_dim: 32, n_layers: 1, n_heads: 2, max_seq_len: 256, vocab_size: 0}}
data:
  type: mixture
  datasets:
    robots:
      type: robotics
      dataset_manifest: [{folder}/robots/manifest.jsonl]
      val_dataset_manifest: [{folder}/robots/manifest.jsonl]
      tokenizer: {tokenizer}
      action_fields: {actions}
      proprioception_fields: {proprioception}
      num_workers: 0
      seq_len: 160
    captions:
      type: image_caption
      dataset_manifest: [{folder}/captions/manifest.jsonl]
      val_dataset_manifest: [{folder}/captions/manifest.jsonl]
      tokenizer: {tokenizer}
      num_workers: 0
      seq_len: 96
    documents:
      type: interleaved
      dataset_manifest: [{folder}/documents/manifest.jsonl]
      val_dataset_manifest: [{folder}/documents/manifest.jsonl]
      tokenizer: {tokenizer}
      num_workers: 0
      seq_len: 96
    text:
      type: text
      dataset_manifest: [{folder}/text/manifest.jsonl]
      val_dataset_manifest: [{folder}/text/manifest.jsonl]
      tokenizer: {tokenizer}
      num_workers: 0
      seq_len: 32
  weights: {shares}
  modality_block: {block}
  allow_multiple_epochs: true
hparams: {{global_batch_size: {batch}, per_gpu_batch_size: 2, precision: fp32, lr: 1e-3, warmup: 0}}
name: alone
save_path: {folder}/runs
num_checkpoints: 2
log_every_n_steps: 1
total_train_samples: {samples}
total_val_samples: 10
wandb: false
"""


@pytest.fixture
def params(
    tmp_path: Path,
    create_recording: Callable[..., Any],
    write_robot_data: Callable[..., Path],
    write_samples: Callable[..., Path],
    write_records: Callable[..., Path],
    tokenizer_folder: Path,
) -> TrainExperimentParams:
    """Resolved params of a policy that learns from 45 windows, 16 captions, 12 documents and 30 records of text."""
    recordings = [create_recording(number) for number in range(5)]
    write_robot_data(tmp_path / "robots", recordings)
    images = [recording.frames["wrist"][0] for recording in recordings]
    captions = [{"jpg": images[number % 5], "txt": f"picture {number}".encode()} for number in range(16)]
    write_samples(tmp_path / "captions", [captions[:9], captions[9:]])
    write_samples(tmp_path / "documents", [[create_document(number, images[:2]) for number in range(12)]])
    write_records(tmp_path / "text", [30], 33)
    config = tmp_path / "config.yaml"
    config.write_text(
        CONFIG.format(
            folder=tmp_path,
            tokenizer=tokenizer_folder,
            actions=json.dumps(ACTIONS),
            proprioception=json.dumps(PROPRIOCEPTION),
            shares=json.dumps(SHARES),
            block=BLOCK,
            batch=BATCH,
            samples=STEPS * BATCH,
        ),
        encoding="utf-8",
    )
    given = parse(TrainExperimentParams, ["--config_path", str(config)], prog="train").params
    return resolve(given, read_facts(given, 1))


def create_document(number: int, images: list[bytes]) -> dict[str, bytes]:
    """A document of text; the first few have one of the images."""
    parts = [{"text": f"page {number}"}, {"image": "image_0.jpg"}, {"text": " below"}]
    has_image = number < len(images)
    text = json.dumps({"parts": parts if has_image else parts[:1]}).encode()
    return {"json": text} | ({"image_0.jpg": images[number]} if has_image else {})


def read_lines(params: TrainExperimentParams, name: str, kind: str = "train") -> list[dict[str, Any]]:
    text = (Path(params.save_path) / name / "metrics.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


def read_losses(params: TrainExperimentParams, name: str, kind: str = "train") -> np.ndarray:
    """The loss of each logged step, and of each dataset in it; nan where the batch has none of its samples."""
    keys = ("loss", *(f"loss_{dataset}" for dataset in SHARES))
    return np.asarray(
        [
            [float("nan") if line.get(key) is None else line[key] for key in keys]
            for line in read_lines(params, name, kind)
        ]
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_sharding_accumulation_and_a_kill_change_no_loss(
    params: TrainExperimentParams, launch: Callable[..., Any]
) -> None:
    """8 microbatches of one process against 2 of each of two ranks, and a run that goes on in one process.

    In a microbatch of documents, one rank has images, and the other has none.
    """
    assert {(True, False), (False, True)} & set(find_images(params))
    train(params, World())
    check_means(params)
    config = Path(params.save_path) / "alone" / "config.yaml"
    done = launch(2, str(_SCRIPT), str(config), "4", timeout=550.0)
    assert done.returncode != 0
    alone, validation = read_losses(params, "alone"), read_losses(params, "alone", "validation")
    assert len(alone) == STEPS
    assert np.isfinite(alone[:, 0]).all()
    np.testing.assert_allclose(read_losses(params, "fsdp"), alone, rtol=1e-5, err_msg=done.stderr[-2000:])
    np.testing.assert_allclose(read_losses(params, "fsdp", "validation"), validation, rtol=1e-5)
    assert len(read_losses(params, "ddp")) == 4
    # the block stays 8 samples, which two ranks of 4 shared
    train(replace(params, name="ddp", resume="auto"), World())
    np.testing.assert_allclose(read_losses(params, "ddp"), alone, rtol=1e-5)
    np.testing.assert_allclose(read_losses(params, "ddp", "validation"), validation, rtol=1e-5)
    starts = json.loads((config.parents[1] / "ddp" / "experiment.json").read_text(encoding="utf-8"))["starts"]
    assert [start["first_step"] for start in starts] == [0, 3]


def find_images(params: TrainExperimentParams) -> list[tuple[bool, ...]]:
    """Whether each of two ranks has an image, for each microbatch of documents in training."""
    found = []
    for rank in range(2):
        world = World(rank=rank, world_size=2)
        with closing(create_dataloader(params.data, world, global_batch_size=BATCH, per_gpu_batch_size=4)) as loader:
            batches = islice(loader.microbatches(0), STEPS * BATCH // BLOCK)
            found.append([len(batch["pixel_values"]) > 0 for batch in batches if batch["dataset"] == "documents"])
    return list(zip(*found, strict=True))


def check_means(params: TrainExperimentParams) -> None:
    """The step's loss is the mean of the datasets' losses, weighted by their samples in the batch."""
    before = dict.fromkeys(SHARES, 0)
    for line in read_lines(params, "alone"):
        after = {name: round(line[f"epochs_{name}"] * size) for name, size in SIZES.items()}
        counts = {name: after[name] - before[name] for name in SHARES}
        assert sum(counts.values()) == BATCH
        expected = sum(counts[name] * line[f"loss_{name}"] for name in SHARES if counts[name]) / BATCH
        assert line["loss"] == pytest.approx(expected, rel=1e-6)
        before = after
    validation = read_lines(params, "alone", "validation")[-1]
    assert validation["samples"] == 10
    weighted = sum(share * validation[f"loss_{name}"] for name, share in SHARES.items())
    assert validation["loss"] == pytest.approx(weighted, rel=1e-6)
