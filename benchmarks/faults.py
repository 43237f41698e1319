"""Disturb real training runs, at places drawn from a seed, and check that each then is the run that nothing disturbed.

    python benchmarks/faults.py                            # every case, small counts: about a minute
    python benchmarks/faults.py --kills 60 --torn 100      # about five minutes on one core
    python benchmarks/faults.py --cases torn --seed 7

A case is one JSON line: what was done how often, and `passed`. After a fault, `--resume auto` must end in the same bits
of weights, average, moments and losses, and an error must be the one line that is promised. The exit code is 1 if a
case fails.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fault_runs import BATCH, NUM_SAVES, NUM_STEPS, Failure, Runs, demand, is_over, wait, write_dataset
from fault_store import serve_faulty_store

from vla_foundry.models.batch_handlers import TextBatchHandler
from vla_foundry.models.registry import BATCH_HANDLERS
from vla_foundry.run_folder import COMPLETE_NAME, find_checkpoint, list_step_folders
from vla_foundry.training import loop

# place of a kill -> function of the loop that it interrupts, calls of it in a run, and about how long one takes (s)
PLACES = {
    "step": ("train_step", NUM_STEPS, 0.006),
    "loader": ("take_microbatches", NUM_STEPS, 0.001),
    "validation": ("validate", NUM_SAVES, 0.01),
    "save": ("save", NUM_SAVES, 0.03),
    # at an operation on a file of the run folder, in any thread
    "write": ("", 400, 0.0),
}
DAMAGES = ("cut", "flip", "missing", "empty", "longer", "no mark", "half renamed", "swapped")
WRAPPERS = (
    ("1 process", 1, ()),
    ("2 ranks, DDP", 2, ()),
    ("4 ranks, FSDP2", 4, ("--distributed.fsdp", "true")),
    ("4 ranks, HSDP", 4, ("--distributed.fsdp", "true", "--distributed.replicate_size", "2")),
    ("2 ranks, FSDP2, offloaded", 2, ("--distributed.fsdp", "true", "--distributed.fsdp_cpu_offload", "true")),
)


def die_in(place: str, call: int, delay: float) -> None:
    """Make this process kill itself in the `call`-th call of a place, `delay` seconds after it began."""
    name = PLACES[place][0]
    if not name:
        sys.addaudithook(partial(_die_at_file, [call]))
        return
    function, calls = getattr(loop, name), [0]

    def interrupted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return function(*args, **options)

    setattr(loop, name, interrupted)


def _die_at_file(left: list[int], event: str, args: tuple[Any, ...]) -> None:
    if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate") and "/runs/" in str(args[0]):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_often(runs: Runs, draw: random.Random, count: int) -> dict[str, Any]:
    """Kill runs at all places in turn, each run until it ends; each must then be the run never killed."""
    expected = runs.fingerprint("straight")
    landed: Counter[str] = Counter()
    num_runs, unfinished = 0, 0
    while sum(landed.values()) < count:
        name = f"killed {num_runs}"
        # every second run writes its checkpoints in the background
        flags = ["--max_checkpoint_limit", "3", "--checkpoint_async", "true"] if num_runs % 2 == 0 else []
        num_runs += 1
        while True:
            place = list(PLACES)[sum(landed.values()) % len(PLACES)]
            _, calls, seconds = PLACES[place]
            # soon enough for several kills of a run
            call = draw.randint(1, max(2, calls // 5))
            prepare = partial(die_in, place, call, draw.uniform(0, seconds))
            code = wait(runs.start(name, *flags, prepare=prepare)[0])
            unfinished += len(list(runs.path(name).glob("checkpoints/.writing_*")))
            if code == -signal.SIGKILL:
                landed[place] += 1
            else:
                demand(code == 0, f"{name} ended with {code}: {runs.read_log(name)}")
                break
            if sum(landed.values()) == count:
                runs.finish(name, *flags)
                break
        demand(runs.fingerprint(name) == expected, f"{name} differs")
        shutil.rmtree(runs.path(name))
    return {"kills": sum(landed.values()), **landed, "runs": num_runs, "half_written_checkpoints": unfinished}


def terminate(runs: Runs, draw: random.Random, count: int) -> dict[str, Any]:
    """Send SIGTERM at random instants: a checkpoint of that step, code 143, and the same run in the end."""
    expected, steps = runs.fingerprint("straight"), []
    for number in range(count):
        name = f"stopped {number}"
        (process,) = runs.start(name)
        demand(runs.wait_for_step(name, process), runs.read_log(name))
        time.sleep(draw.uniform(0, 0.5))
        os.kill(process, signal.SIGTERM)
        code = wait(process)
        step = runs.count_steps(name)
        demand(code == 143, f"{name} ended with {code}: {runs.read_log(name)}")
        demand(find_checkpoint(runs.path(name)).name == f"step_{step:08d}", f"{name} did not save step {step}")
        runs.finish(name)
        # a run stopped at a save validates there after it resumes, so that its metrics are the same too
        demand(runs.fingerprint(name) == expected, f"{name} differs")
        steps.append(step)
    return {"signals": count, "at_steps": steps}


def damage(folder: Path, kind: str, draw: random.Random) -> Path:
    """Damage a checkpoint; return what was damaged."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE_NAME)
    target = draw.choice([*files, folder / COMPLETE_NAME])
    size = target.stat().st_size
    if kind == "cut":
        os.truncate(target, draw.randrange(size))
    elif kind == "flip":
        content = bytearray(target.read_bytes())
        content[draw.randrange(size)] ^= 1 << draw.randrange(8)
        target.write_bytes(content)
    elif kind == "missing":
        target.unlink()
    elif kind == "empty":
        target.write_bytes(b"")
    elif kind == "longer":
        with target.open("ab") as file:
            file.write(draw.randbytes(draw.randint(1, 4096)))
    elif kind == "no mark":
        (folder / COMPLETE_NAME).unlink()
    elif kind == "half renamed":
        folder.rename(folder.with_name(f".writing_{folder.name}"))
    else:
        # the same file of another checkpoint, which is of the same size
        others = [other / target.relative_to(folder) for other in list_step_folders(folder.parents[1])]
        shutil.copyfile(next(other for other in others if other != target and other.is_file()), target)
    return target


def tear(runs: Runs, draw: random.Random, count: int, num_resumes: int) -> dict[str, Any]:
    """Damage the newest checkpoints of copies of a run: the newest whole one is taken, and some copies are resumed."""
    expected, source = runs.fingerprint("straight"), runs.path("straight")
    kinds: Counter[str] = Counter()
    for number in range(count):
        name = f"torn {number}"
        shutil.copytree(source, runs.path(name))
        folders = list_step_folders(runs.path(name))
        num_damaged = draw.choice([1, 1, 1, 2, len(folders)])
        touched = []
        for folder in folders[:num_damaged]:
            kind = DAMAGES[(number + len(touched)) % len(DAMAGES)]
            before = _read_all(folder)
            touched.append(damage(folder, kind, draw))
            if _read_all(folder) == before:  # COMPLETE of another checkpoint was as long by chance, and equal
                touched.pop()
                break
            kinds[kind] += 1
        whole = folders[len(touched)] if len(touched) < len(folders) else None
        try:
            found = find_checkpoint(runs.path(name))
        except ValueError as error:
            demand(whole is None and "\n" not in str(error), f"{name}: {error}")
        else:
            demand(found == whole, f"{name}: {found} was taken, not {whole}; {touched}")
            if number < num_resumes:
                runs.finish(name)
                demand(runs.fingerprint(name) == expected, f"{name} differs")
        shutil.rmtree(runs.path(name))
    return {"torn": count, "damaged": sum(kinds.values()), **kinds, "resumed": min(num_resumes, count)}


def _read_all(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[bool]:
    """Mount a disk of this size on a new folder; yields False where that is not allowed."""
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)


def fill_disk(runs: Runs, draw: random.Random) -> dict[str, Any]:
    """Let the disk fill up during a save: one line and code 2; with more room, the same run in the end."""
    size = 300 + draw.randrange(1200)
    with small_disk(runs.path("full"), f"{size}k") as is_mounted:
        if not is_mounted:
            return {"skipped": "mounting a disk is not allowed here"}
        code = wait(runs.start("full")[0])
        error = runs.read_error("full")
        demand(code == 2 and "No space left" in error, f"code {code}: {error}")
        subprocess.run(["mount", "-o", "remount,size=64m", str(runs.path("full"))], check=True)
        runs.finish("full")
        demand(runs.fingerprint("full") == runs.fingerprint("straight"), "the run differs")
    return {"disk_kb": size, "error": error}


def lose_rank(runs: Runs, draw: random.Random, number: signal.Signals, num_ranks: int) -> dict[str, Any]:
    """Kill or stop one of several ranks: each other one ends with a line that names it; the run resumes exactly."""
    straight, name = f"straight of {num_ranks}", f"{number.name} of {num_ranks}"
    if not runs.path(straight).exists():
        runs.finish(straight, num_ranks=num_ranks)
    lost = draw.randrange(num_ranks)
    processes = runs.start(name, "--distributed.timeout_s", "5", num_ranks=num_ranks)
    demand(runs.wait_for_step(name, processes[0]), runs.read_log(name))
    time.sleep(draw.uniform(0, 0.5))
    os.kill(processes[lost], number)
    started = time.monotonic()
    others = [rank for rank in range(num_ranks) if rank != lost]
    codes = [wait(processes[rank]) for rank in others]
    seconds = time.monotonic() - started
    with suppress(ProcessLookupError):
        os.kill(processes[lost], signal.SIGKILL)
    wait(processes[lost])
    demand(set(codes) == {2}, f"codes {codes}: {runs.read_log(name, others[0])}")
    errors = [runs.read_error(name, rank) for rank in others]
    for error in errors:
        named = {int(number) for number in re.findall(r"rank (\d+) on ", error)}
        demand(named == {lost}, f"rank {lost} was lost, but: {error}")
    runs.finish(name, num_ranks=num_ranks)
    demand(runs.fingerprint(name) == runs.fingerprint(straight), f"{name} differs")
    return {"ranks": num_ranks, "lost": lost, "seconds": round(seconds, 1), "error": errors[0]}


def lose_loader(runs: Runs, draw: random.Random) -> dict[str, Any]:
    """Kill a loader process: the run says so in one line, and resumes exactly."""
    (process,) = runs.start("loader", "--data.num_workers", "1", environment={"MARK_OF_RUN": str(runs.folder)})
    demand(runs.wait_for_step("loader", process), runs.read_log("loader"))
    mark = f"MARK_OF_RUN={runs.folder}".encode()
    workers = [pid for pid in _list_processes(mark) if pid != process]
    # the newest is the worker; before it came the server that it is a fork of
    os.kill(max(workers), signal.SIGKILL)
    code = wait(process)
    error = runs.read_error("loader")
    demand(code == 2, f"code {code}: {error}")
    runs.finish("loader")
    demand(runs.fingerprint("loader") == runs.fingerprint("straight"), "the run differs")
    return {"error": error}


def _list_processes(mark: bytes) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def poison(positions: set[int] | None) -> None:
    """Make this process find NaN in the loss of microbatches with these samples of the plan; None: of all."""

    class Poisoned(TextBatchHandler):
        def prepare(self, batch: Any, device: Any) -> dict[str, Any]:
            is_bad = positions is None or bool(positions & {int(position) for position in batch["positions"]})
            return {**super().prepare(batch, device), "z_loss_coefficient": float("nan") if is_bad else 0.0}

    BATCH_HANDLERS.get("transformer")
    BATCH_HANDLERS._entries["transformer"] = Poisoned


def poison_data(runs: Runs, draw: random.Random) -> dict[str, Any]:
    """Give NaN in some steps: these updates are skipped and counted, over a kill too; in all steps: one line."""
    steps = sorted(draw.sample(range(20, NUM_STEPS), 5))
    bad = {step * BATCH + draw.randrange(BATCH) for step in steps}
    runs.finish("poisoned", prepare=partial(poison, bad))

    def poison_and_die() -> None:
        poison(bad)
        die_in("step", draw.randint(steps[1], steps[3]), 0.002)

    demand(wait(runs.start("poisoned and killed", prepare=poison_and_die)[0]) == -signal.SIGKILL, "it was not killed")
    runs.finish("poisoned and killed", prepare=partial(poison, bad))
    found = runs.fingerprint("poisoned")
    demand(runs.fingerprint("poisoned and killed") == found, "the runs differ")
    skipped = [step for step, loss in found["losses"] if loss is None]
    demand(skipped == [step + 1 for step in steps], f"steps {skipped} were skipped, not those after {steps}")
    code = wait(runs.start("rotten", "--hparams.max_skipped_steps", "7", prepare=partial(poison, None))[0])
    error = runs.read_error("rotten")
    demand(code == 2 and "not finite" in error, f"code {code}: {error}")
    return {"skipped": len(steps), "error": error}


def disturb_store(runs: Runs, draw: random.Random, folder: Path) -> dict[str, Any]:
    """Train from and copy to an object store that fails, is slow and cuts connections; then one that is gone."""
    with serve_faulty_store(draw.random(), runs.folder.parent / "data") as store:
        remote = Runs(folder, f"{store.bucket}/data/manifest.jsonl")
        environment, flags = store.environment, ["--remote_sync", f"{store.bucket}/runs"]
        flags += ["--data.dataset_cache.cache_dir", str(folder / "cache")]
        store.rate = 0.15
        remote.finish("remote", *flags, environment=environment)
        shutil.rmtree(remote.path("remote"))
        # all that is left is the copy, whose newest checkpoint is of the last step
        remote.finish("remote", *flags, environment=environment)
        demand(remote.fingerprint("remote")["tensors"] == runs.fingerprint("straight")["tensors"], "the run differs")
        faults = dict(store.faults)
        store.rate = 1.0
        shutil.rmtree(folder / "cache")
        quick = {**environment, "AWS_MAX_ATTEMPTS": "2"}
        code = wait(remote.start("gone", *flags, environment=quick)[0])
        error = remote.read_error("gone")
        demand(code == 2, f"code {code}: {error}")
    return {"requests": store.num_requests, **faults, "error": error}


def resize(runs: Runs, draw: random.Random) -> dict[str, Any]:
    """Stop a run and go on with other ranks and wrappers, in random order; losses stay those of one process."""
    order = [*WRAPPERS[1:], *WRAPPERS]
    draw.shuffle(order)
    for place, (_, num_ranks, flags) in enumerate(order, start=1):
        limit = ["--distributed.timeout_s", "60", *flags]
        if place == len(order):
            runs.finish("resized", *limit, num_ranks=num_ranks)
            break
        processes = runs.start("resized", *limit, num_ranks=num_ranks)
        demand(runs.wait_for_step("resized", processes[0]), runs.read_log("resized"))
        while runs.count_steps("resized") < place * NUM_STEPS // len(order) and not is_over(processes[0]):
            time.sleep(0.005)
        for process in processes:
            os.kill(process, signal.SIGTERM)
        codes = {wait(process) for process in processes}
        demand(codes <= {143, 0}, f"codes {codes}: {runs.read_log('resized')}")
    pairs = zip(runs.fingerprint("straight")["losses"], runs.fingerprint("resized")["losses"], strict=True)
    worst = max(abs(one[1] - other[1]) / abs(one[1]) for one, other in pairs)
    demand(worst < 1e-5, f"losses differ by {worst:.1e}")
    return {"order": [name for name, *_ in order], "largest_relative_difference": float(f"{worst:.1e}")}


def list_cases(
    arguments: argparse.Namespace, runs: Runs, draw: random.Random
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the cases by name."""
    ranks = {
        f"{what} rank of {count}": partial(lose_rank, runs, draw, number, count)
        for what, number in (("dead", signal.SIGKILL), ("hung", signal.SIGSTOP))
        for count in ((2, 4) if arguments.kills >= 20 else (2,))
    }
    return {
        "kill": partial(kill_often, runs, draw, arguments.kills),
        "term": partial(terminate, runs, draw, max(1, arguments.kills // 6)),
        "torn": partial(tear, runs, draw, arguments.torn, max(1, arguments.torn // 20)),
        "disk": partial(fill_disk, runs, draw),
        "nan": partial(poison_data, runs, draw),
        **ranks,
        "loader": partial(lose_loader, runs, draw),
        "store": partial(disturb_store, runs, draw, runs.folder.parent / "remote"),
        "resize": partial(resize, runs, draw),
    }


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5, help="processes to kill")
    parser.add_argument("--torn", type=int, default=16, help="checkpoints to damage")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    parser.add_argument(
        "--cases", nargs="+", metavar="CASE", help="kill term torn disk nan dead hung loader store resize"
    )
    parser.add_argument("--output", type=Path, help="a file that the lines are appended to as well")
    arguments = parser.parse_args()
    if min(arguments.kills, arguments.torn) < 0:
        parser.error("--kills and --torn must not be below 0.")
    if arguments.output is not None and not arguments.output.parent.is_dir():
        parser.error(f"--output {arguments.output}: its folder does not exist.")
    return arguments


def main() -> int:
    """Run the cases one after the other."""
    arguments = parse()
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    is_good = True
    with tempfile.TemporaryDirectory(prefix="faults_", ignore_cleanup_errors=True) as place:
        runs = Runs(Path(place, "local"), str(write_dataset(Path(place, "data"))))
        runs.finish("straight")
        for name, case in list_cases(arguments, runs, random.Random(arguments.seed)).items():
            if arguments.cases and name.split()[0] not in arguments.cases:
                continue
            started, passed = time.perf_counter(), True
            try:
                found = case()
            except Failure as error:
                found, passed, is_good = {"failure": str(error)}, False, False
            line = {"case": name, "passed": passed, "seed": arguments.seed, **found}
            text = json.dumps({**line, "case_s": round(time.perf_counter() - started, 1)})
            print(text, flush=True)
            if arguments.output is not None:
                with arguments.output.open("a", encoding="utf-8") as file:
                    file.write(f"{text}\n")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
