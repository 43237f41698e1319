"""Where metrics go, and when Weights & Biases is on."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.ema import EMAParams
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.params.hparams import HyperParams
from vla_foundry.params.models.transformer import TransformerParams
from vla_foundry.training.meter import Meter, StepResult, count_tokens, peak_flops
from vla_foundry.training.metrics import (
    WANDB_ID_NAME,
    MetricsFile,
    Terminal,
    create_metric_log,
    format_metrics,
    has_wandb_credentials,
    open_sinks,
    truncate_metrics,
    wants_wandb,
)
from vla_foundry.training.state import create_train_state
from vla_foundry.world import World

BATCH = {"pixel_values": torch.zeros(10, 3, 16, 32, dtype=torch.uint8), "instructions": ["open the drawer", "close it"]}
PARAMS = TrainExperimentParams(name="run", data=TextDataParams(), model=TransformerParams())


def read_lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_metrics_are_json_lines_without_nan(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.write("train", 3, {"loss": float("nan"), "lr": 0.5, "reasons": {"short": 2}})
    file.close()
    assert read_lines(tmp_path) == [{"kind": "train", "step": 3, "loss": None, "lr": 0.5, "reasons": {"short": 2}}]


def test_truncation_drops_later_steps_and_a_line_cut_off(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    for step in range(1, 6):
        file.write("train", step, {"loss": 1.0})
    file.write("validation", 3, {"loss": 2.0})
    file.close()
    with (tmp_path / "metrics.jsonl").open("a") as raw:
        raw.write('{"kind": "train", "st')
    truncate_metrics(tmp_path, 3)
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3, 3]
    truncate_metrics(tmp_path / "nothing", 3)


def test_credentials_are_a_key_or_an_entry_in_netrc(tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    environment = {"NETRC": str(netrc)}
    assert not has_wandb_credentials(environment)
    netrc.write_text("machine other.example login user password x\n", encoding="utf-8")
    assert not has_wandb_credentials(environment)
    assert has_wandb_credentials({**environment, "WANDB_API_KEY": "x"})
    assert has_wandb_credentials({**environment, "WANDB_BASE_URL": "https://other.example"})
    netrc.write_text("machine api.wandb.ai login user password x\n", encoding="utf-8")
    assert has_wandb_credentials(environment)


def test_wandb_is_on_when_told_or_when_its_credentials_are_there(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    nothing = {"NETRC": str(tmp_path / "none")}
    key = {**nothing, "WANDB_API_KEY": "x"}
    assert not wants_wandb(PARAMS, nothing)
    assert wants_wandb(PARAMS, key)
    assert not wants_wandb(PARAMS, {**key, "WANDB_MODE": "disabled"})
    assert not wants_wandb(replace(PARAMS, wandb=False), key)
    assert wants_wandb(replace(PARAMS, wandb=True), {**nothing, "WANDB_MODE": "offline"})
    told = replace(PARAMS, wandb=True)
    with pytest.raises(ValueError, match="Run `wandb login`, set WANDB_API_KEY"):
        wants_wandb(told, nothing)


def test_without_credentials_one_notice_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for wandb, count in ((None, 1), (False, 0)):
        params = replace(PARAMS, wandb=wandb)
        create_metric_log(params, tmp_path, is_main=True, total_steps=5, first_step=0).close()
        assert capsys.readouterr().out.count("wandb login") == count


def test_an_offline_wandb_run_goes_on_under_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logging.getLogger("wandb").setLevel(logging.ERROR)
    monkeypatch.setenv("HOME", str(tmp_path))
    params = replace(PARAMS, wandb=True, save_path=str(tmp_path / "runs"))
    ids = []
    for step in (1, 2):
        log = create_metric_log(params, tmp_path, is_main=True, total_steps=5, first_step=step)
        log.add(open_sinks(params, tmp_path, first_step=step))
        log.write("train", step, {"loss": 1.5})
        log.show(step, BATCH)
        assert wandb.run is not None
        assert wandb.run.summary["train/pictures"]["count"] == 8
        assert wandb.run.summary["train/loss"] == 1.5
        assert wandb.run.settings.host == "host"
        ids.append(wandb.run.id)
        log.close()
    assert ids[0] == ids[1] == (tmp_path / WANDB_ID_NAME).read_text(encoding="utf-8")
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    for file in files:
        assert str(tmp_path).encode() not in file.read_bytes()


def test_tensorboard_files_hold_the_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    params = replace(PARAMS, wandb=False, tensorboard=True)
    log = create_metric_log(params, tmp_path, is_main=True, total_steps=5, first_step=0)
    log.add(open_sinks(params, tmp_path, first_step=0))
    log.write("train", 1, {"loss": 1.5, "reasons": {}})
    log.show(1, BATCH)
    log.show(2, {"pixel_values": torch.zeros(6, 48)})  # patches
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.5)]
    assert [(event.step, event.width, event.height) for event in events.Images("train/pictures")] == [(1, 8 * 32, 16)]


def test_what_is_said_tells_nobody_where_the_users_home_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    log = create_metric_log(PARAMS, tmp_path, is_main=True, total_steps=5, first_step=0)
    log.say(f"Saved {tmp_path}/runs/a")
    log.close()
    assert "Saved ~/runs/a" in capsys.readouterr().out


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = create_metric_log(replace(PARAMS, wandb=True), tmp_path, is_main=False, total_steps=5, first_step=0)
    log.write("train", 1, {"loss": 1.5})
    log.say("something")
    log.advance(2)
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_line_shows_what_matters() -> None:
    line = format_metrics(
        {"loss": 2.5, "lr": 1e-3, "tokens_per_second": 12345.6, "mfu": 0.415, "skipped_steps": 2, "dropped_samples": 0}
    )
    assert line == "loss 2.5000  lr 1.00e-03  tokens/s 12,346  MFU 41.5%  skipped 2"
    assert format_metrics({"loss": None}) == "loss not finite"


def test_lines_without_a_bar_say_how_long_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(total_steps=100, first_step=10)
    # the first step compiles and fills caches; at the end nothing is left
    for step in (11, 60, 100):
        terminal.write("train", step, {"loss": 2.5, "step_seconds": 100.0})
    terminal.write("validation", 60, {"loss": 2.5})
    terminal.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 11/100  loss 2.5000",
        "step 60/100  loss 2.5000  ETA 1:06:40",
        "step 100/100  loss 2.5000",
        "step 60/100  validation loss 2.5000",
    ]


def test_tokens_are_those_that_enter_the_model() -> None:
    assert count_tokens({"input_ids": torch.zeros(3, 9)}) == (24, 8)
    assert count_tokens({"input_ids": torch.zeros(0, 9)}) == (0, 0)
    assert count_tokens({"actions": torch.zeros(3, 9)}) == (0, 0)
    assert peak_flops("cpu") is None


def test_the_wait_for_data_is_a_share_though_ranks_start_at_different_times(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(1, 1)
    hparams, zero = HyperParams(warmup=0.1), torch.zeros(())
    state = create_train_state(model, model, hparams=hparams, ema=EMAParams(), total_steps=10)
    meter = Meter(world=World(world_size=2), flops_per_token=None, uses_bf16=False)
    meter.add_data([], 0.0)
    meter.add_step(StepResult(loss=zero, grad_norm=zero, updated=zero, log_sums={"count": zero}))
    # the other rank has waited for 10 s when this one has only begun
    others = torch.tensor([0, 0, 0, 10, 10, 0, 0, 0], dtype=torch.float64)
    monkeypatch.setattr("vla_foundry.training.meter.all_reduce", lambda values: values + others)
    metrics = meter.read(state)
    assert 0.9 < metrics["data_wait_share"] <= 1
    assert 5 <= metrics["step_seconds"] < 6
