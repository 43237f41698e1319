"""Fill in derived values in one pure pass, check that sections fit together, and print each value's origin."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

from vla_foundry.config.loading import dump_inline
from vla_foundry.config.schema import BaseParams, ChoiceParams, Derived, MissingError, Unavailable
from vla_foundry.config.tree import DEFAULT, TYPE_KEY, Branch, Origin, Scalar
from vla_foundry.storage.uri import write_text
from vla_foundry.world import is_first_process

P = TypeVar("P", bound=BaseParams)

RESOLVED_NAME = "resolved_config.yaml"
# column of the comments in a printed config
_COLUMN = 56


@dataclass(frozen=True)
class Resolved(Generic[P]):
    """Params with every derived value that is known."""

    params: P
    # config path of each derived value -> what it is derived from
    sources: dict[str, str]
    # config path of each value that could not be derived -> what it needs
    unresolved: dict[str, str]
    # lines to print that are not errors
    notices: list[str]


def resolve(params: P, facts: Any) -> P:
    """Return the params with every derived value filled in, checked against each other. Pure.

    Raises:
        ValueError: a value cannot be derived, or sections do not fit together; one line with config paths.
    """
    return require_resolved(resolve_known(params, facts))


def require_resolved(resolved: Resolved[P]) -> P:
    """Return the params, after checking that every value was derived.

    Raises:
        ValueError: a value could not be derived; the message says what it needs.
    """
    for path, needs in resolved.unresolved.items():
        raise ValueError(f"{path} cannot be resolved: it needs {needs}.")
    return resolved.params


def resolve_known(params: P, facts: Any) -> Resolved[P]:
    """Resolve like `resolve`, but leave unknown values as they are.

    Args:
        params: a whole config; its class says in `derivation_order` which section follows which.
        facts: passed to its sections' `derive` and `check`.

    Raises:
        ValueError: sections do not fit together, as far as that is known.
    """
    derivation = _Derivation(sources={}, unresolved={}, notices=[])
    order, notices = params.derivation_order, derivation.notices
    try:
        for name in order:
            # a section's second pass may fill values that its first left open
            for path in [path for path in derivation.unresolved if path.startswith(f"{name}.")]:
                del derivation.unresolved[path]
            params = replace(params, **{name: derivation.derive_section(getattr(params, name), params, facts, name)})
        params = derivation.fill(params, params.derive(params, facts), "")
        for name in dict.fromkeys(order):
            notices += _check(getattr(params, name), params, facts, name)
        notices += params.check(params, facts, "")
    except MissingError as error:
        error.found = Resolved(params, derivation.sources, derivation.unresolved, notices)
        raise
    return Resolved(params, derivation.sources, derivation.unresolved, notices)


@dataclass(frozen=True, kw_only=True)
class _Derivation:
    """The results of one derivation pass."""

    sources: dict[str, str]
    unresolved: dict[str, str]
    # lines for the user
    notices: list[str]

    def derive_section(self, section: Any, root: Any, facts: Any, path: str) -> Any:
        """Return the section, and the sections in it, with derived values."""
        section = self.fill(section, section.derive(root, facts), path)
        sections: dict[str, Any] = {}
        for name, key, part in _parts(section):
            seen, known = section.view(root, facts, name, key)
            inner = _join(path, name, key)
            with naming_section(path, inner) if key else nullcontext():
                derived = self.derive_section(part, seen, known, inner)
            sections[name] = derived if key is None else sections.get(name, {}) | {key: derived}
        return replace(section, **sections) if sections else section

    def fill(self, section: Any, derived: dict[str, Derived], path: str) -> Any:
        values = {}
        for name, item in derived.items():
            full = _join(path, name)
            if isinstance(item.value, Unavailable):
                self.unresolved[full] = item.value.needs
            else:
                values[name] = item.value
                self.sources[full] = item.source
                self.notices.extend([item.notice] if item.notice else [])
        return replace(section, **values) if values else section


@contextmanager
def naming_section(path: str, inner: str) -> Iterator[None]:
    """Name the section at `inner` in the errors of what sees it as the one at `path`; see BaseParams.view."""
    try:
        yield
    except ValueError as error:
        rest = inner.removeprefix(path)
        named = re.sub(rf"(?<![\w/.]){path}(?=\.[a-z_])(?!{re.escape(rest)})", inner, str(error))
        raise type(error)(named) from None


def _parts(section: BaseParams) -> Iterator[tuple[str, str | None, BaseParams]]:
    """Yield the sections in a section: field, key if the field is a dict of sections, and section."""
    for item in fields(section):
        value: Any = getattr(section, item.name)
        if isinstance(value, BaseParams):
            yield item.name, None, value
        elif isinstance(value, dict) and all(isinstance(part, BaseParams) for part in value.values()):
            yield from ((item.name, key, part) for key, part in value.items())


def _join(*keys: str | None) -> str:
    return ".".join(key for key in keys if key)


def _check(section: BaseParams, root: BaseParams, facts: Any, path: str) -> list[str]:
    notices = section.check(root, facts, path)
    for name, key, part in _parts(section):
        inner = _join(path, name, key)
        with naming_section(path, inner) if key else nullcontext():
            notices = [*notices, *_check(part, *section.view(root, facts, name, key), inner)]
    return notices


def print_resolved(resolved: Resolved[Any], origins: dict[str, Origin], folder: str | None = None) -> None:
    """Print a resolved config on the first process.

    Args:
        resolved: the config.
        origins: config path of each given leaf -> where it was written.
        folder: local folder to write resolved_config.yaml to as well.
    """
    if not is_first_process():
        return
    text = format_resolved(resolved, origins)
    sys.stdout.write(text)
    if folder is not None:
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, RESOLVED_NAME)
        write_text(path, text)
        sys.stderr.write(f"note: written to {path}\n")


def format_resolved(resolved: Resolved[Any], origins: dict[str, Origin]) -> str:
    """Return a resolved config as YAML whose comments are the origins; loading it gives the same run."""
    notes = {path: str(origin) for path, origin in origins.items()}
    notes.update({path: f"resolved from {source}" for path, source in resolved.sources.items()})
    notes.update({path: f"unresolved (needs {needs})" for path, needs in resolved.unresolved.items()})
    return "\n".join(_lines(resolved.params, "", notes)) + "\n"


def format_tree(tree: Branch, indent: str = "") -> str:
    """Return what was given of a config as YAML whose comments are the origins."""
    text = ""
    for key, node in tree.children.items():
        if isinstance(node, Branch):
            text += f"{indent}{key}:\n{format_tree(node, f'{indent}  ')}"
        else:
            text += _line(indent, key, _to_plain(node.value), key, {key: str(node.origin)}) + "\n"
    return text


def _to_plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_to_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _to_plain(item) for key, item in value.items()}
    return value.text if isinstance(value, Scalar) else value


def _lines(section: Any, path: str, notes: dict[str, str]) -> list[str]:
    indent = "  " * (path.count(".") + 1 if path else 0)
    lines = []
    values = (
        section if isinstance(section, dict) else {item.name: getattr(section, item.name) for item in fields(section)}
    )
    if isinstance(section, ChoiceParams):
        lines.append(_line(indent, TYPE_KEY, section.registered_name(), f"{path}.{TYPE_KEY}", notes))
    for name, value in values.items():
        full = _join(path, name)
        holds_sections = isinstance(value, dict) and any(is_dataclass(part) for part in value.values())
        if is_dataclass(value) or holds_sections:
            lines += [f"{indent}{name}:", *_lines(value, full, notes)]
        else:
            lines.append(_line(indent, name, value, full, notes))
    return lines


def _line(indent: str, key: str, value: Any, path: str, notes: dict[str, str]) -> str:
    return f"{f'{indent}{key}: {dump_inline(value)}':<{_COLUMN}} # {notes.get(path, str(DEFAULT))}"
