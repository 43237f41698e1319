"""The steps and the report of the quickstart's action stage."""

from pathlib import Path

from vla_foundry.config.command_line import parse_command
from vla_foundry.evaluation.comparison.family import read_family
from vla_foundry.evaluation.results import EpisodeResult, write_results
from vla_foundry.params.commands.evaluation import EvaluateParams
from vla_foundry.quickstart.steps import Sizes, Step
from vla_foundry.quickstart.vla import (
    NUM_EPISODES,
    NUM_FILMED,
    TASKS,
    ablation_steps,
    create_vla_stage,
    write_vla_report,
)


def steps_of(folder: Path) -> dict[str, Step]:
    return {step.name: step for step in create_vla_stage(folder, Sizes(), ablations=True).steps}


def parameters_of(step: Step) -> EvaluateParams:
    assert step.words[0] == "evaluate"
    return parse_command(EvaluateParams, list(step.words[1:]), prog="vla-foundry evaluate")


def flags_of(step: Step) -> dict[str, str]:
    return dict(zip(step.words[1::2], step.words[2::2], strict=True))


def declare(folder: Path) -> Path:
    """Declare the family as the quickstart does; return the folder of the results."""
    step = steps_of(folder)["declare"]
    assert step.function is not None
    step.function()
    return folder / "vla" / "evaluation"


def save_rollouts(results: Path, model: str, successes: int, num: int) -> None:
    """Write the outcomes of a policy: successes first, then failures, on each task."""
    family = read_family(results)
    assert family is not None
    for task in TASKS:
        episodes = [
            EpisodeResult(task=task, seed=seed, outcome="success" if seed < successes else "failure", num_steps=9)
            for seed in range(num)
        ]
        path = results / model / task / "rollouts" / "2026-01-01T00-00-00" / "results.json"
        write_results(path, episodes, max_sample_size=NUM_EPISODES, settings={"family": family.digest})


def test_the_family_is_declared_before_the_first_rollout(tmp_path: Path) -> None:
    steps = steps_of(tmp_path)
    names = list(steps)
    rollouts = [names.index(name) for name in names if name.startswith("evaluate_")]
    assert names.index("declare") < min(rollouts)
    family = read_family(declare(tmp_path))
    assert family is not None
    assert family.tasks == TASKS
    assert family.max_sample_size == NUM_EPISODES
    for model in family.models:
        params = parameters_of(steps[f"evaluate_{model}"])
        assert (params.name or params.policy, params.seeds) == (model, range(NUM_EPISODES))
        assert params.until_decided == (None if model == "policy" else str(tmp_path / "vla/evaluation/policy"))


def test_few_episodes_are_filmed_and_only_of_trained_policies(tmp_path: Path) -> None:
    films = {}
    for name, step in steps_of(tmp_path).items():
        if name in ("evaluate_policy", "evaluate_from_nothing", "evaluate_null", "evaluate_random"):
            params = parameters_of(step)
            films[name] = (params.save_videos, params.max_videos, params.num_pictured)
    filmed, none = ("all", NUM_FILMED, NUM_FILMED), ("none", EvaluateParams.max_videos, 0)
    assert list(films.values()) == [filmed, filmed, none, none]


def test_the_policies_differ_only_in_what_they_start_from(tmp_path: Path) -> None:
    steps = steps_of(tmp_path)
    policy, other = flags_of(steps["train_vla"]), flags_of(steps["train_from_nothing"])
    changed = {name for name in policy.keys() | other.keys() if policy.get(name) != other.get(name)}
    assert {name for name in changed if not name.startswith("--model.vision_language_backbone.")} == {
        "--name",
        # the processor is that of the vision-language model, named because there is no checkpoint
        "--data.processor",
    }
    assert "--model.vision_language_backbone.resume_from_checkpoint" not in other


def test_the_page_shows_letters_decisions_and_saved_rollouts(tmp_path: Path) -> None:
    results = declare(tmp_path)
    for model, successes, num in (("policy", 31, 32), ("from_nothing", 12, 24), ("null", 0, 8), ("random", 1, 16)):
        save_rollouts(results, model, successes, num)
    (tmp_path / "vla" / "action_error.txt").write_text("  errors\n", encoding="utf-8")
    summary = tmp_path / "summary.txt"
    text = write_vla_report(tmp_path / "vla", summary=summary)
    lines = text.splitlines()
    assert lines[1].split() == ["drawer-open", "drawer-close", "window-open", "window-close", "mean"]
    assert lines[2].split()[-4:] == ["31/32", "a", "97%", "a"]
    assert lines[3].split()[-4:] == ["12/24", "b", "50%", "b"]
    assert lines[4].split()[-4:] == ["0/8", "c", "0%", "c"]
    assert lines[6].startswith("  policy against 'the same, trained from nothing': better, decided after ")
    assert lines[6].endswith(" of 128 rollouts of each")
    assert lines[9] == "  rollouts: 320 of 512 planned; 192 saved by the sequential test"
    assert lines[lines.index("  errors") + 1] == "  goal: at most 0.50 in the last column"
    assert summary.read_text(encoding="utf-8") == text + "\n"


def test_policies_that_are_not_told_apart_share_a_letter(tmp_path: Path) -> None:
    results = declare(tmp_path)
    for model, successes in (("policy", 30), ("from_nothing", 30), ("null", 0), ("random", 0)):
        save_rollouts(results, model, successes, 32)
    (tmp_path / "vla" / "action_error.txt").write_text("", encoding="utf-8")
    lines = write_vla_report(tmp_path / "vla", summary=tmp_path / "summary.txt").splitlines()
    assert [line.split()[-1] for line in lines[2:6]] == ["a", "a", "b", "b"]
    assert lines[6].endswith("not told apart after 128 of 128 rollouts of each")


def test_the_wrong_instruction_is_the_opposite_of_each_task(tmp_path: Path) -> None:
    steps = {step.name: step for step in ablation_steps(tmp_path)}
    params = parameters_of(steps["evaluate_wrong_instruction"])
    assert params.tasks == list(TASKS)
    assert params.instructions == {
        "drawer-open-v3@half": "close the drawer",
        "drawer-close-v3@half": "open the drawer",
        "window-open-v3@half": "close the window",
        "window-close-v3@half": "open the window",
    }
