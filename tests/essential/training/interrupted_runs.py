"""Train one job straight, and again while it is killed and stopped at random instants; print what happened as JSON.

    python interrupted_runs.py MANIFEST FOLDER SEED

Each start of a run is a fork of this process, which has imported everything already, so that a start costs
milliseconds. A kill counts as landed only if it ended a process that had done some steps and had not finished.
"""

import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # noqa: F401  else every fork imports it with its first optimizer

from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.ema import EMAParams
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.params.hparams import HyperParams
from vla_foundry.params.models.transformer import TransformerParams
from vla_foundry.training.experiment import train
from vla_foundry.world import World

NUM_STEPS = 160
NUM_KILLS = 5


def create_params(manifest: str, folder: str) -> TrainExperimentParams:
    return TrainExperimentParams(
        save_path=folder,
        resume="auto",
        wandb=False,
        log_every_n_steps=1,
        num_checkpoints=16,
        total_train_samples=NUM_STEPS * 8,
        total_val_samples=12,
        data=TextDataParams(
            dataset_manifest=[manifest],
            dataset_modality=["text"],
            dataset_weighting=[1.0],
            val_dataset_manifest=[manifest],
            seq_len=32,
            num_workers=0,
            seed=3,
            shuffle_buffer_size=64,
            allow_multiple_epochs=True,
        ),
        model=TransformerParams(hidden_dim=32, n_layers=2, n_heads=2, vocab_size=64, weight_tying=True),
        hparams=HyperParams(
            precision="fp32",
            global_batch_size=8,
            per_gpu_batch_size=4,
            lr=0.003,
            warmup=10.0,
            lr_scheduler="warmup_constant_decay",
            grad_clip_norm=0.5,
        ),
        ema=EMAParams(enabled=True, power=0.9),
    )


def start(params: TrainExperimentParams) -> int:
    """Fork a process that trains; return its id."""
    process = os.fork()
    if process:
        return process
    log = os.open(Path(params.save_path) / f"{params.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        train(params, World())
        code = 0
    except SystemExit as stop:
        code = int(str(stop.code))
    finally:
        sys.stdout.flush()
        os._exit(code)


def read_lines(params: TrainExperimentParams) -> list[dict[str, Any]]:
    path = Path(params.save_path) / str(params.name) / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def count_steps(params: TrainExperimentParams) -> int:
    return max((line["step"] for line in read_lines(params)), default=0)


def interrupt(params: TrainExperimentParams, number: signal.Signals, delay: float) -> dict[str, Any]:
    """Start or resume a run, and send it a signal `delay` seconds after its first new step."""
    before = count_steps(params)
    process = start(params)
    deadline = time.monotonic() + 60
    # a resumed run first drops what it will do again
    while (count := count_steps(params)) == 0 or count == before:
        assert time.monotonic() < deadline, "the run does not start"
        if os.waitpid(process, os.WNOHANG)[0]:
            raise AssertionError(Path(params.save_path, f"{params.name}.log").read_text(encoding="utf-8"))
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(process, number)
    status = os.waitpid(process, 0)[1]
    return {
        "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        "exit_code": os.waitstatus_to_exitcode(status),
        "steps_before": before,
        "steps_after": count_steps(params),
        "delay": delay,
    }


def finish(params: TrainExperimentParams) -> float:
    """Start or resume a run, and let it come to its end; returns how long that took."""
    started = time.monotonic()
    status = os.waitpid(start(params), 0)[1]
    assert status == 0, Path(params.save_path, f"{params.name}.log").read_text(encoding="utf-8")
    return time.monotonic() - started


def main() -> None:
    manifest, folder, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    draw = random.Random(seed)
    params = create_params(manifest, folder)
    seconds = finish(replace(params, name="straight"))

    # the kills fall into steps, and into saves in the background
    killed = replace(params, name="killed", checkpoint_async=True, max_checkpoint_limit=3)
    kills: list[dict[str, Any]] = []
    for _ in range(4 * NUM_KILLS):
        if sum(kill["killed"] for kill in kills) == NUM_KILLS or count_steps(killed) == NUM_STEPS:
            break
        kills.append(interrupt(killed, signal.SIGKILL, draw.uniform(0.0, seconds / NUM_KILLS)))
    unfinished = list(Path(folder, "killed", "checkpoints").glob(".writing_*"))
    finish(killed)

    stopped = replace(params, name="stopped")
    stop = interrupt(stopped, signal.SIGTERM, draw.uniform(0.0, seconds / 3))
    checkpoints = sorted(path.name for path in Path(folder, "stopped", "checkpoints").iterdir())
    finish(stopped)
    print(
        json.dumps(
            {
                "seconds": seconds,
                "kills": kills,
                "unfinished": len(unfinished),
                "stop": stop,
                "checkpoints_at_stop": checkpoints,
            }
        )
    )


if __name__ == "__main__":
    main()
