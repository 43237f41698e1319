"""Print a resolved config with the origin of every leaf, as YAML whose comments are the origins."""

import os
import sys
from dataclasses import fields, is_dataclass, replace
from typing import Any

from vla_foundry.config.base import ChoiceParams
from vla_foundry.config.command_line import is_first_process
from vla_foundry.config.loading import dump_inline
from vla_foundry.config.resolve import Resolved
from vla_foundry.config.tree import DEFAULT, TYPE_KEY, Origin
from vla_foundry.storage.uri import write_text

RESOLVED_NAME = "resolved_config.yaml"
_COLUMN = 56


def print_resolved(resolved: Resolved, origins: dict[str, Origin]) -> None:
    """Print the resolved config on the first process, and write it to resolve_configs_path if that is given."""
    if not is_first_process():
        return
    text = format_resolved(resolved, origins)
    sys.stdout.write(text)
    folder = resolved.params.resolve_configs_path
    if folder is not None:
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, RESOLVED_NAME)
        write_text(path, text)
        sys.stderr.write(f"note: written to {path}\n")


def format_resolved(resolved: Resolved, origins: dict[str, Origin]) -> str:
    """Return the resolved config as YAML; loading it gives the same run.

    Args:
        resolved: the config; the flags that asked for this print are left out of it.
        origins: config path of each given leaf -> where it was written.
    """
    notes = {path: str(origin) for path, origin in origins.items()}
    notes.update({path: f"resolved from {source}" for path, source in resolved.sources.items()})
    notes.update({path: f"unresolved (needs {needs})" for path, needs in resolved.unresolved.items()})
    params = replace(resolved.params, resolve_configs=False, resolve_configs_path=None)
    for name in ("resolve_configs", "resolve_configs_path"):
        notes.pop(name, None)
    return "\n".join(_lines(params, "", notes)) + "\n"


def _lines(section: Any, path: str, notes: dict[str, str]) -> list[str]:
    indent = "  " * (path.count(".") + 1 if path else 0)
    lines = []
    values = (
        section if isinstance(section, dict) else {item.name: getattr(section, item.name) for item in fields(section)}
    )
    if isinstance(section, ChoiceParams):
        lines.append(_line(indent, TYPE_KEY, section.registered_name(), f"{path}.{TYPE_KEY}", notes))
    for name, value in values.items():
        full = f"{path}.{name}" if path else name
        holds_sections = isinstance(value, dict) and any(is_dataclass(part) for part in value.values())
        if is_dataclass(value) or holds_sections:
            lines += [f"{indent}{name}:", *_lines(value, full, notes)]
        else:
            lines.append(_line(indent, name, value, full, notes))
    return lines


def _line(indent: str, key: str, value: Any, path: str, notes: dict[str, str]) -> str:
    return f"{f'{indent}{key}: {dump_inline(value)}':<{_COLUMN}} # {notes.get(path, str(DEFAULT))}"
