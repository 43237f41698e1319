"""`vla-foundry new-policy`: write complete, commented configs that train a policy on a LeRobot dataset."""

import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from vla_foundry.config.command_line import describe_error, parse, parse_command
from vla_foundry.data.kept import read_model_config
from vla_foundry.importing.command import check_output, create_aside
from vla_foundry.params.commands.preprocessing import TrainTokenizerParams
from vla_foundry.params.commands.runs import NewPolicyParams
from vla_foundry.params.commands.sharing import PlanParams
from vla_foundry.preprocessing.robotics.converters.field_map import default_role
from vla_foundry.preprocessing.robotics.converters.lerobot_metadata import (
    DatasetInfo,
    EpisodeEntry,
    list_episodes,
    read_info,
)
from vla_foundry.preprocessing.text.tokenizer import train_tokenizer
from vla_foundry.quickstart.doctor import GPU, read_memory
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
# samples of a step; of a microbatch, where memory cannot be predicted
_BATCH, _UNPLANNED = 64, 8
# side of the small backbone's images at most, and of the cells that become a token each, pixels
_SMALL_SIDE, _CELL = 128, 32
# columns of a feature that are named in a comment
_NAMED_COLUMNS = 12


def _quote(value: str | Sequence[str]) -> str:
    """Return a text or texts as YAML, which JSON is; characters that YAML does not take are escaped."""
    readable = json.dumps(value, ensure_ascii=False)
    return readable if readable.isprintable() else json.dumps(value)


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
    def tasks(self) -> list[str]:
        return sorted({task for entry in self.episodes for task in entry.tasks})

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
    # width and layers of the action head
    head: tuple[int, int]
    learning_rate: float


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
        train = folder / TRAIN_NAME
        gpus, gib, what = read_memory()
        # a step's samples are shared out evenly
        ranks = 1 << (min(gpus, _BATCH).bit_length() - 1)
        train.write_text(_format_train(params, recorded, backbone, _BATCH // ranks), encoding="utf-8")
        fit = _fit(train, recorded, ranks, gib, what)
        train.write_text(_format_train(params, recorded, backbone, fit.per_gpu), encoding="utf-8")
    lines = [
        f"{params.dataset}: {len(recorded.episodes)} episodes, {recorded.num_frames:,} frames at {recorded.info.fps:g} "
        f"a second, {len(recorded.tasks)} instructions; cameras {', '.join(recorded.cameras)}",
        f"written: {params.output}/{PREPROCESS_NAME} and {TRAIN_NAME}; every line is yours to change",
        f"microbatches have {fit.per_gpu} sample{'s' * (fit.per_gpu > 1)}{fit.reason}",
    ]
    return "\n".join([*lines, *_list_commands(params.output, ranks, fit.flags)]) + "\n"


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
            lines=_read_template("small_backbone.txt").format(side=side, num_tokens=(side // _CELL) ** 2).splitlines(),
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
            head=(256, 6),
            learning_rate=5e-4,
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
    language = model.get("transformer") or {}
    return _Backbone(
        lines=[
            "type: vlm_foundry_backbone",
            "# weights, architecture, processor and prompts come from this run",
            f"resume_from_checkpoint: {_quote(name)}",
            f"num_vlm_layers_to_use: {min(4, language.get('n_layers') or 4)}",
        ],
        # the observation token takes one
        data_lines=[f"seq_len: {(language.get('max_seq_len') or 513) - 1}"],
        image_side=256,
        head=(256, 6),
        learning_rate=3e-4,
    )


def _choose_published(name: str) -> _Backbone:
    place = find_published(name, fetch=True)
    config = {} if place is None else read_object(join_uri(place, "config.json"))
    kind = str(config.get("model_type"))
    if kind == "clip":
        lines = ["type: clip_backbone", f"hf_pretrained: {_quote(name)}"]
        data_lines = ["# the text encoder takes no more", "max_text_seq_len: 77", "seq_len: 512"]
        return _Backbone(lines=lines, data_lines=data_lines, image_side=256, head=(512, 8), learning_rate=1e-4)
    if "vision_config" not in config:
        raise ValueError(
            f"backbone hf:{name} is of model_type '{kind}', which is not an image-text model. Give one with a "
            "vision_config (Qwen3-VL, PaliGemma, SmolVLM2, ...) or a CLIP."
        )
    layers = min(4, (config.get("text_config") or {}).get("num_hidden_layers") or 4)
    lines = ["type: vlm_backbone", f"hf_pretrained: {_quote(name)}"]
    lines += ["# the head reads these last layers at a token after the instruction", f"num_vlm_layers_to_use: {layers}"]
    return _Backbone(
        lines=lines,
        data_lines=["# images and instruction; `vla-foundry data inspect --config_path` counts them", "seq_len: 2048"],
        image_side=384,
        head=(512, 8),
        learning_rate=1e-4,
    )


def _train_tokenizer(recorded: _Recorded, folder: Path) -> None:
    """Train a tokenizer on the instructions, and keep these beside it."""
    tasks = recorded.tasks or ["act"]
    source = folder / "instructions.jsonl"
    source.write_text("".join(f"{json.dumps({'text': task})}\n" for task in tasks), encoding="utf-8")
    train_tokenizer(TrainTokenizerParams(source=[str(source)], output=str(folder / _TOKENIZER), vocab_size=512))


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """How a run fits into the memory of this machine."""

    per_gpu: int
    # without which no microbatch fits
    flags: tuple[str, ...] = ()
    # words that follow the number of samples
    reason: str


def _fit(train: Path, recorded: _Recorded, ranks: int, gib: float, what: str) -> _Fit:
    """Choose the largest microbatch that fits into a rank's memory, or a small one where that is not known."""
    from vla_foundry.hub.plan import plan, resolve_without_data

    widths = [
        sum(recorded.info.features[name].width for name in names) for names in (recorded.actions, recorded.observations)
    ]
    words = ["--config_path", str(train), "--data.action_dim", str(widths[0])]
    words += ["--data.proprioception_dim", str(widths[1])]
    if (train.parent / _TOKENIZER).exists():
        words += ["--data.tokenizer", str(train.parent / _TOKENIZER)]
    memory, small = f"{gib:.3g} GiB ({what})", min(_UNPLANNED, _BATCH // ranks)
    try:
        resolved = resolve_without_data(parse(PlanParams, words, prog="plan").params)
        found = plan(resolved, gpus=ranks, gpu_memory=gib, headroom=0.1)
        if "uncounted" in found:  # half is left to activations
            found = plan(resolved, gpus=ranks, gpu_memory=gib, headroom=0.5)
    except (ValueError, OSError) as error:  # such as a published model that is not here yet
        return _Fit(per_gpu=small, reason=f", because memory is not predicted: {describe_error(error)}")
    # without a GPU, nothing is gained by sharding or by moving weights to the host
    settings = [one for one in found["settings"] if what == GPU or not any("fsdp" in flag for flag in one["flags"])]
    best = next((one for one in settings if one["largest_per_gpu_batch_size"]), None)
    if best is None:
        held = sum(found["parts"].values()) - found["parts"]["activations"]
        reason = f", and do not fit: without activations a rank needs {held / 2**30:.3g} GiB, and there are {memory}"
        return _Fit(per_gpu=1, reason=f"{reason}. Train on a larger machine, and run new-policy there")
    if "uncounted" in found:
        reason = f", a guess: without activations, which are not counted, a rank needs {best['bytes'] / 2**30:.3g} GiB"
        return _Fit(per_gpu=small, flags=tuple(best["flags"]), reason=f"{reason} of {memory}")
    return _Fit(per_gpu=best["largest_per_gpu_batch_size"], flags=tuple(best["flags"]), reason=f", for {memory}")


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


def _format_train(params: NewPolicyParams, recorded: _Recorded, backbone: _Backbone, per_gpu: int) -> str:
    shards = join_uri(params.output, _SHARDS)
    train = join_uri(shards, "train") if recorded.has_validation else shards
    width, layers = backbone.head
    samples = max(1, math.ceil(recorded.num_frames * _EPOCHS / _BATCH)) * _BATCH
    seconds = recorded.chunk / recorded.info.fps
    held_out = f"val_dataset_manifest: [{_quote(join_uri(shards, 'validation/manifest.jsonl'))}]"
    data = [
        f"dataset_manifest: [{_quote(join_uri(train, 'manifest.jsonl'))}]",
        *([held_out] if recorded.has_validation else []),
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
    return _read_template("policy_template.txt").format(
        dataset=params.dataset,
        backbone="\n".join(f"    {line}" for line in backbone.lines),
        data="\n".join(f"  {line}" for line in data),
        width=width,
        layers=layers,
        batch=_BATCH,
        per_gpu=per_gpu,
        lr=backbone.learning_rate,
        frames=recorded.num_frames,
        episodes=len(recorded.episodes),
        epochs=_EPOCHS,
        samples=samples,
        budget=budget,
        save_path=_quote(join_uri(params.output, _RUNS)),
        name=_RUN,
    )


def _list_commands(output: str, ranks: int, flags: Sequence[str]) -> list[str]:
    start = "vla-foundry train" if ranks == 1 else f"torchrun --standalone --nproc_per_node {ranks} -m vla_foundry.main"
    preprocess, train, run = (
        shlex.quote(join_uri(output, *names)) for names in ((PREPROCESS_NAME,), (TRAIN_NAME,), (_RUNS, _RUN))
    )
    return [
        "",
        f"  vla-foundry preprocess robotics --config_path {preprocess}",
        f"  {' '.join([start, '--config_path', train, *flags])}",
        f"  vla-foundry serve --checkpoint {run}",
        "",
        "Before training, look for faults in the data:",
        f"  vla-foundry doctor --config_path {train}",
    ]


def _read_template(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _name_columns(recorded: _Recorded, feature: str) -> str:
    names = recorded.info.features[feature].names
    width = recorded.info.features[feature].width
    listed = ", ".join(names[:_NAMED_COLUMNS]) + (", ..." if len(names) > _NAMED_COLUMNS else "")
    text = f"{feature}: {width} numbers" + (f" ({listed})" if listed else "")
    # a comment is one line
    return text if text.isprintable() else ascii(text)
