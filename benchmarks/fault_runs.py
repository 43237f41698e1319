"""Small training runs for faults.py: forks of this process, so that a start takes milliseconds, and their comparison.

A fork runs the public command line, `vla-foundry train ...`, alone or as one of several ranks that find each other by
torchrun's variables. Its output is appended to a log beside the run.
"""

import hashlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # noqa: F401  else every fork imports it with its first optimizer
from safetensors import safe_open

import vla_foundry.training.experiment  # noqa: F401  as above
from vla_foundry.cli import main
from vla_foundry.preprocessing.text.packing import RecordPacker, write_records
from vla_foundry.run_folder import METRICS_NAME, find_checkpoint
from vla_foundry.shards import format_manifest

NUM_STEPS, NUM_SAVES, BATCH = 160, 16, 8
CONFIG = f"""\
total_train_samples: {NUM_STEPS * BATCH}
total_val_samples: 12
num_checkpoints: {NUM_SAVES}
log_every_n_steps: 1
wandb: false
resume: auto
model: {{type: transformer, hidden_dim: 32, n_layers: 2, n_heads: 2, vocab_size: 64, weight_tying: true}}
data: {{type: text, seq_len: 32, num_workers: 0, seed: 3, shuffle_buffer_size: 64, allow_multiple_epochs: true}}
hparams: {{precision: fp32, global_batch_size: {BATCH}, per_gpu_batch_size: 2, lr: 0.003, warmup: 10,
  lr_scheduler: warmup_constant_decay, grad_clip_norm: 0.5}}
ema: {{enabled: true, power: 0.9}}
"""
# a run that does not end
_PATIENCE_S = 120.0


class Failure(Exception):
    """A run is not what it should be."""


def demand(is_so: bool, otherwise: str) -> None:
    """Check what a case promises.

    Raises:
        Failure: it is not so.
    """
    if not is_so:
        raise Failure(otherwise)


def write_dataset(folder: Path) -> Path:
    """Write two shards of records whose documents count up modulo 64; return their manifest."""
    folder.mkdir(parents=True)
    draw, entries = np.random.default_rng(5), []
    for number in range(2):
        packer = RecordPacker(33, "uint16")
        for _ in range(120):
            tokens = (int(draw.integers(64)) + np.arange(int(draw.integers(5, 24)))) % 64
            packer.add(tokens.astype(np.uint16), np.asarray([len(tokens)]))
        entries.append(write_records(str(folder), f"shard_{number:06d}", packer.take(48)))
    (folder / "manifest.jsonl").write_text(format_manifest(entries), encoding="utf-8")
    return folder / "manifest.jsonl"


class Runs:
    """Runs of one config in a folder.

    Args:
        folder: it gets `runs/NAME` and a config; it must be new.
        manifest: the dataset, by path or URI.
    """

    def __init__(self, folder: Path, manifest: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "job.yaml").write_text(CONFIG, encoding="utf-8")
        data = ["--data.dataset_manifest", manifest, "--data.val_dataset_manifest", manifest]
        self._words = ["train", "--config_path", str(folder / "job.yaml"), "--save_path", str(folder / "runs"), *data]

    def start(
        self,
        name: str,
        *flags: str,
        num_ranks: int = 1,
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], Any] | None = None,
    ) -> list[int]:
        """Start or resume a run; return its processes, by rank.

        Args:
            flags: further words of the command line.
            environment: variables to set.
            prepare: called in each process before it begins.
        """
        words, log = [*self._words, "--name", name, *flags], self.log(name)
        variables = dict(environment or {})
        if num_ranks > 1:
            variables |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_port())}
        processes = []
        for rank in range(num_ranks):
            process = os.fork()
            if not process:
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_ranks > 1 else {}
                _run(words, log.with_suffix(f".{rank}.log"), variables | own, prepare)
            processes.append(process)
        return processes

    def finish(self, name: str, *flags: str, **options: Any) -> None:
        """Start or resume a run, and let it come to its end.

        Raises:
            Failure: it fails.
        """
        codes = [wait(process) for process in self.start(name, *flags, **options)]
        demand(not any(codes), f"{name} ended with {codes}: {self.read_log(name)}")

    def log(self, name: str) -> Path:
        """Return the file that the log of each rank is beside."""
        return self.folder / f"{name}.log"

    def read_log(self, name: str, rank: int = 0) -> str:
        """Return what a rank has printed, in all starts."""
        path = self.log(name).with_suffix(f".{rank}.log")
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def read_error(self, name: str, rank: int = 0) -> str:
        """Return the one error line that a rank has printed.

        Raises:
            Failure: it has printed none, several, or a traceback.
        """
        log = self.read_log(name, rank)
        lines = [line for line in log.splitlines() if line.startswith("error: ")]
        demand(len(lines) == 1 and "Traceback" not in log, f"rank {rank} of {name}: {log}")
        return lines[0]

    def path(self, name: str) -> Path:
        """Return a run's folder."""
        return self.folder / "runs" / name

    def read_lines(self, name: str, kind: str = "train") -> list[dict[str, Any]]:
        """Return the whole lines of a kind in a run's metrics."""
        path = self.path(name) / METRICS_NAME
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [line for line in lines if line["kind"] == kind]

    def count_steps(self, name: str) -> int:
        """Return the last step that a run has logged."""
        return max((line["step"] for line in self.read_lines(name)), default=0)

    def wait_for_step(self, name: str, process: int) -> bool:
        """Wait until a run that was just started has made a step; return False if it ends before."""
        before, deadline = self.count_steps(name), time.monotonic() + _PATIENCE_S
        # a resumed run first drops what it will do again
        while (count := self.count_steps(name)) == 0 or count == before:
            if is_over(process):
                return False
            demand(time.monotonic() < deadline, f"{name} does not start: {self.read_log(name)}")
            time.sleep(0.002)
        return True

    def fingerprint(self, name: str) -> dict[str, Any]:
        """Return everything that an undisturbed run and a disturbed one must have in common, bit by bit."""
        folder = find_checkpoint(self.path(name))
        return {
            "step": folder.name,
            "losses": [(line["step"], line["loss"]) for line in self.read_lines(name)],
            "validation": [(line["step"], line["loss"]) for line in self.read_lines(name, "validation")],
            "tensors": hash_tensors(folder),
        }


def _run(words: Sequence[str], log: Path, environment: Mapping[str, str], prepare: Callable[[], Any] | None) -> None:
    """Train, in a process of its own; does not return."""
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(environment)
        if prepare is not None:
            prepare()
        main([*words])
        code = 0
    except SystemExit as stop:
        code = int(str(stop.code or 0))
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(process: int, seconds: float = _PATIENCE_S) -> int:
    """Return the exit code of a process, or minus the number of the signal that ended it; kill it if it takes longer.

    Raises:
        Failure: it took longer.
    """
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise Failure(f"a process did not end in {seconds:.0f} s")
        time.sleep(0.005)


def is_over(process: int) -> bool:
    """Return whether a process has ended; it can still be waited for."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def hash_tensors(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every tensor of a checkpoint: weights, average and moments."""
    hashes = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                content = file.get_tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy().data
                hashes[f"{path.name}:{name}"] = hashlib.sha256(content).hexdigest()
    return hashes


def find_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
