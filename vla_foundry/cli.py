"""`vla-foundry <command> ...`: pick a command; its module is imported when it is called."""

import importlib
import os
import sys

from vla_foundry.world import follow_launcher, leave_on_interrupt, raise_on_interrupt

# name: (function, what it does, page of the documentation)
COMMANDS = {
    "train": ("vla_foundry.main:main", "train a model (with torchrun: torchrun -m vla_foundry.main ...)", "training"),
    "preprocess": ("vla_foundry.preprocessing.command:main", "turn raw data into shards: text, tokenizer, ...", "data"),
    "manifest": (
        "vla_foundry.preprocessing.manifest:main",
        "make or verify the manifest of a folder of shards",
        "data",
    ),
    "data": ("vla_foundry.viz.inspection:main", "download data; inspect it: draw a sample as training gets it", "data"),
    "view": (
        "vla_foundry.viz.view:main",
        "write episodes, training batches or rollouts for the rerun viewer",
        "robotics_data",
    ),
    "stats": (
        "vla_foundry.preprocessing.robotics.statistics:main",
        "compute or merge the statistics of robot data",
        "robotics_data",
    ),
    "generate": (
        "vla_foundry.inference.generate:main",
        "continue a prompt with a trained language model",
        "backbones",
    ),
    "caption": (
        "vla_foundry.inference.caption:main",
        "caption images with a trained vision-language model",
        "backbones",
    ),
    "scenes": ("vla_foundry.datagen.scenes:main", "draw captioned scenes in a simulator", "quickstart"),
    "demos": (
        "vla_foundry.datagen.demos:main",
        "record demonstrations by scripted experts in a simulator",
        "simulators",
    ),
    "evaluate": (
        "vla_foundry.evaluation.evaluate:main",
        "run a policy in a simulator; other benchmarks: evaluate harness|text|captions",
        "evaluation",
    ),
    "report": (
        "vla_foundry.evaluation.report.command:main",
        "compare the policies of a folder: one HTML page, tables and figures",
        "comparing_policies",
    ),
    "dashboard": (
        "vla_foundry.evaluation.dashboard.server:main",
        "show a folder's comparison live in the browser, and queue evaluations",
        "dashboard",
    ),
    "action-error": (
        "vla_foundry.evaluation.action_error:main",
        "compare a policy's actions with held-out demonstrations",
        "evaluation",
    ),
    "serve": ("vla_foundry.serving.command:main", "serve a policy over gRPC and websockets", "serving"),
    "import-checkpoint": (
        "vla_foundry.importing.command:main",
        "convert a run of the earlier implementation",
        "importing",
    ),
    "merge": ("vla_foundry.importing.merge:main", "merge a run's adapters (LoRA) into whole weights", "training"),
    "export": (
        "vla_foundry.inference.export:main",
        "write a policy as graphs for torch.export or ONNX, and check them",
        "importing",
    ),
    "hub": ("vla_foundry.hub.command:main", "share runs and datasets on the Hugging Face hub: push, pull", "sharing"),
    "reproduce": ("vla_foundry.hub.reproduce:main", "run a recorded experiment again, and compare", "sharing"),
    "verify-resume": (
        "vla_foundry.hub.verify_resume:main",
        "prove that a killed run of a config, resumed, is the run never killed",
        "training",
    ),
    "plan": ("vla_foundry.hub.plan:main", "predict the memory of a run on each GPU, and say what fits", "training"),
    "new-policy": (
        "vla_foundry.quickstart.new_policy:main",
        "write configs that train a policy on a LeRobot dataset",
        "first_policy",
    ),
    "doctor": (
        "vla_foundry.quickstart.doctor:main",
        "look for faults in a config and its data before training",
        "first_policy",
    ),
    "quickstart": (
        "vla_foundry.quickstart.command:main",
        "all stages on this machine: real data, training, results",
        "quickstart",
    ),
}

# pages of commands that are two words
_PAGES = {
    "preprocess robotics": "robotics_preprocessing",
    "evaluate text": "benchmarks",
    "evaluate captions": "benchmarks",
    "evaluate harness": "serving",
}
_DOCUMENTATION = "https://github.com/vla-foundry/vla_foundry/blob/main/docs"

_USAGE = """usage: vla-foundry COMMAND ...

From language to vision-language to robot actions: one codebase, one training loop.

commands (vla-foundry COMMAND --help says more):
{commands}

A command takes --config_path FILE and --section.field VALUE; sections of `train` are data, model, hparams,
distributed and ema (vla-foundry train --help hparams; vla-foundry train --help model.type=transformer).

documentation: {documentation}/index.md
"""


def usage() -> str:
    """Return the text of `vla-foundry --help`."""
    commands = "\n".join(f"  {name:<18} {what}" for name, (_, what, _) in COMMANDS.items())
    return _USAGE.format(commands=commands, documentation=_DOCUMENTATION)


def main(argv: list[str] | None = None) -> None:
    """Run `vla-foundry`.

    Args:
        argv: the arguments after `vla-foundry`; None: those of this process.

    Raises:
        SystemExit: 2 after an error that the user can fix, printed as one line `error: ...`.
    """
    # waiting threads must not spin: next to another busy process that slows us down tenfold or more
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("--help", "-h", "help"):
        sys.stdout.write(usage())
        return
    leave_on_interrupt()
    follow_launcher()
    try:
        from vla_foundry.config.command_line import run_command

        run_command(_dispatch, words)
    finally:
        raise_on_interrupt()


def _dispatch(words: list[str]) -> None:
    if words[0] not in COMMANDS:
        from vla_foundry.config.command_line import unknown_command_message

        raise ValueError(unknown_command_message(words[0], list(COMMANDS)))
    target, _, page = COMMANDS[words[0]]
    module, _, function = target.partition(":")
    command = getattr(importlib.import_module(module), function)
    if words[0] != "train":  # which imports more, and then raises itself
        raise_on_interrupt()
    try:
        command(words[1:])
    finally:
        if not {"--help", "-h"}.isdisjoint(words):
            page = _PAGES.get(" ".join(words[:2]), page)
            sys.stdout.write(f"\ndocumentation: {_DOCUMENTATION}/{page}.md\n")


if __name__ == "__main__":
    main()
