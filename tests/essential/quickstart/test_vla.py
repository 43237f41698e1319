"""The steps and the report of the quickstart's action stage."""

import json
from pathlib import Path

from PIL import Image

from vla_foundry.config.command_line import parse_command
from vla_foundry.params.commands.evaluation import EvaluateParams
from vla_foundry.quickstart.vla import TASKS, ablation_steps, write_vla_report


def save_evaluation(folder: Path, name: str, successes: int) -> None:
    """Write the summary of 20 episodes of each of two tasks."""
    counts = {"successes": successes, "trials": 20, "invalid": 0}
    (folder / name).mkdir(parents=True)
    values = {"name": name, "tasks": {"drawer-open-v3@half": counts, "window-close-v3@half": counts}}
    (folder / name / "summary.json").write_text(json.dumps(values), encoding="utf-8")


def test_the_page_shows_policies_with_intervals(tmp_path: Path) -> None:
    for name, successes in (("vla", 18), ("null", 0), ("random", 1)):
        save_evaluation(tmp_path / "evaluation", name, successes)
    (tmp_path / "error.txt").write_text("  errors\n", encoding="utf-8")
    summary, figure = tmp_path / "summary.txt", tmp_path / "figure.png"
    text = write_vla_report(
        tmp_path / "evaluation", ["vla", "null", "random"], tmp_path / "error.txt", summary=summary, figure=figure
    )
    lines = text.splitlines()
    assert lines[1].split() == ["drawer-open", "window-close", "all"]
    assert lines[2].split() == ["policy", "18/20", "18/20", "36/40", "=", "90%", "[77%,", "96%]"]
    assert lines[3].split()[:4] == ["no", "motion", "0/20", "0/20"]
    assert lines[lines.index("  errors") + 1] == "  goal: at most 0.50 in the last column"
    assert summary.read_text(encoding="utf-8") == text + "\n"
    with Image.open(figure) as picture:
        assert picture.width == 840


def test_the_wrong_instruction_is_the_opposite_of_each_task(tmp_path: Path) -> None:
    steps = {step.name: step for step in ablation_steps(tmp_path, vlm_run=tmp_path / "vlm")}
    words = steps["evaluate_wrong_instruction"].words
    assert words[0] == "evaluate"
    params = parse_command(EvaluateParams, list(words[1:]), prog="vla-foundry evaluate")
    assert params.tasks == list(TASKS)
    assert params.instructions == {
        "drawer-open-v3@half": "close the drawer",
        "drawer-close-v3@half": "open the drawer",
        "window-open-v3@half": "close the window",
        "window-close-v3@half": "open the window",
    }
