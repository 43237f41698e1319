"""Every preset is what it says, resolves, and is found from a source tree and from an installed package."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_foundry.config.command_line import Parsed, parse
from vla_foundry.config.loading import dump_params
from vla_foundry.config.resolve import resolve
from vla_foundry.config.yaml_source import preset_root
from vla_foundry.data.facts import read_facts
from vla_foundry.params import HyperParams, ModelParams, TrainExperimentParams, load_params_from_yaml
from vla_foundry.params.commands.preprocessing_robotics import (
    ActionFieldsParams,
    FieldMapParams,
    RoboticsPreprocessParams,
)
from vla_foundry.params.commands.serving import ClientMapParams
from vla_foundry.params.commands.simulators import EnvironmentMapParams
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.experiment import total_steps
from vla_foundry.params.models.action_heads import ActionHeadParams
from vla_foundry.params.models.transformer import TransformerParams
from vla_foundry.params.models.vit import ViTParams
from vla_foundry.params.models.vlm import VLMParams
from vla_foundry.robotics.accumulator import StatisticsAccumulator
from vla_foundry.robotics.fields import PoseGroup
from vla_foundry.robotics.spec import CameraDescription, DatasetSpec, FieldDescription, format_spec
from vla_foundry.robotics.statistics_format import format_statistics

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted(path.relative_to(preset_root()) for path in preset_root().rglob("*.yaml"))
JOBS = [str(path) for path in PRESETS if path.parts[0] == "training_jobs"]
TOKENIZER = ("--data.tokenizer", "words/tokenizer")
BACKBONE = ("--model.vision_language_backbone.resume_from_checkpoint", "vlm")
# what a job needs besides its data
NEEDS = {
    "training_jobs/vlm_quickstart.yaml": TOKENIZER,
    "training_jobs/vlm_interleaved.yaml": TOKENIZER,
    "training_jobs/vla_quickstart.yaml": (*TOKENIZER, *BACKBONE),
    "training_jobs/vla_quickstart_cotrained.yaml": (
        *BACKBONE,
        *(
            "--data.datasets.robots.tokenizer",
            "words/tokenizer",
            "--data.datasets.captions.tokenizer",
            "words/tokenizer",
        ),
    ),
    "training_jobs/vla_foundry_mt.yaml": (*TOKENIZER, *BACKBONE),
    "training_jobs/vla_foundry_st.yaml": (*TOKENIZER, *BACKBONE),
    "training_jobs/vla_foundry_ft.yaml": (*TOKENIZER, "--model.resume_from_checkpoint", "vlm"),
    "training_jobs/vla_foundry_sim_mt.yaml": (*TOKENIZER, *BACKBONE),
    "training_jobs/vla_foundry_real_mt.yaml": (*TOKENIZER, *BACKBONE),
    "training_jobs/vla_foundry_sim_ft.yaml": (*TOKENIZER, "--model.resume_from_checkpoint", "vlm"),
    "training_jobs/vla_qwen3_ft.yaml": ("--model.resume_from_checkpoint", "vlm"),
    "training_jobs/vlm_foundry_1.3b.yaml": (*TOKENIZER, "--model.transformer.resume_from_checkpoint", "llm"),
}
NEEDS |= {job: (*TOKENIZER, *BACKBONE) for job in JOBS if job.startswith("training_jobs/action_heads/")}
NEEDS["training_jobs/action_heads/fast_tokens.yaml"] += ("--model.action_head.tokenizer", "fast.json")
NEEDS["training_jobs/action_heads/insulated.yaml"] += ("--model.action_tokens.tokenizer", "fast.json")
# the paper's Table 4, and the stages before it: samples, steps, batch, learning rate, schedule, warm-up in steps
TOTALS = {
    "vla_foundry_mt": (102_400_000, 100_000, 1024, 5e-5, "cosine", 1000),
    "vla_foundry_sim_mt": (102_400_000, 100_000, 1024, 5e-5, "cosine", 1000),
    "vla_foundry_real_mt": (102_400_000, 100_000, 1024, 5e-5, "cosine", 1000),
    "vla_foundry_st": (5_120_000, 10_000, 512, 5e-5, "cosine", 1000),
    "vla_foundry_ft": (1_024_000, 2_000, 512, 5e-6, "cosine", 1000),
    "vla_foundry_sim_ft": (1_024_000, 2_000, 512, 5e-6, "cosine", 1000),
    "vla_qwen3_mt": (100_000_000, 97_656, 1024, 5e-5, "cosine", 1000),
    "vla_qwen3_st": (2_000_000, 3_906, 512, 5e-5, "cosine", 1000),
    "vla_qwen3_ft": (1_024_000, 2_000, 512, 5e-6, "cosine", 1000),
    "vlm_foundry_1.3b": (165_000_000, 161_132, 1024, 1e-4, "cosine", 1000),
    "llm_foundry_1.2b": (500_000_000, 488_281, 1024, 3e-4, "warmup_constant_decay", 2000),
}
# folder of presets -> what they are
SECTIONS = {
    "models": ModelParams,
    "action_heads": ActionHeadParams,
    "hparams": HyperParams,
    "field_maps": FieldMapParams,
    "client_maps": ClientMapParams,
    "simulators": EnvironmentMapParams,
    "action_fields": ActionFieldsParams,
}


@pytest.fixture
def manifest(tmp_path: Path) -> str:
    """The manifest of a dataset that is large enough for every job."""
    path = tmp_path / "manifest.jsonl"
    path.write_text(json.dumps({"shard": "shard_000000", "num_sequences": 10**9}) + "\n", encoding="utf-8")
    return str(path)


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of two words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)


def save_vlm(folder: Path) -> None:
    """Save what a run of a vision-language model says of itself."""
    folder.mkdir()
    vit = ViTParams(hidden_dim=32, inter_dim=32, n_layers=1, n_heads=1, patch_size=16, img_size=64)
    transformer = TransformerParams(hidden_dim=32, n_layers=4, vocab_size=64, max_seq_len=2048)
    (folder / "config_model.yaml").write_text(
        dump_params(VLMParams(vit=vit, transformer=transformer)), encoding="utf-8"
    )


def save_spec(folder: Path, data: RoboticsDataParams) -> None:
    """Say that a dataset has the fields that the params ask for, and their statistics."""
    names = {name.removesuffix("_relative") for name in (*data.action_fields, *data.proprioception_fields)}
    poses = [name for name in names if name.endswith("__xyz")]
    spec = DatasetSpec(
        layout="episodes",
        fps=10.0,
        past_lowdim_steps=1,
        future_lowdim_steps=14,
        image_indices=(0,),
        padding_strategy="copy",
        cameras={name: CameraDescription(size=(64, 64), original_size=None) for name in data.camera_names or ["front"]},
        fields={name: FieldDescription(shape=(6 if name.endswith("rot_6d") else 3,)) for name in names},
        pose_groups=tuple(
            PoseGroup(name=name, position_key=name, rotation_key=name.replace("__xyz", "__rot_6d")) for name in poses
        ),
        language_types=("original", "randomized", "verbose", "alternative"),
    )
    (folder / "robotics.json").write_text(format_spec(spec), encoding="utf-8")
    statistics = StatisticsAccumulator(anchor_index=1)
    for name in (*data.action_fields, *data.proprioception_fields):
        width = spec.fields[name.removesuffix("_relative")].width
        statistics.update({name: np.random.default_rng(0).normal(size=(4, 16, width))})
    (folder / "stats.json").write_text(format_statistics(statistics.finish()), encoding="utf-8")


def test_the_presets_there_are() -> None:
    names = {str(path) for path in PRESETS}
    assert {f"models/transformer_{size}.yaml" for size in ("tiny", "11m", "100m", "410m", "1b")} <= names
    assert {"models/foundry_llm_1.2b.yaml", *JOBS} <= names
    assert {f"training_jobs/{name}.yaml" for name in TOTALS} <= names
    assert {path.parts[0] for path in PRESETS} == {*SECTIONS, "training_jobs", "data"}


@pytest.mark.parametrize("name", [str(path) for path in PRESETS if path.parts[0] in SECTIONS])
def test_a_preset_of_a_section_loads_alone(name: str) -> None:
    cls = SECTIONS[Path(name).parts[0]]
    assert isinstance(load_params_from_yaml(cls, f"config_presets/{name}"), cls)


@pytest.mark.parametrize("name", JOBS)
def test_a_training_job_resolves_and_has_its_data_from_the_command_line(
    name: str, manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tokenizer(tmp_path / "words" / "tokenizer")
    save_vlm(tmp_path / "vlm")
    monkeypatch.chdir(tmp_path)
    # the paper's models are made for many GPUs
    world_size = 128 if "1.2b" in name else 64 if "foundry" in name or "qwen" in name else 1
    words = ["--config_path", f"config_presets/{name}", *NEEDS.get(name, ())]
    sections = ("data.datasets.robots", "data.datasets.captions") if "cotrained" in name else ("data",)
    manifests = [
        word
        for section in sections
        for split in ("dataset", "val_dataset")
        for word in (f"--{section}.{split}_manifest", manifest)
    ]
    params = parse(TrainExperimentParams, [*words, *manifests], prog="train").params
    if isinstance(params.data.main(), RoboticsDataParams):
        save_spec(tmp_path, params.data.main())
    resolved = resolve(params, read_facts(params, world_size, offline=True))
    assert resolved.data.num_workers is not None
    if (totals := TOTALS.get(Path(name).stem)) is not None:
        hparams = resolved.hparams
        schedule = (hparams.global_batch_size, hparams.lr, hparams.lr_scheduler, hparams.warmup)
        assert (resolved.total_train_samples, total_steps(resolved), *schedule) == totals
    bare = parse(TrainExperimentParams, words, prog="train").params
    with pytest.raises(ValueError, match=r"data(\.datasets\.robots)?\.dataset_manifest is empty"):
        resolve(bare, read_facts(bare, world_size, offline=True))


# presets that users of the earlier implementation name, besides those in the paper's commands (test_migrations). Left
# out: `sagemaker/launch_training.py`, a launcher that this package does not have yet; the Ray cluster of AWS; the U-Net
# of images; 3,900 lines of LBM's instructions; and training jobs on data of their authors.
EARLIER_MODELS = (
    *("qwen_05b", "vlm_11m", "vlm_100m", "vlm_1b", "vlm_3b", "vlm_3b_gemma2_2b", "smolvlm_load_llm"),
    *("paligemma_load_llm", "vit_tiny", "vit_paligemma", "vit_smolvlm2_256m", "vit_smolvlm2_256m_224"),
    *("diffusion_policy", "vla_diffusion_11m", "vla_diffusion_100m", "vla_diffusion_1b", "vla_diffusion_paligemma2"),
    *("vla_smolvlm_256m", "vla_smolvlm_foundry_backbone"),
)
IN_PRESETS = "include vla_foundry/config_presets"


@pytest.mark.parametrize("name", EARLIER_MODELS)
def test_models_of_the_earlier_implementation_resolve_on_the_command_line(name: str) -> None:
    words = ["--model", f"{IN_PRESETS}/models/{name}.yaml", "--hparams", f"{IN_PRESETS}/hparams/diffusion_policy.yaml"]
    words += ["--data", f"{IN_PRESETS}/data/{'vla_diffusion' if 'vla' in name else 'diffusion_policy'}.yaml"]
    words += ["--data.camera_names", f"{IN_PRESETS}/data/lbm/lbm_data_camera_names_4cameras.yaml"]
    words += ["--data.augmentation.image", f"{IN_PRESETS}/data/lbm/lbm_image_augmentation_params.yaml"]
    parsed = parse(TrainExperimentParams, [*words, "--total_train_samples", "512"], prog="train")
    data: Any = parsed.params.data
    assert not parsed.notices
    assert data.camera_names == ["scene_right_0", "scene_left_0", "wrist_left_plus", "wrist_right_minus"]
    assert (data.lowdim_future_timesteps, data.augmentation.image.crop.shape) == (14, (224, 224))
    assert parsed.params.hparams.lr == 5e-4


def test_robot_data_of_the_earlier_implementation_is_preprocessed_by_its_names() -> None:
    lbm = f"{IN_PRESETS.removeprefix('include ')}/data/lbm"
    words = ["--type", "spartan", "--config_path", f"{lbm}/../robotics_preprocessing_params_1past_14future.yaml"]
    words += ["--source_episodes", "[a]", "--output_dir", "b", "--camera_names"]
    words += [f"include {lbm}/lbm_data_camera_names_6cameras.yaml"]
    words += ["--data_discard_keys", f"include {lbm}/lbm_data_discard_key.yaml"]
    words += ["--action_fields_config_path", f"{lbm}/lbm_action_fields.yaml"]
    params: Any = parse(RoboticsPreprocessParams, words, prog="preprocess").params
    assert (len(params.camera_names), len(params.data_discard_keys), params.max_padding_right) == (6, 8, 15)
    fields = load_params_from_yaml(ActionFieldsParams, params.action_fields_config_path)
    assert fields.action_index_fields == [3, 9, 12, 18, 19, 20]


def count_parameters(params: TransformerParams) -> tuple[int, int]:
    """Parameters of a transformer with layer norms and SwiGLU: all, and those without embedding and output head."""
    width = params.hidden_dim
    ffn_width = 256 * -(-(8 * width // 3) // 256)
    block = 4 * width * width + 3 * width * ffn_width + 2 * 2 * width
    inner = params.n_layers * block + 2 * width * (1 + params.post_embed_norm)
    return inner + 2 * params.vocab_size * width, inner


@pytest.mark.parametrize("size", ["tiny", "11m", "100m", "410m", "1b"])
def test_the_sizes_are_those_that_the_preset_states(size: str) -> None:
    path = preset_root() / "models" / f"transformer_{size}.yaml"
    params = load_params_from_yaml(ModelParams, str(path))
    assert isinstance(params, TransformerParams)
    stated = [
        float(number)
        for number in re.findall(r"([\d.]+) M parameters, of which ([\d.]+) M", path.read_text(encoding="utf-8"))[0]
    ]
    for count, number in zip(count_parameters(params), stated, strict=True):
        digits = len(str(number).partition(".")[2])
        assert round(count / 1e6, digits) == number


def test_the_papers_language_model_is_the_papers() -> None:
    params = load_params_from_yaml(ModelParams, "config_presets/models/foundry_llm_1.2b.yaml")
    assert isinstance(params, TransformerParams)
    assert params == TransformerParams(hidden_dim=2048, n_layers=24, n_heads=16, vocab_size=49_280, max_seq_len=2048)
    assert round(count_parameters(params)[1] / 1e6, 1) == 1233.3


def test_an_installed_package_finds_its_own_presets(tmp_path: Path, manifest: str) -> None:
    # the layout of the wheel: the presets are a folder of the package
    site = tmp_path / "site"
    for name in ("config", "data", "params", "storage", "robotics", "text"):
        shutil.copytree(ROOT / "vla_foundry" / name, site / "vla_foundry" / name)
    for path in (ROOT / "vla_foundry").glob("*.py"):
        shutil.copy(path, site / "vla_foundry")
    shutil.copytree(preset_root(), site / "vla_foundry" / "config_presets")
    words = ["train", "--config_path", "training_jobs/llm_tiny.yaml", "--data.dataset_manifest", manifest]
    result = subprocess.run(
        [sys.executable, "-m", "vla_foundry.cli", *words, "--resolve_configs"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"hidden_dim: 64 +# config_presets/models/transformer_tiny\.yaml", result.stdout)


def test_a_config_file_is_found_in_the_working_directory_and_then_among_the_presets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parse_train: Callable[..., Parsed]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("hparams/adamw_wsd.yaml", "config_presets/hparams/adamw_wsd.yaml")
    for name in (*names, f"vla_foundry/{names[1]}"):
        assert parse_train("--hparams", f"include {name}").params.hparams.decay == 0.2
    (tmp_path / "hparams").mkdir()
    (tmp_path / "hparams" / "adamw_wsd.yaml").write_text("decay: 0.7\n", encoding="utf-8")
    assert parse_train("--hparams", f"include {names[0]}").params.hparams.decay == 0.7
