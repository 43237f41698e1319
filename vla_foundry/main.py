"""Train one model: `vla-foundry train ...`, or for several processes `torchrun vla_foundry/main.py ...`."""

import sys
from dataclasses import replace
from typing import Any

from vla_foundry.config.command_line import errors_once, parse, print_notices, run_command
from vla_foundry.config.resolve import print_resolved, require_resolved, resolve_known
from vla_foundry.data.facts import read_facts
from vla_foundry.params.experiment import TrainExperimentParams, find_lack_of_memory
from vla_foundry.world import follow_launcher, read_memory, read_world, read_world_size

PROG = "vla-foundry train"


def main(argv: list[str]) -> None:
    """Parse, resolve, train.

    Args:
        argv: the arguments after the command.

    Raises:
        ValueError: an error that the user can fix; one line.
        FileNotFoundError: a file named in the config does not exist.
    """
    follow_launcher()
    with errors_once():
        parsed = parse(TrainExperimentParams, argv, prog=PROG)
    with errors_once(on_each_node=True):
        facts = read_facts(parsed.params, read_world_size(), offline=parsed.params.resolve_configs)
        resolved = resolve_known(parsed.params, facts)
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
    train(params, world)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
