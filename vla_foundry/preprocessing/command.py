"""`vla-foundry preprocess <what>`: find the job, parse its params, run it."""

import importlib
import json
import sys
from collections.abc import Collection, Sequence
from typing import Any

from vla_foundry.config.command_line import parse_command
from vla_foundry.config.schema import concrete_classes, field_types, is_list, options
from vla_foundry.registry import unknown_name_message

# what -> (module:class of its params, module:function, one line of help); a job is imported when it runs
JOBS = {
    "text": (
        "vla_foundry.params.commands.preprocessing:PreprocessTextParams",
        "vla_foundry.preprocessing.text.text_job:preprocess_text",
        "text -> tokenized, packed shards",
    ),
    "text_untokenized": (
        "vla_foundry.params.commands.preprocessing:PreprocessTextUntokenizedParams",
        "vla_foundry.preprocessing.text.text_job:preprocess_text_untokenized",
        "text -> shards of raw text",
    ),
    "tokenizer": (
        "vla_foundry.params.commands.preprocessing:TrainTokenizerParams",
        "vla_foundry.preprocessing.text.tokenizer:train_tokenizer",
        "text -> a byte-level BPE tokenizer",
    ),
    "image_caption": (
        "vla_foundry.params.commands.preprocessing:PreprocessImageCaptionParams",
        "vla_foundry.preprocessing.image_caption.image_caption_job:preprocess_image_caption",
        "images and captions: folders of pairs, lists of paths or URLs",
    ),
    "interleaved": (
        "vla_foundry.params.commands.preprocessing:PreprocessInterleavedParams",
        "vla_foundry.preprocessing.image_caption.interleaved_job:preprocess_interleaved",
        "documents of text and images in order: folders of JSON, lists",
    ),
    "robotics": (
        "vla_foundry.params.commands.preprocessing_robotics:RoboticsPreprocessParams",
        "vla_foundry.preprocessing.robotics.robotics_job:preprocess_robotics",
        "recordings of robots (LeRobot, HDF5, ...)",
    ),
}


def main(argv: list[str]) -> None:
    """Run `vla-foundry preprocess`.

    Args:
        argv: the job, then its flags.

    Raises:
        ValueError: what the user can fix.
        FileNotFoundError: a source does not exist.
    """
    if not argv or argv[0] in ("--help", "-h"):
        lines = (f"  {name:<18}{line}\n" for name, (_, _, line) in JOBS.items())
        sys.stdout.write("usage: vla-foundry preprocess <what> --help | FLAGS\n\n" + "".join(lines))
        return
    if argv[0] not in JOBS:
        raise ValueError(unknown_name_message("preprocess", argv[0], sorted(JOBS)))
    params_name, target, _ = JOBS[argv[0]]
    params_class = _load(params_name)
    words = join_list_flags(argv[1:], _list_flags(params_class))
    params = parse_command(params_class, words, prog=f"vla-foundry preprocess {argv[0]}")
    _load(target)(params)


def _list_flags(params_class: Any) -> set[str]:
    """Return the flags that take a list, in any type of these params."""
    return {
        f"--{name}"
        for member in concrete_classes(params_class)
        for name, hint in field_types(member).items()
        if any(is_list(option) for option in options(hint))
    }


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def join_list_flags(argv: Sequence[str], flags: Collection[str]) -> list[str]:
    """Turn `--source A B --source C` into one flag with a list, `--source ["A", "B", "C"]`.

    A flag given one value that is a list already, or that includes a file, is left as it is.
    """
    words: list[str] = []
    values: dict[str, list[str]] = {}
    flag = None
    for word in argv:
        name, equals, text = word.partition("=")
        if word.startswith("--"):
            flag = name if name in flags else None
            if flag is None:
                words.append(word)
            else:
                values.setdefault(flag, []).extend([text] if equals else [])
        elif flag is not None:
            values[flag].append(word)
        else:
            words.append(word)
    for name, items in values.items():
        is_list = len(items) == 1 and items[0].lstrip().startswith(("[", "include "))
        words += [name, items[0] if is_list else json.dumps(items)]
    return words
