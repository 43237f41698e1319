"""Check that outcomes do not depend on where episodes run, and measure how many run a minute.

Runs the same episodes with several numbers of workers, as processes of this machine and on a Ray cluster of two nodes
that it starts here, with the policy loaded and behind `vla-foundry serve`. In the cases named `killed` a worker is
killed in the middle. Prints one JSON object a case, with a digest of the table of outcomes and numbers of steps, and
whether it is the `same` as in the first case; then the median of episodes a minute over `--rounds` for 1, 2 and 4
processes, and the ratios to 1.
Ends with an error if a table differs.

    uv run python benchmarks/rollouts.py --checkpoint experiments/vla --tasks drawer-open-v3@half
"""

import argparse
import hashlib
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from vla_foundry.config.command_line import import_plugins
from vla_foundry.evaluation.evaluate import describe_setup, open_candidate
from vla_foundry.evaluation.rollouts import Episode, RolloutPool, create_pool, run_episodes
from vla_foundry.params.commands.evaluation import EvaluateParams
from vla_foundry.preprocessing.tasks import ray_cluster
from vla_foundry.simulators import complete_params

Table = dict[tuple[str, int], tuple[str | None, int | None]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Where episodes run."""

    where: str
    policy: str
    num_workers: int
    is_killed: bool = False


def list_cases(places: Sequence[str], policies: Sequence[str], workers: Sequence[int]) -> list[Case]:
    """Return all combinations, and one of each place with a worker that is killed."""
    cases = [
        Case(where=where, policy=policy, num_workers=number)
        for where in places
        for policy in policies
        for number in workers
    ]
    killed = [Case(where=where, policy=policies[0], num_workers=workers[-1], is_killed=True) for where in places]
    return cases + killed


def run_case(params: EvaluateParams, camera: str, case: Case) -> tuple[Table, float]:
    """Return {(task, seed): (outcome, number of steps)}, and how long the episodes took, in seconds."""
    with ExitStack() as stack:
        candidate = open_candidate(stack, params, camera)
        setup = describe_setup(params, candidate)
        pool = stack.enter_context(create_pool(setup, case.num_workers, on_cluster=case.where == "ray"))
        robots = pool.describe(params.tasks)
        actors = [candidate.create_actor(facts) for facts in robots]
        episodes = [
            Episode(task=task, seed=seed, instruction=facts.instruction, fps=float(facts.fps), actor=actor)
            for task, facts, actor in zip(params.tasks, robots, actors, strict=True)
            for seed in params.seeds
        ]
        start, table = time.perf_counter(), {}
        for result in run_episodes(pool, episodes):
            if case.is_killed and len(table) == len(episodes) // 3:
                kill_worker(pool)
            table[result.task, result.seed] = (result.outcome, result.num_steps)
        return table, time.perf_counter() - start


def digest(table: Table) -> str:
    """Return what tells tables of different runs apart."""
    return hashlib.sha256(repr(sorted(table.items())).encode()).hexdigest()[:12]


def kill_worker(pool: RolloutPool) -> None:
    """Kill the worker that was started last."""
    actors: dict[int, Any] = getattr(pool, "actors", {})
    if actors:
        import ray

        ray.kill(actors[max(actors)])
    else:
        multiprocessing.active_children()[-1].kill()


@contextmanager
def start_server(checkpoint: str, device: str) -> Iterator[str]:
    """Yield the address of a server of the checkpoint."""
    command = [sys.executable, "-m", "vla_foundry.cli", "serve", "--checkpoint", checkpoint, "--device", device]
    flags = ["--port", "0", "--websocket_port", "0", "--batching", "exact"]
    server = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        yield server.stdout.readline().partition("grpc ")[2].partition(",")[0]
    finally:
        server.terminate()
        server.wait()


@contextmanager
def start_cluster() -> Iterator[str]:
    """Yield the address of a Ray cluster of two nodes on this machine."""
    from ray.cluster_utils import Cluster

    options: dict[str, Any] = {"num_cpus": 4, "num_gpus": 0, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=options | {"include_dashboard": False})
    cluster.add_node(**options)
    assert cluster.address is not None
    try:
        with ray_cluster(None, cluster.address, flag="--cluster"):
            yield cluster.address
    finally:
        cluster.shutdown()


def measure_speed(params: EvaluateParams, camera: str, rounds: int) -> dict[str, Any]:
    """Return the median number of episodes a minute for 1, 2 and 4 processes, measured in turn, and ratios to 1."""
    found: dict[int, list[float]] = {1: [], 2: [], 4: []}
    for _ in range(rounds):
        for number, speeds in found.items():
            table, seconds = run_case(params, camera, Case(where="local", policy="loaded", num_workers=number))
            speeds.append(60 * len(table) / seconds)
    medians = {number: statistics.median(speeds) for number, speeds in found.items()}
    return {
        "episodes_per_minute": {number: round(value, 1) for number, value in medians.items()},
        "over_1_worker": {number: round(value / medians[1], 2) for number, value in medians.items()},
    }


def main() -> None:
    """Parse the command line, run all cases and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--tasks", required=True, help="comma-separated")
    parser.add_argument("--simulator", default="metaworld")
    parser.add_argument("--plugins", default="", help="modules that register simulators, comma-separated")
    parser.add_argument("--max_steps", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--episodes", default="0:40", help="first:end")
    parser.add_argument("--workers", default="1,4,16", help="comma-separated")
    parser.add_argument("--places", default="local,ray")
    parser.add_argument("--policies", default="loaded,served")
    parser.add_argument("--rounds", type=int, default=3, help="of the measurement of speed; 0: none")
    given = parser.parse_args()
    import_plugins([name for name in given.plugins.split(",") if name], "--plugins")
    loaded, camera = complete_params(
        EvaluateParams(
            checkpoint=given.checkpoint,
            tasks=given.tasks.split(","),
            output="unused",
            simulator=given.simulator,
            episodes=given.episodes,
            max_steps=given.max_steps,
            device=given.device,
        )
    )
    places, policies = given.places.split(","), given.policies.split(",")
    workers = [int(number) for number in given.workers.split(",")]
    expected: Table = {}
    with ExitStack() as stack:
        server = stack.enter_context(start_server(given.checkpoint, given.device)) if "served" in policies else None
        cluster = stack.enter_context(start_cluster()) if "ray" in places else None
        for case in list_cases(places, policies, workers):
            params = replace(loaded, cluster=cluster if case.where == "ray" else None)
            if case.policy == "served":
                params = replace(params, checkpoint=None, policy_server=server)
            table, seconds = run_case(params, camera, case)
            expected = expected or table
            line = {**case.__dict__, "num_episodes": len(table), "seconds": round(seconds, 1), "table": digest(table)}
            successes = sum(outcome == "success" for outcome, _ in table.values())
            print(json.dumps({**line, "successes": successes, "same": table == expected}), flush=True)
            if table != expected:
                changed = [key for key in expected if table.get(key) != expected[key]]
                sys.exit(f"outcomes of {changed[:5]} differ from the first case")
    if given.rounds:
        print(json.dumps(measure_speed(loaded, camera, given.rounds)))


if __name__ == "__main__":
    main()
