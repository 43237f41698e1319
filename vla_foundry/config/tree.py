"""Hold untyped config values in a tree whose nodes record where they were written."""

from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

TYPE_KEY = "type"


@dataclass(frozen=True)
class Origin:
    """Where a value was written: a line of a file, or the command line."""

    # path of the file, or another label ("command line", "default", "resolved from hparams.seed")
    source: str
    # line in the file, from 1; None if the source has no lines
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"

    @property
    def prefix(self) -> str:
        """The start of an error message: file and line, or an empty string."""
        return "" if self.line is None else f"{self}: "


COMMAND_LINE = Origin("command line")
DEFAULT = Origin("default")


@dataclass(frozen=True)
class Scalar:
    """One word or number as written; its field's type determines how it is parsed."""

    text: str
    # written in quotes: never null, and parsed as text if the field accepts text or a number
    quoted: bool = False


# a Scalar, None, True (a flag without a value), or a list or dict of these
Value: TypeAlias = Any


@dataclass(frozen=True)
class Leaf:
    """A value with its origin."""

    value: Value
    origin: Origin


@dataclass(frozen=True)
class Branch:
    """A mapping with its origin."""

    children: dict[Any, "Leaf | Branch"]
    origin: Origin
    # keys given before `type` was changed -> the type they were given for (None: no type was given with them)
    superseded: dict[Any, str | None] = field(default_factory=dict)


Node: TypeAlias = Leaf | Branch


def merge(base: Node, over: Node, path: str = "") -> Node:
    """Merge `over` into `base`: mappings merge key by key at every depth; any other value in `over` replaces.

    Raises:
        ValueError: `over` has keys below a single value of `base`.
    """
    if isinstance(over, Leaf):
        return over
    if isinstance(base, Leaf):
        if base.value is not None:
            shown = f"'{base.value.text}'" if isinstance(base.value, Scalar) else "no mapping"
            raise ValueError(f"{base.origin.prefix}{path} must be a mapping of keys, got {shown}.")
        return over
    children = dict(base.children)
    for key, node in over.children.items():
        below = f"{path}.{key}" if path else str(key)
        children[key] = merge(children[key], node, below) if key in children else node
    superseded: dict[Any, str | None] = {}
    if TYPE_KEY in over.children and text_of(over.children.get(TYPE_KEY)) != text_of(base.children.get(TYPE_KEY)):
        superseded = dict.fromkeys(base.children, text_of(base.children.get(TYPE_KEY)))
    # a key that an earlier change of type left behind belongs to the type before that
    superseded |= base.superseded | over.superseded
    for key in over.children.keys() - over.superseded.keys():
        superseded.pop(key, None)
    return Branch(children, over.origin, superseded)


def as_one_layer(node: Node) -> Node:
    """Return the merged tree as one layer: forget which keys were given for another type."""
    if isinstance(node, Leaf):
        return node
    return Branch({key: as_one_layer(child) for key, child in node.children.items()}, node.origin)


def text_of(node: Node | None) -> str | None:
    """Return the word that a leaf holds; None for anything else."""
    return node.value.text if isinstance(node, Leaf) and isinstance(node.value, Scalar) else None


def place(path: tuple[str, ...], node: Node) -> Node:
    """Return a tree that holds `node` at `path` and nothing else."""
    for key in reversed(path):
        node = Branch({key: node}, node.origin)
    return node


def to_value(node: Node) -> Value:
    """Return a tree as a value, without origins."""
    if isinstance(node, Leaf):
        return node.value
    return {key: to_value(child) for key, child in node.children.items()}


def to_node(value: Value, origin: Origin) -> Node:
    """Return a value as a tree in which every node has the same origin."""
    if isinstance(value, dict):
        return Branch({key: to_node(item, origin) for key, item in value.items()}, origin)
    return Leaf(value, origin)


def without(branch: Branch, key: Any) -> Branch:
    """Return the branch without one of its keys."""
    return replace(branch, children={name: node for name, node in branch.children.items() if name != key})
