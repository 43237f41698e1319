"""Adapters (LoRA): small checkpoints that resume exactly, load as whole models do, and merge into plain runs."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from vla_foundry.cli import main as run_cli
from vla_foundry.inference.loading import load_run_model
from vla_foundry.models import create_model
from vla_foundry.models.layers import LoRALinear, merge_adapters
from vla_foundry.models.weights import describe_base, load_model_checkpoint
from vla_foundry.params import ModelParams, load_params_from_yaml
from vla_foundry.params.distributed import DistributedParams
from vla_foundry.params.ema import EMAParams
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.params.models.roles import LoRAParams
from vla_foundry.params.models.transformer import TransformerHFParams
from vla_foundry.run_folder import EMA_WEIGHTS_NAME, MODEL_WEIGHTS_NAME, list_step_folders
from vla_foundry.training.experiment import train
from vla_foundry.world import World

LORA = LoRAParams(targets=["layers.*.attention.*"], train=["norm.weight"], rank=2, alpha=8.0, dropout=0.2)
IDS = torch.arange(30)[None]


@pytest.fixture(scope="module")
def base(
    create_params: Callable[[str, Path], TrainExperimentParams], tmp_path_factory: pytest.TempPathFactory
) -> TrainExperimentParams:
    """A trained run to adapt."""
    params = create_params("base", tmp_path_factory.mktemp("runs"))
    train(params, World())
    return params


def adapt(base: TrainExperimentParams, name: str, lora: LoRAParams = LORA, **changes: Any) -> TrainExperimentParams:
    start = str(Path(base.save_path) / "base")
    model = replace(base.model, resume_from_checkpoint=start, resume_weights_only=True, lora=lora)
    return replace(base, name=name, model=model, ema=EMAParams(enabled=True, type="vanilla", alpha=0.5), **changes)


@pytest.fixture(scope="module")
def adapted(base: TrainExperimentParams) -> Path:
    """The run folder of adapters of the base."""
    params = adapt(base, "adapted")
    train(params, World())
    return Path(params.save_path) / "adapted"


def read_tensors(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


@torch.no_grad()
def read_logits(run: Path, *, use_ema: bool = False) -> Tensor:
    params = load_params_from_yaml(ModelParams, str(run / "config_model.yaml"))
    model: Any = load_run_model(params, str(run), str(run), use_ema, torch.device("cpu"))
    assert not any(isinstance(part, LoRALinear) for part in model.modules())
    return model(input_ids=IDS).logits


def test_a_checkpoint_holds_adapters_and_what_is_trained_whole(adapted: Path, base: TrainExperimentParams) -> None:
    step_folder = list_step_folders(adapted)[0]
    for file in (MODEL_WEIGHTS_NAME, EMA_WEIGHTS_NAME):
        tensors = read_tensors(step_folder / file)
        names = {name for name in tensors if ".lora_" not in name}
        assert names == {"norm.weight"}
        assert len(tensors) > 8
        assert all(tensor.any() for tensor in tensors.values())
    whole = list_step_folders(Path(base.save_path) / "base")[0] / MODEL_WEIGHTS_NAME
    assert (step_folder / MODEL_WEIGHTS_NAME).stat().st_size < whole.stat().st_size / 5


def test_a_resumed_run_equals_an_unbroken_one_bit_by_bit(adapted: Path, base: TrainExperimentParams) -> None:
    broken = adapted.with_name("broken")
    shutil.copytree(adapted, broken)
    for step_folder in list_step_folders(broken)[:2]:
        shutil.rmtree(step_folder)
    train(adapt(base, "broken", resume="auto"), World())
    for file in (MODEL_WEIGHTS_NAME, EMA_WEIGHTS_NAME):
        straight, resumed = (read_tensors(list_step_folders(run)[0] / file) for run in (adapted, broken))
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())


def test_adapters_of_sharded_weights_start_and_resume_as_those_of_whole_ones(
    adapted: Path, base: TrainExperimentParams
) -> None:
    sharded = adapt(base, "sharded", distributed=DistributedParams(fsdp=True))
    train(sharded, World())
    folder = Path(base.save_path) / "sharded"
    shutil.rmtree(list_step_folders(folder)[0])
    train(replace(sharded, resume="auto"), World())
    for file in (MODEL_WEIGHTS_NAME, EMA_WEIGHTS_NAME):
        whole, own = (read_tensors(list_step_folders(run)[0] / file) for run in (adapted, folder))
        assert whole.keys() == own.keys()
        for name, tensor in whole.items():
            torch.testing.assert_close(own[name], tensor, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_merged_weights_compute_what_the_adapters_do(
    adapted: Path, base: TrainExperimentParams, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = load_params_from_yaml(ModelParams, str(adapted / "config_model.yaml"))
    model: Any = create_model(params).eval()
    before = model(input_ids=IDS).logits
    torch.testing.assert_close(before, read_logits(Path(base.save_path) / "base"), rtol=0, atol=0)
    load_model_checkpoint(model, adapted, base=describe_base(model, params))
    expected = model(input_ids=IDS).logits
    assert (expected - before).abs().max() > 1e-2
    run_cli(["merge", "--checkpoint", str(adapted), "--output", str(tmp_path / "merged")])
    assert capsys.readouterr().out == f"{tmp_path / 'merged' / 'checkpoints' / 'step_00000006'}\n"
    for run in (adapted, tmp_path / "merged"):
        torch.testing.assert_close(read_logits(run), expected, rtol=1e-5, atol=1e-5)
    averages = [read_logits(run, use_ema=True) for run in (adapted, tmp_path / "merged")]
    torch.testing.assert_close(*averages, rtol=1e-6, atol=1e-6)
    assert (averages[0] - expected).abs().max() > 1e-4
    start = replace(base.model, resume_from_checkpoint=str(tmp_path / "merged"), resume_weights_only=True)
    with torch.enable_grad():
        train(replace(base, name="further", model=start), World())


def test_the_start_says_what_share_is_trained(base: TrainExperimentParams, capsys: pytest.CaptureFixture[str]) -> None:
    train(adapt(base, "shown"), World())
    tensors = read_tensors(list_step_folders(Path(base.save_path) / "shown")[0] / MODEL_WEIGHTS_NAME)
    trained = sum(tensor.numel() for tensor in tensors.values())
    whole = sum(weight.numel() for weight in create_model(base.model).parameters()) + trained - 32
    line = f"{whole:,} parameters, {trained:,} of them trained ({trained / whole:.2%})"
    assert line in capsys.readouterr().out


def test_a_base_that_is_gone_or_changed_is_one_line(
    adapted: Path, base: TrainExperimentParams, capsys: pytest.CaptureFixture[str]
) -> None:
    start = Path(base.save_path) / "base"
    words = ["merge", "--checkpoint", str(adapted), "--output", str(adapted.with_name("new"))]
    newest, older = list_step_folders(start)[:2]
    newest.rename(newest.with_name("away"))
    shutil.copytree(older, newest)
    with pytest.raises(SystemExit, match="2"):
        run_cli(words)
    changed = capsys.readouterr().err
    start.rename(start.with_name("moved"))
    with pytest.raises(SystemExit, match="2"):
        run_cli(words)
    gone = capsys.readouterr().err
    start.with_name("moved").rename(start)
    shutil.rmtree(newest)
    newest.with_name("away").rename(newest)
    assert f"those of {newest} have" in changed
    assert "Put back the weights it was trained on" in changed
    assert f"holds adapters (LoRA) of {newest}: " in gone
    assert "does not exist" in gone
    assert [text.count("\n") for text in (changed, gone)] == [1, 1]
    assert not adapted.with_name("new").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"targets": ["*.nothing"]},
            r"model\.lora\.targets: '\*\.nothing' matches no linear layer that can have an adapter\. Names are such",
        ),
        ({"train": ["nothing.*"]}, r"model\.lora\.train: 'nothing\.\*' matches no weight that is not frozen\. Names"),
        ({"targets": ["*attention*", "output"]}, r"model\.lora\.targets: 'output' matches no linear layer that can"),
        ({"train": ["layers.*"]}, r"'layers\.\*\.attention\.\*' matches no linear layer that can"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused_before_anything_is_made(
    base: TrainExperimentParams, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(adapt(base, "refused", replace(LORA, **changes)), World())
    assert not (Path(base.save_path) / "refused").exists()


def test_a_base_of_new_weights_is_refused(base: TrainExperimentParams) -> None:
    model = replace(base.model, lora=LORA)
    with pytest.raises(ValueError, match=r"would freeze new weights, which no checkpoint holds: embeddings\.weight"):
        train(replace(base, name="refused", model=model), World())


def test_adapters_are_no_start_and_whole_weights_no_adapters(adapted: Path, base: TrainExperimentParams) -> None:
    model = replace(base.model, resume_from_checkpoint=str(adapted), resume_weights_only=True)
    with pytest.raises(ValueError, match=r"holds adapters .* Merge them first: vla-foundry merge"):
        train(replace(base, name="refused", model=model), World())
    with pytest.raises(ValueError, match="holds adapters"):
        train(replace(base, name="adapted", resume="auto"), World())
    shutil.copytree(Path(base.save_path) / "base", adapted.with_name("whole"))
    with pytest.raises(ValueError, match="holds all weights, not adapters"):
        train(adapt(base, "whole", resume="auto"), World())


def test_settings_that_contradict_are_named(manifest: Path, base: TrainExperimentParams, capsys) -> None:
    words = ["train", "--model.type", "transformer", "--model.hidden_dim", "32", "--model.n_layers", "2"]
    words += ["--model.n_heads", "2", "--data.type", "text", "--data.dataset_manifest", str(manifest)]
    words += ["--total_train_samples", "512", "--model.lora.rank", "2"]
    words += ["--model.resume_from_checkpoint", f"{base.save_path}/base"]
    targets = ["--model.lora.targets", '["*"]']
    for more, message in [([], "targets is empty"), (targets, "Add --model.resume_weights_only true")]:
        with pytest.raises(SystemExit, match="2"):
            run_cli([*words, *more])
        assert message in capsys.readouterr().err


@torch.no_grad()
def test_layers_of_a_published_model_are_adapted_by_the_same_patterns(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    published = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=2, **sizes)).eval()
    published.save_pretrained(tmp_path)
    lora = replace(LORA, targets=["*.self_attn.q_proj", "*.mlp.*"], train=[])
    model: Any = create_model(TransformerHFParams(hf_pretrained=str(tmp_path), lora=lora)).eval()
    assert sum(isinstance(part, LoRALinear) for part in model.modules()) == 2 * 4
    assert all((".lora_" in name) == weight.requires_grad for name, weight in model.named_parameters())
    torch.testing.assert_close(model(input_ids=IDS).logits, published(IDS).logits, rtol=1e-5, atol=1e-5)
    for part in model.modules():
        if isinstance(part, LoRALinear):
            torch.nn.init.normal_(part.lora_b.weight)
    expected = model(input_ids=IDS).logits
    merge_adapters(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    everywhere = TransformerHFParams(hf_pretrained=str(tmp_path), lora=replace(lora, targets=["*"]))
    assert sum(isinstance(part, LoRALinear) for part in create_model(everywhere).modules()) == 2 * 7
