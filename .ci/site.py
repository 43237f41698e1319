"""A hook of mkdocs: write the reference pages from the code, and let links out of docs/ lead to the repository."""

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from typing import Any

from mkdocs.structure.files import File, Files

from vla_foundry import cli
from vla_foundry.config import schema
from vla_foundry.config.help import describe_default
from vla_foundry.params import TrainExperimentParams

# words of a command that is several
SUBCOMMANDS = {
    "preprocess": ("tokenizer", "text", "image_caption", "interleaved", "robotics"),
    "manifest": ("build", "verify"),
    "data": ("inspect", "explore", "action-tokenizer", "download"),
    "evaluate": ("", "text", "captions"),
    "hub": ("push", "pull"),
}


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    for name, text in (("training", format_training()), ("commands", format_commands())):
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links out of docs/ at the repository."""
    return re.sub(r"\]\(\.\./(?!reference/)([^)]*)\)", rf"]({config.repo_url}/blob/main/\1)", markdown)


def format_training() -> str:
    """Return a page with a table for each section of a training config, and each of its types."""
    lines = ["# Flags of training", "", "`--section.field VALUE`, or the same keys in a YAML file.", "", "## The run"]
    lines += format_table(TrainExperimentParams, "")
    for name, hint in schema.offered_types(TrainExperimentParams).items():
        section = schema.section_class(hint)
        if section is not None:
            lines += ["", f"## {name}", "", describe(section)]
            members = schema.offered_members(section) if schema.is_role(section) else {"": section}
            for kind, member in members.items():
                lines += [f"### {name}.type={kind}", "", describe(member)] if kind else []
                lines += format_table(member, f"{name}.")
    return "\n".join(lines) + "\n"


def describe(cls: Any) -> str:
    """Return the first line of a class's docstring."""
    return escape((cls.__doc__ or "").strip().split("\n")[0])


def format_table(cls: Any, path: str) -> list[str]:
    """Return a table of a dataclass's flags, those of the dataclasses within it included."""
    return ["", "| flag | value | default and range | meaning |", "|---|---|---|---|", *format_rows(cls, path), ""]


def format_rows(cls: Any, path: str) -> Iterator[str]:
    """Yield a row for each flag; a slot of several types has one row, which names them."""
    for name, hint in schema.offered_types(cls).items():
        section, flag = schema.section_class(hint), f"--{path}{name}"
        if section is None:
            comment = schema.field_comments(cls).get(name, "")
            kind = schema.describe_type(schema.field_types(cls)[name])
            limits = schema.ranges(schema.annotated_types(cls)[name])
            default = "; ".join([describe_default(schema.fields_by_name(cls)[name]), *limits])
            yield f"| `{flag}` | {escape(kind)} | {escape(default)} | {escape(comment)} |"
        elif schema.is_role(section):
            yield f"| `{flag}.type` | {escape(' | '.join(schema.offered_members(section)))} | | {describe(section)} |"
        elif path:
            yield from format_rows(section, f"{path}{name}.")


def escape(text: str) -> str:
    """Return text for a cell of a table."""
    return re.sub(r"([|<>*_\[\]{}])", r"\\\1", text)


def format_commands() -> str:
    """Return a page with the help of each command."""
    lines = ["# Commands", "", "What `vla-foundry COMMAND --help` prints."]
    for name, (_, what, _) in cli.COMMANDS.items():
        lines += ["", f"## {name}", "", f"{what[0].upper()}{what[1:]}."]
        for word in SUBCOMMANDS.get(name, ("",)):
            words = [name, word] if word else [name]
            lines += [f"### {' '.join(words)}"] if word else []
            lines += ["", "```text", read_help(words), "```"]
    return "\n".join(lines) + "\n"


def read_help(words: list[str]) -> str:
    """Return what a command prints when it is asked for help."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
    if not out.getvalue().strip():
        sys.exit(f"vla-foundry {' '.join(words)} --help prints nothing")
    return out.getvalue().rstrip()
