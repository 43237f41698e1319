"""Decode a tree of values into frozen dataclasses: strict keys, types chosen by role, errors of one line."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

from vla_foundry.config import schema
from vla_foundry.config.base import ChoiceParams
from vla_foundry.config.choices import checkpoint_of, choose_type, drop_superseded
from vla_foundry.config.migrations import migrations_of
from vla_foundry.config.tree import TYPE_KEY, Branch, Leaf, Node, Origin, Scalar, to_node, to_value, without
from vla_foundry.config.values import as_list, decode_value
from vla_foundry.config.yaml_source import is_null
from vla_foundry.storage.uri import is_remote


def _no_checkpoint_type(location: str) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """One decoding: what it needs to know, and what it finds out on the way."""

    # class of the whole config, for suggestions
    root: Any
    # returns the model type that a checkpoint's config names, or None
    checkpoint_type: Callable[[str], str | None] = _no_checkpoint_type
    # config path of each leaf that is not at its default -> where it comes from
    origins: dict[str, Origin] = field(default_factory=dict)
    # what a user should know although it is no error
    notices: list[str] = field(default_factory=list)
    # config path of each key that has no effect any more -> why
    ignored: dict[str, str] = field(default_factory=dict)


def decode(cls: Any, tree: Node, decoding: Decoding, path: str = "") -> Any:
    """Decode a mapping into a dataclass; a role's concrete class is chosen first.

    Args:
        cls: a config dataclass or a role.
        tree: the mapping.
        decoding: where to look and what to fill in.
        path: the config path of `tree`.

    Raises:
        ValueError: an unknown key, a wrong value or a missing one; one line with the config path and its origin.
    """
    if isinstance(tree, Leaf):
        shown = "null" if is_null(tree.value) else "no keys" if tree.value is True else f"'{_show(tree)}'"
        raise ValueError(f"{tree.origin.prefix}{path or 'the config'} must be a mapping of keys, got {shown}.")
    if issubclass(cls, ChoiceParams):
        cls, tree = _choose(cls, tree, decoding, path)
    tree = _migrate(cls, tree, decoding, path)
    hints = schema.field_types(cls)
    for key, node in tree.children.items():
        if key not in hints:
            raise _unknown_key(cls, key, node, decoding, path)
    values = {key: _decode_field(hints[key], node, decoding, _join(path, key)) for key, node in tree.children.items()}
    for name, item in schema.fields_by_name(cls).items():
        if name not in values and schema.is_required(item):
            values[name] = _missing(cls, name, tree.origin, decoding, path)
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(_with_path(str(error), cls, decoding, path)) from None


def _show(leaf: Leaf) -> str:
    return leaf.value.text if isinstance(leaf.value, Scalar) else str(leaf.value)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _choose(cls: Any, tree: Branch, decoding: Decoding, path: str) -> tuple[Any, Branch]:
    """Return the concrete class of a choice, and the tree without `type` and without what another type left."""
    role = schema.role_of(cls)
    if not schema.is_role(cls) and TYPE_KEY not in tree.children:
        return cls, tree
    name, origin = choose_type(role, tree, path, decoding.checkpoint_type)
    chosen = schema.members(role)[name]
    if not issubclass(chosen, cls):
        raise ValueError(f"{origin.prefix}{_join(path, TYPE_KEY)} is '{name}', not '{cls.registered_name()}'.")
    decoding.origins[_join(path, TYPE_KEY)] = origin
    checkpoint = checkpoint_of(tree)
    if TYPE_KEY not in tree.children and checkpoint is not None and is_remote(checkpoint):
        decoding.notices.append(
            f"{_join(path, TYPE_KEY)} is taken to be '{name}': the config of {checkpoint} is not read for it. "
            f"Give --{_join(path, TYPE_KEY)} if it is another."
        )
    kept, dropped = drop_superseded(role, name, without(tree, TYPE_KEY), path)
    if dropped:
        changed = f"{_join(path, TYPE_KEY)} is now '{name}' ({origin})"
        decoding.notices.append(f"{changed}: dropped {', '.join(dropped)}, which belong to another type.")
    return chosen, kept


def _migrate(cls: type, tree: Branch, decoding: Decoding, path: str) -> Branch:
    """Apply the migrations table to the keys and values of one mapping."""
    known = schema.field_types(cls)
    children = dict(tree.children)
    for migration in migrations_of(cls):
        for old in children.keys() & (migration.ignored.keys() - known.keys()):
            decoding.ignored[_join(path, old)] = migration.ignored[old]
            del children[old]
        for old in children.keys() & (migration.renamed.keys() - known.keys()):
            new = migration.renamed[old]
            if new in children:
                raise ValueError(
                    f"{children[old].origin.prefix}{_join(path, old)} is the old name of {_join(path, new)}, "
                    "and both are given. Remove the old one."
                )
            children[new] = children.pop(old)
            decoding.notices.append(f"{_join(path, old)} is called {_join(path, new)} now.")
        for key in children.keys() & migration.values.keys():
            node = children[key]
            old_value = "null" if isinstance(node, Leaf) and is_null(node.value) else _text(node)
            if old_value not in migration.values[key]:
                continue
            new_value = migration.values[key][old_value]
            if new_value is None:
                del children[key]
            else:
                children[key] = Leaf(Scalar(new_value), node.origin)
    return Branch(children, tree.origin)


def _text(node: Node) -> str | None:
    return node.value.text if isinstance(node, Leaf) and isinstance(node.value, Scalar) else None


def _decode_field(hint: Any, node: Node, decoding: Decoding, path: str) -> Any:
    section = schema.section_class(hint)
    if section is not None:
        if isinstance(node, Leaf) and is_null(node.value) and type(None) in schema.options(hint):
            decoding.origins[path] = node.origin
            return None
        return decode(section, node, decoding, path)
    item_section = schema.section_class(schema.dict_value_type(hint))
    if item_section is not None and isinstance(node, Branch):
        return {name: decode(item_section, child, decoding, f"{path}.{name}") for name, child in node.children.items()}
    decoding.origins[path] = node.origin
    item_section = schema.section_class((get_args(hint) or (None,))[0]) if get_origin(hint) is list else None
    items = as_list(node.value, path, node.origin) if item_section is not None and isinstance(node, Leaf) else None
    if items is not None:
        return [
            decode(item_section, to_node(item, node.origin), decoding, f"{path}[{index}]")
            for index, item in enumerate(items)
        ]
    return decode_value(hint, to_value(node), path, node.origin)


def _missing(cls: type, name: str, origin: Origin, decoding: Decoding, path: str) -> Any:
    full = _join(path, name)
    hint = schema.field_types(cls)[name]
    section = schema.section_class(hint)
    if section is not None:
        return decode(section, Branch({}, Origin(origin.source)), decoding, full)
    comment = schema.field_comments(cls).get(name)
    meaning = f" ({comment})" if comment else ""
    raise ValueError(f"{full} is missing{meaning}. Give it with --{full} {schema.describe_type(hint).upper()}.")


def _unknown_key(cls: Any, key: Any, node: Node, decoding: Decoding, path: str) -> ValueError:
    full = _join(path, str(key))
    message = f"{node.origin.prefix}{full} is unknown"
    if issubclass(cls, ChoiceParams):
        role = schema.role_of(cls)
        others = [name for name, other in schema.members(role).items() if key in schema.accepted_keys(other)]
        message += f" for {_join(path, TYPE_KEY)} '{cls.registered_name()}'"
        if others:
            return ValueError(f"{message}; {', '.join(others)} has it (--{_join(path, TYPE_KEY)} {others[0]}).")
    siblings = [_join(path, name) for name in schema.field_types(cls)]
    nearest = schema.nearest_path(decoding.root, full, siblings)
    hint = f"Did you mean {nearest}?" if nearest else f"Known here: {', '.join(siblings[:12])}"
    return ValueError(f"{message}. {hint}{', ...' if not nearest and len(siblings) > 12 else '' if nearest else '.'}")


def _with_path(message: str, cls: type, decoding: Decoding, path: str) -> str:
    """Name the section in a message of a dataclass's own checks, which names only its own fields."""
    first = re.match(r"\w+", message)
    if first and first.group() in schema.field_types(cls):
        full = _join(path, first.group())
        origin = decoding.origins.get(full)
        return (origin.prefix if origin else "") + _join(path, message)
    return f"{path}: {message}" if path else message
