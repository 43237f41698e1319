"""Read this process's rank and the number of processes from the launcher's environment, never from the config."""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple


class _Launcher(NamedTuple):
    """The environment variables in which a launcher passes a process its rank."""

    rank: str
    local_rank: str
    world_size: str
    ranks_per_node: str


_TORCHRUN = _Launcher("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_OPEN_MPI = _Launcher(*(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")))
_SLURM = _Launcher("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")
# MPICH and Intel MPI
_PMI = _Launcher("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS")
# the first launcher found wins: torchrun may itself be started by Slurm or MPI, and MPI by Slurm
_LAUNCHERS = (_TORCHRUN, _OPEN_MPI, _SLURM, _PMI)
# ports for ranks that are not told one: below those that systems give to connections
_FIRST_PORT, _NUM_PORTS, _DEFAULT_PORT = 20_000, 10_000, "29500"
# the first host of a Slurm list: node[01-04,07],other
_FIRST_HOST = re.compile(r"([^\[,]+)(?:\[(\w+))?")
# after its agent died, a rank has this long to save a checkpoint
_SECONDS_BETWEEN_LOOKS, _SECONDS_TO_SAVE = 2.0, 120.0


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


def read_world(num_cuda_devices: int, environment: Mapping[str, str] = os.environ) -> World:
    """Read the place of this process from its launcher's variables (torchrun, Slurm or MPI).

    Args:
        num_cuda_devices: CUDA devices this process sees (`torch.cuda.device_count()`); 0 means the CPU.
        environment: the variables.

    Raises:
        ValueError: a variable is missing, is not a number, or names a device that does not exist.
    """
    launcher = next((launcher for launcher in _LAUNCHERS if launcher.world_size in environment), None)
    rank, local_rank, world_size = (
        (0, 0, 1) if launcher is None else (_read_int(environment, name) for name in launcher[:3])
    )
    if launcher is not None and not 0 <= rank < world_size:
        raise ValueError(
            f"{launcher.rank} is {rank}, but {launcher.world_size} says that there are {world_size} processes, counted "
            "from 0. Start each with a rank of its own, and all with the same number of processes."
        )
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


def read_world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Read only the number of processes; needs no torch."""
    names = [launcher.world_size for launcher in _LAUNCHERS if launcher.world_size in environment]
    return _read_int(environment, names[0]) if names else 1


def find_meeting_point(world_size: int, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return MASTER_ADDR and MASTER_PORT, where ranks meet; torchrun sets them, Slurm and MPI do not.

    Raises:
        ValueError: it is not known where rank 0 is.
    """
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    job = environment.get("SLURM_JOB_ID", "")
    if not address and _TORCHRUN.rank not in environment:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
        if (match := _FIRST_HOST.match(nodes)) is not None:
            address = match[1] + (match[2] or "")
            port = port or (str(_FIRST_PORT + int(job) % _NUM_PORTS) if job.isdigit() else None)
        elif _find(environment, [_OPEN_MPI.ranks_per_node, _PMI.ranks_per_node]) == str(world_size):
            # all are here, and children of one process
            address, port = "127.0.0.1", port or str(_FIRST_PORT + os.getppid() % _NUM_PORTS)
    if not address:
        raise ValueError(
            "MASTER_ADDR is not set, so this process does not know where rank 0 is. Start the ranks with torchrun, or "
            "set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port there (mpirun -x MASTER_ADDR=HOST -x "
            "MASTER_PORT=29500)."
        )
    port = port or _DEFAULT_PORT
    if not (port.isdigit() and 0 < int(port) < 2**16):
        raise ValueError(f"MASTER_PORT must be the number of a port, got '{port}'.")
    return {"MASTER_ADDR": address, "MASTER_PORT": port}


def leave_on_interrupt() -> None:
    """Make Ctrl-C end this process with code 130 and without a traceback, for the time of the imports.

    An import that KeyboardInterrupt interrupts prints one, or goes on with half a library. Ctrl-C stays ignored where
    it was (jobs in the background).
    """
    _replace_handler(signal.default_int_handler, _leave)


def raise_on_interrupt() -> None:
    """Make Ctrl-C raise KeyboardInterrupt again: there is work that must be put in order."""
    _replace_handler(_leave, signal.default_int_handler)


def _replace_handler(before: object, after: Callable[[int, FrameType | None], object]) -> None:
    if signal.getsignal(signal.SIGINT) is before and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, after)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def follow_launcher() -> None:
    """Stop this process as SIGTERM does when torchrun's agent dies, which otherwise leaves its ranks behind.

    Also keep torch, once it is imported, from writing warnings about connections.

    A process that torchrun did not start has no parent to die with (nohup, tmux); mpirun and srun end their own.
    """
    if is_launched():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch_ancestors, args=(_find_ancestors(),), daemon=True).start()


def _watch_ancestors(before: list[int]) -> None:
    while _find_ancestors() == before:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)
    # ranks that wait for a dead one never come to their checkpoint
    time.sleep(_SECONDS_TO_SAVE)
    os._exit(128 + signal.SIGTERM)


def _find_ancestors() -> list[int]:
    """Return the processes from this one's parent up to torchrun's agent, which does not have the rank's variables."""
    pids = [os.getppid()]
    with suppress(OSError, ValueError):
        while b"TORCHELASTIC_RUN_ID=" in Path(f"/proc/{pids[-1]}/environ").read_bytes():
            status = Path(f"/proc/{pids[-1]}/stat").read_text(encoding="utf-8")
            pids.append(int(status.rpartition(")")[2].split()[1]))
    return pids


def read_ranks_per_node(world_size: int, environment: Mapping[str, str] = os.environ) -> int:
    """Read the number of processes on this machine; `world_size` if the launcher does not provide it."""
    given = _find(environment, [launcher.ranks_per_node for launcher in _LAUNCHERS])
    return int(given) if given.isdigit() and int(given) > 0 else world_size


def read_rank(environment: Mapping[str, str] = os.environ) -> str:
    """Read the rank of this process as its launcher writes it, for messages; "0" without a launcher."""
    return _find(environment, [launcher.rank for launcher in _LAUNCHERS]) or "0"


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Return True if a launcher started this process (torchrun, Slurm or MPI)."""
    return any(launcher.world_size in environment for launcher in _LAUNCHERS)


def is_first_process(*, on_node: bool = False, environment: Mapping[str, str] = os.environ) -> bool:
    """True unless the launcher says that another process is the first, among all or on this machine."""
    names = [launcher.local_rank if on_node else launcher.rank for launcher in _LAUNCHERS]
    return (_find(environment, names) or "0") == "0"


def _find(environment: Mapping[str, str], names: list[str]) -> str:
    return next((environment[name] for name in names if name in environment), "")


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_memory(ranks_per_node: int, *, may_use_gpu: bool = True) -> int | None:
    """Return the memory of this machine for one rank, in bytes: of a GPU, else its share of the RAM. None: unknown."""
    if (
        may_use_gpu
        and os.path.exists("/dev/nvidiactl")
        and os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1")
    ):
        query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        with suppress(OSError, ValueError, subprocess.SubprocessError):
            done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10)
            return max(int(line) for line in done.stdout.split()) * 2**20
        return None
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            limits.append(int(Path("/sys/fs/cgroup", name).read_text(encoding="utf-8")))
    return min(limits) // ranks_per_node


def _read_int(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except KeyError:
        raise ValueError(f"The launcher did not set the environment variable {name}.") from None
    except ValueError:
        raise ValueError(f"The environment variable {name} must be a number, got '{environment[name]}'.") from None
