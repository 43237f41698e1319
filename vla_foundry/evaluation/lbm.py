"""`vla-foundry evaluate --simulator lbm`: run the LBM simulator against a policy and count its successes.

The simulator is a Docker image, or the command of an installed lbm_eval. It calls the gRPC server in this process, or
that of policy_server, and writes <output>/<name>/<task>/rollouts/<time>/results.json itself, in the published layout.
An episode with a failure_message broke down in the simulator: it is invalid, not a trial.
"""

import asyncio
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from vla_foundry.evaluation.harness import cancel_on_sigterm, run_program
from vla_foundry.evaluation.results import (
    ROLLOUTS_FOLDER,
    SUMMARY_NAME,
    EpisodeResult,
    SuccessRate,
    count_successes,
    write_summary,
)
from vla_foundry.inference.loading import find_run_folder
from vla_foundry.params.commands.evaluation import EvaluateParams
from vla_foundry.params.commands.serving import ServeParams
from vla_foundry.run_folder import lock_folder
from vla_foundry.serving.command import open_server
from vla_foundry.serving.policies import load_policy
from vla_foundry.storage.uri import name_of, read_object

# label of our containers, and where the image writes results
_LABEL, _MOUNT = "vla-foundry-eval", "/tmp/lbm/rollouts"
_SERVED = ("checkpoint", "device", "use_ema", "open_loop_steps", "num_inference_steps", "name")


def evaluate_in_lbm(params: EvaluateParams) -> dict[str, SuccessRate]:
    """Run the simulator for every task whose results are not complete; with `dry_run`, print its commands instead.

    Returns:
        The success rate of each task; none after a dry run.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: a program is missing or failed, or its results cannot be read.
    """
    origin = params.checkpoint or params.policy_server
    if origin is None:
        raise ValueError(f"simulator 'lbm' needs a checkpoint or a policy_server: it has no policy '{params.policy}'.")
    if not params.tasks:
        raise ValueError("tasks is empty. Name tasks of LBM, such as --tasks PutMugOnSaucer.")
    host, _, port = (params.policy_server or f"127.0.0.1:{params.lbm.port}").rpartition(":")
    origin = name_of(find_run_folder(params.checkpoint)) if params.checkpoint else origin
    folder = Path(params.output) / (params.name or re.sub(r"\W", "_", origin))
    commands = {task: create_command(params, task, folder, f"{host}:{port}") for task in params.tasks}
    if params.dry_run:
        for command in commands.values():
            sys.stdout.write(shlex.join(command) + "\n")
        return {}
    program = next(iter(commands.values()))[0]
    if shutil.which(program) is None:
        raise ValueError(f"'{program}' is not found. Install it, or give --lbm.command, that of an installed lbm_eval.")
    with lock_folder(folder, what="evaluation", flag="--name or --output"):
        try:
            asyncio.run(_run(params, folder, commands))
        except asyncio.CancelledError:
            raise SystemExit(128 + signal.SIGTERM) from None
        rates = {task: count_successes(read_episodes(folder, task, params.seeds)) for task in params.tasks}
        write_summary(folder / SUMMARY_NAME, rates, name=folder.name, episodes=params.episodes, settings={})
    return rates


def create_command(params: EvaluateParams, task: str, folder: Path, address: str) -> list[str]:
    """Return the command that runs a task's episodes against the policy at an address, HOST:PORT."""
    rollouts = str((folder / task / ROLLOUTS_FOLDER).absolute())
    lbm, seeds = params.lbm, params.seeds
    if lbm.command is not None:
        words = [*shlex.split(lbm.command), "--skill_type", task, "--num_evaluations", str(len(seeds))]
        words += ["--num_processes", str(lbm.num_processes), "--output_directory", rollouts]
        return [*words, "--server_uri", address]
    host, _, port = address.rpartition(":")
    values = {
        "NVIDIA_DRIVER_CAPABILITIES": "all",
        "LAUNCH_DEMONSTRATION_INDICES": params.episodes,
        "NUM_PROCESSES": lbm.num_processes,
        "POLICY_HOST": host,
        "POLICY_PORT": port,
        "USE_EVAL_SEED": 1,
        "MAX_RETRIES": 3,
        "RECORD_VIDEO": int(params.num_pictured > 0),
        "VIDEO_FPS": 10,
        "MAX_SAMPLE_SIZE_PER_MODEL": params.max_sample_size or len(seeds),
    }
    words = ["docker", "run", "--rm", "--network", "host", "--label", _LABEL, "--runtime=nvidia"]
    words += ["--gpus", f"device={lbm.gpu}", "--device", "/dev/dri", "--group-add", "video"]
    words += [word for name, value in values.items() for word in ("-e", f"{name}={value}")]
    return [*words, "-v", f"{rollouts}:{_MOUNT}", lbm.image, "bash", lbm.launcher, task]


async def _run(params: EvaluateParams, folder: Path, commands: Mapping[str, Sequence[str]]) -> None:
    """Serve the policy, unless a server is given, and run the commands of tasks without complete results.

    Raises:
        ValueError: a command failed.
    """
    cancel_on_sigterm()
    missing = [task for task in commands if len(read_episodes(folder, task, params.seeds)) < len(params.seeds)]
    async with AsyncExitStack() as stack:
        if params.policy_server is None and missing:
            given = {name: getattr(params, name) for name in _SERVED}
            # as `vla-foundry evaluate` computes
            serving = ServeParams(port=params.lbm.port, websocket_port=None, precision="fp32", **given)
            await stack.enter_async_context(open_server(serving, load_policy(serving)))
        for task in missing:
            rollouts = folder / task / ROLLOUTS_FOLDER
            rollouts.mkdir(parents=True, exist_ok=True)
            # the container has a user of its own
            rollouts.chmod(0o777)
            code = await run_program(commands[task], "lbm.command")
            if code:
                raise ValueError(f"The LBM simulator ended with code {code} at task {task}; its own output says why.")


def read_episodes(folder: Path, task: str, seeds: Sequence[int]) -> list[EpisodeResult]:
    """Return the episodes of a task that are over, from the simulator's newest results.

    Raises:
        ValueError: the file is broken.
    """
    found = sorted((folder / task / ROLLOUTS_FOLDER).rglob("results*.json"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        return []
    try:
        values = read_object(str(found[-1]))["evaluations"]
        return [_read_episode(each) for each in values if each["scenario_index"] in seeds and _is_over(each)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{found[-1]} is not a result file of the LBM simulator ({error!r}).") from None


def _is_over(values: Mapping[str, Any]) -> bool:
    return not values.get("is_pending", False) and values["is_success"] is not None


def _read_episode(values: Mapping[str, Any]) -> EpisodeResult:
    message = values.get("failure_message")
    outcome = "invalid" if message else "success" if values["is_success"] else "failure"
    return EpisodeResult(
        task=values["skill_type"],
        seed=values["scenario_index"],
        outcome=outcome,
        seconds=values["total_time"],
        failure_message=message,
    )
