"""Evaluate a policy at several simulated latencies, and compare what the robot does while the policy thinks.

blocking holds the robot still, async goes on with the last chunk, realtime makes chunks agree too (real-time chunking).
Prints success rates as a table and writes them as delay.png and delay.json to the output folder. Finished evaluations
are not run again.

    uv run python benchmarks/execution_delay.py --checkpoint experiments/vla --tasks drawer-open-v3@half --output delay
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from vla_foundry.config.command_line import import_plugins
from vla_foundry.evaluation.evaluate import evaluate
from vla_foundry.evaluation.results import SuccessRate, add_rates
from vla_foundry.params.commands.evaluation import EvaluateParams

EXECUTIONS = ("blocking", "async", "realtime")
COLORS = {"blocking": "#888888", "async": "#c8743c", "realtime": "#4878a8"}


def measure(params: EvaluateParams, latencies: list[float]) -> dict[str, list[SuccessRate]]:
    """Return the success rate over all tasks of each execution at each latency."""
    rates: dict[str, list[SuccessRate]] = {}
    for execution in EXECUTIONS:
        rates[execution] = []
        for latency in latencies:
            given = replace(
                params, execution=execution, simulated_latency_ms=latency, name=f"{execution}_{latency:g}ms"
            )
            rates[execution].append(add_rates(evaluate(given).values()))
    return rates


def print_table(rates: dict[str, list[SuccessRate]], latencies: list[float]) -> None:
    """Print a row per latency, a column per execution."""
    print(f"{'latency':>10}" + "".join(f"{name:>28}" for name in rates))
    for row, latency in enumerate(latencies):
        print(f"{latency:>7g} ms" + "".join(f"{found[row].format():>28}" for found in rates.values()))


def draw(rates: dict[str, list[SuccessRate]], latencies: list[float], path: Path) -> None:
    """Plot success rates with their 95% Wilson intervals."""
    figure = Figure(figsize=(6, 3.6), dpi=120, layout="tight")
    axes = figure.subplots()
    for name, found in rates.items():
        shares = [rate.num_successes / max(rate.num_trials, 1) for rate in found]
        low, high = zip(*(rate.interval for rate in found), strict=True)
        axes.plot(latencies, shares, "o-", color=COLORS[name], label=name)
        axes.fill_between(latencies, low, high, color=COLORS[name], alpha=0.15, linewidth=0)
    axes.set(ylim=(0, 1), xlabel="latency of a prediction (ms)", ylabel="success rate")
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    """Parse the command line, evaluate, and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--tasks", required=True, help="comma-separated")
    parser.add_argument("--output", required=True)
    parser.add_argument("--simulator", default="metaworld")
    parser.add_argument("--plugins", default="", help="modules that register simulators, comma-separated")
    parser.add_argument("--latencies", default="0,100,200,300,400", help="milliseconds, comma-separated")
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
    latencies = [float(text) for text in given.latencies.split(",")]
    rates = measure(params, latencies)
    print_table(rates, latencies)
    folder = Path(given.output)
    draw(rates, latencies, folder / "delay.png")
    values = {name: [[rate.num_successes, rate.num_trials] for rate in found] for name, found in rates.items()}
    text = json.dumps({"latencies_ms": latencies, "successes_and_trials": values}, indent=1)
    (folder / "delay.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
