"""A run of a tiny policy on recordings of a made-up arm, by way of preprocessing and training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.essential.robot_data import create_params as create_params
from tests.essential.robot_data import create_recording as create_recording
from tests.essential.robot_data import read_batch as read_batch
from tests.essential.robot_data import tokenizer_folder as tokenizer_folder
from tests.essential.robot_data import write_robot_data as write_robot_data
from vla_foundry.config.command_line import parse
from vla_foundry.config.resolve import resolve
from vla_foundry.data.facts import read_facts
from vla_foundry.params import TrainExperimentParams
from vla_foundry.params.commands.preprocessing_robotics import RoboticsPreprocessParams, register_converter_params
from vla_foundry.preprocessing.robotics import BaseRoboticsConverter, register_converter
from vla_foundry.preprocessing.robotics.converters.converter import ArrayFrames, Episode, EpisodeRef
from vla_foundry.preprocessing.robotics.robotics_job import preprocess_robotics
from vla_foundry.robotics.fields import PoseGroup
from vla_foundry.robotics.rotations import matrix_to_rotation, rotation_to_matrix
from vla_foundry.robotics.spec import FieldDescription, GripperRange
from vla_foundry.training.experiment import train
from vla_foundry.world import World

ACTUAL, ACTION = "robot__actual__poses__right::arm", "robot__action__poses__right::arm"
GRIPPER = "robot__action__grippers__right::hand"
CAMERAS, DEPTH = ("rig.front", "rig.wrist"), "rig.depth"
PAST, FUTURE, NUM_FRAMES, FPS = 2, 5, 14, 10.0
INSTRUCTION = "lift the lid"
FIELDS = {
    f"{ACTUAL}__xyz": FieldDescription(shape=(3,), dtype="float64", unit="m"),
    f"{ACTUAL}__rot_6d": FieldDescription(shape=(6,), dtype="float64", rotation="rot_6d_rows"),
    f"{ACTION}__xyz": FieldDescription(shape=(3,), unit="m", role="action"),
    f"{ACTION}__rot_6d": FieldDescription(shape=(6,), rotation="rot_6d_rows", role="action"),
    GRIPPER: FieldDescription(shape=(1,), role="action", gripper=GripperRange(open=1.0, closed=0.0)),
}
VLM_BACKBONE = """
    type: vlm_foundry_backbone
    num_vlm_layers_to_use: 1
    vlm:
      vit: {hidden_dim: 32, inter_dim: 48, n_layers: 1, n_heads: 4, patch_size: 4, img_size: 16}
      transformer: {hidden_dim: 32, n_layers: 2, n_heads: 4, max_seq_len: 192}"""
VIT_BACKBONE = """
    type: vit_backbone
    vit: {hidden_dim: 32, inter_dim: 48, n_layers: 1, n_heads: 4, patch_size: 4, img_size: 16}"""
CONFIG = (
    """
model:
  type: diffusion_policy
  vision_language_backbone:"""
    + VLM_BACKBONE
    + """
  action_head:
    type: flow_transformer
    transformer: {hidden_dim: 32, n_layers: 1, n_heads: 2, max_seq_len: 256, vocab_size: 0}
data:
  type: robotics
  image_indices: [-2, 0]
  prompts: ["<image><image><image><image>The robot has to {instruction}."]
  num_workers: 0
  seq_len: 128
  allow_multiple_epochs: true
  augmentation: {enabled: true, image: {crop: {enabled: true, shape: [0.8, 0.9]}, color_jitter: {enabled: true}}}
hparams: {global_batch_size: 4, per_gpu_batch_size: 4, precision: fp32, lr: 1e-3, warmup: 0}
ema: {enabled: true, type: vanilla, alpha: 0.5}
num_checkpoints: 1
total_train_samples: 12
total_val_samples: 14
"""
)


@dataclass(frozen=True)
class Recording:
    """An episode as the robot had it: {field: (L, C)} and {camera: uint8 (L, H, W, 3), or depth uint16 (L, H, W)}."""

    fields: dict[str, np.ndarray]
    images: dict[str, np.ndarray]


@dataclass(frozen=True)
class Arm:
    """A run, and what it was trained on."""

    run: Path
    params: TrainExperimentParams
    recordings: list[Recording]


def record_arm(seed: int) -> Recording:
    """Smooth poses, a gripper, and noisy pictures that are not square."""
    rng = np.random.default_rng(seed)
    fields: dict[str, np.ndarray] = {}
    for name in (ACTUAL, ACTION):
        fields[f"{name}__xyz"] = rng.normal(size=(NUM_FRAMES, 3)).cumsum(axis=0) / 10
        angles = rng.normal(size=(NUM_FRAMES, 3)).cumsum(axis=0) / 5
        matrices = rotation_to_matrix(angles, "axis_angle")
        fields[f"{name}__rot_6d"] = matrix_to_rotation(matrices, "rot_6d_rows")
    fields[GRIPPER] = rng.random((NUM_FRAMES, 1))
    fields = {name: values.astype(FIELDS[name].dtype) for name, values in fields.items()}
    shapes = {CAMERAS[0]: (30, 40), CAMERAS[1]: (24, 20)}
    images: dict[str, Any] = {
        camera: rng.integers(0, 256, (NUM_FRAMES, *shape, 3), dtype=np.uint8) for camera, shape in shapes.items()
    }
    images[DEPTH] = rng.integers(0, 3000, (NUM_FRAMES, 32, 40), dtype=np.uint16)
    images[DEPTH][:, ::3, ::5] = 0  # not measured
    return Recording(fields, images)


@register_converter_params("inference_test_arm")
@dataclass(frozen=True, kw_only=True)
class ArmParams(RoboticsPreprocessParams):
    """Made-up recordings."""


@register_converter("inference_test_arm")
class ArmConverter(BaseRoboticsConverter):
    """Makes recordings up: the source is the name of a file with their number."""

    def discover_episodes(self) -> list[EpisodeRef]:
        count = int(Path(self.params.source_episodes[0]).read_text(encoding="utf-8"))
        return [EpisodeRef(episode_id=f"episode_{n}", source=str(n), num_frames=NUM_FRAMES) for n in range(count)]

    def discover_cameras(self) -> list[str]:
        return [*CAMERAS, DEPTH]

    def describe_fields(self) -> dict[str, FieldDescription]:
        return dict(FIELDS)

    def pose_groups(self) -> tuple[PoseGroup, ...]:
        return tuple(
            PoseGroup(name=name, position_key=f"{name}__xyz", rotation_key=f"{name}__rot_6d")
            for name in (ACTUAL, ACTION)
        )

    def read_episode(self, ref: EpisodeRef) -> Episode:
        recording = record_arm(int(ref.source))
        return Episode(
            ref=ref,
            fps=FPS,
            timestamps=np.arange(NUM_FRAMES) / FPS,
            fields=recording.fields,
            cameras={name: ArrayFrames(images) for name, images in recording.images.items()},
            instructions=Episode.one_instruction(INSTRUCTION, NUM_FRAMES),
        )


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of words."""
    words = ["<unk>", "<|endoftext|>", *f"User Assistant : \n The robot has to {INSTRUCTION} .".split()]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    return folder


def train_arm(
    folder: Path, *others: str, action_fields: list[str], proprioception_fields: list[str], has_language: bool = True
) -> Arm:
    """Preprocess two recordings, turned and resized, and train a policy on them for three steps, with other flags."""
    (folder / "count").write_text("2", encoding="utf-8")
    options: dict[str, Any] = {"source_episodes": [str(folder / "count")], "output_dir": str(folder / "data")}
    options |= {"past_lowdim_steps": PAST, "future_lowdim_steps": FUTURE, "max_padding_left": PAST}
    options |= {"resize_images_size": [20, 16], "camera_rotations": {CAMERAS[1]: 1}, "num_workers": 0}
    preprocess_robotics(ArmParams(**options))
    config = CONFIG if has_language else CONFIG.replace(VLM_BACKBONE, VIT_BACKBONE)
    (folder / "train.yaml").write_text(config, encoding="utf-8")
    manifest = str(folder / "data" / "manifest.jsonl")
    words = ["--config_path", str(folder / "train.yaml"), "--save_path", str(folder / "runs"), "--name", "arm"]
    words += ["--data.dataset_manifest", manifest, "--data.val_dataset_manifest", manifest]
    words += ["--data.tokenizer", str(write_tokenizer(folder / "tokenizer"))] if has_language else []
    words += ["--data.action_fields", ",".join(action_fields)]
    words += ["--data.proprioception_fields", f"[{','.join(proprioception_fields)}]", *others]
    params = parse(TrainExperimentParams, words, prog="train").params
    params = resolve(params, read_facts(params, 1))
    train(params, World())
    return Arm(folder / "runs" / "arm", params, [record_arm(0), record_arm(1)])


@pytest.fixture(scope="session")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Arm:
    """A policy of relative actions."""
    return train_arm(
        tmp_path_factory.mktemp("arm"),
        action_fields=[f"{ACTION}__xyz_relative", GRIPPER, f"{ACTION}__rot_6d_relative"],
        proprioception_fields=[f"{ACTUAL}__xyz", f"{ACTION}__rot_6d_relative"],
    )


@pytest.fixture(scope="session")
def silent_arm(tmp_path_factory: pytest.TempPathFactory) -> Arm:
    """A policy of absolute actions that is told nothing, feels nothing, and sees depth, too."""
    return train_arm(
        tmp_path_factory.mktemp("silent_arm"),
        *("--data.depth_cameras", "{depth: [0.5, 2.5]}"),
        action_fields=[f"{ACTION}__xyz", f"{ACTION}__rot_6d"],
        proprioception_fields=[],
        has_language=False,
    )
