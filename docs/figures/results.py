"""Draw docs/figures/results.png from a finished quickstart: episodes of its policy, and success rates of all policies.

Usage: python docs/figures/results.py quickstart_output
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vla_foundry.evaluation.results import wilson_interval

POLICIES = {
    "policy": ("from the vision-language model", "#3182bd"),
    "from_nothing": ("the same, from nothing", "#e6550d"),
    "random": ("random motion", "#969696"),
    "null": ("no motion", "#bdbdbd"),
}


def main(folder: Path) -> None:
    """Draw the figure."""
    rcParams.update({"font.size": 9, "font.family": "sans-serif"})
    tasks = sorted(path.name for path in (folder / "policy").iterdir() if path.is_dir())
    figure = Figure(figsize=(11, 3.2), dpi=110, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    for axes, task in zip(left.subplots(len(tasks), 1), tasks, strict=True):
        draw_episode(axes, folder / "policy" / task)
    draw_rates(right.subplots(), folder, tasks)
    figure.savefig(Path(__file__).with_name("results.png"), metadata={"Software": None})


def read_episodes(folder: Path) -> list[dict]:
    """Return the records of a policy's finished episodes of a task."""
    return [
        episode
        for path in sorted(folder.rglob("results.json"))
        for episode in json.loads(path.read_text(encoding="utf-8"))["evaluations"]
        if episode["is_success"] is not None
    ]


def draw_episode(axes: Axes, folder: Path) -> None:
    """Draw the first successful episode that has pictures."""
    pictures = {int(path.parent.name.rpartition("_")[2]): path for path in folder.rglob("pictures.png")}
    episodes = [e for e in read_episodes(folder) if e["is_success"] and e["scenario_index"] in pictures]
    axes.set_axis_off()
    if episodes:
        with Image.open(pictures[episodes[0]["scenario_index"]]) as strip:
            axes.imshow(np.asarray(strip.convert("RGB")))
        axes.set_title(f"{folder.name.partition('-v3')[0]}: six pictures of an episode", fontsize=8, loc="left", pad=2)


def draw_rates(axes: Axes, folder: Path, tasks: list[str]) -> None:
    """Draw each policy's success rate on each task, with its 95% Wilson interval."""
    for number, (name, (label, color)) in enumerate(POLICIES.items()):
        for place, task in enumerate(tasks):
            outcomes = [episode["is_success"] for episode in read_episodes(folder / name / task)]
            low, high = wilson_interval(sum(outcomes), len(outcomes))
            rate = sum(outcomes) / len(outcomes)
            axes.bar(place + 0.2 * number, rate, 0.18, color=color, label=label if place == 0 else None)
            axes.plot([place + 0.2 * number] * 2, [low, high], color="black", linewidth=0.8)
    axes.set_xticks(np.arange(len(tasks)) + 0.3, [task.partition("-v3")[0] for task in tasks])
    axes.set_ylabel("success, with 95% interval")
    axes.set_ylim(0, 1.3)
    axes.set_yticks([0, 0.5, 1])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", ncols=2, frameon=False, fontsize=8)


if __name__ == "__main__":
    main(Path(sys.argv[1]) / "vla" / "evaluation")
