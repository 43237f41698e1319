"""Read YAML into a tree that records each value's line, with includes that merge at every depth.

There are three ways to include a file, all relative to the including file:

    key: !include other.yaml        the value of one key
    <<: !include other.yaml         merge into this mapping; may appear several times, later ones override
    include: other.yaml             the same, with one path or a list of paths

The mapping's own values override included ones, leaf by leaf.
"""

import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from vla_foundry.config.tree import COMMAND_LINE, Branch, Leaf, Node, Origin, Scalar, merge, to_value
from vla_foundry.parsing import MAX_DEPTH, compose_yaml
from vla_foundry.storage.uri import is_remote, read_text

INCLUDE_KEY = "include"
# includes of a config, repeated ones counted each time: ten files can include each other a billion times
_MAX_FILES = 1000
_MAX_VALUES = 200_000
# how the name of a preset begins
PRESETS = "config_presets/"
_PRESET_PREFIXES = (f"vla_foundry/{PRESETS}", PRESETS)
_INCLUDE_TAG = "!include"
_MERGE_TAG = "tag:yaml.org,2002:merge"
_STANDARD_TAG = "tag:yaml.org,2002:"
_KNOWN_TAGS = ("str", "int", "float", "bool", "null", "map", "seq", "timestamp", "value", "merge")
_NULL_WORDS = frozenset(("", "~", "null", "Null", "NULL"))
# YAML 1.1 folds these like line breaks, in quoted text too; YAML 1.2 and our reader keep them as they are
SEPARATORS = "\x85\u2028\u2029"
_STAND_INS = "\U0010fd85\U0010fd28\U0010fd29"
_HIDE, _SHOW = str.maketrans(SEPARATORS, _STAND_INS), str.maketrans(_STAND_INS, SEPARATORS)


def preset_root() -> Path:
    """Return the folder of presets: in an installed package, or beside the package in a source tree."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "config_presets"
    return installed if installed.is_dir() else package.parent / "config_presets"


def _display_name(location: str) -> str:
    """Return a config file as a user would name it: presets begin with `config_presets/`."""
    root = f"{preset_root()}{os.sep}"
    return f"{PRESETS}{location.removeprefix(root)}" if location.startswith(root) else location


def find_config(name: str, folder: str | None = None) -> str:
    """Find the config file that a user named.

    Args:
        name: a path or URI. A leading `config_presets/` or `vla_foundry/config_presets/` names the preset folder.
        folder: folder of the including file; None: the name was given on the command line, so search the working
            directory and then the preset folder.

    Raises:
        FileNotFoundError: it is in none of these places.
    """
    if is_remote(name):
        return name
    if folder is not None and is_remote(folder):
        scheme, _, place = folder.partition("://")
        return f"{scheme}://{posixpath.normpath(posixpath.join(place, name))}"
    path = Path(os.path.expanduser(name))
    places = [path if path.is_absolute() else Path(folder or ".") / path]
    prefix = next((prefix for prefix in _PRESET_PREFIXES if name.startswith(prefix)), None)
    if prefix is not None:
        places.append(preset_root() / name.removeprefix(prefix))
    elif folder is None and not path.is_absolute():
        places.append(preset_root() / path)
    for place in places:
        if place.is_file():
            return os.path.normpath(place)
    searched = " nor ".join(str(place) for place in places)
    raise FileNotFoundError(f"Config file '{name}' was not found: there is no {searched}.")


def load_config(name: str) -> Node:
    """Read the config file named on the command line, with its includes.

    Raises:
        FileNotFoundError: it or an included file does not exist.
        ValueError: it is not YAML, or includes itself; the message begins with file and line.
    """
    return _load(find_config(name), _Depth((), 0, count(1), count(1)))


def load_mapping(name: str) -> Branch:
    """Read a config file like `load_config`; one that is not a mapping of keys is a ValueError."""
    tree = load_config(name)
    if not isinstance(tree, Branch):
        raise ValueError(f"{name} holds no mapping of keys. Is it a config file?")
    return tree


def parse_inline(text: str) -> Node:
    """Parse YAML given on the command line; its includes are found as there. Other text is a ValueError."""
    return _parse(text, COMMAND_LINE.source, None, _Depth((), 0, count(1), count(1)))


def is_null(value: Any) -> bool:
    """Return whether YAML reads this as null, or it is `none` or `None`, as users also write."""
    if isinstance(value, Scalar):
        return not value.quoted and (value.text in _NULL_WORDS or value.text in ("none", "None"))
    return value is None


@dataclass(frozen=True)
class _Depth:
    """Where a file stands among the includes of a config."""

    # the files that include each other down to here
    chain: tuple[str, ...]
    # lists, mappings and includes around it
    levels: int
    # counts the files of the config, and its values with aliases expanded
    num_files: Iterator[int]
    num_values: Iterator[int]


def _load(location: str, depth: _Depth) -> Node:
    chain = depth.chain
    if location in chain:
        circle = " -> ".join((*chain[chain.index(location) :], location))
        raise ValueError(f"{location} includes itself: {circle}. Remove one of these includes.")
    if next(depth.num_files) > _MAX_FILES:
        raise ValueError(f"{chain[0]} includes more than {_MAX_FILES:,} files, with those that they include.")
    source, folder = _display_name(location), posixpath.dirname(location) or "."
    return _parse(read_text(location), source, folder, replace(depth, chain=(*chain, location)))


def _parse(text: str, source: str, folder: str | None, depth: _Depth) -> Node:
    root = compose_yaml(text.translate(_HIDE), source, has_lines=folder is not None)
    return Branch({}, Origin(source, 1)) if root is None else _Reader(source, folder, depth).convert(root)


class _Reader:
    """Convert the YAML nodes of one file to ours."""

    def __init__(self, source: str, folder: str | None, depth: _Depth) -> None:
        self.source = source
        self.folder = folder
        self.depth = depth
        self.levels = depth.levels

    def origin(self, node: yaml.Node) -> Origin:
        return COMMAND_LINE if self.folder is None else Origin(self.source, node.start_mark.line + 1)

    def convert(self, node: yaml.Node) -> Node:
        origin = self.origin(node)
        self.levels += 1
        if self.levels > MAX_DEPTH:
            raise ValueError(f"{origin}: nests too deeply: over {MAX_DEPTH} lists and mappings, or over 25 includes.")
        if next(self.depth.num_values) > _MAX_VALUES:
            raise ValueError(f"{origin}: the config has more than {_MAX_VALUES:,} values, with aliases and includes.")
        try:
            if node.tag == _INCLUDE_TAG:
                return self.include(node)
            if node.tag.removeprefix(_STANDARD_TAG) not in _KNOWN_TAGS:
                raise ValueError(f"{origin}: the tag {node.tag} is unknown. The only tag is !include.")
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node)
            if isinstance(node, yaml.SequenceNode):
                return Leaf([to_value(self.convert(item)) for item in node.value], origin)
            return Leaf(_scalar(node), origin)
        finally:
            self.levels -= 1

    def mapping(self, node: yaml.MappingNode) -> Node:
        included: Node = Branch({}, self.origin(node))
        own: dict[Any, Node] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE_TAG or key_node.value == INCLUDE_KEY:
                for part in self.merged_parts(key_node, value_node):
                    included = merge(included, part)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"{self.origin(key_node)}: a key must be a word, not a list or a mapping.")
            if key_node.value in own:
                raise ValueError(f"{self.origin(key_node)}: the key '{key_node.value}' is given twice. Remove one.")
            own[key_node.value] = self.convert(value_node)
        return merge(included, Branch(own, self.origin(node)))

    def merged_parts(self, key_node: yaml.Node, value_node: yaml.Node) -> list[Node]:
        """Return what `<<:` or `include:` merges in; later ones override."""
        is_sequence = isinstance(value_node, yaml.SequenceNode)
        items = value_node.value if is_sequence else [value_node]
        if key_node.tag != _MERGE_TAG:
            parts = [self.include(item) for item in items]
        else:
            # YAML's own rule for a list: the first one overrides
            parts = [self.convert(item) for item in reversed(items)]
        for part, item in zip(parts, items, strict=True):
            if isinstance(part, Leaf):
                raise ValueError(f"{self.origin(item)}: '{key_node.value}' needs a mapping to merge in.")
        return parts

    def include(self, node: yaml.Node) -> Node:
        if not isinstance(node, yaml.ScalarNode) or not node.value:
            raise ValueError(f"{self.origin(node)}: an include needs the path of a file.")
        try:
            return _load(find_config(node.value, self.folder), replace(self.depth, levels=self.levels + 2))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.origin(node).prefix}{error}") from None


def _scalar(node: Any) -> Scalar | None:
    # a plain scalar has no style; `!!str null` is text although it has no quotes
    is_text = node.tag == f"{_STANDARD_TAG}str" and node.value in _NULL_WORDS
    quoted = bool(node.style) or is_text
    return None if not quoted and node.value in _NULL_WORDS else Scalar(node.value.translate(_SHOW), quoted=quoted)
