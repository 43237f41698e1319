"""The processes of a run: what a signal to all of them does, and that none outlives the trainer or its launcher."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vla_foundry.run_folder import list_step_folders

Start = Callable[..., subprocess.Popen[str]]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
# /proc says which processes belong to a run
pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")


@pytest.fixture
def start(manifest: Path, tmp_path: Path) -> Iterator[Start]:
    """Start an endless run with two loader processes, in a session of its own; return when it has made a step."""
    processes: list[subprocess.Popen[str]] = []

    def run(*launcher: str, ignored: tuple[signal.Signals, ...] = ()) -> subprocess.Popen[str]:
        words = (
            "--model.type transformer --model.hidden_dim 16 --model.n_layers 1 --model.n_heads 2 --model.vocab_size 64 "
            "--hparams.precision fp32 --hparams.global_batch_size 4 --hparams.per_gpu_batch_size 2 "
            "--data.num_workers 2 --data.type text --data.seq_len 32 --data.allow_multiple_epochs true "
            f"--data.dataset_manifest {manifest} --total_train_samples 40000000 --wandb false --num_checkpoints 1 "
            f"--log_every_n_steps 1 --save_path {tmp_path} --name run"
        ).split()
        with (tmp_path / "log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "vla_foundry.main", *words],
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MARK_OF_RUN": str(tmp_path)},
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: [signal.signal(number, signal.SIG_IGN) for number in ignored],
                text=True,
            )
        processes.append(process)
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_until(lambda: process.poll() is not None or (metrics.is_file() and metrics.stat().st_size > 0), 90)
        assert process.poll() is None, read_log(tmp_path)
        return process

    yield run
    for pid in find_processes(tmp_path):
        os.kill(pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def read_log(folder: Path) -> str:
    return (folder / "log").read_text(encoding="utf-8")


def find_processes(folder: Path) -> list[int]:
    """The living processes of a run, found by a variable of their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        if f"MARK_OF_RUN={folder}\0".encode() in environment:
            found.append(int(entry.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_whole_group_saves_says_where_and_leaves_nothing(
    start: Start, tmp_path: Path, number: signal.Signals
) -> None:
    """As Ctrl-C and a closed terminal send it: to trainer, fork server and workers alike."""
    process = start()
    assert len(find_processes(tmp_path)) >= 4
    os.killpg(process.pid, number)
    assert process.wait(60) == 128 + number, read_log(tmp_path)
    (checkpoint,) = list_step_folders(tmp_path / "run")
    log = read_log(tmp_path)
    assert f"Saved {checkpoint}" in log
    assert f"Stopped by {number.name} after step" in log
    assert "Traceback" not in log
    wait_until(lambda: not find_processes(tmp_path), 20)


def test_loader_processes_do_not_outlive_a_killed_trainer(start: Start, tmp_path: Path) -> None:
    process = start(ignored=(signal.SIGHUP,))
    # a signal that was ignored at the start, as under nohup, changes nothing
    os.kill(process.pid, signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    process.kill()
    wait_until(lambda: not find_processes(tmp_path), 20)


def test_ranks_save_and_end_when_their_launcher_is_killed(start: Start, tmp_path: Path) -> None:
    process = start(*TORCHRUN)
    process.kill()
    wait_until(lambda: not find_processes(tmp_path), 20)
    assert len(list_step_folders(tmp_path / "run")) == 1, read_log(tmp_path)
