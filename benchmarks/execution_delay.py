"""Evaluate a policy at several simulated latencies, and compare what the robot does while the policy thinks.

blocking holds the robot still, async goes on with the last chunk, realtime makes chunks agree too (real-time chunking);
without latency all three are the same. Prints success rates with their 95% Wilson intervals and the mean time of the
successful episodes, and writes them as delay.png and delay.json to the output folder. Finished evaluations are not run
again.

    uv run python benchmarks/execution_delay.py --checkpoint experiments/vla --tasks drawer-open-v3@half --output delay
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from vla_foundry.config.command_line import import_plugins
from vla_foundry.evaluation.evaluate import evaluate
from vla_foundry.evaluation.results import SuccessRate, add_rates, find_results, read_results
from vla_foundry.inference.policy_files import load_policy_files
from vla_foundry.params.commands.evaluation import EvaluateParams

EXECUTIONS = ("blocking", "async", "realtime")
COLORS = {"blocking": "#888888", "async": "#c8743c", "realtime": "#4878a8"}
# latencies that are tried, in durations of a chunk; from 1 on, no action of a chunk is of use when it is there
SHARES = (0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)


class Cell(NamedTuple):
    """The episodes of an execution at a latency."""

    rate: SuccessRate
    # mean of the successful episodes; None: there are none
    seconds: float | None


def choose_latencies(checkpoint: str) -> list[float]:
    """Return latencies in milliseconds that suit the length of the policy's chunks."""
    spec = load_policy_files(checkpoint).spec
    assert spec.fps is not None, "the data do not say their rate: give --latencies"
    return [round(1000 * share * (spec.future_lowdim_steps + 1) / spec.fps, 3) for share in SHARES]


def measure(params: EvaluateParams, latencies: list[float]) -> dict[str, list[Cell]]:
    """Return the outcomes over all tasks of each execution at each latency."""
    cells: dict[str, list[Cell]] = {name: [] for name in EXECUTIONS}
    for latency in latencies:
        for execution in EXECUTIONS:
            if latency == 0 and execution != EXECUTIONS[0]:
                cells[execution].append(cells[EXECUTIONS[0]][-1])
                continue
            name = f"{execution}_{latency:g}ms"
            rates = evaluate(replace(params, execution=execution, simulated_latency_ms=latency, name=name))
            paths = [find_results(Path(params.output) / name / task) for task in params.tasks]
            episodes = [episode for path in paths if path is not None for episode in read_results(path)[0]]
            seconds = [each.seconds for each in episodes if each.outcome == "success" and each.seconds is not None]
            cells[execution].append(Cell(add_rates(rates.values()), float(np.mean(seconds)) if seconds else None))
    return cells


def print_table(cells: dict[str, list[Cell]], latencies: list[float]) -> None:
    """Print a row per latency, a column per execution."""
    print(f"{'latency':>11}" + "".join(f"{name:>36}" for name in cells))
    for row, latency in enumerate(latencies):
        texts = []
        for found in cells.values():
            rate, seconds = found[row]
            texts.append(rate.format() + ("" if seconds is None else f", {seconds:.2f} s"))
        print(f"{latency:>8g} ms" + "".join(f"{text:>36}" for text in texts))


def draw(cells: dict[str, list[Cell]], latencies: list[float], path: Path) -> None:
    """Plot success rates with their 95% Wilson intervals, and the mean time of the successful episodes."""
    figure = Figure(figsize=(8.4, 3.2), dpi=90, layout="tight")
    left, right = figure.subplots(1, 2)
    for name, found in cells.items():
        rates = [cell.rate for cell in found]
        shares = [rate.num_successes / max(rate.num_trials, 1) for rate in rates]
        low, high = zip(*(rate.interval for rate in rates), strict=True)
        left.plot(latencies, shares, "o-", color=COLORS[name], label=name)
        left.fill_between(latencies, low, high, color=COLORS[name], alpha=0.15, linewidth=0)
        seconds = [np.nan if cell.seconds is None else cell.seconds for cell in found]
        right.plot(latencies, seconds, "o-", color=COLORS[name])
    left.set(ylim=(0, 1.02), xlabel="latency of a prediction (ms)", ylabel="success rate")
    right.set(ylim=(0, None), xlabel="latency of a prediction (ms)", ylabel="time of a success (s)")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    left.legend()
    figure.savefig(path)


def main() -> None:
    """Parse the command line, evaluate, and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--tasks", required=True, help="comma-separated")
    parser.add_argument("--output", required=True)
    parser.add_argument("--simulator", default="metaworld")
    parser.add_argument("--plugins", default="", help="modules that register simulators, comma-separated")
    parser.add_argument("--latencies", help="milliseconds, comma-separated; default: 0 to the duration of a chunk")
    parser.add_argument("--episodes", default="0:40")
    parser.add_argument("--open_loop_steps", type=int, default=None)
    parser.add_argument("--max_steps", type=int, default=None)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    import_plugins([name for name in given.plugins.split(",") if name], "--plugins")
    params = EvaluateParams(
        checkpoint=given.checkpoint,
        tasks=given.tasks.split(","),
        output=given.output,
        simulator=given.simulator,
        episodes=given.episodes,
        open_loop_steps=given.open_loop_steps,
        max_steps=given.max_steps,
        device=given.device,
    )
    if given.latencies is None:
        latencies = choose_latencies(given.checkpoint)
    else:
        latencies = [float(text) for text in given.latencies.split(",")]
    cells = measure(params, latencies)
    print_table(cells, latencies)
    folder = Path(given.output)
    draw(cells, latencies, folder / "delay.png")
    values = {
        name: [[cell.rate.num_successes, cell.rate.num_trials, cell.seconds] for cell in found]
        for name, found in cells.items()
    }
    text = json.dumps({"latencies_ms": latencies, "successes_trials_seconds": values}, indent=1)
    (folder / "delay.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
