"""Decode a tree of values into frozen dataclasses: strict keys, types chosen by role, errors of one line."""

import os
import re
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

from vla_foundry.config import schema
from vla_foundry.config.schema import ChoiceParams, find_retyped, migrations_of
from vla_foundry.config.tree import (
    DEFAULT,
    TYPE_KEY,
    Branch,
    Leaf,
    Node,
    Origin,
    Scalar,
    text_of,
    to_node,
    to_value,
    without,
)
from vla_foundry.config.values import as_list, decode_value
from vla_foundry.config.yaml_source import is_null, load_config
from vla_foundry.registry import unknown_name_message
from vla_foundry.run_folder import MODEL_CONFIG_NAME, run_folder_candidates
from vla_foundry.storage.uri import is_remote


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """What one decoding finds out on the way."""

    # class of the whole config, for suggestions
    root: Any
    # config path of each leaf that is not at its default -> where it comes from
    origins: dict[str, Origin] = field(default_factory=dict)
    # lines that are no errors, but worth printing
    notices: list[str] = field(default_factory=list)
    # config path of each key that no longer has an effect -> why
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
    name, origin = _choose_type(role, tree, path)
    retyped = find_retyped(role, name, lambda key: _find_text(tree, key))
    if retyped is not None:
        decoding.notices.append(
            f"{_join(path, TYPE_KEY)} '{name}' with {_join(path, retyped[1])} is called '{retyped[0]}' now."
        )
        name = retyped[0]
    chosen = schema.members(role)[name]
    # a slot may hold one type only, which was made of the one that is given
    chosen = cls if issubclass(cls, chosen) else chosen
    if not issubclass(chosen, cls):
        raise ValueError(f"{origin.prefix}{_join(path, TYPE_KEY)} is '{name}', not '{cls.registered_name()}'.")
    decoding.origins[_join(path, TYPE_KEY)] = origin
    checkpoint = _checkpoint_of(role, tree)
    if TYPE_KEY not in tree.children and checkpoint is not None and is_remote(checkpoint):
        decoding.notices.append(
            f"{_join(path, TYPE_KEY)} is taken to be '{name}': the config of {checkpoint} is not read for it. "
            f"Give --{_join(path, TYPE_KEY)} if it is another."
        )
    kept, dropped = _drop_superseded(role, name, without(tree, TYPE_KEY), path)
    if dropped:
        changed = f"{_join(path, TYPE_KEY)} is now '{name}' ({origin})"
        decoding.notices.append(f"{changed}: dropped {', '.join(dropped)}, which belong to another type.")
    return chosen, kept


def _choose_type(role: Any, branch: Branch, path: str) -> tuple[str, Origin]:
    """Return the name of the type that a branch is, and where that comes from.

    In this order: the type that is given; that of the checkpoint it starts from; the only type that has all given
    keys; the role's native type.

    Args:
        role: the class of the slot.
        branch: what is given for the slot.
        path: config path of the slot, for messages.

    Raises:
        ValueError: the type is unknown or cannot be determined.
    """
    types = schema.members(role)
    type_path = f"{path}.{TYPE_KEY}" if path else TYPE_KEY
    given = branch.children.get(TYPE_KEY)
    if given is not None and not is_null(getattr(given, "value", given)):
        return _given_type(given, types, type_path), given.origin
    checkpoint = _checkpoint_of(role, branch)
    if checkpoint is not None:
        found = _read_checkpoint_type(checkpoint)
        if found in types:
            return str(found), Origin(f"type of {path}.{role.checkpoint_key}")
    native = role.default_choice_name() if role.default_choice_name() in types else None
    keys = branch.children.keys() - branch.superseded.keys() - {TYPE_KEY}
    able = [name for name, cls in types.items() if keys <= schema.accepted_keys(cls)]
    if native is not None and (native in able or not able):
        return native, DEFAULT
    if len(able) == 1 and keys:
        return able[0], Origin(f"the only type with the keys {', '.join(sorted(keys))}")
    names = ", ".join(sorted(able or types))
    raise ValueError(f"{branch.origin.prefix}{type_path} is missing. Choose one of: {names} (--{type_path} NAME).")


def _checkpoint_of(role: Any, branch: Branch) -> str | None:
    """The checkpoint that a branch starts from, if it names one."""
    node = branch.children.get(role.checkpoint_key)
    return text_of(node) if isinstance(node, Leaf) and not is_null(node.value) else None


def _read_checkpoint_type(location: str) -> str | None:
    """The type in the saved config of a local checkpoint's run; None if there is none."""
    if is_remote(location):
        return None
    for folder in run_folder_candidates(location):
        config = f"{folder}/{MODEL_CONFIG_NAME}"
        if os.path.isfile(config):
            tree = load_config(config)
            return text_of(tree.children.get(TYPE_KEY)) if isinstance(tree, Branch) else None
    return None


def _given_type(given: Any, types: dict[str, type], type_path: str) -> str:
    if not isinstance(given, Leaf) or not isinstance(given.value, Scalar):
        raise ValueError(f"{given.origin.prefix}{type_path} must be a name, one of: {', '.join(sorted(types))}.")
    if given.value.text not in types:
        raise ValueError(given.origin.prefix + unknown_name_message(type_path, given.value.text, sorted(types)))
    return given.value.text


def _drop_superseded(role: Any, name: str, branch: Branch, path: str) -> tuple[Branch, list[str]]:
    """Drop what was given for another type before the type was changed, where the new type has no such key.

    Returns:
        the branch, and the config paths that were dropped.
    """
    types = schema.members(role)
    known = schema.accepted_keys(types[name])
    dropped = []
    for key, old in branch.superseded.items():
        owners = [types[old]] if old in types else list(types.values())
        if key not in known and any(key in schema.accepted_keys(owner) for owner in owners):
            dropped.append(key)
    children = {key: node for key, node in branch.children.items() if key not in dropped}
    return Branch(children, branch.origin), [f"{path}.{key}" for key in dropped]


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
            old_value = "null" if isinstance(node, Leaf) and is_null(node.value) else text_of(node)
            if old_value not in migration.values[key]:
                continue
            new_value = migration.values[key][old_value]
            if new_value is None:
                del children[key]
            else:
                children[key] = Leaf(Scalar(new_value), node.origin)
    return Branch(children, tree.origin)


def _find_text(tree: Node, key: str) -> str | None:
    """What a branch gives for a dotted key, as text; None: nothing."""
    for name in key.split("."):
        if not isinstance(tree, Branch) or name not in tree.children:
            return None
        tree = tree.children[name]
    if isinstance(tree, Leaf) and is_null(tree.value):
        return "null"
    return text_of(tree) or str(to_value(tree))


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
