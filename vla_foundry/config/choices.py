"""Choose the concrete class of a role: by `type`, by a checkpoint, by the keys that are given, or the native one."""

from collections.abc import Callable
from typing import Any

from vla_foundry.config import schema
from vla_foundry.config.tree import DEFAULT, TYPE_KEY, Branch, Leaf, Origin, Scalar
from vla_foundry.config.yaml_source import is_null
from vla_foundry.registry import unknown_name_message

_CHECKPOINT_KEY = "resume_from_checkpoint"


def choose_type(
    role: Any, branch: Branch, path: str, checkpoint_type: Callable[[str], str | None]
) -> tuple[str, Origin]:
    """Return the name of the type that a branch is, and where that comes from.

    In this order: the type that is given; that of the checkpoint it starts from; the only type that has all given
    keys; the role's native type.

    Args:
        role: the class of the slot.
        branch: what is given for the slot.
        path: config path of the slot, for messages.
        checkpoint_type: returns the model type that a checkpoint's config names, or None.

    Raises:
        ValueError: the type is unknown, or can not be told.
    """
    types = schema.members(role)
    type_path = f"{path}.{TYPE_KEY}" if path else TYPE_KEY
    given = branch.children.get(TYPE_KEY)
    if given is not None and not is_null(getattr(given, "value", given)):
        return _given_type(given, types, type_path), given.origin
    checkpoint = checkpoint_of(branch)
    if checkpoint is not None:
        found = checkpoint_type(checkpoint)
        if found in types:
            return str(found), Origin(f"type of {path}.{_CHECKPOINT_KEY}")
    native = role.default_choice_name() if role.default_choice_name() in types else None
    keys = branch.children.keys() - branch.superseded.keys() - {TYPE_KEY}
    able = [name for name, cls in types.items() if keys <= schema.accepted_keys(cls)]
    if native is not None and (native in able or not able):
        return native, DEFAULT
    if len(able) == 1 and keys:
        return able[0], Origin(f"the only type with the keys {', '.join(sorted(keys))}")
    names = ", ".join(sorted(able or types))
    raise ValueError(f"{branch.origin.prefix}{type_path} is missing. Choose one of: {names} (--{type_path} NAME).")


def checkpoint_of(branch: Branch) -> str | None:
    """The checkpoint that a branch starts from, if it names one."""
    node = branch.children.get(_CHECKPOINT_KEY)
    if isinstance(node, Leaf) and isinstance(node.value, Scalar) and not is_null(node.value):
        return node.value.text
    return None


def _given_type(given: Any, types: dict[str, type], type_path: str) -> str:
    if not isinstance(given, Leaf) or not isinstance(given.value, Scalar):
        raise ValueError(f"{given.origin.prefix}{type_path} must be a name, one of: {', '.join(sorted(types))}.")
    if given.value.text not in types:
        raise ValueError(given.origin.prefix + unknown_name_message(type_path, given.value.text, sorted(types)))
    return given.value.text


def drop_superseded(role: Any, name: str, branch: Branch, path: str) -> tuple[Branch, list[str]]:
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
