"""Which checkpoint of a run folder is taken, and what is said of the damaged ones."""

import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import pytest

from vla_foundry.run_folder import (
    COMPLETE_NAME,
    MODEL_WEIGHTS_NAME,
    find_checkpoint,
    find_fault,
    list_step_folders,
    lock_folder,
    read_step,
    run_folder_candidates,
    step_folder_name,
)


def write_step(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / step_folder_name(step)
    (folder / "training_state").mkdir(parents=True)
    contents = {MODEL_WEIGHTS_NAME: b"weights %d" % step, "training_state/shard.safetensors": b"moments %d" % step}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    complete = {name: [len(content), hashlib.sha256(content).hexdigest()] for name, content in contents.items()}
    (folder / COMPLETE_NAME).write_text(json.dumps(complete), encoding="utf-8")
    return folder


def test_the_newest_complete_checkpoint_of_a_run_is_found(tmp_path: Path) -> None:
    folders = [write_step(tmp_path, step) for step in (9, 10, 100_000_000)]
    assert find_checkpoint(tmp_path) == folders[2]
    assert find_checkpoint(tmp_path / "checkpoints") == folders[2]
    assert find_checkpoint(str(folders[0])) == folders[0]
    assert [read_step(folder) for folder in list_step_folders(tmp_path)] == [100_000_000, 10, 9]


@pytest.mark.parametrize(
    ("name", "damage", "fault"),
    [
        (MODEL_WEIGHTS_NAME, lambda file: file.write_bytes(b"w"), "has 1 bytes, not the 9"),
        (MODEL_WEIGHTS_NAME, lambda file: file.write_bytes(b"weightz 9"), "SHA-256"),
        (MODEL_WEIGHTS_NAME, lambda file: file.unlink(), "is missing"),
        (COMPLETE_NAME, lambda file: file.unlink(), "never finished"),
        (COMPLETE_NAME, lambda file: file.write_text("[]", encoding="utf-8"), "COMPLETE holds no JSON object"),
        (COMPLETE_NAME, lambda file: file.write_text('{"model', encoding="utf-8"), "COMPLETE is not JSON"),
        (COMPLETE_NAME, lambda file: file.write_text('{"x": [Infinity, "a"]}', encoding="utf-8"), "'x' must be"),
        (COMPLETE_NAME, lambda file: file.write_text('{"x": ["9", "a"]}', encoding="utf-8"), "'x' must be"),
        (COMPLETE_NAME, lambda file: file.write_text('{"x": [' + "1" * 5000 + "]}", encoding="utf-8"), "5,000 digits"),
        (COMPLETE_NAME, lambda file: file.write_text("[" * 10**5, encoding="utf-8"), "more than 100 deep"),
        (COMPLETE_NAME, lambda file: os.truncate(file, 2**40), "at most 536,870,912 are read"),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_skipped(tmp_path: Path, name: str, damage, fault: str) -> None:
    older, newest = write_step(tmp_path, 4), write_step(tmp_path, 9)
    damage(newest / name)
    notices: list[str] = []
    assert find_checkpoint(tmp_path, notify=notices.append) == older
    assert len(notices) == 1
    assert fault in notices[0]
    assert str(newest / name) in notices[0]
    assert fault in (find_fault(newest) or "")
    with pytest.raises(ValueError, match=fault):
        find_checkpoint(newest)
    damage(older / name)
    with pytest.raises(ValueError, match=f"no usable checkpoint.*step_00000009.*{fault}"):
        find_checkpoint(tmp_path)


def test_only_the_files_that_are_asked_for_need_be_right(tmp_path: Path) -> None:
    folder = write_step(tmp_path, 3)
    (folder / "training_state/shard.safetensors").write_bytes(b"MOMENTS 3")
    assert find_checkpoint(tmp_path, only=[MODEL_WEIGHTS_NAME]) == folder
    assert find_fault(folder, only=[MODEL_WEIGHTS_NAME]) is None
    with pytest.raises(ValueError, match=r"training_state/shard\.safetensors"):
        find_checkpoint(tmp_path)


def test_a_folder_without_checkpoints_is_said_to_have_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".writing_step_00000001").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no step folders"):
        find_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_checkpoint(tmp_path / "nothing")


@pytest.mark.parametrize("root", ["/runs/a", "s3://bucket/a", "hf://owner/a"])
def test_a_run_is_looked_for_at_a_checkpoint_and_above_it(root: str) -> None:
    for place in (
        "",
        "/",
        "/checkpoints",
        "/checkpoints/step_00000001",
        "/checkpoints/step_00000001/model.safetensors",
    ):
        assert root in run_folder_candidates(root + place)
    assert run_folder_candidates(f"{root}/checkpoints/step_1")[0] == f"{root}/checkpoints/step_1"
    assert run_folder_candidates("s3://bucket") == ["s3://bucket"]


def test_a_run_folder_is_held_by_one_process_and_free_when_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from vla_foundry.run_folder import lock_folder\n"
        "with lock_folder(Path(sys.argv[1]), what='', flag=''): print('held', flush=True); time.sleep(60)"
    )
    run = tmp_path / "runs" / "same"
    owner = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    message = rf"run folder .*same is in use by process {owner.pid} on {re.escape(socket.gethostname())}"
    with pytest.raises(ValueError, match=message), lock_folder(run, what="run folder", flag="--name"):
        pass
    with lock_folder(run.with_name("other"), what="run folder", flag="--name"):
        pass
    owner.kill()
    owner.wait()
    owner.stdout.close()
    with lock_folder(run, what="run folder", flag="--name"):
        assert not run.exists()


def test_a_mounted_folder_is_locked_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with lock_folder(mount, what="output folder", flag="--output"):
        assert [path.name for path in tmp_path.rglob("*.lock")] == [".mount.lock"]
        assert (mount / ".mount.lock").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_on_a_file_system_without_locks_only_this_machine_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    local = tmp_path / "tmp"
    local.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(local))
    flock = fcntl.flock

    def refuse(file: TextIO, operation: int) -> None:
        if not file.name.startswith(str(local)):
            raise OSError(number, os.strerror(number))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):  # the second after the first has ended
        with lock_folder(tmp_path / "run", what="run folder", flag="--name"):
            second = lock_folder(tmp_path / "run", what="run folder", flag="--name")
            with pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on"), second:
                pass
    assert [record.message for record in caplog.records] == [
        f"{tmp_path} cannot be locked ({os.strerror(number)}): a second process that uses it is noticed on this "
        "machine only."
    ]
