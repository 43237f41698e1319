"""What is imported is whole, or refused with one line and leaves nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vla_foundry.cli import main as run_cli
from vla_foundry.importing.command import import_checkpoint
from vla_foundry.inference.loading import load_run_model
from vla_foundry.params import ModelParams, load_params_from_yaml
from vla_foundry.params.commands.runs import ImportParams
from vla_foundry.run_folder import find_checkpoint
from vla_foundry.storage.uri import upload


def load(run: Path, *, use_ema: bool | None = None) -> Any:
    params = load_params_from_yaml(ModelParams, str(run / "config_model.yaml"))
    return load_run_model(params, str(run), str(run), use_ema, torch.device("cpu"))


@torch.no_grad()
def test_a_hugging_face_model_keeps_its_architecture(save_source: Callable[..., None], tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    published = LlamaForCausalLM(LlamaConfig(vocab_size=20, **tiny)).eval()
    published.config.save_pretrained(tmp_path / "published")
    config = {"type": "transformer_hf", "hf_pretrained": str(tmp_path / "published")}
    state = {f"model.{name}": value.bfloat16() for name, value in published.state_dict().items()}
    save_source(tmp_path / "source", config, state)
    import_checkpoint(ImportParams(source=str(tmp_path / "source"), output=str(tmp_path / "run")))
    (tmp_path / "published" / "config.json").unlink()
    published.load_state_dict({name.removeprefix("model."): value.float() for name, value in state.items()})
    ids = torch.arange(10)[None]
    logits = load(tmp_path / "run")(input_ids=ids).logits
    torch.testing.assert_close(logits, published(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_average_the_step_and_names_of_wrappers_are_taken_over(
    language_source: Path, change_checkpoint: Callable[..., None], tmp_path: Path
) -> None:
    source = language_source
    weights = source / "checkpoints" / "checkpoint_1.pt"
    for name in ("checkpoint_2.pt", "checkpoint_10.pt", "ema_10.pt"):
        (source / "checkpoints" / name).write_bytes(weights.read_bytes())

    def wrap(content: dict[str, Any]) -> None:
        content["global_step"] = 500
        state = content["state_dict"]
        content["state_dict"] = {f"module._orig_mod.{name}": value for name, value in state.items()}
        for name in [name for name in content["state_dict"] if name.endswith("inv_freq")]:
            content["state_dict"][name] = content["state_dict"][name].bfloat16()

    def average(content: dict[str, Any]) -> None:
        state = {name: value * 0 for name, value in content.pop("state_dict").items()}
        content["ema_state_dict"] = state

    change_checkpoint(source, wrap, "checkpoint_10.pt")
    change_checkpoint(source, average, "ema_10.pt")
    run = tmp_path / "run"
    lines = import_checkpoint(ImportParams(source=str(source), output=str(run)))
    step_folder = find_checkpoint(run)
    assert step_folder.name == "step_00000500"
    params: Any = load_params_from_yaml(ModelParams, str(run / "config_model.yaml"))
    # bf16 tables say that training rounded the frequencies
    assert params.rope_bf16_frequencies
    assert "parity: model.rope_bf16_frequencies is true (trained in bf16)" in lines
    ids = torch.arange(8)[None]
    assert load(run, use_ema=False)(input_ids=ids).logits.any()
    assert not load(run)(input_ids=ids).logits.any()
    older = tmp_path / "older"
    import_checkpoint(ImportParams(source=str(source), output=str(older), checkpoint=2))
    assert find_checkpoint(older).name == "step_00000007"
    assert (
        json.loads((older / "experiment.json").read_text(encoding="utf-8"))["imported"]["checkpoint"]
        == "checkpoint_2.pt"
    )


def add_weight(content: dict[str, Any]) -> None:
    content["state_dict"]["layers.7.gate"] = torch.zeros(2)


def remove_weight(content: dict[str, Any]) -> None:
    del content["state_dict"]["norm.weight"]


def drop_state(content: dict[str, Any]) -> None:
    del content["state_dict"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_weight, r"does not fit the model: unexpected: layers\.7\.gate"),
        (remove_weight, r"does not fit the model: missing: norm\.weight"),
        (drop_state, "is not a checkpoint of the earlier implementation: it has no state_dict"),
    ],
)
def test_weights_that_are_not_understood_leave_nothing(
    change: Callable[[dict[str, Any]], None],
    message: str,
    language_source: Path,
    change_checkpoint: Callable[..., None],
    tmp_path: Path,
) -> None:
    source = language_source
    change_checkpoint(source, change)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(ImportParams(source=str(source), output=str(tmp_path / "runs" / "run")))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".run.lock"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("language_source", "num_experts: 8", r"config_model\.yaml: model\.num_experts is unknown for model\.type"),
        ("policy_source", "guidance: 2.0", r"config_model\.yaml: model\.guidance is unknown for model\.type"),
        ("language_source", "n_heads: [", r"config_model\.yaml:\d: not valid YAML"),
    ],
)
def test_a_config_that_is_not_understood_leaves_nothing(
    name: str, text: str, message: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source: Path = request.getfixturevalue(name)
    (source / "config.yaml").unlink(missing_ok=True)
    with (source / "config_model.yaml").open("a") as file:
        file.write(f"{text}\n")
    with pytest.raises(ValueError, match=message):
        import_checkpoint(ImportParams(source=str(source), output=str(tmp_path / "run")))
    assert {path.name for path in tmp_path.glob("*run*")} <= {".run.lock"}


def test_what_is_there_is_kept_and_what_is_not_is_named(policy_source: Path, tmp_path: Path) -> None:
    source = policy_source
    (source / "../vlm/config_model.yaml").unlink()
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=r"output .*run exists\. Choose another name, or delete it"):
        import_checkpoint(ImportParams(source=str(source), output=str(tmp_path / "run")))
    params = ImportParams(source=str(source), output=str(tmp_path / "new"))
    with pytest.raises(FileNotFoundError, match=r"is in none of .*Say where it is with --vlm_source FOLDER"):
        import_checkpoint(params)
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint_7\.pt\. There are 1 \(--checkpoint\)"):
        import_checkpoint(ImportParams(source=str(source), output=str(tmp_path / "new"), checkpoint=7))
    with pytest.raises(FileNotFoundError, match="is not a run of the earlier implementation: it has neither"):
        import_checkpoint(ImportParams(source=str(tmp_path / "nowhere"), output=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


def test_the_command_ends_with_one_line(
    language_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["import-checkpoint", "--source", str(language_source), "--output", str(tmp_path / "run")]
    run_cli(words)
    assert capsys.readouterr().out.splitlines()[-1] == f"Run folder {tmp_path / 'run'}"
    with pytest.raises(SystemExit) as stopped:
        run_cli(words)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_source_may_be_remote(language_source: Path, s3_bucket: str, tmp_path: Path) -> None:
    for path in language_source.rglob("*.*"):
        upload(str(path), f"{s3_bucket}/llm/{path.relative_to(language_source)}")
    for name, source in (("near", str(language_source)), ("far", f"{s3_bucket}/llm")):
        import_checkpoint(ImportParams(source=source, output=str(tmp_path / name)))
    near, far = (find_checkpoint(tmp_path / name) for name in ("near", "far"))
    assert (near / "model.safetensors").read_bytes() == (far / "model.safetensors").read_bytes()
