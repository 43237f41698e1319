"""Which process this is among how many: read from the launcher's environment, never stored in the config."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

# (rank, local rank, world size), one row per launcher: torchrun, Open MPI, Slurm
_LAUNCHERS = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
)


@dataclass(frozen=True, kw_only=True)
class World:
    """The place of one process in a run."""

    # index of this process among all, 0 .. world_size - 1
    rank: int = 0
    # index of this process on its node
    local_rank: int = 0
    # number of processes
    world_size: int = 1
    # torch device of this process: "cpu" or "cuda:<local_rank>"
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and talks to the user."""
        return self.rank == 0


def read_world(num_cuda_devices: int, environment: Mapping[str, str] | None = None) -> World:
    """Read the place of this process from its launcher's variables (torchrun, Open MPI or Slurm).

    Args:
        num_cuda_devices: CUDA devices this process sees (`torch.cuda.device_count()`); 0 means the CPU.
        environment: the variables; those of this process if not given.

    Raises:
        ValueError: a variable is missing, or not a number, or names a device that is not there.
    """
    environment = os.environ if environment is None else environment
    for rank_name, local_rank_name, world_size_name in _LAUNCHERS:
        if world_size_name in environment:
            rank, local_rank, world_size = (
                _read_int(environment, name) for name in (rank_name, local_rank_name, world_size_name)
            )
            break
    else:
        rank, local_rank, world_size = 0, 0, 1
    if num_cuda_devices == 0:
        device = "cpu"
    elif local_rank < num_cuda_devices:
        device = f"cuda:{local_rank}"
    else:
        raise ValueError(
            f"Local rank {local_rank} has no GPU: this node shows {num_cuda_devices}. "
            f"Start at most {num_cuda_devices} processes per node (torchrun --nproc_per_node)."
        )
    return World(rank=rank, local_rank=local_rank, world_size=world_size, device=device)


def read_world_size(environment: Mapping[str, str] | None = None) -> int:
    """Read only the number of processes; needs no torch."""
    environment = os.environ if environment is None else environment
    names = [row[2] for row in _LAUNCHERS if row[2] in environment]
    return _read_int(environment, names[0]) if names else 1


def _read_int(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except KeyError:
        raise ValueError(f"The environment variable {name} is missing; the launcher must set it.") from None
    except ValueError:
        raise ValueError(f"The environment variable {name} must be a number, got '{environment[name]}'.") from None
