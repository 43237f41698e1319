"""Evaluation in Meta-World: experts succeed, idle robots do not, whatever the number of processes."""

import json
from pathlib import Path

import pytest

from vla_foundry.evaluation.evaluate import evaluate
from vla_foundry.params.commands.evaluation import EvaluateParams

TASKS = ["drawer-close-v3@half", "window-open-v3@half"]


@pytest.mark.parametrize(("policy", "num_successes"), [("expert", 3), ("null", 0)])
def test_experts_succeed_and_idle_robots_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, num_successes: int
) -> None:
    # without what other tests named
    monkeypatch.setattr("vla_foundry.config.command_line._named", [])
    found = []
    for num_workers in (1, 2):
        output = tmp_path / str(num_workers)
        params = EvaluateParams(
            tasks=TASKS,
            policy=policy,  # pyright: ignore[reportArgumentType]
            episodes="0:3",
            max_steps=120,
            num_workers=num_workers,
            num_pictured=1,
            output=str(output),
        )
        rates = evaluate(params)
        assert [rate.num_successes for rate in rates.values()] == [num_successes] * 2
        files = sorted((output / policy).glob("*/rollouts/*/results.json"))
        found.append([json.loads(file.read_text(encoding="utf-8"))["evaluations"] for file in files])
        assert (output / policy / "contact_sheet.png").is_file()
    assert found[0] == found[1]
    assert {episode["instruction"] for task in found[0] for episode in task} == {"close the drawer", "open the window"}
