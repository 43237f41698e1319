"""`close` leaves a complete copy of the run folder, and COMPLETE is copied after the files it lists."""

import socket
import threading
from pathlib import Path

import pytest

from vla_foundry.training import remote_sync
from vla_foundry.training.remote_sync import RemoteSync


def test_what_is_written_while_a_copy_runs_is_copied_before_close_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, remote = tmp_path / "run", tmp_path / "remote"
    run.mkdir()
    (run / "first").write_text("1", encoding="utf-8")
    started, may_finish = threading.Event(), threading.Event()
    upload = remote_sync.upload

    def upload_slowly(path: str, target: str) -> None:
        started.set()
        assert may_finish.wait(30)
        upload(path, target)

    monkeypatch.setattr(remote_sync, "upload", upload_slowly)
    sync = RemoteSync(run, str(remote), print)
    sync.request()
    assert started.wait(30)
    # the copy that runs has listed the files already
    (run / "last").write_text("2", encoding="utf-8")
    sync.request()
    closer = threading.Thread(target=sync.close)
    closer.start()
    may_finish.set()
    closer.join(30)
    assert (remote / "run" / "last").read_text(encoding="utf-8") == "2"


def test_complete_is_copied_after_all_files_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    for step in ("step_00000001", "step_00000002"):
        for name in ("COMPLETE", "model.safetensors", "training_state/a.safetensors"):
            path = run / "checkpoints" / step / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name, encoding="utf-8")
    copied: list[str] = []
    monkeypatch.setattr(remote_sync, "upload", lambda path, target: copied.append(target.partition("checkpoints/")[2]))
    sync = RemoteSync(run, str(tmp_path / "remote"), print)
    sync.request()
    sync.close()
    names = ["model.safetensors", "training_state/a.safetensors", "COMPLETE"]
    assert copied == [f"{step}/{name}" for step in ("step_00000001", "step_00000002") for name in names]


def test_a_storage_that_hangs_is_given_up_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}", encoding="utf-8")
    hanging = threading.Event()
    monkeypatch.setattr(remote_sync, "upload", lambda path, target: hanging.wait(60))
    monkeypatch.setattr(remote_sync, "_PATIENCE_SECONDS", 0.2)
    sync = RemoteSync(tmp_path / "run", str(tmp_path / "remote"), print)
    with pytest.raises(
        ValueError, match=r"lacks part of it: metrics\.jsonl could not be copied \(no answer; gave up\)"
    ):
        sync.close()
    hanging.set()


def test_a_storage_that_is_missing_is_not_taken_for_a_deleted_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}", encoding="utf-8")

    def fail(path: str, target: str) -> None:
        raise FileNotFoundError(f"{target} does not exist.")

    monkeypatch.setattr(remote_sync, "upload", fail)
    with (
        pytest.raises(ValueError, match="lacks part of it"),
        RemoteSync(tmp_path / "run", "s3://missing", print) as sync,
    ):
        sync.request()


def test_a_copy_says_neither_whose_home_nor_which_host_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(socket, "gethostname", lambda: "node7.example")
    files = {
        "config.yaml": f"save_path: {tmp_path}\ndata: [{tmp_path}/a, {tmp_path}2/b, /mnt{tmp_path}/c]\n",
        "tokenizer/tokenizer_config.json": f'{{"name_or_path": "{tmp_path}/tok"}}',
        "tensorboard/events.out.tfevents.1.node7.example.2.0": "",
        "wandb/offline-run-1/run.wandb": "node7.example",
        "checkpoints/step_00000001/state.json": "{}",
    }
    for name, text in files.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(text, encoding="utf-8")
    sync = RemoteSync(tmp_path / "run", str(tmp_path / "remote"), print)
    sync.close()
    copied = {
        str(path.relative_to(tmp_path / "remote" / "run")): path.read_text(encoding="utf-8")
        for path in (tmp_path / "remote").rglob("*")
        if path.is_file()
    }
    assert copied == {
        "config.yaml": f"save_path: ~/\ndata: [~/a, {tmp_path}2/b, /mnt{tmp_path}/c]\n",
        "tokenizer/tokenizer_config.json": '{"name_or_path": "~/tok"}',
        "tensorboard/events.out.tfevents.1.host.2.0": "",
        "checkpoints/step_00000001/state.json": "{}",
    }
