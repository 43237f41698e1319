"""Format `--help`: a command's overview, a section's or type's flags; and find the path that a mistyped one meant."""

import difflib
from dataclasses import MISSING, Field
from typing import Any

from vla_foundry.config import schema
from vla_foundry.config.schema import ChoiceParams
from vla_foundry.config.tree import TYPE_KEY
from vla_foundry.registry import unknown_name_message

_WIDTH = 38
# a slot may hold its own type; nobody types a deeper path than this
_MAX_DEPTH = 6


def format_help(cls: Any, prog: str, topic: str, positional: tuple[str, ...] = ()) -> str:
    """Return the help of a command.

    Args:
        cls: the dataclass of the command.
        prog: the command as the user types it.
        topic: "" for the overview, or a section (`hparams`), a field (`hparams.lr`) or a type (`model.type=vlm`).
        positional: fields that are given without a flag.

    Raises:
        ValueError: the topic does not exist.
    """
    if topic:
        return _format_topic(cls, topic)
    words = "".join(f" {name.upper()}" for name in positional)
    lines = [f"usage: {prog}{words} [--config_path FILE] [--FLAG VALUE ...]", "", _summary(cls), ""]
    if schema.is_role(cls):
        lines.append(_columns(f"--{TYPE_KEY} {' | '.join(schema.offered_members(cls))}", "what it is (required)"))
    sections = {name: schema.section_class(hint) for name, hint in schema.offered_types(cls).items()}
    lines += [_leaf_line(cls, name, f"--{name}") for name, section in sections.items() if section is None]
    if schema.is_role(cls):
        lines += _type_lines(cls)
    if any(sections.values()):
        lines += ["", "sections (--help SECTION lists its flags):"]
    for name, section in sections.items():
        if section is not None:
            lines.append(_columns(f"--{name}.*", _summary(section)))
            if schema.is_role(section):
                types = ", ".join(schema.offered_members(section))
                lines.append(_columns("", f"--{name}.type: {types} (--help {name}.type=NAME)"))
    lines += [
        "",
        _columns("--config_path FILE", "a YAML file; flags override it, in any order"),
        _columns("--SECTION include FILE", "merge a YAML file into one section (in quotes)"),
        _columns("--debug", "show the traceback of an error"),
    ]
    return "\n".join(lines) + "\n"


def _columns(head: str, tail: str) -> str:
    """Return a line of two columns, or two lines if the first column is too narrow."""
    return f"  {head:<{_WIDTH}} {tail}" if len(head) <= _WIDTH else f"  {head}\n  {'':<{_WIDTH}} {tail}"


def _type_lines(role: Any) -> list[str]:
    """Return the lines of each type's own fields, besides those of the role."""
    lines = []
    for type_name, member in schema.offered_members(role).items():
        lines += ["", f"--{TYPE_KEY} {type_name}: {_summary(member)}"]
        own = [name for name in schema.offered_types(member) if name not in schema.field_types(role)]
        lines += [_leaf_line(member, name, f"--{name}") for name in own]
    return lines


def _summary(cls: Any) -> str:
    first = (cls.__doc__ or "").strip().split("\n")[0]
    # a section's docstring begins with its flag, which the list already shows
    return first.partition("` ")[2] if first.startswith("`--") else first


def _leaf_line(cls: Any, name: str, flag: str) -> str:
    comment = schema.field_comments(cls).get(name, "")
    ranges = schema.ranges(schema.annotated_types(cls)[name])
    tail = (
        f"{comment}{' ' if comment else ''}({'; '.join([describe_default(schema.fields_by_name(cls)[name]), *ranges])})"
    )
    return _columns(f"{flag} {schema.describe_type(schema.field_types(cls)[name])}", tail)


def describe_default(item: Field) -> str:
    """Return a field's default as a user would type it, or `required`."""
    if schema.is_required(item):
        return "required"
    value = item.default if item.default_factory is MISSING else item.default_factory()
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _format_topic(cls: Any, topic: str) -> str:
    path, equals, type_name = topic.lstrip("-").partition("=")
    parent, _, leaf = path.rpartition(".")
    slot = parent if leaf == TYPE_KEY else path
    roles = [section for section in _sections(cls, slot) if schema.is_role(section)]
    if equals:
        known = {name: member for role in roles for name, member in schema.members(role).items()}
        if type_name not in known:
            raise ValueError(unknown_name_message(path, type_name, sorted(known)))
        return "\n".join(_section_lines(known[type_name], slot)) + "\n"
    lines: list[str] = []
    for section in _sections(cls, path):
        offered = schema.offered_members(section).values() if schema.is_role(section) else [section]
        for member in offered:
            lines += [*_section_lines(member, path), ""]
    if lines:
        return "\n".join(lines)
    for role in roles:
        lines += [_columns(f"{path}={name}", _summary(member)) for name, member in schema.offered_members(role).items()]
    for owner in _sections(cls, parent) if parent else [cls]:
        for member in schema.concrete_classes(owner):
            if leaf in schema.field_types(member):
                lines.append(_leaf_line(member, leaf, f"--{path}"))
    if not lines:
        names = list(schema.field_types(cls))
        nearest = nearest_path(cls, path, names)
        hint = f" Did you mean --help {nearest}?" if nearest else ""
        raise ValueError(f"There is no help on '{topic}'.{hint} Topics: {', '.join(names)}, SECTION.type=NAME.")
    return "\n".join(dict.fromkeys(lines)) + "\n"


def _sections(cls: Any, path: str) -> list[Any]:
    found = [schema.section_class(hint) for hint in schema.lookup(cls, path)]
    return list(dict.fromkeys(section for section in found if section is not None))


def _section_lines(cls: Any, path: str) -> list[str]:
    kind = f"{path}.type={cls.registered_name()}" if issubclass(cls, ChoiceParams) else path
    lines = [f"{kind}: {_summary(cls)}"]
    for name, hint in schema.offered_types(cls).items():
        section = schema.section_class(hint)
        if section is None:
            lines.append(_leaf_line(cls, name, f"--{path}.{name}"))
        elif schema.is_role(section):
            types = ", ".join(schema.offered_members(section))
            lines.append(_columns(f"--{path}.{name}.*", f"one of: {types} (--help {path}.{name}.type=NAME)"))
        else:
            lines += [f"  {line}" for line in _section_lines(section, f"{path}.{name}")]
    return lines


def _leaf_owners(cls: Any, depth: int = 0) -> dict[str, type]:
    """Return every dotted path that can be set below a class, over all types of its roles, with its dataclass."""
    owners: dict[str, type] = {}
    for member in schema.concrete_classes(cls):
        for name, hint in schema.field_types(member).items():
            section = schema.section_class(hint)
            if section is None or depth == _MAX_DEPTH:
                owners.setdefault(name, member)
            else:
                below = _leaf_owners(section, depth + 1)
                owners |= {f"{name}.{path}": owner for path, owner in below.items() if f"{name}.{path}" not in owners}
    return owners | ({"type": cls} if schema.is_role(cls) else {})


def nearest_path(root: Any, wanted: str, siblings: list[str]) -> str | None:
    """Return the path, or "one or another", that a user who typed the unknown `wanted` may have meant.

    Args:
        root: the class of the whole config.
        wanted: the dotted path as typed.
        siblings: dotted paths of the fields beside the unknown one; they are tried first.
    """
    name = wanted.rpartition(".")[2]
    beside = {path.rpartition(".")[2]: path for path in siblings}
    near = difflib.get_close_matches(name, list(beside), n=1, cutoff=0.75)
    if near:
        return beside[near[0]]
    owners = _leaf_owners(root)
    same_name = [path for path in owners if path.rpartition(".")[2] == name]
    if same_name:
        depth = min(path.count(".") for path in same_name)
        return " or ".join([path for path in same_name if path.count(".") == depth][:3])
    last_names = {path.rpartition(".")[2]: path for path in reversed(owners)}
    near = difflib.get_close_matches(name, list(last_names), n=1, cutoff=0.7)
    if near:
        return last_names[near[0]]
    near = difflib.get_close_matches(wanted, [*siblings, *owners], n=1, cutoff=0.7)
    if near:
        return near[0]
    comments = {path: schema.field_comments(owner).get(path.rpartition(".")[2], "") for path, owner in owners.items()}
    described = [path for path, comment in comments.items() if name.replace("_", " ") in comment]
    return min(described, key=lambda path: len(comments[path]), default=None) if "_" in name else None
