"""Train a resolved mixture under FSDP2, and under DDP until a rank is killed; run by torchrun.

torchrun --nproc_per_node 2 mixture_run.py CONFIG.yaml KILL_AT_STEP
"""

import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from vla_foundry.params.experiment import TrainExperimentParams, load_experiment_params_from_yaml
from vla_foundry.training import loop
from vla_foundry.training.distributed import start_process_group
from vla_foundry.training.experiment import create_run, find_run_folder
from vla_foundry.world import World, read_world


class Killer:
    """A handler that ends this process like a lost machine, as it prepares its first microbatch of a step."""

    def __init__(self, handler: Any, run: loop.Run, step: int) -> None:
        self.handler, self.run, self.step = handler, run, step
        self.count_targets = handler.count_targets

    def prepare(self, batch: Any, device: Any) -> Any:
        if self.run.state.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.handler.prepare(batch, device)


def train(params: TrainExperimentParams, world: World, kill_at: int | None = None) -> None:
    with ExitStack() as stack:
        run = create_run(params, world, find_run_folder(params), stack, {})
        if kill_at is not None and world.rank == 1:
            run.handler = Killer(run.handler, run, kill_at)
        loop.train(run)


def main() -> None:
    torch.set_num_threads(1)
    params = load_experiment_params_from_yaml(sys.argv[1])
    params = replace(params, hparams=replace(params.hparams, per_gpu_batch_size=4))
    world = read_world(0)
    start_process_group(params.distributed, world)
    train(replace(params, name="fsdp", distributed=replace(params.distributed, fsdp=True)), world)
    train(replace(params, name="ddp"), world, int(sys.argv[2]))


if __name__ == "__main__":
    main()
