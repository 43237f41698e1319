"""Runs that are killed, stopped and damaged end as the undisturbed one, bit by bit (benchmarks/faults.py)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/faults.py"


def disturb(*cases: str) -> dict[str, dict[str, Any]]:
    """Run some cases; returns what each reports."""
    done = subprocess.run([sys.executable, str(SCRIPT), "--cases", *cases], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(line["passed"] for line in lines)
    return {line["case"]: line for line in lines}


def test_killed_and_stopped_runs_and_torn_checkpoints_lose_nothing() -> None:
    found = disturb("kill", "term", "torn")
    assert [found["kill"][place] for place in ("step", "loader", "validation", "save", "write")] == [1] * 5
    assert found["term"]["signals"] == 1
    assert 0 < found["term"]["at_steps"][0] < 160
    assert found["torn"]["damaged"] >= found["torn"]["torn"] == 16


@pytest.mark.slow
def test_a_full_disk_nan_a_dead_rank_and_a_failing_store_are_survived() -> None:
    found = disturb("disk", "nan", "dead", "store")
    assert found.keys() == {"disk", "nan", "dead rank of 2", "store"}
    assert sum(found["store"].get(kind, 0) for kind in ("500", "503", "reset", "half", "slow")) > 0
