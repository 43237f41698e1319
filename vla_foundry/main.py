"""Train one model: `vla-foundry train ...`, or for several processes `torchrun vla_foundry/main.py ...`."""

import sys
from pathlib import Path

if __name__ == "__main__" and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    # run as a script, Python puts this folder first, where `io` and others would hide modules of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from vla_foundry.params.command_line import parse_command, run_command
from vla_foundry.params.experiment import TrainExperimentParams

PROG = "vla-foundry train"


def main(argv: list[str]) -> None:
    """Parse, resolve, train.

    Args:
        argv: the words after the command.

    Raises:
        ValueError: what the user can fix, in one line.
    """
    params = parse_command(TrainExperimentParams, argv, prog=PROG)

    import torch

    from vla_foundry.training.experiment import train  # pyright: ignore[reportMissingImports]
    from vla_foundry.world import read_world

    train(params, read_world(torch.cuda.device_count()))


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
