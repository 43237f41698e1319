"""Two robots in one run: their own cameras, steps, widths and statistics, or statistics merged by choice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.essential.robot_data import ACTIONS, PROPRIOCEPTION
from tests.essential.robot_data import create_recording as create_recording
from tests.essential.robot_data import write_robot_data as write_robot_data
from vla_foundry.config.command_line import parse
from vla_foundry.config.resolve import resolve
from vla_foundry.data.facts import read_facts
from vla_foundry.data.robotics import create_normalization, read_specs
from vla_foundry.evaluation.action_error import measure_action_error
from vla_foundry.inference import Policy
from vla_foundry.inference.policy_files import load_policy_files
from vla_foundry.params import TrainExperimentParams
from vla_foundry.params.commands.evaluation import ActionErrorParams
from vla_foundry.params.models.policy import check_chunk_lengths
from vla_foundry.training.experiment import train
from vla_foundry.world import World

ROBOTS = """
model:
  type: diffusion_policy
  vision_language_backbone:
    type: vit_backbone
    vit: {{hidden_dim: 32, inter_dim: 48, n_layers: 1, n_heads: 4, patch_size: 4, img_size: 16}}
  action_head:
    type: flow_transformer
    transformer: {{hidden_dim: 32, n_layers: 1, n_heads: 2, max_seq_len: 256, vocab_size: 0}}
data:
  type: mixture
  datasets:
    arm:
      type: robotics
      dataset_manifest: [{folder}/arm/manifest.jsonl]
      val_dataset_manifest: [{folder}/arm/manifest.jsonl]
      action_fields: {actions}
      proprioception_fields: {proprioception}
    hand:
      type: robotics
      dataset_manifest: [{folder}/hand/manifest.jsonl]
      val_dataset_manifest: [{folder}/hand/manifest.jsonl]
      action_fields: [{gripper}]
  weights: {{arm: 3, hand: 1}}
  num_workers: 0
  seq_len: 64
  allow_multiple_epochs: true
hparams: {{global_batch_size: 16, per_gpu_batch_size: 4, precision: fp32, lr: 1e-3, warmup: 0}}
name: robots
save_path: {folder}/runs
num_checkpoints: 1
log_every_n_steps: 1
total_train_samples: 48
total_val_samples: 8
wandb: false
"""
GRIPPER = ACTIONS[-1]


@pytest.fixture
def resolve_robots(
    tmp_path: Path, create_recording: Callable[..., Any], write_robot_data: Callable[..., Path]
) -> Callable[..., TrainExperimentParams]:
    """Resolve params of an arm and of a hand, which has one camera, more steps and frames, and a gripper in percent."""
    hands = [create_recording(number, cameras={"wrist": (16, 16)}) for number in range(3)]
    for hand in hands:
        hand.fields[GRIPPER] = 500 + 100 * hand.fields[GRIPPER]
    write_robot_data(tmp_path / "arm", [create_recording(number) for number in range(4)])
    write_robot_data(tmp_path / "hand", hands, window=(0, 5), image_indices=[0], fps=25.0)
    text = ROBOTS.format(
        folder=tmp_path, actions=json.dumps(ACTIONS), proprioception=json.dumps(PROPRIOCEPTION), gripper=GRIPPER
    )
    (tmp_path / "robots.yaml").write_text(text, encoding="utf-8")

    def resolve_them(**data: str) -> TrainExperimentParams:
        words = [word for key, value in data.items() for word in (f"--data.{key.replace('__', '.')}", value)]
        words = ["--config_path", str(tmp_path / "robots.yaml"), *words]
        given = parse(TrainExperimentParams, words, prog="train").params
        return resolve(given, read_facts(given, 1))

    return resolve_them


def test_two_robots_in_one_run_are_evaluated_apart(resolve_robots: Callable[..., TrainExperimentParams]) -> None:
    params = resolve_robots()
    data: Any = params.data
    assert {name: (part.action_dim, part.padded_action_dim) for name, part in data.datasets.items()} == {
        "arm": (10, 10),
        "hand": (1, 10),
    }
    with pytest.raises(ValueError, match=r"lowdim_future_timesteps differ \(arm 3, hand 5\)\. Make them equal\.$"):
        check_chunk_lengths(data)
    train(params, World())
    run = str(Path(params.save_path) / "robots")
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines)
    validation = next(line for line in reversed(lines) if line["kind"] == "validation")
    assert validation["loss"] == pytest.approx(0.75 * validation["loss_arm"] + 0.25 * validation["loss_hand"])
    cases = {"arm": (["Scene.Left", "wrist"], (3, 6, 1), 4), "hand": (["wrist"], (1,), 6)}
    for name, (cameras, widths, steps) in cases.items():
        files = load_policy_files(run, dataset=name)
        policy = Policy.from_run(run, dataset=name, device="cpu")
        assert [camera.name for camera in policy.cameras] == cameras
        assert tuple(field.width for field in policy.commanded.values()) == widths
        assert policy.chunk_steps == steps
        policy.reset(seed=0)
        gripper = policy.act(files.imagine_observation())[GRIPPER]
        # near the mean of this robot, in its unit
        assert np.abs(gripper - (0.5 if name == "arm" else 550)).max() < (5 if name == "arm" else 300)
        errors = measure_action_error(ActionErrorParams(checkpoint=run, dataset=name, device="cpu", num_samples=6))
        assert {field: len(error.policy) for field, error in errors.items()} == dict.fromkeys(
            data.datasets[name].action_fields, steps
        )
        assert errors[GRIPPER].mean_action.max() < 0.3 if name == "arm" else errors[GRIPPER].mean_action.max() > 10
    assert list(Policy.from_run(run, device="cpu").commanded) == list(Policy.from_run(run, dataset="arm").commanded)
    with pytest.raises(ValueError, match=r"dataset 'hnad' is unknown\. Did you mean 'hand'"):
        Policy.from_run(run, dataset="hnad")


@pytest.mark.parametrize("weighting", ["count", "mixture"])
def test_statistics_of_robots_merge_by_choice(
    resolve_robots: Callable[..., TrainExperimentParams], weighting: str
) -> None:
    same = {"datasets__arm__action_fields": f"[{GRIPPER}]", "datasets__arm__proprioception_fields": "[]"}
    same |= {"statistics_weighting": weighting, "accept_contradictions": "true", "merge_statistics": "true"}
    data: Any = resolve_robots(**same).data
    made = [create_normalization(part, read_specs(part.dataset_manifest)) for part in data.datasets.values()]
    scales = [one.normalizer.scales[GRIPPER] for one in made]
    np.testing.assert_array_equal(scales[0].center, scales[1].center)
    np.testing.assert_array_equal(scales[0].scale, scales[1].scale)
    alone = resolve_robots(**same | {"merge_statistics": "false"})
    parts = [
        create_normalization(part, read_specs(part.dataset_manifest)).statistics[GRIPPER]
        for part in alone.data.datasets.values()
    ]
    # 36 windows of the arm and 27 of the hand, or 3 : 1
    counts = [float(part.count.sum()) for part in parts]
    if weighting == "mixture":
        counts = [count * share / windows for count, share, windows in zip(counts, (3, 1), (36, 27), strict=True)]
    expected = np.average([part.mean[0] for part in parts], weights=counts)
    assert scales[0].center.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"^data\.merge_statistics needs robots with the same fields, but data\.datasets\.hand\.action_fields "),
        (
            {"datasets__arm__action_fields": f"[{GRIPPER}]"},
            rf"data\.datasets\.hand\.proprioception_fields lacks '{PROPRIOCEPTION[0]}' of arm\. Add it",
        ),
        (
            {
                "datasets__arm__action_fields": f"[{GRIPPER}]",
                "datasets__arm__proprioception_fields": "[]",
                "datasets__hand__normalization__method": "min_max",
            },
            r"^data\.merge_statistics: data\.datasets\.hand\.normalization differs from that of arm\. Give it once",
        ),
        (
            {"datasets__arm__action_fields": f"[{GRIPPER}]", "datasets__arm__proprioception_fields": "[]"},
            r"^data\.merge_statistics: .*arm/manifest\.jsonl has 10 frames a second and .*hand/manifest\.jsonl 25",
        ),
    ],
)
def test_robots_that_differ_do_not_merge(
    resolve_robots: Callable[..., TrainExperimentParams], changes: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        resolve_robots(**changes, merge_statistics="true")
    assert "\n" not in str(caught.value)
