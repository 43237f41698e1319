"""Describe config dataclasses: their fields and comments, number ranges, roles with types, and migrations."""

import ast
import functools
import inspect
import itertools
import math
import operator
import re
import textwrap
import types
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import draccus

P = TypeVar("P", bound=type)

# metadata of a field that only legacy checkpoints need: --help leaves it out
LEGACY = {"is_legacy": True}


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The range of a number: `Annotated[int, Bounds(least=1)]`. NaN is out of it, and infinity unless it is an end."""

    least: int | float | None = None
    above: int | float | None = None
    most: int | float | None = None
    below: int | float | None = None
    # sentence that ends the message
    fix: str = ""

    def _limits(self) -> list[tuple[str, int | float, Callable[[Any, Any], bool]]]:
        limits = (
            ("at least", self.least, operator.ge),
            ("above", self.above, operator.gt),
            ("at most", self.most, operator.le),
            ("below", self.below, operator.lt),
        )
        return [(words, limit, is_met) for words, limit, is_met in limits if limit is not None]

    def __str__(self) -> str:
        return " and ".join(f"{words} {_short(limit)}" for words, limit, _ in self._limits())

    def check(self, value: int | float, name: str) -> None:
        """Check that `value` lies in the range.

        Raises:
            ValueError: it does not; the message begins with `name`.
        """
        limits = self._limits()
        largest = 2**63 if isinstance(value, int) else math.inf
        is_number = -largest < value < largest or value in (self.least, self.most)
        if is_number and all(is_met(value, limit) for _, limit, is_met in limits):
            return
        wanted = [str(self)] if limits else []
        if not is_number and len(limits) < 2:
            wanted.append("within 64 bits" if isinstance(value, int) else "finite")
        raise ValueError(f"{name} ({str(value).removesuffix('.0')}) must be {' and '.join(wanted)}. {self.fix}".strip())


def _short(number: int | float) -> str:
    """Write large round numbers as 1e12."""
    short = f"{number:.0e}".replace("e+", "e")
    return short if abs(number) >= 10**9 and float(short) == number else str(number)


Count = Annotated[int, Bounds(least=1)]
# a length, size or number of parts; more than this is a typing error on any machine
Size = Annotated[int, Bounds(least=1, most=1_000_000)]
# like a size, but there may be none
Steps = Annotated[int, Bounds(least=0, most=1_000_000)]
NumTokens = Annotated[int, Bounds(least=1, most=100_000_000)]
# a frame relative to the anchor
ImageIndex = Annotated[int, Bounds(least=-1_000_000, most=1_000_000)]
FPS = Annotated[float, Bounds(above=0, most=1_000_000)]
NumWorkers = Annotated[int, Bounds(least=0, most=1024)]
NumThreads = Annotated[int, Bounds(least=1, most=1024)]
Int = Annotated[int, Bounds()]
NonNegativeInt = Annotated[int, Bounds(least=0)]
Finite = Annotated[float, Bounds()]
NonNegative = Annotated[float, Bounds(least=0, most=10**12)]
Positive = Annotated[float, Bounds(above=0, most=10**12)]
Fraction = Annotated[float, Bounds(least=0, most=1)]
Epsilon = Annotated[float, Bounds(above=0, most=1)]
# annotation of a name, which is printed in a line and may become a file's name
ONE_LINE = "one line"
Name = Annotated[str, ONE_LINE]
# annotation of a path or URI that the user gives, on one line too: parsing expands a leading ~
EXPANDED = "~ is expanded"
Location = Annotated[str, EXPANDED]
_NOT_IN_A_LINE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class MissingError(ValueError):
    """Raised for a value that the user must still give; what there is can be shown."""

    # the config so far: a tree of what was given, or a Resolved; None: unknown
    found: Any = None


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

    `__post_init__` checks the class's own fields: here ranges and characters, in subclasses what else holds. A message
    begins with the name of a field, and the engine prepends the config path.
    """

    # root of a config only: its sections in the order in which they are derived; a section may appear twice
    derivation_order: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name, hint in annotated_types(type(self)).items():
            map_annotated(hint, getattr(self, name), _check_value, name)

    def derive(self, root: Any, facts: Any) -> dict[str, Derived]:
        """Return this section's derived fields, each with its value and source.

        Args:
            root: the whole config; the sections before this one are already derived. The root itself comes last.
            facts: what is known about the machine and the data.
        """
        return {}

    def view(self, root: Any, facts: Any, name: str, key: str | None) -> tuple[Any, Any]:
        """Return root and facts for the section in field `name` (at `key`, if that is a dict of sections)."""
        return root, facts

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


def _check_value(value: Any, annotation: Any, name: str) -> Any:
    if isinstance(value, str):
        _check_text(value, name, is_line=annotation in (ONE_LINE, EXPANDED))
        if annotation == EXPANDED and "://" not in value and re.search(rb"[^/]{256}", value.encode()):
            raise ValueError(f"{name} holds a name of more than 255 bytes, which no file has.")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        (annotation if isinstance(annotation, Bounds) else Bounds()).check(value, name)
    return value


def _check_text(text: str, name: str, *, is_line: bool) -> None:
    found = _NOT_IN_A_LINE.search(text) if is_line else None
    wrong = found[0] if found else next((char for char in text if char == "\0" or "\ud800" <= char <= "\udfff"), None)
    if wrong is not None:
        kind = "not UTF-8" if wrong >= "\ud800" else "a control character"
        raise ValueError(f"{name} holds {wrong!r}, {kind}, in {text[:80]!r}. Remove it.")


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
    # roles only: (mapping as given, its config path) -> the mapping with short forms written out
    written_out: Callable[[Any, str], Any] | None = None


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
    """Return the type of each field of a dataclass, in order and with annotations."""
    return {name: hint for name, hint in get_type_hints(cls, include_extras=True).items() if name in field_types(cls)}


def map_annotated(hint: Any, value: Any, change: Callable[[Any, Any, str], Any], name: str) -> Any:
    """Return `value` after `change(part, annotation, name)` of each part; without an annotation, it is None."""
    if hint is Any and isinstance(value, list | dict):
        hint = list[Any] if isinstance(value, list) else dict[str, Any]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        for annotation in arguments[1:]:
            value = change(value, annotation, name)
    elif hint in (int, float, str, Any):
        value = change(value, None, name)
    elif origin in (Union, types.UnionType):
        for option in arguments:
            value = map_annotated(option, value, change, name)
    elif origin in (list, tuple) and isinstance(value, list | tuple):
        hints = itertools.repeat(arguments[0]) if origin is list or Ellipsis in arguments else arguments
        parts = zip(hints, value, strict=False)
        return type(value)(map_annotated(*part, change, f"{name}[{index}]") for index, part in enumerate(parts))
    elif origin is dict and isinstance(value, dict):
        return {
            map_annotated(arguments[0], key, change, name): map_annotated(arguments[1], item, change, f"{name}.{key}")
            for key, item in value.items()
        }
    return value


def ranges(hint: Any) -> list[str]:
    """Return the ranges of the numbers in a type, in words, each once."""
    if isinstance(hint, Bounds):
        return [str(hint)] if str(hint) else []
    parts = hint.__metadata__ if get_origin(hint) is Annotated else get_args(hint)
    return list(dict.fromkeys(words for part in parts for words in ranges(part)))


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
            own, tables = field_types(member), [migration.renamed for migration in migrations_of(member)]
            news = [lookup(member, table[key]) for table in tables if key in table and key not in own]
            found += [own[key]] if key in own else list(itertools.chain(*news))
        return found
    return [value_type or Any] if value_type is not None or hint is Any else []


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
