"""The benchmark of every speed claim runs at a toy size, each row in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/gpu.py"


# of each kind, and of our models all that is compiled in its own way
ROWS = (
    *("device", "llm_8", "llm_8_compiled", "llm_16_budget_compiled", "llm_8_documents_compiled"),
    *("vlm_padded_compiled", "vlm_packed_compiled", "vla_8_draws_compiled", "infer_compiled_graphs", "checkpoint"),
)


@pytest.mark.slow  # one process imports torch, whatever the rows
def test_each_row_prints_its_figures_and_is_compiled_whole_and_once() -> None:
    command = [sys.executable, str(SCRIPT), "--preset", "tiny", "--rows", *ROWS]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = {row["row"]: row for row in map(json.loads, output.splitlines())}
    assert tuple(rows) == ROWS
    assert [row for row in rows.values() if "error" in row] == []
    trained = [row for row in rows.values() if "step_ms" in row]
    for row in trained:
        assert row["samples_per_s"] > 0
        assert 0 < row["mfu"] < 1
        assert 0 < row["share_of_measured_peak"] < 1
    compiled = [row for row in trained if "graph_breaks" in row]
    assert len(compiled) == 6
    assert {(row["graph_breaks"], row["recompilations"]) for row in compiled} == {(0, 0)}
    assert rows["device"]["matmul_tflops"] > 0
    assert rows["infer_compiled_graphs"]["p50_ms"] > 0
    assert rows["checkpoint"]["gb"] > 0


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


def test_an_unknown_row_is_an_error() -> None:
    found = subprocess.run([sys.executable, str(SCRIPT), "--rows", "llm_9"], capture_output=True, text=True)
    assert found.returncode == 2
    assert "llm_9" in found.stderr
