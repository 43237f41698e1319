"""A queue of evaluations as files, so that any number of browsers, dashboards and restarts see the same.

<results>/.dashboard/<id>.job   an evaluation: its flags, its state, and the process that runs it (JSON)
<results>/.dashboard/<id>.log   what it printed
<results>/.dashboard/.lock      held by whoever reads a job in order to change it

`python -m vla_foundry.evaluation.dashboard.jobs JOB WORD...` runs a job and notes how it ended. It leads a session of
its own, so it outlives the dashboard that started it.
"""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from vla_foundry.config.command_line import named_plugins, parse
from vla_foundry.evaluation.comparison.published import published_counts
from vla_foundry.evaluation.results import ROLLOUTS_FOLDER, SuccessRate, count_successes, find_results, read_results
from vla_foundry.inference.loading import find_run_folder
from vla_foundry.params.commands.evaluation import EvaluateParams
from vla_foundry.parsing import parse_object
from vla_foundry.registry import unknown_name_message
from vla_foundry.run_folder import hold_lock
from vla_foundry.storage.uri import name_of, write_text

FOLDER_NAME = ".dashboard"
PASSWORD_VARIABLE = "VLA_FOUNDRY_PASSWORD"
# flags of `evaluate` that a browser may set; others name files, servers or programs
FLAGS = [
    *("checkpoint", "policy", "name", "simulator", "tasks", "episodes", "max_sample_size", "until_decided", "seed"),
    *("alpha", "max_steps", "open_loop_steps", "num_inference_steps", "use_ema", "device", "batch_size", "num_workers"),
    *("simulated_latency_ms", "execution", "ensemble_decay", "images", "num_pictured", "camera", "image_size"),
]
State = Literal["queued", "running", "stopping", "stopped", "failed", "done", "broken"]
_ID = re.compile(r"[\w-]{1,64}", re.ASCII)
_INCLUDE = re.compile(r"!include|\binclude\s*[: ]")
_MAX_BYTES, _MAX_NOTE = 64 << 10, 1000
# an evaluation that does not end this long after SIGTERM is killed; one that does not start in this time has failed
_STOP_S, _START_S = 20.0, 300.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """An evaluation in the queue."""

    id: str
    state: State
    # since when it is in this state, seconds since 1970
    since: float
    # of `vla-foundry evaluate`, as words
    flags: Mapping[str, str]
    # why it failed, or why the file cannot be read
    note: str = ""
    # the process that runs it, 0: none; its machine; and what tells it from a later process of this number
    pid: int = 0
    host: str = ""
    identity: str = ""

    @property
    def name(self) -> str:
        """Return the name of the policy in the results."""
        return self.flags.get("name", "")

    @property
    def is_active(self) -> bool:
        """Return whether a process runs it."""
        return self.state in ("running", "stopping")

    def become(self, state: State, note: str = "", **process: Any) -> "Job":
        """Return the job in another state."""
        return replace(
            self, **({"pid": 0, "host": "", "identity": ""} | process), state=state, since=time.time(), note=note
        )


_TYPES = {"state": str, "since": float, "flags": dict, "note": str, "pid": int, "host": str, "identity": str}


def read_job(path: Path) -> Job:
    """Read a job; a file that is none gives a job in state `broken`."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            raise ValueError("it is not a small file.")
        values = parse_object(path.read_bytes(), path.name, finite=True)
        if {name: type(value) for name, value in values.items()} != _TYPES or values["state"] not in get_args(State):
            raise ValueError("a value is missing, unknown or of the wrong type.")
        if not all(isinstance(text, str) for text in values["flags"].values()):
            raise ValueError("flags must be text.")
        return Job(id=path.stem, **values)
    except (OSError, ValueError) as error:
        return Job(id=path.stem, state="broken", since=0.0, flags={}, note=f"{path.name} is no job: {error}")


def write_job(path: Path, job: Job) -> None:
    """Write a job whole or not at all."""
    write_text(str(path), json.dumps({name: getattr(job, name) for name in _TYPES}, indent=1) + "\n")


class Queue:
    """The evaluations of a folder of results."""

    def __init__(self, root: Path, *, checkpoints: Sequence[str] = (), parallel: int = 1) -> None:
        self.root = root.resolve()
        self.folder = self.root / FOLDER_NAME
        # folders whose checkpoints may be evaluated
        self.checkpoints = [Path(folder).expanduser().resolve() for folder in checkpoints]
        self.parallel = parallel
        # so that processes that ended are not left behind
        self.started: list[subprocess.Popen] = []
        # of jobs in a state, by id and since when
        self._progress: dict[tuple[str, float], tuple[SuccessRate, int] | None] = {}

    def jobs(self) -> list[Job]:
        """Return all jobs, the oldest first."""
        found = [read_job(path) for path in self.folder.glob("*.job") if _ID.fullmatch(path.stem)]
        return sorted(found, key=lambda job: (job.since, job.id))

    def find(self, job_id: str) -> Job | None:
        """Return a job by its id."""
        return next((job for job in self.jobs() if job.id == job_id), None)

    def add(self, flags: Mapping[str, str]) -> Job:
        """Queue an evaluation.

        Raises:
            ValueError: a flag is unknown or wrong, or names a folder that is not allowed.
        """
        flags = {name: text.strip() for name, text in flags.items() if text.strip()}
        params = self._parse(flags)
        flags["name"] = params.name or params.policy
        if params.checkpoint is not None:
            flags["checkpoint"] = str(Path(params.checkpoint).resolve())
            flags["name"] = params.name or name_of(find_run_folder(flags["checkpoint"]))
        job_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        job = Job(id=job_id, state="queued", since=time.time(), flags=flags)
        with self._locked():
            self._write(job)
        return job

    def words(self, flags: Mapping[str, str]) -> list[str]:
        """Return the command line of an evaluation, after `vla-foundry`.

        Raises:
            ValueError: a flag is wrong, or names a folder that is not allowed.
        """
        self._parse(flags)
        baseline = flags.get("until_decided")
        if baseline and not (baseline in published_counts() and not (self.root / baseline).exists()):
            flags = {**flags, "until_decided": str(self._inside(baseline))}
        plugins = [f"--plugins={name}" for name in named_plugins()]
        return ["evaluate", f"--output={self.root}", *plugins, *(f"--{name}={text}" for name, text in flags.items())]

    def _parse(self, flags: Mapping[str, str]) -> EvaluateParams:
        for name, text in flags.items():
            if name not in FLAGS:
                raise ValueError(unknown_name_message("flag of the dashboard", name, FLAGS))
            # it would read a file, and messages would show it
            if _INCLUDE.search(text):
                raise ValueError(f"{name} must be a value, not '{text[:40]}'.")
        words = [f"--output={self.root}", *(f"--{name}={text}" for name, text in flags.items())]
        params: EvaluateParams = parse(EvaluateParams, words, prog="vla-foundry evaluate").params
        if params.checkpoint is not None:
            place = Path(params.checkpoint).resolve()
            if not any(place.is_relative_to(folder) for folder in self.checkpoints):
                allowed = ", ".join(str(folder) for folder in self.checkpoints) or "none"
                raise ValueError(f"checkpoint {params.checkpoint} is outside the folders of --checkpoints: {allowed}.")
        if params.until_decided is not None:
            self._inside(params.until_decided)
        return params

    def _inside(self, name: str) -> Path:
        place = (self.root / name).resolve()
        if not place.is_relative_to(self.root) or place == self.root:
            raise ValueError(f"until_decided must be a policy in {self.root} or a published one, not '{name[:80]}'.")
        return place

    def stop(self, job_id: str) -> None:
        """Take a job out of the queue, or end the processes that run it; what they have written stays."""
        with self._locked():
            job = self.find(job_id)
            if job is not None and job.state == "queued":
                self._write(job.become("stopped"))
            elif job is not None and job.is_active:
                self._write(job.become("stopping", pid=job.pid, host=job.host, identity=job.identity))
                self._signal(job, signal.SIGTERM)

    def resume(self, job_id: str) -> None:
        """Queue a job again: it runs the episodes that are missing."""
        with self._locked():
            job = self.find(job_id)
            if job is not None and job.state in ("stopped", "failed", "done"):
                self._write(job.become("queued"))

    def remove(self, job_id: str) -> None:
        """Forget a job that does not run; its results stay."""
        with self._locked():
            job = self.find(job_id)
            if job is not None and not job.is_active:
                for suffix in (".job", ".log"):
                    self._path(job, suffix).unlink(missing_ok=True)

    def step(self) -> None:
        """Note what ended, kill what does not stop, and start what is next."""
        if not self.folder.is_dir():
            return
        self.started = [process for process in self.started if process.poll() is None]
        with self._locked():
            jobs = [self._watch(job) for job in self.jobs()]
            busy = [job.name for job in jobs if job.is_active]
            for job in jobs:
                if job.state == "queued" and len(busy) < self.parallel and job.name not in busy:
                    self._start(job)
                    busy.append(job.name)

    def _watch(self, job: Job) -> Job:
        if not job.is_active or job.host not in ("", socket.gethostname()):
            return job
        seconds = time.time() - job.since
        if job.pid == 0 and seconds < _START_S:
            return job
        if self._is_alive(job):
            if job.state == "stopping" and seconds > _STOP_S:
                self._signal(job, signal.SIGKILL)
            return job
        note = "its process ended without a word: killed, or the machine was restarted"
        job = job.become("stopped") if job.state == "stopping" else job.become("failed", note)
        self._write(job)
        return job

    def _start(self, job: Job) -> None:
        try:
            words = self.words(job.flags)
        except (ValueError, OSError) as error:
            self._write(job.become("failed", str(error)))
            return
        self._write(job.become("running"))
        module = [sys.executable, "-m", "vla_foundry.evaluation.dashboard.jobs", str(self._path(job, ".job"))]
        environment = {name: text for name, text in os.environ.items() if name != PASSWORD_VARIABLE}
        with self._path(job, ".log").open("ab") as log:
            process = subprocess.Popen(
                [*module, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment,
            )
        self.started.append(process)

    def _is_alive(self, job: Job) -> bool:
        """Return whether this machine's process still runs the job; a file that names another one is not believed."""
        is_here = job.pid > 1 and job.host == socket.gethostname() and str(self._path(job, ".job")) in job.identity
        return is_here and _identify(job.pid) == job.identity

    def _signal(self, job: Job, number: int) -> None:
        if self._is_alive(job):
            with suppress(ProcessLookupError):
                os.killpg(job.pid, number)

    def log(self, job: Job) -> str:
        """Return the end of what a job printed."""
        path = self._path(job, ".log")
        return read_end(path) if path.is_file() and path.resolve().parent == self.folder.resolve() else ""

    def progress(self, job: Job) -> tuple[SuccessRate, int] | None:
        """Return the outcomes of a job's episodes so far, and how many episodes it is to run; None: unknown."""
        key = (job.id, job.since)
        if job.is_active or key not in self._progress:
            try:
                self._progress[key] = self._count(job)
            except (ValueError, OSError):
                self._progress[key] = None
        return self._progress[key]

    def _count(self, job: Job) -> tuple[SuccessRate, int]:
        params, folder = self._parse(job.flags), self.root / job.name
        tasks = params.tasks or [path.parent.name for path in folder.glob(f"*/{ROLLOUTS_FOLDER}")]
        files = [path for task in tasks if (path := find_results(folder / task))]
        episodes = [episode for path in files for episode in read_results(path)[0] if episode.seed in params.seeds]
        return count_successes(episodes), len(tasks) * len(params.seeds)

    def _path(self, job: Job, suffix: str) -> Path:
        return self.folder / f"{job.id}{suffix}"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(exist_ok=True)
        with hold_lock(self.folder / ".lock", wait=True):
            yield

    def _write(self, job: Job) -> None:
        write_job(self._path(job, ".job"), job)


def read_end(path: Path, *, max_bytes: int = 16 << 10) -> str:
    """Return the last bytes of a file as text."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - max_bytes))
        return file.read(max_bytes).decode("utf-8", "replace")


def _identify(pid: int) -> str:
    """Return when a process started, and its command line; "" if there is none, or only its exit code is left."""
    try:
        status, words = (Path(f"/proc/{pid}/{name}").read_bytes() for name in ("stat", "cmdline"))
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        # not Linux
        words = ["ps", "-o", "lstart=,command=", "-p", str(pid)]
        with suppress(OSError):
            return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
        return ""
    # the 22nd field; the second one may hold anything, in parentheses
    start = status.rpartition(b")")[2].split()[19].decode()
    return f"{boot} {start} {words.replace(bytes(1), b' ').decode('utf-8', 'replace').strip()}" if words else ""


def end_with_parent() -> None:
    """Have this process terminated when the one that started it is killed: nobody could stop it any more."""
    # PR_SET_PDEATHSIG of Linux
    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def main(path: Path, words: list[str]) -> None:
    """Run a job in this process's session: note the process, run the command, and note how it ended."""
    # the command gets the signal too, and this process must see how it ends
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    lock = path.with_name(".lock")
    with hold_lock(lock, wait=True):
        job = read_job(path)
        if job.state != "running" or job.pid:
            if job.state == "stopping":
                write_job(path, job.become("stopped"))
            return
        pid = os.getpid()
        write_job(path, job.become("running", pid=pid, host=socket.gethostname(), identity=_identify(pid)))
    sys.stderr.write(f"$ {' '.join(['vla-foundry', *words])}\n")
    sys.stderr.flush()
    command = [sys.executable, "-m", "vla_foundry.cli", *words]
    code = subprocess.call(command, stdin=subprocess.DEVNULL, preexec_fn=end_with_parent)
    with hold_lock(lock, wait=True):
        job = read_job(path)
        # it may have been removed by hand meanwhile
        if job.is_active:
            state = "stopped" if job.state == "stopping" else "failed" if code else "done"
            write_job(path, job.become(state, _describe_failure(path, code) if state == "failed" else ""))


def _describe_failure(path: Path, code: int) -> str:
    """Return what the log's last line says if it is an error, or else the exit code."""
    last = read_end(path.with_suffix(".log")).strip().rpartition("\n")[2]
    return last[:_MAX_NOTE] if last.startswith("error: ") else f"exit code {code}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
