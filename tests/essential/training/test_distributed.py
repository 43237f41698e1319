"""The same numbers under DDP, FSDP2, accumulation and on one process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from vla_foundry.hub.plan import count_held
from vla_foundry.models.layers import add_adapters
from vla_foundry.models.weights import has_ema, list_weights_files, open_checkpoint
from vla_foundry.params.distributed import DistributedParams
from vla_foundry.run_folder import EMA_WEIGHTS_NAME, MODEL_WEIGHTS_NAME, find_fault, list_step_folders
from vla_foundry.tensors import as_parts, join_files, write_tensors
from vla_foundry.training import lost_ranks
from vla_foundry.training.distributed import start_process_group
from vla_foundry.training.experiment import cast_parameters
from vla_foundry.world import World

# name -> changes to the params of tiny_run.py (20 steps, global batch 16, clipping, EMA, two validations)
LORA = {"targets": ["layers.*.linear"], "train": ["layers.0.norm.*", "scale"], "rank": 3}
SCENARIOS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, half the accumulation": {"hparams__per_gpu_batch_size": 4},
    "ddp, activation checkpointing": {"hparams__grad_checkpointing": True},
    "fsdp": {"distributed__fsdp": True},
    "fsdp, resharding and activation checkpointing": {
        "distributed__fsdp": True,
        "distributed__fsdp_reshard_after_forward": True,
        "hparams__grad_checkpointing": True,
    },
    "hsdp": {"distributed__fsdp": True, "distributed__replicate_size": 2},
    "fsdp, offloaded": {"distributed__fsdp": True, "distributed__fsdp_cpu_offload": True},
    "ddp, saved in the background": {"checkpoint_async": True, "max_checkpoint_limit": 1},
    "fsdp, saved in the background": {
        "distributed__fsdp": True,
        "checkpoint_async": True,
        "max_checkpoint_limit": 1,
    },
    "ddp, single precision": {"hparams__precision": "fp32"},
    "fsdp, single precision": {"distributed__fsdp": True, "hparams__precision": "fp32"},
    "ddp, muon": {"hparams__optimizer": "muon"},
    "fsdp, muon": {"distributed__fsdp": True, "hparams__optimizer": "muon"},
    "fsdp, muon, offloaded, a spoiled microbatch of one rank": {
        "distributed__fsdp": True,
        "distributed__fsdp_cpu_offload": True,
        "hparams__optimizer": "muon",
        "spoiled": [16 * 4 + 2],
    },
    "ddp, adapters": {"model__lora": LORA},
    "fsdp, adapters and activation checkpointing": {
        "distributed__fsdp": True,
        "hparams__grad_checkpointing": True,
        "model__lora": LORA,
    },
    "ddp, a spoiled microbatch of one rank": {"spoiled": [16 * 4 + 2]},
    "fsdp, a spoiled microbatch of one rank": {"distributed__fsdp": True, "spoiled": [16 * 4 + 2]},
}


# ways to start a sharded model, whose ranks make no more than their part
STARTS: dict[str, dict[str, Any]] = {
    "start": {},
    "start, activation checkpointing": {"hparams__grad_checkpointing": True},
    "start, from weights": {},
    "start, restored": {"is_restored": True},
}


# the position in whose step the disk of a rank becomes full, after the first checkpoint
FULL = {"full, rank 0": 12 * 16, "full, rank 1": 12 * 16 + 2}


def write_start(folder: Path, tiny) -> str:
    """Write the weights of another seed to a file; return its path."""
    weights = tiny.start_scenario({"hparams__seed": 7}, World())["weights"]
    write_tensors(folder / "start.safetensors", as_parts(weights))
    return str(folder / "start.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(tiny, folder: Path) -> dict[str, Any]:
    """Each scenario on one process without wrappers."""
    results: dict[str, Any] = {}
    for name, changes in SCENARIOS.items():
        kept = {
            key: value
            for key, value in changes.items()
            if key in ("spoiled", "hparams__precision", "hparams__optimizer", "model__lora")
        }
        same = next((other for other in results if results[other]["changes"] == kept), None)
        if same is None:
            results[name] = tiny.run_scenario({"save_path": str(folder), "name": f"alone {name}", **kept}, World())
            results[name]["changes"] = kept
        else:
            results[name] = results[same]
    return results


@pytest.fixture(scope="module")
def together(tiny, alone: dict[str, Any], run_on_two_ranks, folder: Path) -> list[dict[str, Any]]:
    """Each scenario on two ranks, by rank; and one that goes on from the single process's checkpoint."""
    # first, because what is freed does not lower a process's peak of memory
    scenarios = {
        name: {"starts": True, "distributed__fsdp": True, "ema__enabled": False, **changes}
        for name, changes in STARTS.items()
    }
    scenarios["start, from weights"]["weights"] = write_start(folder, tiny)
    scenarios |= {name: {"save_path": str(folder), "name": name, **changes} for name, changes in SCENARIOS.items()}
    scenarios["fsdp, from one process"] = {
        "save_path": str(folder),
        "name": "from one process",
        "distributed__fsdp": True,
        "start": str(folder / "alone ddp" / "checkpoints" / "step_00000010"),
    }
    halfway = {kind: str(folder / kind / "checkpoints" / "step_00000010") for kind in ("ddp", "fsdp", "hsdp")}
    for name, start in (("ddp", "fsdp"), ("fsdp, offloaded", "hsdp"), ("hsdp", "ddp")):
        scenarios[f"{name}, from {start}"] = scenarios[name] | {
            "name": f"{name} from {start}",
            "start": halfway[start],
        }
    # every 60 microseconds: as soon as the ranks have agreed on it
    scenarios["saved by the clock"] = {
        "save_path": str(folder),
        "name": "clock",
        "num_checkpoints": 1,
        "checkpoint_every_minutes": 1e-6,
    }
    scenarios["fsdp, adapters, from one process"] = scenarios["fsdp, adapters and activation checkpointing"] | {
        "name": "adapters from one process",
        "start": str(folder / "alone ddp, adapters" / "checkpoints" / "step_00000010"),
    }
    scenarios["fsdp, muon, from one process"] = scenarios["fsdp, muon"] | {
        "name": "muon from one process",
        "start": str(folder / "alone ddp, muon" / "checkpoints" / "step_00000010"),
    }
    # a position of rank 1 in the sixth step
    scenarios["stopped"] = {"save_path": str(folder), "name": "stopped", "stop_at": 5 * 16 + 2}
    scenarios["two configs"] = {"differs": True}
    for name, full_at in FULL.items():
        scenarios[name] = scenarios["fsdp, saved in the background"] | {"name": name, "full_at": full_at}
    return run_on_two_ranks(scenarios)


def assert_close(one: dict[str, Any], other: dict[str, Any], tolerance: float, first_step: int = 1) -> None:
    lines = [[line for line in result["lines"] if line["step"] >= first_step] for result in (one, other)]
    assert len(lines[0]) == len(lines[1])
    for mine, theirs in zip(*lines, strict=True):
        for key in ("kind", "step", "targets", "weights"):
            assert mine.get(key) == theirs.get(key)
        for key in ("loss", "grad_norm", "accuracy", "lr"):
            if theirs.get(key) is not None:
                assert mine[key] == pytest.approx(theirs[key], rel=tolerance), f"{key} at step {mine['step']}"
    for key in ("weights", "averages", "moments"):
        assert one[key].keys() == other[key].keys()
        for name, value in other[key].items():
            torch.testing.assert_close(one[key][name], value, rtol=tolerance, atol=tolerance * float(value.abs().max()))
    assert one["counters"] == other["counters"]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_train_as_one_process_does(name: str, alone, together) -> None:
    tolerance = 1e-5 if "single precision" in name else 1e-9
    for result in together:
        assert_close(result[name], alone[name], tolerance)


@pytest.mark.parametrize("name", STARTS)
def test_sharded_ranks_start_as_one_process_and_never_hold_the_model(name: str, tiny, together) -> None:
    seed = {"hparams__seed": 7} if name == "start, from weights" else {}
    alone = tiny.start_scenario({"ema__enabled": False, **seed}, World())
    num_bytes = sum(weight.nbytes for weight in alone["weights"].values())
    for result in together:
        found = result[name]
        assert found["weights"].keys() == alone["weights"].keys()
        if "restored" not in name:
            assert all(torch.equal(found["weights"][key], value) for key, value in alone["weights"].items())
        assert all(torch.equal(found["buffers"][key], value) for key, value in alone["buffers"].items())
        assert torch.equal(found["drawn_next"], alone["drawn_next"]) or name not in list(STARTS)[:2]
        # a file that is read is mapped, and counts while the system leaves it in memory
        assert found["rise"] < 0.9 * num_bytes or name == "start, from weights"


def test_every_global_batch_has_the_same_samples(alone, together) -> None:
    for name in SCENARIOS:
        ranks = [
            chain.from_iterable(result[name]["positions"][: len(alone["ddp"]["positions"])]) for result in together
        ]
        assert set(chain.from_iterable(ranks)) >= set(range(20 * 16)) | set(range(24))
    per_batch = 16 // 2 // 2
    for step in range(10):
        places = slice(step * per_batch, (step + 1) * per_batch)
        samples = [sample for result in together for batch in result["ddp"]["positions"][places] for sample in batch]
        assert sorted(samples) == list(range(step * 16, (step + 1) * 16))


def test_a_checkpoint_of_sharded_ranks_goes_on_in_one_process_and_back(tiny, alone, together, folder: Path) -> None:
    sharded = list_step_folders(folder / "fsdp")[-1]
    assert sorted(path.name for path in sharded.rglob("*-00002-of-00002.safetensors")) == [
        "ema-00002-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "moments-00002-of-00002.safetensors",
    ]
    result = tiny.run_scenario({"save_path": str(folder), "name": "from two ranks", "start": str(sharded)}, World())
    assert_close(result, alone["ddp"], 1e-9, first_step=11)
    assert_close(together[0]["fsdp, from one process"], alone["ddp"], 1e-9, first_step=11)
    assert_close(together[0]["fsdp, muon, from one process"], alone["ddp, muon"], 1e-9, first_step=11)
    assert_close(together[0]["fsdp, adapters, from one process"], alone["ddp, adapters"], 1e-9, first_step=11)
    for name in ("ddp, from fsdp", "fsdp, offloaded, from hsdp", "hsdp, from ddp"):
        assert_close(together[0][name], alone["ddp"], 1e-9, first_step=11)
    with pytest.raises(ValueError, match=r"was trained with adamw, which hparams\.optimizer must be to resume it"):
        tiny.run_scenario({"save_path": str(folder), "start": str(sharded), "hparams__optimizer": "muon"}, World())


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_rank_holds_what_the_planner_predicts(name: str, tiny, alone, together) -> None:
    params = tiny.create_params("", **{key: value for key, value in SCENARIOS[name].items() if key != "spoiled"})
    with torch.device("meta"):
        model = tiny.TinyModel()
        if params.model.lora is not None:
            add_adapters(model, params.model.lora)
    cast_parameters(model, params.hparams.precision)
    for rank, result in enumerate(together):
        assert count_held(model, params, 2, rank).sharded() == result[name]["held"]
    unsharded = replace(params, distributed=DistributedParams())
    assert count_held(model, unsharded, 1).sharded() == alone[name]["held"]
    if name == "fsdp":
        halves = sum(alone[name]["held"].values()) / 2
        assert all(sum(result[name]["held"].values()) == pytest.approx(halves, rel=0.1) for result in together)


def test_weights_of_sharded_ranks_are_read_as_whole_ones(together, folder: Path, tmp_path: Path) -> None:
    last = list_step_folders(folder / "fsdp")[0]
    assert has_ema(folder / "fsdp")
    for name, use_ema, kind in ((MODEL_WEIGHTS_NAME, False, "weights"), (EMA_WEIGHTS_NAME, True, "averages")):
        expected = together[0]["fsdp"][kind]
        with open_checkpoint(folder / "fsdp", use_ema=use_ema) as entries:
            assert entries.keys() >= expected.keys()
            assert all(torch.equal(entries[key].read(), value) for key, value in expected.items())
        join_files(list_weights_files(last, name), tmp_path / name)
        whole = load_file(tmp_path / name)
        assert all(torch.equal(whole[key], value) for key, value in expected.items())
    # the format is that of torch.distributed.checkpoint, which reads it too
    wanted = {key: torch.zeros_like(together[0]["fsdp"]["moments"][f"{key} exp_avg"]) for key in expected}
    wanted = {f"exp_avg.{key}": value for key, value in wanted.items() if value.ndim}
    reader = HuggingFaceStorageReader(str(last / "training_state"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state_dict_loader.load(wanted, storage_reader=reader, no_dist=True)
    for key, value in wanted.items():
        assert torch.equal(value, together[0]["fsdp"]["moments"][f"{key.removeprefix('exp_avg.')} exp_avg"])


def test_saves_in_the_background_and_by_the_clock_are_complete(folder: Path) -> None:
    for name in ("ddp, saved in the background", "fsdp, saved in the background"):
        folders = list_step_folders(folder / name)
        assert [path.name for path in folders] == ["step_00000020"]
        assert find_fault(folders[0]) is None
        same = list_step_folders(folder / name.partition(",")[0])[0]
        assert (folders[0] / "COMPLETE").read_bytes() == (same / "COMPLETE").read_bytes()
    # each request reaches all ranks one step later
    assert len(list_step_folders(folder / "clock")) >= 10


def test_a_spoiled_microbatch_skips_the_update_on_every_rank(together) -> None:
    for result in together:
        for kind in ("ddp", "fsdp"):
            spoiled = result[f"{kind}, a spoiled microbatch of one rank"]
            assert spoiled["counters"]["skipped"] == 1
            assert spoiled["counters"]["updates"] == 19
            assert spoiled["lines"][4]["loss"] is None


def test_sigterm_of_one_rank_stops_all_at_the_same_step_with_a_checkpoint(together, folder: Path) -> None:
    steps = [result["stopped"]["step"] for result in together]
    assert steps == [7, 7]
    assert [path.name for path in list_step_folders(folder / "stopped")] == ["step_00000007"]


def test_ranks_of_two_runs_are_one_line(together) -> None:
    errors = [result["two configs"]["error"] for result in together]
    assert errors[0].startswith(
        "hparams.lr is 2.0 on rank 1, but 1.0 on rank 0. Give all ranks of a run the same config"
    )
    assert errors[1] == "2"


@pytest.mark.parametrize("name", FULL)
def test_a_save_in_the_background_that_fails_on_one_rank_is_one_line(name: str, together, folder: Path) -> None:
    errors = [result[name]["error"] for result in together]
    assert errors[1] == "2"
    assert re.search(
        r"step_00000020/\S+: File too large\. A checkpoint needs .* continue with --resume auto\.$", errors[0]
    )
    assert "\n" not in errors[0]
    kept = list_step_folders(folder / name)
    assert [path.name for path in kept] == ["step_00000010"]
    assert find_fault(kept[0]) is None
    assert [path.name for path in kept[0].parent.iterdir()] == ["step_00000010"]


@pytest.mark.slow
def test_an_error_of_one_rank_ends_all(launch, tiny, tmp_path: Path) -> None:
    scenario = {"save_path": str(tmp_path), "fail_at": 5 * 16 + 2, "distributed__fsdp": True}
    (tmp_path / "scenarios.json").write_text(json.dumps({"failing": scenario}), encoding="utf-8")
    done = launch(2, tiny.__file__, str(tmp_path / "scenarios.json"), str(tmp_path / "result"), timeout=150.0)
    assert done.returncode != 0
    assert "this rank fails" in done.stderr


SCRIPT = """
import os, sys, torch.distributed as dist
from vla_foundry.config.command_line import run_command
from vla_foundry.params.distributed import DistributedParams
from vla_foundry.training.distributed import barrier, start_process_group
from vla_foundry.training.loop import StopSignal
from vla_foundry.training.lost_ranks import naming_lost_ranks
from vla_foundry.world import read_world
def main(argv):
    world = read_world(0)
    start_process_group(DistributedParams(), world)
    with naming_lost_ranks(world), StopSignal(world):
        barrier()
        if world.rank == 1 and argv[0] == "kill":
            os.kill(os.getpid(), 9)
        if world.rank == 1:
            raise KeyError("too few fish")
        for _ in range(3):
            barrier()
run_command(main, sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("way", "message"),
    [
        pytest.param("bug", r"rank 1 on {host} failed: KeyError: 'too few fish'", marks=pytest.mark.slow),
        ("kill", r"rank 1 on {host} \(process \d+\) ended without a word\. It was killed, perhaps"),
    ],
)
def test_ranks_name_the_one_that_is_lost_and_why(launch, tmp_path: Path, way: str, message: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    done = launch(3, str(tmp_path / "script.py"), way, timeout=150.0)
    assert done.returncode != 0
    wanted = message.replace("{host}", re.escape(socket.gethostname()))
    assert re.search(rf"^error: {wanted}", done.stderr, re.MULTILINE), done.stderr
    assert re.search(rf"^error: process 2: {wanted}", done.stderr, re.MULTILINE), done.stderr
    assert "gloo" not in done.stderr


class DeafStore(dist.HashStore):
    """A store on a host that is cut off."""

    def check(self, keys: list[str]) -> bool:
        time.sleep(5)
        return False


@pytest.fixture
def lose(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Fails in rank 0 of six; returns the error that its user sees: (error, store)."""

    def fail(error: Exception, store: dist.Store) -> str:
        monkeypatch.setattr(lost_ranks, "gather_objects", lambda place: [lost_ranks._Place(*item) for item in PLACES])
        monkeypatch.setattr(lost_ranks.distributed_c10d, "_get_default_store", lambda: store)
        monkeypatch.setattr(lost_ranks.signal, "signal", lambda *_: None)
        monkeypatch.setattr(lost_ranks, "_SECONDS_TO_HEAR", 0.0)
        monkeypatch.setattr(lost_ranks, "_SECONDS_TO_ANSWER", 1.0)
        with pytest.raises(ValueError, match="rank") as raised, lost_ranks.naming_lost_ranks(World(world_size=6)):
            raise error
        return str(raised.value)

    return fail


# two ranks on each of three hosts, of which this process is rank 0
PLACES = [
    (f"node-{rank // 2}", "" if rank else "here", os.getpid(), f"10.0.0.{rank // 2}") for rank in range(6)
]  # host, name space, process, address
GLOO = "[/gloo/transport/tcp/pair.cc:545] Read error [10.0.0.2]:22662: Connection reset by peer"
NCCL = "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error"


@pytest.mark.parametrize(
    ("error", "alive", "message"),
    [
        (
            RuntimeError(GLOO),
            (1, 4),
            r"connection to rank 5 on node-2 is lost, without a word",
        ),
        (RuntimeError(GLOO), (), r"connection to rank 4 on node-2, rank 5 on node-2 is lost"),
        (dist.DistBackendError(NCCL), (1, 2, 3), r"connection to rank 4 on node-2, rank 5 on node-2 is lost"),
        (dist.DistBackendError(NCCL), (), r"connection to rank 1 on node-0, rank 2 on node-1, rank 3 .* and 2 more is"),
        (dist.DistNetworkError("Broken pipe"), range(1, 6), r"all of them are alive\. Look at the network"),
        (RuntimeError(f"{NCCL}\nncclRemoteError"), (1, 2, 3, 5), r"rank 4 on node-2 is lost"),
        (
            dist.DistBackendError(NCCL),
            "rank 3 on node-1 failed: KeyError: 'fish'",
            r"^rank 3 on node-1 failed",
        ),
    ],
)
def test_ranks_of_other_hosts_are_named_without_the_words_of_their_transport(
    error: Exception, alive: Any, message: str, lose: Callable[..., str]
) -> None:
    store = dist.HashStore()
    if isinstance(alive, str):
        store.set("vla_foundry/error of rank 3", alive)
    for rank in () if isinstance(alive, str) else alive:
        store.set(f"vla_foundry/rank {rank} is alive", "")
    said = lose(error, store)
    assert re.search(message, said)
    assert not any(word in said for word in ("NCCL", "gloo", "\n"))


def test_a_store_that_never_answers_is_not_waited_for(lose: Callable[..., str]) -> None:
    start = time.monotonic()
    assert "rank 4 on node-2, rank 5 on node-2 is lost" in lose(RuntimeError(GLOO), DeafStore())
    assert time.monotonic() - start < 4


def test_a_stopped_rank_of_this_host_is_named(lose: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        places = [PLACES[0], ("node-0", "here", process.pid, "10.0.0.0"), *PLACES[2:]]
        monkeypatch.setattr(sys.modules[__name__], "PLACES", places)
        assert f"rank 1 on node-0 (process {process.pid}) is stopped" in lose(RuntimeError(GLOO), DeafStore())
    finally:
        process.kill()
        process.wait()


def test_nccl_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a GPU"):
        start_process_group(DistributedParams(dist_backend="nccl"), World(world_size=2))


Start = Callable[..., subprocess.Popen[str]]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
# /proc says which processes belong to a run
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")


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
                preexec_fn=lambda: set_signals(ignored),
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


def set_signals(ignored: tuple[signal.Signals, ...]) -> None:
    """Ignore only these, whatever this process ignores because it runs under nohup or in the background."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)


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


@needs_proc
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


@needs_proc
def test_loader_processes_do_not_outlive_a_killed_trainer(start: Start, tmp_path: Path) -> None:
    process = start(ignored=(signal.SIGHUP,))
    # a signal that was ignored at the start, as under nohup, changes nothing
    os.kill(process.pid, signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    process.kill()
    wait_until(lambda: not find_processes(tmp_path), 20)


@needs_proc
def test_ranks_save_and_end_when_their_launcher_is_killed(start: Start, tmp_path: Path) -> None:
    process = start(*TORCHRUN)
    process.kill()
    wait_until(lambda: not find_processes(tmp_path), 20)
    assert len(list_step_folders(tmp_path / "run")) == 1, read_log(tmp_path)
