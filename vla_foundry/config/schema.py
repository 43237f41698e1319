"""Describe config dataclasses: their fields and comments, number ranges, roles with types, and migrations."""

import ast
import difflib
import functools
import inspect
import itertools
import operator
import textwrap
import types
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import draccus

P = TypeVar("P", bound=type)

# metadata of a field that only legacy checkpoints need: --help leaves it out
LEGACY = {"is_legacy": True}

# a slot may hold its own type; nobody types a deeper path than this
_MAX_DEPTH = 6


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The range of a number, as an annotation of its type: `Annotated[int, Bounds(least=1)]`. NaN is never in it."""

    least: int | float | None = None
    above: int | float | None = None
    most: int | float | None = None
    below: int | float | None = None
    # sentence that ends the message
    fix: str = ""

    def check(self, value: int | float, name: str) -> None:
        """Check that `value` lies in the range.

        Raises:
            ValueError: it does not; the message begins with `name`.
        """
        limits = (
            ("at least", self.least, operator.ge),
            ("above", self.above, operator.gt),
            ("at most", self.most, operator.le),
            ("below", self.below, operator.lt),
        )
        if not all(is_met(value, limit) for _, limit, is_met in limits if limit is not None):
            wanted = " and ".join(f"{words} {limit}" for words, limit, _ in limits if limit is not None)
            raise ValueError(f"{name} ({str(value).removesuffix('.0')}) must be {wanted}. {self.fix}".strip())


Count = Annotated[int, Bounds(least=1)]
# a length, size or number of parts; more than this is a typing error on any machine
Size = Annotated[int, Bounds(least=1, most=1_000_000)]
NumWorkers = Annotated[int, Bounds(least=0, most=1024)]
NonNegativeInt = Annotated[int, Bounds(least=0)]
NonNegative = Annotated[float, Bounds(least=0)]
Positive = Annotated[float, Bounds(above=0)]
Fraction = Annotated[float, Bounds(least=0, most=1)]
# annotation of a path or URI that the user gives: parsing expands a leading ~
EXPANDED = "~ is expanded"
Location = Annotated[str, EXPANDED]


@dataclass(frozen=True)
class Unavailable:
    """A fact that is not known yet."""

    # what is needed to know it, for "unresolved (needs ...)"
    needs: str


@dataclass(frozen=True)
class Derived:
    """A value that follows from other values."""

    # the value, or what is needed to know it
    value: Any | Unavailable
    # what it follows from, for "resolved from ..."
    source: str
    # a line for the user; empty: none
    notice: str = ""


@dataclass(frozen=True, kw_only=True)
class BaseParams:
    """Base of every config dataclass.

    `__post_init__` checks the class's own fields: here their `Bounds`, in subclasses what else holds. A message begins
    with the name of a field, and the engine prepends the config path.
    """

    # root of a config only: its sections in the order in which they are derived; a section may appear twice
    derivation_order: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name, hint in annotated_types(type(self)).items():
            map_annotated(hint, getattr(self, name), _check_bounds, name)

    def derive(self, root: Any, facts: Any) -> dict[str, Derived]:
        """Return this section's derived fields, each with its value and source.

        Args:
            root: the whole config; the sections before this one are already derived. The root itself comes last.
            facts: what is known about the machine and the data.
        """
        return {}

    def check(self, root: Any, facts: Any, path: str) -> list[str]:
        """Check this section against the others after everything is derived; the root comes last.

        Args:
            root: the whole config.
            facts: what is known about the machine and the data.
            path: config path of this section, for messages; "" for the root.

        Returns:
            Notices: lines worth printing that are not errors.

        Raises:
            ValueError: sections do not fit together; one line with config paths and a fix.
        """
        return []


def _check_bounds(value: Any, bounds: Any, name: str) -> Any:
    if isinstance(bounds, Bounds) and value is not None:
        bounds.check(value, name)
    return value


@dataclass(frozen=True, kw_only=True)
class ChoiceParams(BaseParams, draccus.ChoiceRegistry):
    """Base of params whose concrete class is chosen by the key `type`. Each role sets its own `_choice_registry`."""

    # the config path of the choice, as the user types it
    choice_path: ClassVar[str] = "type"
    # type of this role's slots if nothing else decides; None: the user must choose
    native_type: ClassVar[str | None] = None
    # --help lists this class among the types of its roles
    is_offered: ClassVar[bool] = True
    # field that names a checkpoint, whose saved config gives the `type` if the user does not
    checkpoint_key: ClassVar[str | None] = None

    @classmethod
    def registered_name(cls) -> str:
        """Return the name this class is registered as."""
        return cls.get_choice_name(cls)

    @property
    def type(self) -> str:
        """The name this class is registered as."""
        return self.registered_name()


def register_choice(name: str) -> Callable[[P], P]:
    """Register a dataclass as the type `name` of every role it inherits from.

    Raises:
        ValueError: a role already has another type of this name.
    """

    def register(cls: P) -> P:
        for role in cls.__mro__:
            registry: dict[str, Any] | None = role.__dict__.get("_choice_registry")
            # draccus gives ChoiceParams a registry too, in which types of different roles would collide
            if registry is not None and role is not ChoiceParams:
                if registry.get(name, cls) is not cls:
                    raise ValueError(f"{role.choice_path} '{name}' is registered twice. Choose another name.")
                registry[name] = cls
        return cls

    return register


@dataclass(frozen=True, kw_only=True)
class Retyped:
    """A type that became another type for some values of other keys."""

    to: str
    # dotted key -> values, as text, that select the new type
    when: dict[str, tuple[str, ...]] = field(default_factory=dict)
    # dotted key -> values, as text, that keep the old type; any other value selects the new one
    unless: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Migration:
    """What changed in one config dataclass."""

    # old key -> new key; a dotted new key is in a section below
    renamed: dict[str, str] = field(default_factory=dict)
    # old key, which may be dotted -> why it no longer has an effect
    ignored: dict[str, str] = field(default_factory=dict)
    # (mapping as given, its config path) -> values that an old mapping implies, by new dotted key: a tree, or YAML text
    implied: Callable[[Any, str], dict[str, Any]] | None = None
    # key -> {old value as text: new value as text; None: the default}
    values: dict[str, dict[str, str | None]] = field(default_factory=dict)
    # roles only: old type -> new type
    retyped: dict[str, Retyped] = field(default_factory=dict)


_migrations: dict[str, Migration] = {}


def register_migrations(table: dict[str, Migration]) -> None:
    """Add migrations by dataclass name; subclasses inherit their bases' migrations."""
    _migrations.update(table)


def migrations_of(cls: type) -> list[Migration]:
    """Return the migrations of a dataclass and of its bases."""
    return [_migrations[base.__name__] for base in cls.__mro__ if base.__name__ in _migrations]


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Return the type of each field of a dataclass, in order and without annotations."""
    hints = get_type_hints(cls)
    return {item.name: hints[item.name] for item in fields(cls)}


@functools.cache
def annotated_types(cls: type) -> dict[str, Any]:
    """Return the types of the fields that are annotated, or hold something annotated."""
    hints = get_type_hints(cls, include_extras=True)
    return {name: hints[name] for name, plain in field_types(cls).items() if hints[name] != plain}


def map_annotated(hint: Any, value: Any, change: Callable[[Any, Any, str], Any], name: str) -> Any:
    """Return `value` after `change(part, annotation, name)` of each part whose type is annotated."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        for annotation in arguments[1:]:
            value = change(value, annotation, name)
    elif origin in (Union, types.UnionType):
        for option in arguments:
            value = map_annotated(option, value, change, name)
    elif origin in (list, tuple) and isinstance(value, list | tuple):
        hints = itertools.repeat(arguments[0]) if origin is list or Ellipsis in arguments else arguments
        parts = zip(hints, value, strict=False)
        return type(value)(map_annotated(*part, change, f"{name}[{index}]") for index, part in enumerate(parts))
    elif origin is dict and isinstance(value, dict):
        return {key: map_annotated(arguments[1], item, change, f"{name}.{key}") for key, item in value.items()}
    return value


@functools.cache
def field_comments(cls: type) -> dict[str, str]:
    """Return the comment above each field of a dataclass; empty if the source is not available."""
    comments: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if is_dataclass(owner):
            comments.update(_own_comments(owner))
    return comments


def _own_comments(cls: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    lines = [line.strip() for line in source.split("\n")]
    comments = {}
    for node in ast.parse(source).body[0].body:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above = itertools.takewhile(lambda line: line.startswith("#"), reversed(lines[: node.lineno - 1]))
            comments[node.target.id] = " ".join(line.lstrip("# ") for line in reversed([*above]))
    # a subclass that changes a default inherits the comment
    return {name: comment for name, comment in comments.items() if comment}


@functools.cache
def accepted_keys(cls: type) -> frozenset[str]:
    """Return the keys that a dataclass accepts: its fields, and old names of fields."""
    old = [key for migration in migrations_of(cls) for key in (*migration.renamed, *migration.ignored)]
    return frozenset((*field_types(cls), *old))


def fields_by_name(cls: type) -> dict[str, Field]:
    """Return the fields of a dataclass by name."""
    return {item.name: item for item in fields(cls)}


def is_required(item: Field) -> bool:
    """Return whether a field has no default."""
    return item.default is MISSING and item.default_factory is MISSING


def is_role(hint: Any) -> bool:
    """Return whether `type` chooses the concrete class of this class: it has a registry of its own."""
    return isinstance(hint, type) and issubclass(hint, ChoiceParams) and "_choice_registry" in hint.__dict__


def role_of(hint: Any) -> Any:
    """Return the nearest role of a class of choices."""
    return next(base for base in hint.__mro__ if is_role(base))


def members(role: Any) -> dict[str, type]:
    """Return the types of a role by name."""
    return dict(role.get_known_choices())


def offered_members(role: Any) -> dict[str, Any]:
    """Return the types that `--help` lists for a role, sorted by name."""
    return {name: member for name, member in sorted(members(role).items()) if member.is_offered}


def offered_types(cls: type) -> dict[str, Any]:
    """Return the type of each field that `--help` lists, in order."""
    items = fields_by_name(cls)
    return {name: hint for name, hint in field_types(cls).items() if not items[name].metadata.get("is_legacy")}


def options(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def section_class(hint: Any) -> Any | None:
    """Return the dataclass that a field holds (perhaps optionally); None for any other field."""
    return next((option for option in options(hint) if isinstance(option, type) and is_dataclass(option)), None)


def dict_value_type(hint: Any) -> Any | None:
    """Return the type of a dict field's values; None for any other field."""
    for option in options(hint):
        if option is dict or get_origin(option) is dict:
            return (get_args(option) or (str, Any))[1]
    return None


def concrete_classes(cls: Any) -> list[type]:
    """Return the classes that a section of this type can be."""
    return list(members(cls).values()) if is_role(cls) else [cls]


def lookup(cls: Any, path: str) -> list[Any]:
    """Return all types that the value at a dotted path can have; empty if there is no such path."""
    hints: list[Any] = [cls]
    for key in path.split("."):
        hints = [found for hint in hints for found in _step(hint, key)]
    return hints


def _step(hint: Any, key: str) -> list[Any]:
    section, value_type = section_class(hint), dict_value_type(hint)
    if section is not None:
        found = [str] * (key == "type" and is_role(section))
        for member in concrete_classes(section):
            if key in field_types(member):
                found.append(field_types(member)[key])
                continue
            new_keys = [migration.renamed[key] for migration in migrations_of(member) if key in migration.renamed]
            found += [hint for new_key in new_keys for hint in lookup(member, new_key)]
        return found
    return [value_type or Any] if value_type is not None or hint is Any else []


def _leaf_owners(cls: Any, depth: int = 0) -> dict[str, type]:
    """Return every dotted path that can be set below a class, over all types of its roles, with its dataclass."""
    owners: dict[str, type] = {}
    for member in concrete_classes(cls):
        for name, hint in field_types(member).items():
            section = section_class(hint)
            if section is None or depth == _MAX_DEPTH:
                owners.setdefault(name, member)
            else:
                below = _leaf_owners(section, depth + 1)
                owners |= {f"{name}.{path}": owner for path, owner in below.items() if f"{name}.{path}" not in owners}
    return owners | ({"type": cls} if is_role(cls) else {})


def nearest_path(root: Any, wanted: str, siblings: list[str]) -> str | None:
    """Return the path, or "one or another", that a user who typed the unknown `wanted` may have meant.

    Args:
        root: the class of the whole config.
        wanted: the dotted path as typed.
        siblings: dotted paths of the fields beside the unknown one; they are tried first.
    """
    near = difflib.get_close_matches(wanted, siblings, n=1, cutoff=0.75)
    if near:
        return near[0]
    owners = _leaf_owners(root)
    name = wanted.rpartition(".")[2]
    same_name = [path for path in owners if path.rpartition(".")[2] == name]
    if same_name:
        depth = min(path.count(".") for path in same_name)
        return " or ".join([path for path in same_name if path.count(".") == depth][:3])
    near = difflib.get_close_matches(wanted, [*siblings, *owners], n=1, cutoff=0.7)
    if near:
        return near[0]
    last_names = {path.rpartition(".")[2]: path for path in reversed(owners)}
    near = difflib.get_close_matches(name, list(last_names), n=1, cutoff=0.7)
    if near:
        return last_names[near[0]]
    comments = {path: field_comments(owner).get(path.rpartition(".")[2], "") for path, owner in owners.items()}
    described = [path for path, comment in comments.items() if name.replace("_", " ") in comment]
    return min(described, key=lambda path: len(comments[path]), default=None) if "_" in name else None


def describe_type(hint: Any) -> str:
    """Describe a type in a user's words."""
    if get_origin(hint) is Literal:
        return " | ".join(str(choice) for choice in get_args(hint))
    if len(options(hint)) > 1:
        return " | ".join(describe_type(option) for option in options(hint))
    plain = {int: "int", float: "float", bool: "true | false", str: "text", type(None): "null", Any: "any"}
    if hint in plain:
        return plain[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (list, tuple):
        items = [argument for argument in arguments if argument is not Ellipsis]
        return f"[{', '.join(describe_type(item) for item in items)}{', ...' if origin is list else ''}]"
    if origin is dict:
        return f"{{{describe_type(arguments[0])}: {describe_type(arguments[1])}}}"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def is_list(hint: Any) -> bool:
    """Return whether a field holds a list."""
    return hint is list or get_origin(hint) is list
