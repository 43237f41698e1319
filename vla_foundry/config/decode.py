"""Decode a tree of values into frozen dataclasses, with strict keys and one-line errors."""

import os
import re
from dataclasses import MISSING, Field, dataclass, field, replace
from typing import Any, get_args, get_origin

from vla_foundry.config import schema
from vla_foundry.config.help import nearest_path
from vla_foundry.config.schema import ChoiceParams, MissingError, Retyped, migrations_of
from vla_foundry.config.tree import (
    COMMAND_LINE,
    DEFAULT,
    TYPE_KEY,
    Branch,
    Leaf,
    Node,
    Origin,
    Scalar,
    merge,
    place,
    text_of,
    to_node,
    to_value,
    without,
)
from vla_foundry.config.values import as_list, decode_value, show
from vla_foundry.config.yaml_source import PRESETS, is_null, load_config, parse_inline
from vla_foundry.registry import unknown_name_message
from vla_foundry.run_folder import MODEL_CONFIG_NAME, run_folder_candidates
from vla_foundry.storage.uri import is_remote
from vla_foundry.tars import refuse_pipe


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """The results of decoding, besides the dataclass."""

    # class of the whole config, for suggestions
    root: Any
    # config path of each given leaf -> where it was written
    origins: dict[str, Origin] = field(default_factory=dict)
    # lines worth printing that are not errors
    notices: list[str] = field(default_factory=list)
    # config path of each key that no longer has an effect -> why
    ignored: dict[str, str] = field(default_factory=dict)
    # old config path -> new one
    renamed: dict[str, str] = field(default_factory=dict)
    # config path -> value that an old mapping implies
    implied: dict[str, str] = field(default_factory=dict)


def decode(cls: Any, tree: Node, decoding: Decoding, path: str = "") -> Any:
    """Decode a mapping into a dataclass, or into a role's concrete class; `path` is its config path.

    Raises:
        ValueError: a key is unknown, or a value is wrong or missing; one line with the config path and its origin.
    """
    if isinstance(tree, Leaf):
        shown = "null" if is_null(tree.value) else "no keys" if tree.value is True else f"'{show(tree.value)}'"
        raise ValueError(f"{tree.origin.prefix}{path or 'the config'} must be a mapping of keys, got {shown}.")
    slot = cls
    if issubclass(cls, ChoiceParams):
        cls, tree = _choose(cls, tree, decoding, path)
    tree = _migrate(cls, tree, decoding, path)
    hints = schema.field_types(cls)
    for key, node in tree.children.items():
        if key not in hints:
            raise _unknown_key(cls, slot, key, node, decoding, path)
    annotated = schema.annotated_types(cls)
    values = {}
    for key, node in tree.children.items():
        if _is_reset(schema.fields_by_name(cls)[key], hints[key], node):
            continue
        value = _decode_field(hints[key], node, decoding, _join(path, key))
        values[key] = schema.map_annotated(
            annotated.get(key), value, _expand_home, f"{node.origin.prefix}{_join(path, key)}"
        )
    for name, item in schema.fields_by_name(cls).items():
        if name not in values and schema.is_required(item):
            values[name] = _missing(cls, name, tree.origin, decoding, path)
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(_with_path(str(error), cls, decoding, path)) from None


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _choose(cls: Any, tree: Branch, decoding: Decoding, path: str) -> tuple[Any, Branch]:
    """Return the concrete class of a choice, and the tree without `type` and without keys left from another type."""
    role = schema.role_of(cls)
    for migration in migrations_of(role):
        tree = tree if migration.written_out is None else migration.written_out(tree, path)
    if not schema.is_role(cls) and TYPE_KEY not in tree.children:
        return cls, tree
    type_path = _join(path, TYPE_KEY)
    name, origin = _choose_type(role, tree, path)
    retyped = _find_retyped(role, name, tree)
    if retyped is not None:
        decoding.notices.append(f"{type_path} '{name}' with {_join(path, retyped[1])} is called '{retyped[0]}' now.")
        name = retyped[0]
    chosen = schema.members(role)[name]
    # a slot may accept only a subclass of the given type
    chosen = cls if issubclass(cls, chosen) else chosen
    if not issubclass(chosen, cls):
        own = cls.registered_name()
        fix = f" Give --{type_path} {own}." if path else ""
        raise ValueError(f"{origin.prefix}{type_path} is '{name}', not '{own}'.{fix}")
    decoding.origins[type_path] = origin
    checkpoint = _checkpoint_of(role, tree)
    if TYPE_KEY not in tree.children and checkpoint is not None and is_remote(checkpoint):
        decoding.notices.append(
            f"{type_path} is assumed to be '{name}': the remote config of {checkpoint} is not read for it. "
            f"If it is another type, give --{type_path}."
        )
    kept, dropped = _drop_superseded(role, name, without(tree, TYPE_KEY), path)
    if dropped:
        changed = f"{type_path} is now '{name}' ({origin})"
        decoding.notices.append(f"{changed}: dropped {', '.join(dropped)}, which belong to another type.")
    return chosen, kept


def _choose_type(role: Any, branch: Branch, path: str) -> tuple[str, Origin]:
    """Return the type of a branch, and where it comes from.

    In this order: the given type; the type of the checkpoint it starts from; the only type that has all given keys;
    the role's native type.

    Raises:
        ValueError: the type is unknown or cannot be determined.
    """
    types = schema.members(role)
    type_path = _join(path, TYPE_KEY)
    given = branch.children.get(TYPE_KEY)
    if given is not None and not is_null(getattr(given, "value", given)):
        return _given_type(given, types, type_path), given.origin
    checkpoint = _checkpoint_of(role, branch)
    if checkpoint is not None:
        found = _read_checkpoint_type(checkpoint)
        if found in types:
            return str(found), Origin(f"type of {path}.{role.checkpoint_key}")
    native = role.native_type if role.native_type in types else None
    keys = branch.children.keys() - branch.superseded.keys() - {TYPE_KEY}
    able = [name for name, cls in types.items() if keys <= schema.accepted_keys(cls)]
    if native is not None and (native in able or not able):
        return native, DEFAULT
    if len(able) == 1 and keys:
        return able[0], Origin(f"the only type with the keys {', '.join(sorted(keys))}")
    names = ", ".join(sorted(able or types))
    raise MissingError(f"{branch.origin.prefix}{type_path} is missing. Choose one of: {names} (--{type_path} NAME).")


def _find_retyped(role: type, name: str, tree: Branch) -> tuple[str, str] | None:
    """Return the new type of a section and the key that selects it; None if the type is unchanged."""
    other = {key for key, old in tree.superseded.items() if old is not None}
    tree = Branch({key: node for key, node in tree.children.items() if key not in other}, tree.origin)
    for migration in migrations_of(role):
        retyped = migration.retyped.get(name, Retyped(to=name))
        for keys, is_new in ((retyped.when, True), (retyped.unless, False)):
            for key, values in keys.items():
                value = find_text(tree, key)
                if value is not None and (value.lower() in values) == is_new:
                    return retyped.to, key
    return None


def _checkpoint_of(role: Any, branch: Branch) -> str | None:
    """Return the checkpoint that a branch starts from; None if it names none."""
    node = branch.children.get(role.checkpoint_key)
    return text_of(node) if isinstance(node, Leaf) and not is_null(node.value) else None


def _read_checkpoint_type(location: str) -> str | None:
    """Return the type in the saved config of a local checkpoint's run; None if there is no config."""
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
    """Drop the keys that were given for another type before `type` changed and that the new type lacks.

    Returns:
        The branch, and the config paths of the dropped keys.
    """
    types = schema.members(role)
    known, current = schema.accepted_keys(types[name]), schema.field_types(types[name])
    dropped = []
    for key, old in branch.superseded.items():
        owners = [types[old]] if old in types else types.values()
        # what is an old name here, and a name there, is another thing
        is_of_others = key not in known or (old in types and key in schema.field_types(types[old]))
        if key not in current and is_of_others and any(key in schema.accepted_keys(owner) for owner in owners):
            dropped.append(key)
    children = {key: node for key, node in branch.children.items() if key not in dropped}
    return Branch(children, branch.origin), [f"{path}.{key}" for key in dropped]


def _migrate(cls: type, tree: Branch, decoding: Decoding, path: str) -> Branch:
    """Apply the migrations table to the keys and values of one mapping."""
    known = schema.field_types(cls)
    for migration in migrations_of(cls):
        implied = {} if migration.implied is None else migration.implied(tree, path)
        for old in migration.ignored:
            tree, node = (tree, None) if old in known else _take(tree, old)
            if node is not None:
                decoding.ignored[_join(path, old)] = migration.ignored[old]
        for old, new in migration.renamed.items():
            tree, node = (tree, None) if old in known else _take(tree, old)
            if node is not None:
                moved = place(tuple(new.split(".")), node)
                tree = _combine(tree, moved, path, (_join(path, new), _join(path, old)))
                decoding.renamed[_join(path, old)] = _join(path, new)
        tree = _imply(tree, implied, decoding, path)
        tree = _replace_values(tree, migration.values)
    return tree


def _take(tree: Branch, key: str) -> tuple[Branch, Node | None]:
    """Take the value at a dotted key out of a tree; None if there is none."""
    name, _, rest = key.partition(".")
    node = tree.children.get(name)
    if rest and isinstance(node, Branch):
        inner, found = _take(node, rest)
        return replace(tree, children={**tree.children, name: inner}), found
    return (tree, None) if node is None or rest else (without(tree, name), node)


def _combine(tree: Any, moved: Any, path: str, names: tuple[str, str]) -> Any:
    """Add what was given under an old name; of two values for a key, the command line's wins, and a preset's loses.

    Args:
        names: the new and the old config path of what was moved.

    Raises:
        ValueError: both names are given in files, or both on the command line.
    """
    if isinstance(tree, Branch) and isinstance(moved, Branch):
        joined = {
            key: _combine(tree.children[key], node, _join(path, key), names) if key in tree.children else node
            for key, node in moved.children.items()
        }
        return replace(tree, children={**tree.children, **joined})
    # presets have no old names
    ranks = [(node.origin == COMMAND_LINE) - node.origin.source.startswith(PRESETS) for node in (tree, moved)]
    if ranks[0] == max(ranks[1], 0) and to_value(tree) != to_value(moved):
        old = path.replace(*names, 1)
        raise ValueError(
            f"{moved.origin.prefix}{old} is the old name of {path}, and both are given. Remove the old one."
        )
    return tree if ranks[0] > max(ranks[1], 0) else moved


def imply(cls: type, tree: Branch, decoding: Decoding) -> Branch:
    """Add to a whole config what its sections imply for each other, so that one of them can be decoded alone."""
    for migration in migrations_of(cls):
        if migration.implied is not None:
            tree = _imply(tree, migration.implied(tree, ""), decoding, "")
    return tree


def _imply(tree: Node, implied: dict[str, Any], decoding: Decoding, path: str) -> Branch:
    """Add the values that an old mapping implies where it gives none."""
    for key, value in implied.items():
        if find_text(tree, key) is None:
            is_text = isinstance(value, str)
            node = to_node(to_value(parse_inline(value)), Origin("the earlier implementation")) if is_text else value
            tree = merge(tree, place(tuple(key.split(".")), node), path)
            decoding.implied[_join(path, key)] = value if is_text else f"that of {node.origin.source}"
    assert isinstance(tree, Branch)
    return tree


def _replace_values(tree: Branch, values: dict[str, dict[str, str | None]]) -> Branch:
    children = dict(tree.children)
    for key in children.keys() & values.keys():
        text = find_text(tree, key)
        if text in values[key]:
            origin, new_value = children.pop(key).origin, values[key][text]
            if new_value is not None:
                children[key] = Leaf(Scalar(new_value), origin)
    return replace(tree, children=children)


def find_text(tree: Node, key: str) -> str | None:
    """Return the text that a branch holds at a dotted key; None if it holds nothing there."""
    for name in key.split("."):
        if not isinstance(tree, Branch) or name not in tree.children:
            return None
        tree = tree.children[name]
    if isinstance(tree, Leaf) and is_null(tree.value):
        return "null"
    return text_of(tree) or str(to_value(tree))


def _is_reset(item: Field, hint: Any, node: Node) -> bool:
    """Return whether a null resets a list or mapping to its default: these are never null themselves."""
    is_null_leaf = isinstance(node, Leaf) and is_null(node.value)
    can_reset = item.default_factory is not MISSING and schema.section_class(hint) is None
    return is_null_leaf and can_reset and type(None) not in schema.options(hint)


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


def _expand_home(value: Any, annotation: Any, name: str) -> Any:
    """Expand a leading `~` or `~user` of a location that a user gives; the one place for it. Refuse `pipe:`."""
    if annotation is not schema.EXPANDED or not isinstance(value, str):
        return value
    refuse_pipe(value, f"{name}: ")
    if not value.startswith("~"):
        return value
    expanded = os.path.expanduser(value)
    if expanded == value:
        raise ValueError(
            f"{name}: '{value}' begins with a user without a home folder. Write ./{value} if it is a file."
        )
    return expanded


def _missing(cls: type, name: str, origin: Origin, decoding: Decoding, path: str) -> Any:
    full = _join(path, name)
    hint = schema.field_types(cls)[name]
    section = schema.section_class(hint)
    if section is not None:
        return decode(section, Branch({}, Origin(origin.source)), decoding, full)
    comment = schema.field_comments(cls).get(name)
    meaning = f" ({comment})" if comment else ""
    raise MissingError(f"{full} is missing{meaning}. Give it with --{full} {schema.describe_type(hint).upper()}.")


def _unknown_key(cls: Any, slot: Any, key: Any, node: Node, decoding: Decoding, path: str) -> ValueError:
    full = _join(path, str(key))
    message = f"{node.origin.prefix}{full} is unknown"
    if issubclass(cls, ChoiceParams):
        role = schema.role_of(slot)
        others = [name for name, other in schema.members(role).items() if key in schema.accepted_keys(other)]
        message += f" for {_join(path, TYPE_KEY)} '{cls.registered_name()}'"
        if others:
            return ValueError(f"{message}; {', '.join(others)} has it (--{_join(path, TYPE_KEY)} {others[0]}).")
    siblings = [_join(path, name) for name in schema.field_types(cls)]
    nearest = nearest_path(decoding.root, full, siblings)
    hint = f"Did you mean {nearest}?" if nearest else f"Known here: {', '.join(siblings[:12])}"
    return ValueError(f"{message}. {hint}{', ...' if not nearest and len(siblings) > 12 else '' if nearest else '.'}")


def _with_path(message: str, cls: type, decoding: Decoding, path: str) -> str:
    """Prepend the config path to the message of a dataclass's own checks, which name only their fields."""
    first = re.match(r"\w+", message)
    if first and first.group() in schema.field_types(cls):
        origin = decoding.origins.get(_join(path, first.group()), DEFAULT)
        return f"{origin.prefix}{_join(path, message)}"
    return f"{path}: {message}" if path else message
