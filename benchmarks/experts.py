"""Count the seeds that a simulator's expert solves, task by task, without rendering; 50 tasks take minutes.

python benchmarks/experts.py --output FOLDER [--simulator metaworld] [--tasks a,b] [--seeds 5]
"""

import argparse
from pathlib import Path

from vla_foundry.evaluation.evaluate import evaluate
from vla_foundry.evaluation.results import find_results, read_results, write_rates
from vla_foundry.params.commands.evaluation import EvaluateParams
from vla_foundry.simulators.metaworld_tasks import INSTRUCTIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--simulator", default="metaworld")
    parser.add_argument(
        "--tasks", default="", help="comma-separated; empty: all of Meta-World, or the simulator's default"
    )
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    known = sorted(INSTRUCTIONS) if given.simulator == "metaworld" else []
    params = EvaluateParams(
        policy="expert",
        simulator=given.simulator,
        tasks=given.tasks.split(",") if given.tasks else known,
        episodes=f"0:{given.seeds}",
        num_pictured=0,
        output=given.output,
    )
    rates = evaluate(params)
    write_rates(rates)
    for task in rates:
        found = find_results(Path(given.output) / "expert" / task)
        assert found is not None
        failed = [episode.seed for episode in read_results(found)[0] if episode.outcome != "success"]
        if failed:
            print(f"{task}: fails at seeds {failed}")


if __name__ == "__main__":
    main()
