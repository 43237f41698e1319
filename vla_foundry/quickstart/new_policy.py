"""`vla-foundry new-policy`: write complete, commented configs that train a policy on a LeRobot dataset."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from vla_foundry.config.command_line import parse_command
from vla_foundry.data.kept import read_model_config
from vla_foundry.importing.command import check_output, create_aside
from vla_foundry.params.commands.preprocessing import TrainTokenizerParams
from vla_foundry.params.commands.runs import NewPolicyParams
from vla_foundry.preprocessing.robotics.converters.field_map import default_role
from vla_foundry.preprocessing.robotics.converters.lerobot_metadata import (
    DatasetInfo,
    EpisodeEntry,
    list_episodes,
    read_info,
)
from vla_foundry.preprocessing.text.tokenizer import train_tokenizer
from vla_foundry.storage.hub import find_published
from vla_foundry.storage.uri import join_uri, read_object

PREPROCESS_NAME, TRAIN_NAME = "preprocess.yaml", "train.yaml"
_TOKENIZER, _SHARDS, _RUNS, _RUN = "tokenizer", "shards", "runs", "policy"
# a chunk has this many actions at least and at most
_FEWEST_ACTIONS, _MOST_ACTIONS = 8, 50
# of this many episodes and more, a tenth is held out
_EPISODES_TO_HOLD_OUT = 10
_MOST_VALIDATION_SAMPLES = 1024
# training sees each frame about this often
_EPOCHS = 20
_BATCH = 64
# side of the small backbone's images at most, and of the cells that become a token each, pixels
_SMALL_SIDE, _CELL = 128, 32
# columns of a feature that are named in a comment
_NAMED_COLUMNS = 12


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """What a dataset holds."""

    info: DatasetInfo
    episodes: Sequence[EpisodeEntry]
    cameras: list[str]
    observations: list[str]
    actions: list[str]

    @property
    def num_frames(self) -> int:
        return sum(entry.length for entry in self.episodes)

    @property
    def has_validation(self) -> bool:
        return len(self.episodes) >= _EPISODES_TO_HOLD_OUT

    @property
    def num_held_out(self) -> int:
        """Frames that are held out at least, whichever episodes these are."""
        return sum(sorted(entry.length for entry in self.episodes)[: len(self.episodes) // 10])

    @property
    def chunk(self) -> int:
        """Number of actions that are predicted together: a second, but short against the episodes."""
        most = min(_MOST_ACTIONS, median(entry.length for entry in self.episodes) // 4)
        return int(max(min(round(self.info.fps), most), _FEWEST_ACTIONS))

    @property
    def image_side(self) -> int:
        """Shortest side of all images, pixels."""
        return min(min(self.info.features[name].image_sizes[0]) for name in self.cameras)


@dataclass(frozen=True, kw_only=True)
class _Backbone:
    """What encodes images and instruction."""

    # lines of the YAML section
    lines: list[str]
    # the pipeline's lines: tokenizer, length
    data_lines: list[str]
    # shorter side of stored images, pixels
    image_side: int
    # width, layers and heads of the action head
    head: tuple[int, int, int]
    learning_rate: float
    # samples in a microbatch
    per_gpu: int


def main(argv: list[str]) -> None:
    """Run `vla-foundry new-policy`.

    Raises:
        ValueError: an argument is wrong, or the dataset cannot be read.
        FileNotFoundError: the dataset does not exist.
    """
    params = parse_command(NewPolicyParams, argv, prog="vla-foundry new-policy")
    sys.stdout.write(create_policy_config(params))


def create_policy_config(params: NewPolicyParams) -> str:
    """Write `preprocess.yaml`, `train.yaml` and, for the small backbone, a tokenizer to `params.output`.

    Returns:
        What to run next.

    Raises:
        ValueError: the output exists, or the dataset or backbone is not what it should be.
    """
    output = check_output(params.output)
    recorded = _read(params.dataset)
    backbone = _choose_backbone(params, recorded)
    with create_aside(output) as folder:
        if params.backbone == "small":
            _train_tokenizer(recorded, folder)
        (folder / PREPROCESS_NAME).write_text(_format_preprocess(params, recorded, backbone), encoding="utf-8")
        (folder / TRAIN_NAME).write_text(_format_train(params, recorded, backbone), encoding="utf-8")
    return _describe(params, recorded)


def _read(dataset: str) -> _Recorded:
    info = read_info(dataset.rstrip("/"))
    depth = [name for name in info.cameras if info.features[name].is_depth_video]
    numbers = [name for name in info.signals if info.features[name].dtype != "bool"]
    actions = [name for name in numbers if default_role(name) == "action"]
    observed = [name for name in numbers if name not in actions and name.startswith("observation")]
    # other features often repeat it, or hold what a robot cannot measure
    observations = [name for name in observed if name == "observation.state"] or observed
    episodes = list_episodes(info)
    if not actions:
        known = ", ".join(info.signals) or "no numbers"
        raise ValueError(f"{dataset} has no feature named action...: it has {known}. A policy needs actions to learn.")
    if not episodes:
        raise ValueError(f"{dataset} has no episodes.")
    cameras = [name for name in info.cameras if name not in depth]
    if not cameras:
        raise ValueError(f"{dataset} has no colour camera. A policy needs images.")
    return _Recorded(info=info, episodes=episodes, cameras=cameras, observations=observations, actions=actions)


def _choose_backbone(params: NewPolicyParams, recorded: _Recorded) -> _Backbone:
    name = params.backbone
    if name == "small":
        side = min(_SMALL_SIDE, max(1, recorded.image_side // _CELL) * _CELL)
        return _Backbone(
            lines=_SMALL.format(side=side, num_tokens=(side // _CELL) ** 2).splitlines(),
            data_lines=[
                "# byte-level, trained on the dataset's instructions; it can encode any other text too",
                f"tokenizer: {_quote(join_uri(params.output, _TOKENIZER))}",
                'prompts: ["<image>{instruction}"]',
                "# images are padded to a square, so that nothing is cut off",
                "image_resizing_method: resize_fit",
                "# images, instruction and the observation token have room in the model's 512",
                "seq_len: 384",
            ],
            image_side=side,
            head=(256, 6, 8),
            learning_rate=5e-4,
            per_gpu=_BATCH,
        )
    if name.startswith("hf:") and not name.startswith("hf://"):
        return _choose_published(name.removeprefix("hf:"))
    model = read_model_config(name)
    kind = model.get("type")
    if kind != "vlm":
        found = f"is a run of type {kind}" if kind else "is not a run"
        raise ValueError(
            f"backbone {name} {found}. Give small, hf:NAME_OR_FOLDER of a Hugging Face model, or a run of type vlm; a "
            "policy is trained further with vla-foundry train --config_path RUN/config.yaml."
        )
    return _Backbone(
        lines=[
            "type: vlm_foundry_backbone",
            "# weights, architecture, processor and prompts come from this run",
            f"resume_from_checkpoint: {_quote(name)}",
            "num_vlm_layers_to_use: 4",
        ],
        # the observation token takes one
        data_lines=[f"seq_len: {int((model.get('transformer') or {}).get('max_seq_len') or 513) - 1}"],
        image_side=256,
        head=(256, 6, 8),
        learning_rate=3e-4,
        per_gpu=16,
    )


def _choose_published(name: str) -> _Backbone:
    place = find_published(name, fetch=True)
    config = {} if place is None else read_object(join_uri(place, "config.json"))
    kind = str(config.get("model_type"))
    if kind == "clip":
        lines = ["type: clip_backbone", f"hf_pretrained: {_quote(name)}"]
        data_lines = ["# the text encoder takes no more", "max_text_seq_len: 77", "seq_len: 512"]
        return _Backbone(
            lines=lines, data_lines=data_lines, image_side=256, head=(512, 8, 8), learning_rate=1e-4, per_gpu=32
        )
    if "vision_config" not in config:
        raise ValueError(
            f"backbone hf:{name} is of model_type '{kind}', which is not an image-text model. Give one with a "
            "vision_config (Qwen3-VL, PaliGemma, SmolVLM2, ...) or a CLIP."
        )
    lines = [
        "type: vlm_backbone",
        f"hf_pretrained: {_quote(name)}",
        "# the head reads these last layers at a token after the instruction",
        "num_vlm_layers_to_use: 4",
        "# true: its weights stay as they are; less memory, and less success",
        "freeze: false",
    ]
    return _Backbone(
        lines=lines,
        data_lines=["# images and instruction; `vla-foundry data inspect --config_path` counts them", "seq_len: 2048"],
        image_side=384,
        head=(512, 8, 8),
        learning_rate=1e-4,
        per_gpu=8,
    )


def _train_tokenizer(recorded: _Recorded, folder: Path) -> None:
    """Train a tokenizer on the instructions, and keep these beside it."""
    tasks = sorted({task for entry in recorded.episodes for task in entry.tasks}) or ["act"]
    source = folder / "instructions.jsonl"
    source.write_text("".join(f"{json.dumps({'text': task})}\n" for task in tasks), encoding="utf-8")
    train_tokenizer(TrainTokenizerParams(source=[str(source)], output=str(folder / _TOKENIZER), vocab_size=512))


def _format_preprocess(params: NewPolicyParams, recorded: _Recorded, backbone: _Backbone) -> str:
    sizes = {recorded.info.features[name].image_sizes[0] for name in recorded.cameras}
    lines = [
        f"# The recordings of {params.dataset} to shards. `vla-foundry preprocess robotics --help lerobot`",
        "# says what else can be set: units, rotations and grippers of single columns (--field_map), another rate, ...",
        "type: lerobot",
        f"source_episodes: [{_quote(params.dataset)}]",
        f"output_dir: {_quote(join_uri(params.output, _SHARDS))}",
        f"camera_names: {_quote(recorded.cameras)}",
        "# what the robot measures",
        f"observation_keys: {_quote(recorded.observations)}",
        *(f"#   {_name_columns(recorded, name)}" for name in recorded.observations),
        "# what it is commanded",
        f"action_keys: {_quote(recorded.actions)}",
        *(f"#   {_name_columns(recorded, name)}" for name in recorded.actions),
        "# statistics are of this window; training may choose another, and then computes its own",
        "image_indices: [0]",
        "past_lowdim_steps: 0",
        f"future_lowdim_steps: {recorded.chunk - 1}",
        "# the last actions of an episode are learned too, without what follows them",
        "max_padding_left: 0",
        f"max_padding_right: {recorded.chunk - 1}",
    ]
    width, height = _stored_size(sizes, backbone.image_side)
    if width:
        lines += [
            f"# [width, height]: the shorter side has {backbone.image_side} pixels, nothing is cut off",
            f"resize_images_size: [{width}, {height}]",
            "image_resizing_method: resize_no_crop",
        ]
    else:
        lines += [
            "# images stay as recorded: the cameras have different shapes, or are small",
            "resize_images_size: null",
        ]
    if recorded.has_validation:
        lines += ["# share of the episodes that are held out", "validation_fraction: 0.1"]
    return "\n".join(lines) + "\n"


def _stored_size(sizes: set[tuple[int, int]], side: int) -> tuple[int, int]:
    """Return (W, H) to which all images of these sizes can be resized without distortion; (0, 0): none, or larger."""
    if len({round(width / height, 2) for width, height in sizes}) != 1:
        return 0, 0
    width, height = min(sizes)
    scale = side / min(width, height)
    return (0, 0) if scale >= 1 else (round(width * scale), round(height * scale))


def _format_train(params: NewPolicyParams, recorded: _Recorded, backbone: _Backbone) -> str:
    shards = join_uri(params.output, _SHARDS)
    train = join_uri(shards, "train") if recorded.has_validation else shards
    width, layers, heads = backbone.head
    samples = max(1, math.ceil(recorded.num_frames * _EPOCHS / _BATCH)) * _BATCH
    seconds = recorded.chunk / recorded.info.fps
    validation = (
        [f"val_dataset_manifest: [{_quote(join_uri(shards, 'validation/manifest.jsonl'))}]"]
        if recorded.has_validation
        else []
    )
    data = [
        f"dataset_manifest: [{_quote(join_uri(train, 'manifest.jsonl'))}]",
        *validation,
        f"action_fields: {_quote(recorded.actions)}",
        f"proprioception_fields: {_quote(recorded.observations)}",
        "# in the order in which the model sees them",
        f"camera_names: {_quote(recorded.cameras)}",
        "# frames before the present one: [-5, 0] shows the one of 5 steps ago too",
        "image_indices: [0]",
        "lowdim_past_timesteps: 0",
        f"# a chunk of {recorded.chunk} actions, {seconds:.2g} s at {recorded.info.fps:g} frames a second",
        f"lowdim_future_timesteps: {recorded.chunk - 1}",
        *backbone.data_lines,
        "# how numbers are scaled: most of their range to [-1, 1]; outliers are clipped at twice that",
        "normalization:",
        "  method: percentile_1_99",
        "  centered_norm: true",
        "  clip: 2.0",
        "  # a range smaller than this counts as constant; in the fields' own unit",
        "  epsilon: 0.000001",
        "# colours vary from day to day, and cameras are never quite where they were",
        "augmentation:",
        "  image:",
        "    color_jitter: {enabled: true}",
        "    random_resized_crop: {enabled: true, scale: [0.85, 1.0], ratio: [0.95, 1.05]}",
        "allow_multiple_epochs: true",
    ]
    num_validation = min(recorded.num_held_out, _MOST_VALIDATION_SAMPLES)
    budget = f"total_val_samples: {num_validation}\n" if recorded.has_validation else ""
    return _TRAIN.format(
        dataset=params.dataset,
        backbone="\n".join(f"    {line}" for line in backbone.lines),
        data="\n".join(f"  {line}" for line in data),
        width=width,
        layers=layers,
        heads=heads,
        batch=_BATCH,
        per_gpu=backbone.per_gpu,
        lr=backbone.learning_rate,
        frames=recorded.num_frames,
        episodes=len(recorded.episodes),
        epochs=_EPOCHS,
        samples=samples,
        budget=budget,
        save_path=_quote(join_uri(params.output, _RUNS)),
        name=_RUN,
    )


def _describe(params: NewPolicyParams, recorded: _Recorded) -> str:
    tasks = {task for entry in recorded.episodes for task in entry.tasks}
    cameras = ", ".join(recorded.cameras)
    return (
        f"{params.dataset}: {len(recorded.episodes)} episodes, {recorded.num_frames:,} frames at "
        f"{recorded.info.fps:g} a second, {len(tasks)} instructions; cameras {cameras}\n"
        f"written: {params.output}/{PREPROCESS_NAME} and {TRAIN_NAME}; every line is yours to change\n\n"
        f"  vla-foundry preprocess robotics --config_path {params.output}/{PREPROCESS_NAME}\n"
        f"  vla-foundry train --config_path {params.output}/{TRAIN_NAME}\n"
        f"  vla-foundry serve --checkpoint {params.output}/{_RUNS}/{_RUN}\n\n"
        "Before training, look for faults in the data:\n"
        f"  vla-foundry doctor --config_path {params.output}/{TRAIN_NAME}\n"
    )


def _name_columns(recorded: _Recorded, feature: str) -> str:
    names = recorded.info.features[feature].names
    width = recorded.info.features[feature].width
    listed = ", ".join(names[:_NAMED_COLUMNS]) + (", ..." if len(names) > _NAMED_COLUMNS else "")
    return f"{feature}: {width} numbers" + (f" ({listed})" if listed else "")


def _quote(value: object) -> str:
    """Write a text or a list of texts as YAML, which JSON is."""
    return json.dumps(value, ensure_ascii=False)


_SMALL = """type: vlm_foundry_backbone
# the head reads these last layers at a token after the instruction
num_vlm_layers_to_use: 2
vlm:
  # {num_tokens} tokens an image: a convolutional stem, then 2 x 2 of its cells in a token
  vit:
    type: vit
    img_size: {side}
    patch_size: 16
    stem: conv
    projector_pixel_shuffle_factor: 2
    hidden_dim: 256
    inter_dim: 1024
    n_layers: 4
    n_heads: 4
  transformer:
    type: transformer
    norm_type: rms_norm
    hidden_dim: 256
    n_layers: 4
    n_heads: 4
    weight_tying: true
    max_seq_len: 512"""

_TRAIN = """# A policy on {dataset}. `vla-foundry train --help SECTION` explains every key; all can be given on the
# command line too: --hparams.lr 0.0003.
model:
  type: diffusion_policy
  vision_language_backbone:
{backbone}
  # flow matching: noise becomes a chunk of actions in num_inference_steps steps
  action_head:
    type: flow_transformer
    time_conditioning: adaln_zero
    # draws of noise and time per sample: images are encoded once for all
    num_action_head_repeats: 4
    noise:
      type: flow
      num_inference_steps: 10
    transformer:
      type: transformer
      norm_type: rms_norm
      is_causal: false
      hidden_dim: {width}
      n_layers: {layers}
      n_heads: {heads}
      vocab_size: 0
      max_seq_len: 128
data:
  type: robotics
{data}
hparams:
  optimizer: adamw
  # samples per update, on all processes together; and at a time on each of them: halve it when memory runs out, which
  # changes no result
  global_batch_size: {batch}
  per_gpu_batch_size: {per_gpu}
  lr: {lr}
  lr_scheduler: cosine
  warmup: 0.05
  wd: 0.01
  grad_clip_norm: 1.0
  precision: amp_bfloat16
# an average of the weights, which acts better than the last ones
ema:
  enabled: true
# {episodes} episodes, {frames:,} frames: each is seen about {epochs} times
total_train_samples: {samples}
{budget}num_checkpoints: 5
log_every_n_steps: 25
wandb: false
save_path: {save_path}
name: {name}
"""
