"""The queue: what may run, and what becomes of jobs whose files, processes or dashboards are gone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.essential.processes import is_group_running
from vla_foundry.evaluation.dashboard.jobs import FOLDER_NAME, Job, Queue, _identify, read_job, write_job

FLAGS = {"policy": "null", "tasks": "easy", "episodes": "0:4", "simulator": "toy", "num_workers": "1"}


def path_of(queue: Queue, job: Job) -> Path:
    return queue.folder / f"{job.id}.job"


def wait_for(queue: Queue, condition: Callable[[], bool], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, queue.jobs()
        queue.step()
        time.sleep(0.1)


def num_trials(queue: Queue, job: Job) -> int:
    now = queue.find(job.id)
    found = queue.progress(now) if now else None
    assert found is not None
    return found[0].num_trials


def test_only_evaluations_of_allowed_folders_are_queued(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "vla"
    run.mkdir(parents=True)
    (run / "config_model.yaml").touch()
    (tmp_path / "runs" / "away").symlink_to("/")
    results = tmp_path / "results"
    results.mkdir()
    queue = Queue(results, checkpoints=[str(tmp_path / "runs")])
    job = queue.add({"checkpoint": f"{run}/../vla", "tasks": "easy", "until_decided": "CS/LBM-MT", "name": ""})
    assert (job.name, job.flags["checkpoint"]) == ("vla", str(run))
    assert queue.words(job.flags) == [
        *("evaluate", f"--output={results}", f"--checkpoint={run}", "--tasks=easy"),
        *("--until_decided=CS/LBM-MT", "--name=vla"),
    ]
    assert queue.words({"policy": "null", "until_decided": "other"})[-1] == f"--until_decided={results}/other"
    wrong = {
        "outside the folders of --checkpoints": {"checkpoint": "/etc"},
        "outside the folders": {"checkpoint": f"{tmp_path}/runs/away/etc"},
        "does not exist": {"checkpoint": f"{tmp_path}/runs/none"},
        "'output' is unknown": {"policy": "null", "output": "/tmp"},
        "'plugins' is unknown": {"policy": "null", "plugins": "os"},
        "'lbm.command' is unknown": {"policy": "null", "lbm.command": "id"},
        "name must be the name of a folder": {"policy": "null", "name": "../x"},
        "episodes must be first:end": {"policy": "null", "episodes": "all"},
        "must be a policy in": {"policy": "null", "until_decided": "../../etc"},
        "tasks must be a value": {"policy": "null", "tasks": "include /etc/passwd"},
        "tasks must be a value, not": {"policy": "null", "tasks": "[!include /etc/passwd]"},
        "Give either a checkpoint": {"tasks": "easy"},
        "batch_size must be a whole number": {"policy": "null", "batch_size": "--device"},
    }
    for message, flags in wrong.items():
        with pytest.raises((ValueError, OSError), match=message):
            queue.add(flags)
    assert [found.id for found in queue.jobs()] == [job.id]


def test_a_job_file_that_is_none_is_shown_and_can_be_removed(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    job = queue.add(FLAGS | {"policy": "expert", "simulator": "metaworld"})
    good = json.loads(path_of(queue, job).read_text(encoding="utf-8"))
    wrong: list[object] = ["{", "[]", {}, good | {"state": "new"}, good | {"since": "now"}, good | {"flags": [1]}]
    wrong += [good | {"pid": True}, good | {"id": "x"}, good | {"flags": {"a": 1}}, good | {"since": float("inf")}]
    wrong += [good | {"pid": "1"}, good | {"note": "x" * 100_000}]
    for number, values in enumerate(wrong):
        text = values if isinstance(values, str) else json.dumps(values)
        (queue.folder / f"wrong{number}.job").write_text(text, encoding="utf-8")
    (queue.folder / "folder.job").mkdir()
    (queue.folder / "<b>.job").touch()
    # flags that are not allowed never run, and others' processes are never ended
    write_job(queue.folder / "evil.job", replace(job, id="evil", flags=job.flags | {"output": "/tmp"}))
    process = {"pid": os.getpid(), "host": os.uname().nodename, "identity": _identify(os.getpid())}
    write_job(queue.folder / "mine.job", job.become("running", **process))
    queue.remove(job.id)
    queue.stop("mine")
    queue.step()
    states = {found.id: found.state for found in queue.jobs()}
    assert states.pop("evil") == "failed"
    assert states.pop("mine") == "stopped"
    assert states == {f"wrong{number}": "broken" for number in range(len(wrong))} | {"folder": "broken"}
    queue.remove("wrong0")
    assert "wrong0" not in {found.id for found in queue.jobs()}
    assert queue.find("../../x") is None


@pytest.fixture
def queue_that_ends(tmp_path: Path, toy_simulator: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    """A queue in tmp_path whose processes find the toy simulator, and end with the test."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    queue = Queue(tmp_path)
    yield queue
    for job in queue.jobs():
        if job.pid:
            os.killpg(job.pid, signal.SIGKILL)
    for process in queue.started:
        process.wait()


@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_jobs_run_one_at_a_time_and_outlive_the_dashboard(tmp_path: Path, queue_that_ends: Queue) -> None:
    queue = queue_that_ends
    long = queue.add(FLAGS | {"name": "long", "episodes": "0:10000", "batch_size": "2"})
    dies = queue.add(FLAGS | {"name": "dies", "tasks": "nowhere"})
    done = queue.add(FLAGS | {"name": "done"})
    wait_for(queue, lambda: num_trials(queue, long) > 3)
    assert [job.state for job in queue.jobs()] == ["queued", "queued", "running"]
    # another dashboard finds it, and ends the whole group
    later = Queue(tmp_path)
    later.step()
    running = later.find(long.id)
    assert running is not None
    later.stop(long.id)
    wait_for(later, lambda: read_job(path_of(later, long)).state == "stopped")
    for process in queue.started:
        process.wait(60)  # it is a child of this process, which stays until it is waited for
    wait_for(later, lambda: not is_group_running(running.pid))
    wait_for(later, lambda: read_job(path_of(later, done)).state == "done")
    failed = read_job(path_of(later, dies))
    assert failed.state == "failed"
    assert failed.note.startswith("error: toy task 'nowhere' is unknown.")
    assert failed.note in later.log(failed)
    assert num_trials(later, done) == 4
    # it goes on where it was; a process that is killed is noticed
    before = json.loads(next(tmp_path.glob("long/easy/rollouts/*/results.json")).read_text(encoding="utf-8"))
    later.resume(long.id)
    wait_for(later, lambda: num_trials(later, long) > before["num_evaluated"])
    leader = read_job(path_of(later, long)).pid
    os.kill(leader, signal.SIGKILL)
    wait_for(later, lambda: read_job(path_of(later, long)).state == "failed")
    wait_for(later, lambda: not is_group_running(leader))
    assert "without a word" in read_job(path_of(later, long)).note
    for process in later.started:
        process.wait(60)


def test_a_process_of_the_same_number_is_another_process(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    job = queue.add(FLAGS | {"simulator": "metaworld"})
    words = [sys.executable, "-c", "print(flush=True); input()", str(path_of(queue, job))]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        # until it runs, it has no command line yet
        assert other.stdout is not None
        other.stdout.readline()
        identity = _identify(other.pid)
        assert str(path_of(queue, job)) in identity
        for wrong in (identity.replace(" ", " 1", 1), "", "x"):
            process = {"pid": other.pid, "host": os.uname().nodename, "identity": wrong}
            write_job(path_of(queue, job), job.become("running", **process))
            queue.stop(job.id)
            queue.step()
            assert read_job(path_of(queue, job)).state == "stopped"
            assert other.poll() is None
        other.communicate(b"\n")
    assert not _identify(other.pid)
    assert queue.folder.name == FOLDER_NAME
