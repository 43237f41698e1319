"""The place of a process, as torchrun, Open MPI and Slurm tell it."""

import os
import subprocess
import sys

import pytest

from vla_foundry.world import (
    World,
    find_meeting_point,
    is_first_process,
    read_rank,
    read_ranks_per_node,
    read_world,
    read_world_size,
)

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
OPEN_MPI_NAMES = [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")]
SLURM_NAMES = ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"]
OPEN_MPI = dict(zip(OPEN_MPI_NAMES, TORCHRUN.values(), strict=True))
SLURM = dict(zip(SLURM_NAMES, TORCHRUN.values(), strict=True))


@pytest.mark.parametrize("environment", [TORCHRUN, OPEN_MPI, SLURM], ids=["torchrun", "mpi", "slurm"])
def test_every_launcher_tells_the_same(environment: dict[str, str]) -> None:
    assert read_world(2, environment) == World(rank=5, local_rank=1, world_size=8, device="cuda:1")
    assert (read_world_size(environment), read_ranks_per_node(8, environment), read_rank(environment)) == (8, 4, "5")
    assert not is_first_process(environment=environment)
    assert not is_first_process(on_node=True, environment=environment)
    name = next(name for name, value in environment.items() if value == "1")
    assert is_first_process(on_node=True, environment={**environment, name: "0"})


def test_mpich_tells_the_same() -> None:
    names = ["PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"]
    mpich: dict[str, str] = dict(zip(names, TORCHRUN.values(), strict=True))
    assert read_world(2, mpich) == World(rank=5, local_rank=1, world_size=8, device="cuda:1")


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({"MASTER_ADDR": "first", "MASTER_PORT": "7"}, ("first", "7")),
        ({"MASTER_ADDR": "first"}, ("first", "29500")),
        ({**SLURM, "SLURM_JOB_ID": "10123", "SLURM_JOB_NODELIST": "gpu[07-08,11],other"}, ("gpu07", "20123")),
        ({**SLURM, "SLURM_JOB_ID": "5", "SLURM_STEP_NODELIST": "one,two", "MASTER_PORT": "9"}, ("one", "9")),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, ("127.0.0.1", str(20_000 + os.getppid() % 10_000))),
    ],
)
def test_ranks_know_where_to_meet(environment: dict[str, str], place: tuple[str, str]) -> None:
    assert tuple(find_meeting_point(8, environment).values()) == place


@pytest.mark.parametrize("environment", [OPEN_MPI, TORCHRUN, {}])
def test_ranks_that_do_not_know_where_to_meet_are_told_what_to_set(environment: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"MASTER_ADDR is not set.*mpirun -x MASTER_ADDR=HOST"):
        find_meeting_point(8, environment)
    with pytest.raises(ValueError, match="MASTER_PORT must be the number of a port, got 'http'"):
        find_meeting_point(8, {"MASTER_ADDR": "here", "MASTER_PORT": "http"})
    with pytest.raises(ValueError, match="RANK is 8, but WORLD_SIZE says that there are 8 processes"):
        read_world(0, {**TORCHRUN, "RANK": "8"})


def test_torchrun_counts_where_slurm_started_it() -> None:
    assert read_world(0, {**SLURM, **TORCHRUN, "RANK": "0"}).rank == 0
    assert is_first_process(environment={**SLURM, "RANK": "0"})


def test_without_a_launcher_a_process_is_alone() -> None:
    assert read_world(0, {}) == World()
    assert (read_world_size({}), read_ranks_per_node(1, {}), read_rank({})) == (1, 1, "0")
    assert is_first_process(environment={})


def test_a_variable_that_is_missing_or_no_number_is_named() -> None:
    with pytest.raises(ValueError, match="did not set the environment variable LOCAL_RANK"):
        read_world(0, {"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="WORLD_SIZE must be a number, got 'two'"):
        read_world_size({"WORLD_SIZE": "two"})
    with pytest.raises(ValueError, match=r"Local rank 1 has no GPU: this node shows 1\."):
        read_world(1, TORCHRUN)


@pytest.mark.parametrize("module", ["vla_foundry.main", "vla_foundry.cli"])
def test_the_launcher_is_watched_from_before_the_imports_that_take_seconds(module: str) -> None:
    code = f"""
import os, runpy, sys, vla_foundry.world
vla_foundry.world.follow_launcher = lambda: os._exit(5 if "vla_foundry.config" not in sys.modules else 6)
sys.argv = ["vla-foundry", "train"]
runpy.run_module("{module}", run_name="__main__")
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 5
