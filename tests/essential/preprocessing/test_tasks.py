"""Tasks run on Ray and here alike: failures are tried again, then reported by name, and never lost."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vla_foundry.preprocessing.tasks import Task, ray_cluster, run_tasks


def create_tasks(folder: Path, num_tasks: int = 5) -> list[Task]:
    return [Task(number=n, name=f"file {n}", weight=10, payload=str(folder / f"{n}")) for n in range(num_tasks)]


def square(shared: int, task: Task) -> int:
    return shared + task.number**2


def fail_twice(shared: str, task: Task) -> int:
    """Fail on the first two calls for each task: by an error, or by the death of the worker."""
    calls = len(list(Path(task.payload).parent.glob(f"{task.number}_*")))
    Path(f"{task.payload}_{calls}").touch()
    if calls < 2 and task.number == 3:
        if shared == "die":
            os._exit(1)
        raise RuntimeError("out of luck")
    return task.number


def fail(shared: type, task: Task) -> None:
    Path(f"{task.payload}_{time.monotonic_ns()}").touch()
    if task.number == 2:
        raise shared("no\nluck")


@pytest.fixture(autouse=True, scope="module")
def _functions_travel() -> None:
    """Let Ray send this module's functions to its workers, which can not import it."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(params=["here", "ray"])
def num_workers(request: pytest.FixtureRequest) -> int | None:
    if request.param == "here":
        return 0
    request.getfixturevalue("ray_cluster")
    return None


def run(function, folder: Path, shared, num_workers: int | None) -> dict[int, object]:
    found = run_tasks(
        function, create_tasks(folder), shared=shared, title="test", num_workers=num_workers, ray_address=None
    )
    return {task.number: result for task, result in found}


def test_every_task_gives_its_result(tmp_path: Path, num_workers: int | None):
    assert run(square, tmp_path, 100, num_workers) == {n: 100 + n * n for n in range(5)}


def test_failed_task_is_tried_again(tmp_path: Path, num_workers: int | None):
    assert sorted(run(fail_twice, tmp_path, "raise", num_workers)) == list(range(5))
    assert len(list(tmp_path.glob("3_*"))) == 3


def test_dead_worker_is_replaced(tmp_path: Path, ray_cluster: str):
    assert sorted(run(fail_twice, tmp_path, "die", None)) == list(range(5))
    assert len(list(tmp_path.glob("3_*"))) == 3


def test_task_that_keeps_failing_is_named(tmp_path: Path, num_workers: int | None):
    with pytest.raises(ValueError, match=r"^'file 2' failed 3 times, the last time with RuntimeError: no luck$"):
        run(fail, tmp_path, RuntimeError, num_workers)
    assert len(list(tmp_path.glob("2_*"))) == 3


def test_errors_of_the_user_are_not_tried_again(tmp_path: Path, num_workers: int | None):
    with pytest.raises(ValueError, match=r"^no\sluck$"):
        run(fail, tmp_path, ValueError, num_workers)
    assert len(list(tmp_path.glob("2_*"))) == 1


def test_missing_cluster_is_one_line(tmp_path: Path):
    code = (
        "from vla_foundry.preprocessing.tasks import Task, run_tasks\n"
        "task = Task(number=0, name='x', weight=1, payload=None)\n"
        "try: list(run_tasks(print, [task], shared=0, title='t', num_workers=1, ray_address='127.0.0.1:1'))\n"
        "except ValueError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("No Ray cluster answers at --ray_address 127.0.0.1:1: ")


def test_a_ray_that_does_not_start_is_one_line():
    code = (
        "from vla_foundry.preprocessing.tasks import Task, run_tasks\n"
        "task = Task(number=0, name='x', weight=1, payload=None)\n"
        "try: list(run_tasks(print, [task], shared=0, title='t', num_workers=1, ray_address=None))\n"
        "except ValueError as error: print(error)"
    )
    environment = {**os.environ, "RAY_TMPDIR": "/proc/nowhere"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.startswith("Ray does not start (FileNotFoundError: ")
    assert run.stdout.endswith("Give --num_workers 0 to work in this process.\n")


def test_missing_ray_is_one_line():
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from vla_foundry.preprocessing.tasks import Task, run_tasks\n"
        "task = Task(number=0, name='x', weight=1, payload=None)\n"
        "try: list(run_tasks(print, [task], shared=0, title='t', num_workers=1, ray_address=None))\n"
        "except ValueError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "uv pip install 'vla-foundry[preprocessing]', or give --num_workers 0" in run.stdout


def test_progress_is_plain_lines_without_a_terminal(monkeypatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("vla_foundry.progress._SECONDS_BETWEEN_LINES", 0.0)
    run(square, tmp_path, 0, 0)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" after")[0] for line in lines] == [f"test: {20 * n}.0%" for n in range(1, 6)]
    assert all(line.endswith(" s") and "ETA" in line for line in lines)


def test_a_cluster_is_joined_with_the_token_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "restored at the end")
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    for found in (None, "token"):
        with pytest.raises(ValueError, match=r"If it asks for a token"), ray_cluster(None, "127.0.0.1:1"):
            pass
        assert os.environ.get("RAY_AUTH_MODE") == found
        (tmp_path / ".ray").mkdir(exist_ok=True)
        (tmp_path / ".ray/auth_token").write_text("secret", encoding="utf-8")


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.1.0\n    Python: 3.11.7"),
            r"^The Ray cluster at --cluster auto runs other versions\. Install .* with: Ray: 2\.1\.0 Python",
        ),
        (
            ConnectionError("Could not find any\nrunning Ray instance."),
            r"^No Ray cluster answers at --cluster auto: Could",
        ),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_one_line(raised: Exception, message: str, monkeypatch: pytest.MonkeyPatch):
    import ray

    def fail(**_: object) -> None:
        raise raised

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(ValueError, match=message), ray_cluster(None, "auto", flag="--cluster"):
        pass
