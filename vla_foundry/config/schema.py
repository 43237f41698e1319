"""What a config dataclass is: frozen fields with comments, roles whose type is chosen by name, old names of keys."""

import ast
import difflib
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

import draccus

P = TypeVar("P", bound=type)
Path: TypeAlias = tuple[str, ...]

# metadata of a field that only legacy checkpoints need: --help leaves it out
LEGACY = {"is_legacy": True}

# a slot may hold the type it stands in; nobody types a path deeper than this
_MAX_DEPTH = 6


@dataclass(frozen=True)
class Unavailable:
    """A fact that is not known here and now."""

    # what is needed to know it, for "unresolved (needs ...)"
    needs: str


@dataclass(frozen=True)
class Derived:
    """A value that follows from other values."""

    # the value, or what is needed to know it
    value: Any | Unavailable
    # what it follows from, for "resolved from ..."
    source: str


@dataclass(frozen=True, kw_only=True)
class BaseParams:
    """Base of every config dataclass.

    `__post_init__` checks a class's own fields; its messages begin with the name of a field, and the engine puts the
    config path in front.
    """

    # of the root of a config: its sections in the order in which they are derived; one may come twice
    derivation_order: ClassVar[tuple[str, ...]] = ()

    def derive(self, root: Any, facts: Any) -> dict[str, Derived]:
        """Return the fields of this section that follow from others: {field: value and where it comes from}.

        Args:
            root: the whole config; sections before this one are derived already, and the root comes last.
            facts: what is known about the machine and the data.
        """
        return {}

    def check(self, root: Any, facts: Any, path: str) -> list[str]:
        """Check this section against the others, once everything is derived; the root comes last.

        Args:
            root: the whole config.
            facts: what is known about the machine and the data.
            path: config path of this section, for messages; "" for the root.

        Returns:
            notices: lines that are no errors, but worth printing.

        Raises:
            ValueError: sections do not fit together; one line with config paths and a fix.
        """
        return []


@dataclass(frozen=True, kw_only=True)
class ChoiceParams(BaseParams, draccus.ChoiceRegistry):
    """Base of params whose concrete class is chosen by the key `type`. Each role sets its own `_choice_registry`."""

    # the config path of the choice, as the user types it
    choice_path: ClassVar[str] = "type"
    # the type of a slot of this role when nothing else decides; None: the user must name one
    native_type: ClassVar[str | None] = None
    # --help lists this class among the types of its roles
    is_offered: ClassVar[bool] = True
    # field that names a checkpoint; where `type` is not given, it is the one in the config of that checkpoint's run
    checkpoint_key: ClassVar[str | None] = None

    @classmethod
    def default_choice_name(cls) -> str | None:
        """The native type of this role."""
        return cls.native_type

    @classmethod
    def registered_name(cls) -> str:
        """The name this class is registered as."""
        return cls.get_choice_name(cls)

    @property
    def type(self) -> str:
        """The name this class is registered as."""
        return self.registered_name()


def register_choice(name: str) -> Callable[[P], P]:
    """Register a dataclass as the type `name` of every role it inherits from.

    Raises:
        ValueError: one of these roles has another type of this name.
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
    """When a type of a role is another type now, by what else is given."""

    to: str
    # dotted key -> values, as text, that make it the new type
    when: dict[str, tuple[str, ...]] = field(default_factory=dict)
    # dotted key -> values, as text, that leave it as it is; any other makes it the new type
    unless: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Migration:
    """What changed in one config dataclass."""

    # old key -> new key
    renamed: dict[str, str] = field(default_factory=dict)
    # old key -> why it no longer has an effect
    ignored: dict[str, str] = field(default_factory=dict)
    # key -> {old value as text: new value as text; None: the default}
    values: dict[str, dict[str, str | None]] = field(default_factory=dict)
    # of a role: type -> what it is now
    retyped: dict[str, Retyped] = field(default_factory=dict)


_migrations: dict[str, Migration] = {}


def register_migrations(table: dict[str, Migration]) -> None:
    """Add a table of migrations, by name of the dataclass; a subclass has its bases' migrations too."""
    _migrations.update(table)


def migrations_of(cls: type) -> list[Migration]:
    """The migrations of a dataclass and of its bases."""
    return [_migrations[base.__name__] for base in cls.__mro__ if base.__name__ in _migrations]


def find_retyped(role: type, name: str, value_of: Callable[[str], str | None]) -> tuple[str, str] | None:
    """Return the new type of a section and the key that makes it so; None: its type is as it was.

    Args:
        name: the type that is given or taken.
        value_of: returns what is given for a dotted key, as text; None: nothing.
    """
    for migration in migrations_of(role):
        retyped = migration.retyped.get(name, Retyped(to=name))
        for keys, is_new in ((retyped.when, True), (retyped.unless, False)):
            for key, values in keys.items():
                value = value_of(key)
                if value is not None and (value.lower() in values) == is_new:
                    return retyped.to, key
    return None


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """The type of each field of a dataclass, in order."""
    hints = get_type_hints(cls)
    return {item.name: hints[item.name] for item in fields(cls)}


@functools.cache
def field_comments(cls: type) -> dict[str, str]:
    """The comment above each field of a dataclass; empty where the source is not at hand."""
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
    lines = source.split("\n")
    comments = {}
    for node in ast.parse(source).body[0].body:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above = []
            row = node.lineno - 2
            while row >= 0 and lines[row].strip().startswith("#"):
                above.insert(0, lines[row].strip().lstrip("# "))
                row -= 1
            comments[node.target.id] = " ".join(above)
    return comments


@functools.cache
def accepted_keys(cls: type) -> frozenset[str]:
    """The keys that a dataclass takes: its fields, and the old names of fields."""
    migrations = migrations_of(cls)
    old = [key for migration in migrations for key in (*migration.renamed, *migration.ignored)]
    return frozenset((*field_types(cls), *old))


def fields_by_name(cls: type) -> dict[str, Field]:
    """The fields of a dataclass by name."""
    return {item.name: item for item in fields(cls)}


def is_required(item: Field) -> bool:
    """True for a field without a default."""
    return item.default is MISSING and item.default_factory is MISSING


def default_of(item: Field) -> Any:
    """The default of a field that has one."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def is_role(hint: Any) -> bool:
    """True for a class whose concrete class is chosen by `type`: it has a registry of its own."""
    return isinstance(hint, type) and issubclass(hint, ChoiceParams) and "_choice_registry" in hint.__dict__


def role_of(hint: Any) -> Any:
    """The nearest role of a class of choices."""
    return next(base for base in hint.__mro__ if is_role(base))


def members(role: Any) -> dict[str, type]:
    """The types that a role can be, by name."""
    return dict(role.get_known_choices())


def offered_members(role: Any) -> dict[str, Any]:
    """The types that `--help` lists for a role, by name."""
    return {name: member for name, member in members(role).items() if member.is_offered}


def offered_types(cls: type) -> dict[str, Any]:
    """The type of each field that `--help` lists, in order."""
    items = fields_by_name(cls)
    return {name: hint for name, hint in field_types(cls).items() if not items[name].metadata.get("is_legacy")}


def options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def section_class(hint: Any) -> Any | None:
    """The dataclass that a field holds (perhaps optionally), or None for any other field."""
    found = [option for option in options(hint) if isinstance(option, type) and is_dataclass(option)]
    return found[0] if found else None


def dict_value_type(hint: Any) -> Any | None:
    """The type of a dict field's values, or None for any other field."""
    for option in options(hint):
        if option is dict or get_origin(option) is dict:
            return (get_args(option) or (str, Any))[1]
    return None


def concrete_classes(cls: Any) -> list[type]:
    """The classes that a section of this type can turn out to be."""
    return list(members(cls).values()) if is_role(cls) else [cls]


def lookup(cls: Any, path: Path) -> list[Any]:
    """All types that the value at `path` can have; empty if there is no such path. `type` of a choice is str."""
    hints: list[Any] = [cls]
    for key in path:
        found: list[Any] = []
        for hint in hints:
            section, value_type = section_class(hint), dict_value_type(hint)
            if section is not None:
                found += _step(section, key)
            elif value_type is not None:
                found.append(value_type)
            elif hint is Any:
                found.append(Any)
        hints = found
    return hints


def _step(section: Any, key: str) -> list[Any]:
    found = [field_types(member)[key] for member in concrete_classes(section) if key in field_types(member)]
    return [str, *found] if key == "type" and is_role(section) else found


def leaf_paths(cls: Any, depth: int = 0) -> Iterator[str]:
    """Every dotted path that can be set below a class, over all types of its choices."""
    seen: set[str] = set()
    for member in concrete_classes(cls):
        for name, hint in field_types(member).items():
            section = section_class(hint)
            below = [name]
            if section is not None and depth < _MAX_DEPTH:
                below = [f"{name}.{rest}" for rest in leaf_paths(section, depth + 1)]
            yield from (path for path in below if path not in seen)
            seen.update(below)
    if is_role(cls):
        yield "type"


def nearest_path(root: Any, wanted: str, siblings: list[str]) -> str | None:
    """The path, or "one or another", that a user who typed the unknown `wanted` may have meant.

    Args:
        root: the class of the whole config.
        wanted: the dotted path as typed.
        siblings: dotted paths of the fields that stand where the unknown one was typed: they are tried first.
    """
    near = difflib.get_close_matches(wanted, siblings, n=1, cutoff=0.75)
    if near:
        return near[0]
    paths = list(dict.fromkeys(leaf_paths(root)))
    name = wanted.rpartition(".")[2]
    same_name = [path for path in paths if path.rpartition(".")[2] == name]
    if same_name:
        depth = min(path.count(".") for path in same_name)
        return " or ".join([path for path in same_name if path.count(".") == depth][:3])
    near = difflib.get_close_matches(wanted, [*siblings, *paths], n=1, cutoff=0.7)
    if near:
        return near[0]
    last_names = {path.rpartition(".")[2]: path for path in reversed(paths)}
    near = difflib.get_close_matches(name, list(last_names), n=1, cutoff=0.7)
    if near:
        return last_names[near[0]]
    phrase = name.replace("_", " ")
    described = [(len(comment), path) for path, comment in _commented_paths(root) if phrase in comment]
    return min(described)[1] if "_" in name and described else None


def _commented_paths(cls: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    for member in concrete_classes(cls):
        for name, hint in field_types(member).items():
            section = section_class(hint)
            yield prefix + name, field_comments(member).get(name, "")
            if section is not None and depth < _MAX_DEPTH:
                yield from _commented_paths(section, f"{prefix}{name}.", depth + 1)


def describe_type(hint: Any) -> str:
    """Say a type in a user's words."""
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
    """True for a list field."""
    return hint is list or get_origin(hint) is list
