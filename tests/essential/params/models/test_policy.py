"""A policy's params follow from the run that its backbone starts from and from its data, and have the paper's sizes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vla_foundry.config.command_line import parse
from vla_foundry.config.help import format_help
from vla_foundry.config.loading import dump_params
from vla_foundry.config.resolve import resolve_known
from vla_foundry.data.facts import read_facts
from vla_foundry.models import create_model
from vla_foundry.params import ModelParams, TrainExperimentParams, load_params_from_yaml
from vla_foundry.params.facts import Facts
from vla_foundry.params.models.action_heads import (
    ActionHeadParams,
    DDPMTransformerParams,
    FlowTransformerParams,
    RegressionParams,
)
from vla_foundry.params.models.backbones import ViTBackboneParams, VLMFoundryBackboneParams
from vla_foundry.params.models.policy import (
    DiffusionPolicyParams,
    RegressionPolicyParams,
    with_model_files,
    without_starts,
)
from vla_foundry.params.models.roles import TokenLimits
from vla_foundry.params.models.transformer import TransformerParams
from vla_foundry.params.models.vit import ViTHFParams, ViTParams
from vla_foundry.params.models.vlm import VLMParams
from vla_foundry.robotics.spec import CameraDescription, DatasetSpec, FieldDescription, format_spec

VLM = VLMParams(
    vit=ViTParams(hidden_dim=32, inter_dim=48, n_layers=1, n_heads=2, patch_size=8, img_size=64),
    transformer=TransformerParams(hidden_dim=32, n_layers=2, vocab_size=64, max_seq_len=128),
    image_token_id=63,
    vocab_size=64,
)
SPEC = DatasetSpec(
    layout="episodes",
    fps=10.0,
    past_lowdim_steps=1,
    future_lowdim_steps=4,
    image_indices=(0,),
    padding_strategy="copy",
    cameras={"front": CameraDescription(size=(64, 64), original_size=(64, 64))},
    fields={"a": FieldDescription(shape=(3,), role="action")},
    language_types=("original",),
)
BACKBONE = "--model.vision_language_backbone"


def parse_policy(*words: str) -> TrainExperimentParams:
    words = ("--data.type", "robotics", "--model.type", "diffusion_policy", *words)
    return parse(TrainExperimentParams, list(words), prog="train").params


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of a vision-language model, as far as params look at it."""
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    started = replace(
        VLM,
        vit=replace(VLM.vit, freeze=True),
        transformer=replace(VLM.transformer, resume_from_checkpoint="gone"),
    )
    (tmp_path / "config_model.yaml").write_text(dump_params(started), encoding="utf-8")
    (tmp_path / "checkpoints" / "step_00000001" / "model.safetensors").touch()
    return tmp_path


def test_the_architecture_and_the_images_are_those_of_the_run(run: Path) -> None:
    checkpoint = str(run / "checkpoints" / "step_00000001")
    (run / "manifest.jsonl").write_text('{"shard": "shard_000000", "num_sequences": 1000}\n', encoding="utf-8")
    (run / "robotics.json").write_text(format_spec(SPEC), encoding="utf-8")
    data_words = ["--data.dataset_manifest", str(run / "manifest.jsonl"), "--data.action_fields", "[a]"]
    data_words += ["--data.seq_len", "100", "--data.tokenizer", "words"]
    data_words += ["--data.normalization.enabled", "false"]
    budget = ["--total_train_samples", "1000", "--hparams.global_batch_size", "10", "--hparams.warmup", "0.0"]
    budget += ["--hparams.per_gpu_batch_size", "10"]
    layers = [f"{BACKBONE}.num_vlm_layers_to_use", "2"]
    params = parse_policy(f"{BACKBONE}.resume_from_checkpoint", checkpoint, *data_words, *budget, *layers)
    assert isinstance(params.model, DiffusionPolicyParams)
    assert isinstance(params.model.action_head, FlowTransformerParams)
    resolved = resolve_known(params, read_facts(params, 1, offline=True))
    model: Any = resolved.params.model
    assert model.vision_language_backbone.vlm == VLM
    assert resolved.sources["model.vision_language_backbone.vlm"] == f"the config of {checkpoint}"
    # the data, which is resolved between, knows what images the model takes
    data: Any = resolved.params.data
    assert (data.image_size, data.img_num_tokens) == (64, 64)
    assert model.token_limits(Facts()) == TokenLimits(vocab_size=64, max_seq_len=127)
    assert model.action_head.transformer.vocab_size == 0
    assert (model.action_dim, model.proprioception_dim) == (3, 0)


def test_a_saved_model_config_does_not_need_what_the_run_began_from(run: Path) -> None:
    config = str(run / "config_model.yaml")
    (run / "config.yaml").touch()
    encoder = ViTHFParams(hf_pretrained=str(run / "encoder"), resume_from_checkpoint=str(run / "gone"))
    began = replace(VLM, vit=encoder, resume_from_checkpoint=str(run / "gone"), resume_weights_only=True)
    (run / "config_model.yaml").write_text(dump_params(began), encoding="utf-8")
    files = str(run / "model_files" / "vit")
    expected = replace(VLM, vit=ViTHFParams(hf_pretrained=files, hf_load_weights=False))
    assert load_params_from_yaml(ModelParams, config) == expected
    # what still exists is kept
    (run / "encoder").mkdir()
    (run / "encoder" / "config.json").touch()
    started = replace(
        began, resume_from_checkpoint=str(run / "checkpoints"), vit=ViTHFParams(hf_pretrained=str(run / "encoder"))
    )
    (run / "config_model.yaml").write_text(dump_params(started), encoding="utf-8")
    assert load_params_from_yaml(ModelParams, config) == started
    assert without_starts(started) == replace(VLM, vit=started.vit)


def test_more_layers_than_the_language_model_has_is_an_error_of_the_config(run: Path, tmp_path: Path) -> None:
    params = parse_policy(f"{BACKBONE}.resume_from_checkpoint", str(run), "--total_train_samples", "512")
    message = rf"^{BACKBONE[2:]}\.num_vlm_layers_to_use \(4\) is more than the 2 layers of the language model\. Use"
    resolved: Any = params.model.vision_language_backbone.derive(params, read_facts(params, 1))
    native = replace(params.model.vision_language_backbone, vlm=resolved["vlm"].value)
    with pytest.raises(ValueError, match=message):
        native.check(params, Facts(), BACKBONE[2:])
    config = {"text_config": {"num_hidden_layers": 2}, "num_hidden_layers": 30}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    words = (f"{BACKBONE}.type", "vlm_backbone", f"{BACKBONE}.hf_pretrained", str(tmp_path))
    params = parse_policy(*words, "--total_train_samples", "512")
    with pytest.raises(ValueError, match=message):
        params.model.vision_language_backbone.check(params, read_facts(params, 1, offline=True), BACKBONE[2:])


@pytest.mark.parametrize(
    ("words", "tokens"),
    [
        ((), 0),
        (("--data.lowdim_future_timesteps", "20"), 22),
        (("--data.lowdim_future_timesteps", "15", "--model.action_head.time_conditioning", "concat"), 21),
        (("--data.lowdim_future_timesteps", "15", "--model.action_head.type", "regression"), 0),
    ],
)
def test_a_window_longer_than_the_action_head_is_an_error_of_the_config(words: tuple[str, ...], tokens: int) -> None:
    head = "--model.action_head.transformer.max_seq_len"
    steps = ("--data.lowdim_past_timesteps", "1", "--data.lowdim_future_timesteps", "17", "--model.action_dim", "7")
    params = parse_policy(*steps, head, "19", *words, "--model.proprioception_dim", "3")
    if not tokens:
        assert params.model.check(params, Facts(), "model") == []
        return
    with pytest.raises(ValueError, match=rf"^model\.action_head\.\S*max_seq_len \(19\) is less than the {tokens} "):
        params.model.check(params, Facts(), "model")


def test_more_sampling_steps_than_diffusion_steps_are_an_error_of_the_config() -> None:
    noise = parse_policy("--model.action_head.type", "ddpm_transformer").model.action_head.noise
    assert noise.check(None, Facts(), "a") == []
    with pytest.raises(ValueError, match=r"^a\.num_inference_steps \(101\) must be at most a\.num_timesteps \(100\)"):
        replace(noise, num_inference_steps=101).check(None, Facts(), "a")


def test_a_run_of_another_model_is_an_error(run: Path) -> None:
    (run / "config_model.yaml").write_text(dump_params(VLM.transformer), encoding="utf-8")
    params = parse_policy(f"{BACKBONE}.resume_from_checkpoint", str(run), "--total_train_samples", "512")
    with pytest.raises(ValueError, match=r"resume_from_checkpoint \(.*\) is of type transformer, not vlm"):
        resolve_known(params, read_facts(params, 1))
    (run / "config_model.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="lies in no run folder"):
        read_facts(params, 1)


def test_widths_are_those_of_the_data() -> None:
    backbone = ("--model.vision_language_backbone.type", "vit_backbone")
    params = parse_policy(*backbone, "--data.action_dim", "7", "--data.proprioception_dim", "4")
    model: Any = resolve_known_model(params)
    assert (model.action_dim, model.proprioception_dim) == (7, 4)
    assert isinstance(model.vision_language_backbone, ViTBackboneParams)
    assert not model.image_inputs().takes_text
    wrong = parse_policy(*backbone, "--data.action_dim", "7", "--model.action_dim", "6")
    with pytest.raises(ValueError, match=r"model\.action_dim \(6\) must be that of the data \(7\)"):
        wrong.model.check(wrong, Facts(), "model")


def resolve_known_model(params: TrainExperimentParams) -> ModelParams:
    derived = params.model.derive(params, Facts())
    return replace(params.model, **{name: item.value for name, item in derived.items()})


def test_each_head_has_its_own_noise() -> None:
    params = parse_policy(
        "--model.action_head.type", "ddpm_transformer", "--model.action_head.noise.beta_start", "0.01"
    )
    assert isinstance(params.model, DiffusionPolicyParams)
    head = params.model.action_head
    assert isinstance(head, DDPMTransformerParams)
    assert (head.noise.beta_start, head.noise.num_timesteps) == (0.01, 100)
    with pytest.raises(ValueError, match=r"action_head\.noise\.type is 'flow', not 'ddpm'"):
        parse_policy("--model.action_head.type", "ddpm_transformer", "--model.action_head.noise.type", "flow")


def count_millions(parameters: Any) -> float:
    return round(sum(parameter.numel() for parameter in parameters) / 1e6, 1)


def test_the_papers_policy_has_the_papers_size() -> None:
    params = load_params_from_yaml(ModelParams, "config_presets/models/foundry_vla_1.7b.yaml")
    assert isinstance(params, DiffusionPolicyParams)
    assert isinstance(params.vision_language_backbone, VLMFoundryBackboneParams)
    vlm = params.vision_language_backbone.vlm
    assert vlm is not None
    backbone = replace(params.vision_language_backbone, vlm=replace(vlm, image_token_id=49279))
    params = replace(params, action_dim=20, proprioception_dim=20, vision_language_backbone=backbone)
    with torch.device("meta"):
        model: Any = create_model(params, load_pretrained=False)
    assert count_millions(model.action_head.parameters()) == 325.0
    assert count_millions(model.vision_language_backbone.model.parameters()) == 1527.2
    tables = model.vision_language_backbone.model.transformer
    assert count_millions(model.parameters()) == 1852.2
    assert round(1852.2 - count_millions([tables.embeddings.weight, tables.output.weight])) == 1650


def test_the_papers_policy_on_qwen_has_the_papers_size(tmp_path: Path) -> None:
    from transformers import Qwen3VLConfig

    # the sizes of Qwen3-VL-2B
    text: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "head_dim": 128}
    text |= {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": True}
    vision: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "num_heads": 16}
    vision |= {"patch_size": 16, "out_hidden_size": 2048, "spatial_merge_size": 2, "num_position_embeddings": 2304}
    vision |= {"deepstack_visual_indexes": [5, 11, 17]}
    Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True).save_pretrained(tmp_path)
    params = load_params_from_yaml(ModelParams, "config_presets/models/foundry_qwen3vla_2.1b.yaml")
    assert isinstance(params, DiffusionPolicyParams)
    params = replace(with_model_files(params, str(tmp_path)), action_dim=20, proprioception_dim=20)
    with torch.device("meta"):
        model: Any = create_model(params, load_pretrained=False)
    inner = model.vision_language_backbone.model.model
    table = inner.get_input_embeddings().weight
    assert count_millions(model.action_head.parameters()) == pytest.approx(312.5, abs=0.2)
    assert count_millions(inner.base_model.visual.parameters()) == pytest.approx(410, abs=5)
    assert count_millions(inner.base_model.language_model.layers.parameters()) == pytest.approx(1410, abs=5)
    assert count_millions([table]) == pytest.approx(311, abs=1)


OLD_HEAD = """
type: {type}
transformer: {{attn_name: torch_attn, hidden_dim: 32, n_layers: 1, n_heads: 2, vocab_size: 0}}
conditioning: tokens
final_norm: {final_norm}
time_conditioning: {time}
time_encoding: {encoding}
num_action_head_repeats: 1
input_noise_std: 0.0
noise: {noise}
"""
OLD_FLOW = "{type: flow, clamp_range: null, num_timesteps: null, sampling_time_shift: 0.0, solver: heun}"


@pytest.mark.parametrize(
    ("changes", "new_type", "key"),
    [
        ({}, "flow_transformer", None),
        ({"time": "add", "encoding": "table", "noise": "{type: flow, num_timesteps: 9}"}, "legacy", "time_encoding"),
        ({"final_norm": "false"}, "legacy", "final_norm"),
        ({"noise": "{type: flow, clamp_range: [-1.5, 1.5]}"}, "legacy", "noise.clamp_range"),
        ({"noise": "{type: flow, num_timesteps: 9}"}, "legacy", "noise.num_timesteps"),
        ({"noise": "{type: flow, sampling_time_shift: 0.01}"}, "legacy", "noise.sampling_time_shift"),
        ({"type": "ddpm_transformer", "noise": "{type: ddpm, num_timesteps: 9}"}, "ddpm_transformer", None),
        ({"type": "ddpm_transformer", "noise": "{type: ddpm}", "final_norm": "false"}, "legacy", "final_norm"),
    ],
)
def test_heads_of_older_configs_are_legacy_ones_by_what_they_use(
    changes: dict[str, str], new_type: str, key: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"type": "flow_transformer", "final_norm": "true", "time": "adaptive_norm", "encoding": "mlp"}
    values |= {"noise": OLD_FLOW, **changes}
    config = tmp_path / "head.yaml"
    config.write_text(OLD_HEAD.format(**values), encoding="utf-8")
    head: Any = load_params_from_yaml(ActionHeadParams, str(config))
    notes = capsys.readouterr().err
    if key is not None:
        new_type = f"legacy_{values['type']}"
        assert f"'{values['type']}' with {key} is called '{new_type}' now" in notes
    assert head.type == new_type
    assert head.time_conditioning == values["time"].replace("adaptive_norm", "adaln_zero")
    if new_type.startswith("legacy"):
        assert (head.time_encoding, head.final_norm) == (values["encoding"], values["final_norm"] == "true")
    # what is saved now needs no translation
    config.write_text(dump_params(head), encoding="utf-8")
    assert load_params_from_yaml(ActionHeadParams, str(config)) == head
    assert not capsys.readouterr().err


def test_a_diffusion_policy_with_a_regression_head_is_a_regression_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config_model.yaml"
    size = "{hidden_dim: 32, n_layers: 1, n_heads: 2, vocab_size: 0}"
    text = f"vision_language_backbone: {{type: vit_backbone}}\naction_head: {{HEADtransformer: {size}}}\n"
    config.write_text(
        "type: diffusion_policy\n" + text.replace("HEAD", "type: regression, final_norm: true, "), encoding="utf-8"
    )
    params: Any = load_params_from_yaml(ModelParams, str(config))
    assert "'diffusion_policy' with action_head.type is called 'regression_policy' now" in capsys.readouterr().err
    assert isinstance(params, RegressionPolicyParams)
    assert isinstance(params.action_head, RegressionParams)
    # its head needs no type
    config.write_text("type: regression_policy\n" + text.replace("HEAD", ""), encoding="utf-8")
    assert load_params_from_yaml(ModelParams, str(config)) == params
    config.write_text("type: regression_policy\n" + text.replace("HEAD", "type: flow_transformer, "), encoding="utf-8")
    with pytest.raises(ValueError, match=r"action_head\.type is 'flow_transformer', not 'regression'"):
        load_params_from_yaml(ModelParams, str(config))


def test_help_offers_no_legacy_options() -> None:
    pages = [
        format_help(TrainExperimentParams, "train", topic)
        for topic in ("model", "model.action_head", "model.action_head.type", "model.type=diffusion_policy")
    ]
    names = ["legacy", "regression ", "time_encoding", "final_norm", "sampling_time_shift", "rope_bf16", "before_proj"]
    assert [name for name in names for page in pages if name in page] == []
    assert all("flow_transformer" in page for page in pages)
    whole = format_help(TrainExperimentParams, "train", "model.action_head.type=legacy_flow_transformer")
    assert "--model.action_head.time_encoding" in whole
    assert "--model.action_head.noise.sampling_time_shift" in whole
