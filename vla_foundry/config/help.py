"""The text of `--help`: commands and sections in short, the leaves of a section or of a type on demand."""

from dataclasses import MISSING
from typing import Any

from vla_foundry.config import schema
from vla_foundry.config.schema import ChoiceParams
from vla_foundry.config.tree import TYPE_KEY
from vla_foundry.registry import unknown_name_message

_WIDTH = 38


def format_help(cls: Any, prog: str, topic: str, positional: tuple[str, ...] = ()) -> str:
    """Return the help of a command.

    Args:
        cls: the dataclass of the command.
        prog: the command as the user types it.
        topic: "" for the overview, or a section (`hparams`), a field (`hparams.lr`) or a type (`model.type=vlm`).
        positional: fields that stand without a flag.

    Raises:
        ValueError: there is no such topic.
    """
    if topic:
        return _format_topic(cls, topic)
    words = "".join(f" {name.upper()}" for name in positional)
    lines = [f"usage: {prog}{words} [--config_path FILE] [--FLAG VALUE ...]", "", _summary(cls), ""]
    sections = []
    if schema.is_role(cls):
        lines.append(f"  {'--type ' + ' | '.join(sorted(schema.offered_members(cls))):<{_WIDTH}} what it is (required)")
    for name, hint in schema.offered_types(cls).items():
        section = schema.section_class(hint)
        if section is None:
            lines.append(_leaf_line(cls, name, f"--{name}"))
        else:
            sections.append((name, section))
    if schema.is_role(cls):
        lines += _type_lines(cls)
    if sections:
        lines += ["", "sections (--help SECTION lists its flags):"]
        for name, section in sections:
            lines.append(f"  --{name + '.*':<{_WIDTH - 2}} {_summary(section)}")
            if schema.is_role(section):
                types = ", ".join(sorted(schema.offered_members(section)))
                lines.append(f"  {'':<{_WIDTH}} --{name}.type: {types} (--help {name}.type=NAME)")
    lines += [
        "",
        f"  {'--config_path FILE':<{_WIDTH}} a YAML file; flags win over it, whatever their order",
        f"  {'--SECTION include FILE':<{_WIDTH}} lay a YAML file over one section (in quotes)",
        f"  {'--debug':<{_WIDTH}} show the traceback of an error",
    ]
    return "\n".join(lines) + "\n"


def _type_lines(role: Any) -> list[str]:
    """What each type of a role adds to the fields that all have."""
    lines = []
    for type_name, member in sorted(schema.offered_members(role).items()):
        lines += ["", f"--{TYPE_KEY} {type_name}: {_summary(member)}"]
        own = [name for name in schema.offered_types(member) if name not in schema.field_types(role)]
        lines += [_leaf_line(member, name, f"--{name}") for name in own]
    return lines


def _summary(cls: Any) -> str:
    first = (cls.__doc__ or "").strip().split("\n")[0]
    # a section's docstring begins with its flag, which the list shows already
    return first.partition("` ")[2] if first.startswith("`--") else first


def _leaf_line(cls: Any, name: str, flag: str) -> str:
    kind = schema.describe_type(schema.field_types(cls)[name])
    comment = schema.field_comments(cls).get(name, "")
    default = _default(cls, name)
    head, tail = f"{flag} {kind}", f"{comment}{' ' if comment else ''}({default})"
    # what is too long for its column has a line of its own
    return f"  {head:<{_WIDTH}} {tail}" if len(head) <= _WIDTH else f"  {head}\n  {'':<{_WIDTH}} {tail}"


def _default(cls: Any, name: str) -> str:
    item = schema.fields_by_name(cls)[name]
    if schema.is_required(item):
        return "required"
    value = item.default if item.default is not MISSING else schema.default_of(item)
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _format_topic(cls: Any, topic: str) -> str:
    path, equals, name = topic.lstrip("-").partition("=")
    if equals:
        section_path = path.removesuffix(".type")
        roles = [hint for hint in _sections(cls, section_path) if schema.is_role(hint)]
        known = {type_name: member for role in roles for type_name, member in schema.members(role).items()}
        if name not in known:
            raise ValueError(unknown_name_message(path, name, sorted(known)))
        return "\n".join(_section_lines(known[name], section_path)) + "\n"
    sections = _sections(cls, path)
    if sections:
        lines: list[str] = []
        for section in sections:
            offered = schema.offered_members(section).values() if schema.is_role(section) else [section]
            for member in offered:
                lines += [*_section_lines(member, path), ""]
        return "\n".join(lines)
    parent, _, leaf = path.rpartition(".")
    roles = [hint for hint in _sections(cls, parent) if schema.is_role(hint)] if leaf == TYPE_KEY else []
    lines = [
        f"  {f'{path}={name}':<{_WIDTH}} {_summary(member)}"
        for role in roles
        for name, member in sorted(schema.offered_members(role).items())
    ]
    for owner in _sections(cls, parent) if parent else [cls]:
        for member in schema.concrete_classes(owner):
            if leaf in schema.field_types(member):
                lines.append(_leaf_line(member, leaf, f"--{path}"))
    if not lines:
        names = [f"{name}" for name in schema.field_types(cls)]
        nearest = schema.nearest_path(cls, path, names)
        hint = f" Did you mean --help {nearest}?" if nearest else ""
        raise ValueError(f"There is no help on '{topic}'.{hint} Topics: {', '.join(names)}, SECTION.type=NAME.")
    return "\n".join(dict.fromkeys(lines)) + "\n"


def _sections(cls: Any, path: str) -> list[Any]:
    found = [schema.section_class(hint) for hint in schema.lookup(cls, tuple(path.split(".")))]
    return list(dict.fromkeys(section for section in found if section is not None))


def _section_lines(cls: Any, path: str) -> list[str]:
    kind = f"{path}.type={cls.registered_name()}" if issubclass(cls, ChoiceParams) else path
    lines = [f"{kind}: {_summary(cls)}"]
    for name, hint in schema.offered_types(cls).items():
        section = schema.section_class(hint)
        if section is None:
            lines.append(_leaf_line(cls, name, f"--{path}.{name}"))
        elif schema.is_role(section):
            types = ", ".join(sorted(schema.offered_members(section)))
            lines.append(f"  {f'--{path}.{name}.*':<{_WIDTH}} one of: {types} (--help {path}.{name}.type=NAME)")
        else:
            lines += [f"  {line}" for line in _section_lines(section, f"{path}.{name}")]
    return lines
