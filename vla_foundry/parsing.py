"""Parse JSON and YAML: the one reader of each, with limits on bytes, depth, digits and what aliases expand to."""

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import yaml

# a document as a whole; the tokenizer.json of the largest vocabularies has 34 MB, an index of a large shard 100 MB
MAX_BYTES = 512 << 20
# one record of a dataset: a line of JSON lines, or a JSON member of a sample
MAX_RECORD_BYTES = 64 << 20
MAX_DEPTH = 100
# lists and objects of a document; an empty one has three bytes there and 64 in memory
MAX_LISTS = 8 << 20
# 128 bits have 39 digits; tokenizers write "no limit" as a whole number of 31
MAX_DIGITS = 40
# YAML is what people write, and slow to parse
MAX_YAML_BYTES = 16 << 20
MAX_YAML_NODES = 500_000
# nodes that the aliases of a YAML file may add to those it spells out
MAX_ALIASED_NODES = 100_000

# escapes of surrogates, and numbers that may not be finite: a document with any of them is looked through
_SUSPECT = re.compile(r"\\u[dD][89a-fA-F]|Infinity|NaN|[eE]\+?[0-9]{3}")
_ZEROS = bytes.maketrans(b"123456789", b"0" * 9)
_NOT_FINITE = re.compile(r"Infinity|NaN|[eE]\+?[0-9]{3}")
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):
    """Reads 1e-3 as a number and a date as text, as YAML 1.2 does; YAML 1.1, which PyYAML follows, does not."""

    yaml_implicit_resolvers = {  # PyYAML's own attribute
        first: [rule for rule in rules if not rule[0].endswith(":timestamp")]
        for first, rules in _SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


class _LongNumber:
    def __init__(self, digits: str) -> None:
        self.fault = f"is a number of {len(digits):,} digits; at most {MAX_DIGITS} are read"


def parse_json(text: str | bytes, name: str, *, finite: bool = False) -> Any:
    """Parse a JSON document.

    Args:
        name: where the text comes from, for messages.
        finite: refuse Infinity and NaN, which Python and NumPy write though JSON has neither.

    Raises:
        ValueError: it is not JSON, exceeds a limit, or holds half of a surrogate pair; the message names the key.
    """
    return _parse_json(text, name, MAX_BYTES, lambda item: _fault_of_text(item) or _fault_of_number(item, finite))


def parse_object(text: str | bytes, name: str, *, finite: bool = False) -> dict[str, Any]:
    """Parse a JSON document like `parse_json`; one that is not an object is a ValueError."""
    values = parse_json(text, name, finite=finite)
    if not isinstance(values, dict):
        raise ValueError(f"{name} holds no JSON object.")
    return values


def as_json(values: Any) -> Any:
    """Return values as JSON gives them back: tuples become lists, and keys text."""
    return json.loads(json.dumps(values))


def parse_record(text: str | bytes, name: str, *, max_bytes: int = MAX_RECORD_BYTES) -> Any:
    """Parse a line or a member of a dataset like `parse_json`; callers check the text that they use of it.

    Raises:
        ValueError: it is not JSON, or exceeds a limit.
    """
    return _parse_json(text, name, max_bytes, _fault_of_number)


def _parse_json(text: str | bytes, name: str, max_bytes: int, fault_of: Callable[[Any], str | None]) -> Any:
    if len(text) > max_bytes:
        raise ValueError(f"{name} has {len(text):,} bytes of JSON; at most {max_bytes:,} are read.")
    try:
        text = text.decode(json.detect_encoding(text)) if isinstance(text, bytes) else text.removeprefix("\ufeff")
        num_lists, max_lists = text.count("[") + text.count("{"), max(MAX_LISTS, max_bytes // 32)
        if num_lists > max_lists:
            raise ValueError(f"{name} has {num_lists:,} lists and objects; at most {max_lists:,} are read.")
        # many times faster than a regular expression
        has_long_number = b"0" * (MAX_DIGITS + 1) in text.encode("utf-8", "replace").translate(_ZEROS)
        value = json.loads(text, parse_int=_read_int) if has_long_number else json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not JSON (byte {error.start} is not {error.encoding.upper()}).") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON ({error}).") from None
    except RecursionError:
        raise ValueError(f"{name} {_TOO_DEEP}.") from None
    if num_lists > MAX_DEPTH and _is_deep(value):
        raise ValueError(f"{name} {_TOO_DEEP}.")
    if has_long_number or _SUSPECT.search(text):
        for key, item in _walk(value):
            if fault := fault_of(item):
                raise ValueError(f"{name}: {ascii(key) if key else 'its value'} {fault}.")
    return value


_TOO_DEEP = f"nests lists and mappings more than {MAX_DEPTH} deep"


def _read_int(digits: str) -> int | _LongNumber:
    return int(digits) if len(digits) <= MAX_DIGITS else _LongNumber(digits)


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = [item for items in inner for item in items if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield each value below a value, and each key, with the keys that lead to it."""
    found = [("", value)]
    while found:
        path, item = found.pop()
        yield path, item
        if isinstance(item, dict):
            yield from ((f"{path}.{key}".lstrip("."), key) for key in item)
            found += [(f"{path}.{key}".lstrip("."), each) for key, each in item.items()]
        elif isinstance(item, list):
            found += [(f"{path}[{number}]", each) for number, each in enumerate(item)]


def _fault_of_number(item: Any, finite: bool = False) -> str | None:
    if isinstance(item, _LongNumber):
        return item.fault
    is_wrong = finite and isinstance(item, float) and not math.isfinite(item)
    return f"must be a finite number, not {item}" if is_wrong else None


def _fault_of_text(item: Any) -> str | None:
    is_wrong = isinstance(item, str) and any("\ud800" <= letter <= "\udfff" for letter in item)
    return "holds half of a surrogate pair, which is not text" if is_wrong else None


def parse_yaml(text: str, name: str) -> Any:
    """Parse a YAML document into plain values; see compose_yaml."""
    with _yaml_faults(name):
        _check_nodes(text)
        return yaml.load(text, Loader=_Loader)  # noqa: S506  # it is one of PyYAML's two safe loaders


def compose_yaml(text: str, name: str, *, has_lines: bool = True) -> yaml.Node | None:
    """Parse a YAML document into PyYAML's nodes; None if it is empty.

    Args:
        name: where the text comes from, for messages.
        has_lines: messages give the line.

    Raises:
        ValueError: it is not YAML, exceeds a limit, or an anchor contains itself.
    """
    with _yaml_faults(name, has_lines):
        _check_nodes(text)
        return yaml.compose(text, Loader=_Loader)


@contextmanager
def _yaml_faults(name: str, has_lines: bool = True) -> Iterator[None]:
    try:
        yield
    except yaml.MarkedYAMLError as error:
        place = f"{name}:{error.problem_mark.line + 1}" if error.problem_mark and has_lines else name
        raise ValueError(f"{place}: not valid YAML: {error.problem or error.context}.") from None
    except (yaml.YAMLError, UnicodeError) as error:
        raise ValueError(f"{name}: not valid YAML: {' '.join(str(error).split())}.") from None
    except (ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
        # PyYAML's constructors, of values such as `!!int ""`
        raise ValueError(f"{name}: not valid YAML: a value does not fit its type ({error!r}).") from None


def _events(text: str) -> Iterator[yaml.Event]:
    if len(text) > MAX_YAML_BYTES:
        raise yaml.YAMLError(f"it has {len(text):,} letters; at most {MAX_YAML_BYTES:,} are read")
    for number, event in enumerate(yaml.parse(text, Loader=_Loader)):
        if number > MAX_YAML_NODES:
            raise yaml.MarkedYAMLError(
                problem=f"it has more than {MAX_YAML_NODES:,} values", problem_mark=event.start_mark
            )
        yield event


def _check_nodes(text: str) -> None:
    """Check depth and aliases while they are events: PyYAML makes nodes, and values of them, by recursion."""
    # of each open list or mapping: its anchor, the nodes before it, and the deepest level reached in it
    opened: list[tuple[str | None, int, int]] = []
    # anchor -> nodes and levels of its value, aliases expanded
    anchors: dict[str, tuple[int, int]] = {}
    num_nodes = num_aliased = 0
    for event in _events(text):
        level, fault = len(opened), None
        if isinstance(event, yaml.AliasEvent):
            added, levels = anchors.get(event.anchor, (1, 0))
            num_nodes, num_aliased, level = num_nodes + added, num_aliased + added, level + levels
            if num_aliased > MAX_ALIASED_NODES:
                fault = f"its aliases (*{event.anchor}) expand to more than {MAX_ALIASED_NODES:,} values"
            elif any(event.anchor == anchor for anchor, _, _ in opened):
                fault = "this anchor contains itself. Remove the alias"
        elif isinstance(event, yaml.CollectionStartEvent):
            level += 1
            opened.append((event.anchor, num_nodes, level))
            num_nodes += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, start, level = opened.pop()
            if anchor:
                anchors[anchor] = num_nodes - start, level - len(opened)
        elif isinstance(event, yaml.ScalarEvent):
            num_nodes += 1
            if event.anchor:
                anchors[event.anchor] = 1, 0
        if opened:
            opened[-1] = *opened[-1][:2], max(level, opened[-1][2])
        if fault or level > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=fault or _TOO_DEEP, problem_mark=event.start_mark)
