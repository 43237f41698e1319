"""The benchmark of every speed claim runs at a toy size, each row in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/gpu.py"


@pytest.mark.slow  # one process imports torch, whatever the rows
def test_each_row_prints_its_figures() -> None:
    command = [sys.executable, str(SCRIPT), "--preset", "tiny"]
    rows = ["device", "llm_8", "checkpoint"]
    output = subprocess.run([*command, "--rows", *rows], capture_output=True, text=True, check=True).stdout
    device, llm, checkpoint = map(json.loads, output.splitlines())
    assert [device["row"], llm["row"], checkpoint["row"]] == rows
    assert device["matmul_tflops"] > 0
    assert llm["tokens_per_s"] > 0
    assert 0 < llm["mfu"] < 1
    assert 0 < llm["share_of_measured_peak"] < 1
    assert checkpoint["gb"] > 0


def test_an_unknown_row_is_an_error() -> None:
    found = subprocess.run([sys.executable, str(SCRIPT), "--rows", "llm_9"], capture_output=True, text=True)
    assert found.returncode == 2
    assert "llm_9" in found.stderr
