"""Load params from a config file, and write params as YAML."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import yaml

from vla_foundry.config import schema
from vla_foundry.config.command_line import PLUGINS_FLAG, Parsed, check_file_plugins, decode_tree, print_notices
from vla_foundry.config.decode import Decoding, imply
from vla_foundry.config.schema import ChoiceParams
from vla_foundry.config.tree import TYPE_KEY, Branch
from vla_foundry.config.values import is_ambiguous
from vla_foundry.config.yaml_source import SEPARATORS, load_mapping

P = TypeVar("P")


def load_params(cls: type[P], path: str, root: Any = None) -> P:
    """Load params from a YAML file, which may include others and may come from an earlier version.

    Args:
        cls: a config dataclass or a role.
        path: the file: a path, s3:// or hf://.
        root: class of whole configs; if the file is a whole config, load the section that holds `cls`.

    Raises:
        ValueError: an unknown key, a wrong value or a missing one.
        FileNotFoundError: the file does not exist.
    """
    parsed = read_params(cls, path, root)
    print_notices([f"{path}: {notice}" for notice in parsed.notices])
    return parsed.params


def read_params(cls: Any, path: str, root: Any = None) -> Parsed:
    """Load like `load_params`, and return origins and notices too."""
    tree = load_mapping(str(path))
    check_file_plugins(tree)
    section = None if root is None or issubclass(cls, root) else _section_name(cls, tree, root)
    if root is None or section is None:
        return decode_tree(cls, tree)
    # other sections may tell how an earlier version understood this one
    decoding = Decoding(root=cls)
    node = imply(root, tree, decoding).children[section]
    assert isinstance(node, Branch)
    own = {key: value for key, value in decoding.implied.items() if key.startswith(f"{section}.")}
    return decode_tree(cls, node, section, replace(decoding, implied=own))


def _section_name(cls: Any, tree: Branch, root: Any) -> str | None:
    """Return the key of a whole config that holds params of this class; None if the tree is not a whole config."""
    own = {key for member in schema.concrete_classes(cls) for key in schema.accepted_keys(member)} | {TYPE_KEY}
    for name, hint in schema.field_types(root).items():
        section = schema.section_class(hint)
        is_kind = section is not None and (issubclass(cls, section) or issubclass(section, cls))
        if is_kind and isinstance(tree.children.get(name), Branch) and name not in own:
            return name
    return None


def dump_params(params: Any, plugins: list[str] | None = None) -> str:
    """Write params as YAML that loads to equal params, including every leaf and every type.

    Args:
        params: a whole config, or one section.
        plugins: for a section, the modules to import before loading it; a whole config lists its own.
    """
    return dump_value(({PLUGINS_FLAG: plugins} if plugins else {}) | to_plain(params))


def to_plain(value: Any) -> Any:
    """Turn params into dicts, lists and scalars; a choice starts with its `type`."""
    if is_dataclass(value) and not isinstance(value, type):
        kind = {TYPE_KEY: value.registered_name()} if isinstance(value, ChoiceParams) else {}
        return kind | {item.name: to_plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def dump_value(value: Any, *, is_inline: bool = False) -> str:
    """Write dicts, lists and scalars as YAML that our reader reads back unchanged."""
    options = {"allow_unicode": True, "sort_keys": False, "width": 1_000_000, "default_flow_style": is_inline}
    return yaml.dump(value, Dumper=_Dumper, **options)


def dump_inline(value: Any) -> str:
    """Write a value as YAML on one line."""
    # YAML appends an end-of-document marker to a lone scalar
    return dump_value(to_plain(value), is_inline=True).removesuffix("...\n").strip()


class _Dumper(yaml.SafeDumper):
    """Quotes text that our reader would parse as a number or null."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        style = '"' if any(mark in text for mark in SEPARATORS) else "'" if is_ambiguous(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)
