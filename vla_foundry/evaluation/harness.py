"""`vla-foundry evaluate harness`: run a policy in the benchmarks of the vla-eval harness and count its successes.

The harness is a command in an environment of its own. It talks to a server that lives in this process meanwhile.

<output>/<name>/harness/<time>/                       the harness's own files
<output>/<name>/<task>/rollouts/<time>/results.json   its outcomes in our layout (results.py)
<output>/<name>/summary.json                          success rates with 95% Wilson intervals

An episode that the harness could not run to its end (it has a failure_reason) is invalid: it is not a trial.
"""

import asyncio
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from vla_foundry.config.command_line import parse_command
from vla_foundry.evaluation.comparison.family import find_family
from vla_foundry.evaluation.results import (
    RESULTS_NAME,
    ROLLOUTS_FOLDER,
    SUMMARY_NAME,
    EpisodeResult,
    SuccessRate,
    count_successes,
    write_rates,
    write_results,
    write_summary,
)
from vla_foundry.params.commands.evaluation import HarnessParams
from vla_foundry.params.commands.serving import ServeParams
from vla_foundry.run_folder import lock_folder
from vla_foundry.serving.command import open_server
from vla_foundry.serving.policies import Served, load_policy
from vla_foundry.serving.websocket_server import VLA_EVAL_PATH
from vla_foundry.storage.uri import read_object

# how long the harness may take to end when it is told to, seconds
_GRACE_S = 10.0
_SERVED = ("checkpoint", "client_map", "device", "use_ema", "open_loop_steps", "num_inference_steps", "dataset", "name")


def evaluate_in_harness(params: HarnessParams) -> dict[str, SuccessRate]:
    """Serve a policy, run the harness against it, and read its results.

    Returns:
        The success rate of each task.

    Raises:
        FileNotFoundError: the checkpoint or the benchmark's config does not exist.
        ValueError: there is no such command, it failed, or its results cannot be read.
    """
    command = find_harness(params.harness_command)
    if not Path(params.benchmark_config).is_file():
        raise FileNotFoundError(f"benchmark_config {params.benchmark_config} does not exist.")
    given = {name: getattr(params, name) for name in _SERVED}
    # as `vla-foundry evaluate` computes
    serving = ServeParams(port=0, websocket_port=0, precision="fp32", **given)
    served = load_policy(serving)
    # runs that begin within a second must not meet
    time = datetime.now().strftime("%Y-%m-%dT%H-%M-%S-%f")
    folder = Path(params.output) / served.metadata.name
    family = find_family(Path(params.output), served.metadata.name)
    with lock_folder(folder, what="evaluation", flag="--name or --output"):
        own = folder / "harness" / time
        own.mkdir(parents=True)
        command += ["run", "--config", params.benchmark_config, "--output-dir", str(own)]
        command += [] if params.docker else ["--no-docker"]
        code = asyncio.run(_serve_and_run(serving, served, command))
        files = sorted(own.glob("*_aggregate.json"))
        if not files:
            raise ValueError(
                f"'{params.harness_command} run' ended with code {code} and left no results in {own}; its own output "
                "says why."
            )
        tasks = read_aggregates(files)
        if not any(episodes for episodes, _ in tasks.values()):
            raise ValueError(f"'{params.harness_command} run' ended with code {code} and ran no episode: see {own}.")
        settings = given | dict(served.metadata.info) | {"family": family and family.digest}
        rates = {}
        for (task, (episodes, facts)), name in zip(tasks.items(), name_folders(list(tasks)), strict=True):
            path = folder / name / ROLLOUTS_FOLDER / time / RESULTS_NAME
            write_results(path, episodes, max_sample_size=len(episodes), settings=settings | facts)
            rates[task] = count_successes(episodes)
        write_summary(folder / SUMMARY_NAME, rates, name=served.metadata.name, settings=settings)
    if code:
        raise ValueError(f"'{params.harness_command} run' ended with code {code}; what it had done is in {folder}.")
    return rates


def find_harness(command: str) -> list[str]:
    """Return the words of the harness's command.

    Raises:
        ValueError: there is no such command; the message says how to get it.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"harness_command '{command}' cannot be read: {error}.") from None
    if not words or shutil.which(words[0]) is None:
        raise ValueError(
            f"harness_command '{command}' is not found. Install the harness (`uv tool install vla-eval`), or give its "
            "path: --harness_command PATH/TO/vla-eval."
        )
    return words


async def _serve_and_run(params: ServeParams, served: Served, command: list[str]) -> int:
    """Run the command against a server on a free port; return its exit code."""
    cancel_on_sigterm()
    async with open_server(params, served) as ports:
        url = f"ws://{params.host}:{ports.websocket}{VLA_EVAL_PATH}"
        return await run_program([*command, "--server-url", url], "harness_command")


def cancel_on_sigterm() -> None:
    """Cancel the running task when this process is told to end."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


async def run_program(command: Sequence[str], flag: str) -> int:
    """Run a program to its end, or end it if this task is cancelled; return its exit code.

    Args:
        command: its words.
        flag: config key that names it, for messages.

    Raises:
        ValueError: it cannot be run.
    """
    try:
        process = await asyncio.create_subprocess_exec(*command)
    except OSError as error:
        raise ValueError(f"{flag} {command[0]} cannot be run: {error.strerror}.") from None
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), _GRACE_S)
            except TimeoutError:
                process.kill()


def read_aggregates(files: Sequence[Path]) -> dict[str, tuple[list[EpisodeResult], dict[str, Any]]]:
    """Read the harness's result files: {task: its episodes, and facts of its benchmark}.

    Raises:
        ValueError: a file is broken, or an episode has neither a failure_reason nor a success.
    """
    tasks: dict[str, tuple[list[EpisodeResult], dict[str, Any]]] = {}
    for file in files:
        try:
            values = read_object(str(file))
            facts = {"benchmark": values["benchmark"], "harness_version": values["harness_version"]}
            facts["harness_config"] = values["config"]
            if values.get("partial"):
                sys.stderr.write(f"warning: the harness did not finish {values['benchmark']}.\n")
            for found in values["tasks"]:
                name = found["task"]
                if not isinstance(name, str):
                    raise ValueError(f"task is {name!r}")
                task = name if len(files) == 1 else f"{file.stem.removesuffix('_aggregate')}: {name}"
                episodes = [_read_episode(task, episode) for episode in found["episodes"]]
                tasks.setdefault(task, ([], facts))[0].extend(episodes)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is not a result file of the harness ({error!r}).") from None
    return tasks


def _read_episode(task: str, values: Mapping[str, Any]) -> EpisodeResult:
    seed, num_steps = values["episode_id"], values.get("steps")
    if not (isinstance(seed, int) and isinstance(num_steps, int | None)):
        raise ValueError(f"episode_id is {seed!r} and steps {num_steps!r}")
    reason = values.get("failure_reason")
    if reason:
        outcome, message = "invalid", f"{reason}: {values.get('failure_detail') or ''}".rstrip(": ")
    elif values["metrics"]["success"] in (True, False):
        outcome, message = "success" if values["metrics"]["success"] else "failure", None
    else:
        raise ValueError(f"success is {values['metrics']['success']!r}")
    return EpisodeResult(
        task=task,
        seed=seed,
        outcome=outcome,
        num_steps=num_steps,
        failure_message=message,
    )


def name_folders(tasks: Sequence[str]) -> list[str]:
    """Return a folder for each task, each another one."""
    names: list[str] = []
    for task in tasks:
        name = re.sub(r"[^\w@-]+", "_", task)[:120].strip("_") or "task"
        taken = {other.casefold() for other in names}
        numbered = (name if number == 1 else f"{name}_{number}" for number in count(1))
        names.append(next(each for each in numbered if each.casefold() not in taken))
    return names


def main(argv: list[str]) -> None:
    """Run `vla-foundry evaluate harness`: print the success rate of each task."""
    params = parse_command(HarnessParams, argv, prog="vla-foundry evaluate harness")
    try:
        rates = evaluate_in_harness(params)
    except asyncio.CancelledError:
        raise SystemExit(128 + signal.SIGTERM) from None
    write_rates(rates)
