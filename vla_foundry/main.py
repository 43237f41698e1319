"""Train one model: `vla-foundry train ...`, or for several processes `torchrun -m vla_foundry.main ...`."""

from vla_foundry.world import follow_launcher, leave_on_interrupt, raise_on_interrupt

if __name__ == "__main__":
    leave_on_interrupt()
    # the launcher may die during the imports
    follow_launcher()

import os
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from typing import Any

from vla_foundry.config.command_line import (
    EXPECTED_ERRORS,
    Parsed,
    describe_error,
    errors_once,
    parse,
    print_notices,
    run_command,
)
from vla_foundry.config.decode import find_text
from vla_foundry.config.resolve import Resolved, format_tree, print_resolved, require_resolved, resolve_known
from vla_foundry.config.schema import MissingError
from vla_foundry.data.facts import read_facts
from vla_foundry.params.experiment import TrainExperimentParams, find_lack_of_memory
from vla_foundry.storage.uri import write_text
from vla_foundry.world import is_first_process, is_launched, read_memory, read_world, read_world_size

PROG = "vla-foundry train"


def main(argv: list[str]) -> None:
    """Parse, resolve, train.

    Args:
        argv: the arguments after the command.

    Raises:
        ValueError: an error that the user can fix; one line.
        FileNotFoundError: a file named in the config does not exist.
    """
    try:
        with errors_once():
            parsed = parse(TrainExperimentParams, argv, prog=PROG)
    except MissingError as error:
        if find_text(error.found, "resolve_configs") not in ("true", "True"):
            raise
        if is_first_process():
            sys.stdout.write(format_tree(error.found))
        print_notices([f"this is what was given; to train, more is needed: {error}"])
        return
    try:
        run(parsed)
    except Exception as error:  # what it is tells run_command; the record is all that is left of it on a cluster
        if is_launched() and is_first_process() and not parsed.params.resolve_configs:
            record_failure(parsed.params, error)
        raise


def record_failure(params: TrainExperimentParams, error: Exception) -> None:
    """Write an error to <save_path>/.failed/<name>.log: the report of a launcher buries the line that is printed."""
    now = time.strftime("%Y_%m_%d-%H_%M_%S")
    is_expected = isinstance(error, EXPECTED_ERRORS)
    text = describe_error(error) if is_expected else "".join(traceback.format_exception(error))
    with suppress(OSError):
        write_text(os.path.join(params.save_path, ".failed", f"{params.name or now}.log"), f"{now} {text}\n")


def run(parsed: Parsed) -> None:
    """Resolve the params of a command line, and train."""
    with errors_once(on_each_node=True):
        facts = read_facts(parsed.params, read_world_size(), offline=parsed.params.resolve_configs)
        try:
            resolved = resolve_known(parsed.params, facts)
        except MissingError as error:
            if not parsed.params.resolve_configs:
                raise
            resolved: Resolved[Any] = error.found
            resolved.notices.append(f"to train, more is needed: {error}")
    print_notices(parsed.notices + resolved.notices)
    if parsed.params.resolve_configs:
        lack = find_lack_of_memory(resolved.params, facts.world_size, read_memory(facts.ranks_per_node))
        print_notices([lack] if lack else [])
        # the flags that requested this output are not part of the run
        flags: dict[str, Any] = {"resolve_configs": False, "resolve_configs_path": None}
        shown = replace(resolved, params=replace(resolved.params, **flags))
        origins = {path: origin for path, origin in parsed.origins.items() if path not in flags}
        print_resolved(shown, origins, parsed.params.resolve_configs_path)
        return
    params = require_resolved(resolved)
    if is_first_process():
        from vla_foundry.training.metrics import wants_wandb

        # an error here comes before torch is imported and before anything is written
        wants_wandb(params)

    import torch

    from vla_foundry.training.experiment import train

    world = read_world(torch.cuda.device_count())
    if world.device == "cpu":
        memory = read_memory(facts.ranks_per_node, may_use_gpu=False)
    else:
        memory = torch.cuda.get_device_properties(world.device).total_memory
    with errors_once(on_each_node=True):
        lack = find_lack_of_memory(params, facts.world_size, memory)
        if lack is not None:
            raise ValueError(lack)
    raise_on_interrupt()
    origins = {path: str(origin) for path, origin in parsed.origins.items()}
    derived = {path: f"resolved from {source}" for path, source in resolved.sources.items()}
    train(params, world, origins | derived)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
