"""The benchmark of every speed claim runs at a toy size, each row in a process of its own."""

import json
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.essential.processes import is_running

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/gpu.py"
FP8 = "llm_16_fp8_compiled"


def run_rows(*words: str) -> dict[str, dict[str, Any]]:
    """Run rows at the toy size, and return them by name."""
    command = [sys.executable, str(SCRIPT), "--preset", "tiny", *words]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {row["row"]: row for row in map(json.loads, output.splitlines())}


def find_sessions(pid: int) -> set[int]:
    """Return the sessions of a process and its descendants."""
    found = {os.getsid(pid)} if Path(f"/proc/{pid}").exists() else set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text(encoding="utf-8").split():
            found |= find_sessions(int(child))
    return found


@pytest.mark.slow  # all rows; the last one starts two processes, which import torch
def test_each_row_prints_its_figures_and_is_compiled_whole_and_once() -> None:
    rows = run_rows("--minutes", "20")
    assert list(rows) == re.findall(r'^    "(\w+)": \(', SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    errors = {name: row["error"] for name, row in rows.items() if "error" in row}
    if find_spec("torchao") is None:
        assert "needs torchao" in errors.pop(FP8)
    assert errors == {}
    trained = {name: row for name, row in rows.items() if "step_ms" in row}
    assert len(trained) >= 11
    for row in trained.values():
        assert row["samples_per_s"] > 0
        assert 0 < row["mfu"] < 1
        assert 0 < row["share_of_measured_peak"] < 1
    compiled = {
        name: (row["graph_breaks"], row["recompilations"]) for name, row in trained.items() if "compile_s" in row
    }
    assert compiled.pop("qwen3vla_8_draws_compiled")[1] == 0  # it breaks in code of transformers
    assert len(compiled) >= 7
    assert set(compiled.values()) == {(0, 0)}
    assert rows["device"]["matmul_tflops"] > 0
    for name in ("infer", "infer_compiled", "infer_graphs", "infer_compiled_graphs"):
        assert 0 < rows[name]["p50_ms"] <= rows[name]["p99_ms"]
    assert rows["checkpoint"]["gb"] > 0
    assert rows["start"]["cold_s"] > 0 < rows["start"]["warm_s"]


@pytest.mark.skipif(find_spec("torchao") is None, reason="the row needs torchao, which .ci/run installs for it")
def test_the_row_with_fp8_is_compiled_whole_and_once() -> None:
    row = run_rows("--rows", FP8)[FP8]
    assert (row.get("error"), row["graph_breaks"], row["recompilations"]) == (None, 0, 0)


@pytest.mark.slow  # two launches of torchrun
def test_every_wrapper_is_measured_on_one_rank_and_on_two(tmp_path: Path) -> None:
    words = ["--preset", "tiny", "--ranks", "1", "2", "--output", str(tmp_path / "lines")]
    output = subprocess.run(
        [sys.executable, str(SCRIPT.with_name("scaling.py")), *words], capture_output=True, text=True, check=True
    ).stdout
    lines = [json.loads(line) for line in output.splitlines()]
    measured = [(line["ranks"], line["wrapper"]) for line in lines]
    assert measured == [(1, "ddp"), (1, "fsdp"), (2, "ddp"), (2, "fsdp"), (2, "hsdp")]
    assert lines[0]["efficiency"] == 1
    assert all(line["samples_per_s_per_gpu"] > 0 < line["efficiency"] for line in lines)
    assert (tmp_path / "lines").read_text(encoding="utf-8") == output


@pytest.mark.slow  # a launch of torchrun
def test_saves_at_once_and_in_the_background_are_timed_on_one_rank_and_on_two(tmp_path: Path) -> None:
    words = ["--hidden_dim", "32", "--n_layers", "1", "--saves", "1", "--folder", str(tmp_path)]
    output = subprocess.run(
        [sys.executable, str(SCRIPT.with_name("checkpoint.py")), *words], capture_output=True, text=True, check=True
    ).stdout
    lines = [json.loads(line) for line in output.splitlines()]
    assert [(line["ranks"], line["wrapper"]) for line in lines] == [(1, "none"), (2, "FSDP2")]
    for line in lines:
        assert line["megabytes"] > 8
        assert 0 < line["at_once"]["waits"] <= line["at_once"]["seconds"]
        assert line["share"] == pytest.approx(line["background"]["waits"] / line["at_once"]["waits"], rel=0.1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [("--rows", "llm_9"), ("--output", "/none/file"), ("--limit_s", "nan")])
def test_what_cannot_be_run_is_an_error(words: tuple[str, str]) -> None:
    found = subprocess.run([sys.executable, str(SCRIPT), "--preset", "tiny", *words], capture_output=True, text=True)
    assert found.returncode == 2
    assert words[0] in found.stderr.splitlines()[-1]


def test_a_row_ends_with_the_run_that_is_killed() -> None:
    words = ["--preset", "tiny", "--rows", "qwen3vla_8_draws_compiled"]
    with subprocess.Popen([sys.executable, str(SCRIPT), *words], start_new_session=True) as run:
        deadline = time.monotonic() + 60
        # the row's process leads a session of its own, which is that of no other process of the run
        while not (rows := find_sessions(run.pid) - {run.pid}) and time.monotonic() < deadline:
            time.sleep(0.1)
        run.kill()
    assert rows
    deadline = time.monotonic() + 5  # by itself it would go on for longer
    while any(map(is_running, rows)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, rows))
