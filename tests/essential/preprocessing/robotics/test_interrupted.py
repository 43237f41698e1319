"""A job that is killed, uncatchably and at any moment, goes on to the same bytes."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

RIG = Path(__file__).with_name("rig_converter.py")
LENGTHS = [12] * 12


@pytest.fixture(scope="module")
def source(tmp_path_factory, write_episodes) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_episodes(folder, LENGTHS)
    return folder


@pytest.fixture(scope="module")
def processes() -> Iterator[BaseContext]:
    """Starts processes that have imported what a job needs, so that they are at work at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RIG.parent))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "rig_converter", "vla_foundry.preprocessing.robotics.robotics_job"])
        yield context


def job_options(source: Path, output: Path, **options: Any) -> dict[str, Any]:
    return {
        "source_episodes": [str(source)],
        "output_dir": str(output),
        "num_workers": 0,
        "past_lowdim_steps": 2,
        "future_lowdim_steps": 3,
        "samples_per_shard": 10,
        "seconds_per_frame": 0.002,
        **options,
    }


def dataset_files(folder: Path) -> dict[str, bytes]:
    """{path: content} of all that is in a dataset, but for the seconds that stages took and the commit of the code."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name, key in (("report", "seconds"), ("provenance", "git_commit"), ("processing_metadata", "git_info")):
        values = json.loads(files[f"{name}.json"])
        values.pop(key)
        files[f"{name}.json"] = json.dumps(values).encode()
    return files


def count_done(output: Path) -> int:
    return len(list(output.glob("_progress/task_*.json")))


def wait_for(is_time: Callable[[], bool], is_alive: Callable[[], bool]) -> None:
    stop = time.monotonic() + 180
    while not is_time():
        assert is_alive(), "the process ended before it could be killed"
        assert time.monotonic() < stop
        time.sleep(0.0005)


def kill_when_done(process: Any, output: Path, *, num_tasks: int, seconds: float) -> None:
    """Kill a job some seconds after so many of its tasks are done, and make sure that it was at work."""
    wait_for(lambda: (output / "_progress").exists() and count_done(output) >= num_tasks, process.is_alive)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    # some of it is there, and it is not finished
    assert (output / "_progress" / "plan.json").exists()
    assert not (output / "manifest.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["episodes", "samples"])
def test_five_kills_at_random_moments_change_no_byte(layout, tmp_path, rig, source, processes):
    chosen, moments = random.Random(f"20261121 {layout}"), set()
    started = time.monotonic()
    rig.run_job(job_options(source, tmp_path / "expected" / "out", layout=layout))
    expected = dataset_files(tmp_path / "expected" / "out")
    num_shards = sum(name.endswith(".tar") for name in expected)
    num_tasks = num_shards if layout == "episodes" else len(LENGTHS) + num_shards
    seconds_per_task = (time.monotonic() - started) / num_tasks
    for number in range(5):
        output = tmp_path / str(number) / "out"
        options = job_options(source, output, layout=layout)
        process = processes.Process(target=rig.run_job, args=(options,))
        process.start()
        # after some tasks, and some way into the next
        seconds = chosen.uniform(0, 0.7 * seconds_per_task)
        kill_when_done(process, output, num_tasks=chosen.randrange(num_tasks), seconds=seconds)
        moments.add(count_done(output))
        rig.run_job(options)
        assert dataset_files(output) == expected
    assert len(moments) >= 3, moments


@pytest.mark.slow
def test_a_kill_on_ray_changes_no_byte(tmp_path, rig, source):
    """The whole command, which starts Ray itself and finds its plug-in in the working directory."""
    rig.run_job(job_options(source, tmp_path / "expected" / "out"))
    (tmp_path / "rig_converter.py").write_text(RIG.read_text(encoding="utf-8"), encoding="utf-8")
    output = tmp_path / "killed" / "out"
    options = job_options(source, output, num_workers=2, seconds_per_frame=0.002)
    options["source_episodes"] = source
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "vla_foundry.cli", "preprocess", "robotics", "--plugins", "rig_converter"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start() -> subprocess.Popen:
        return subprocess.Popen([*command, "--type", "rig", *words], cwd=tmp_path, env=environment)

    process = start()
    try:
        wait_for(lambda: count_done(output) >= 3, lambda: process.poll() is None)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 3 <= count_done(output) < len(LENGTHS)
    assert not (output / "manifest.jsonl").exists()
    again = start()
    try:
        assert again.wait(timeout=300) == 0
    finally:
        again.kill()
    found, expected = dataset_files(output), dataset_files(tmp_path / "expected" / "out")
    assert found.pop("preprocessing_config.yaml") != expected.pop("preprocessing_config.yaml")  # it names the workers
    assert found == expected
