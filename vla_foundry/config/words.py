"""Split a command line into flags and positional words, and merge the flags in order of precedence."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vla_foundry.config import schema
from vla_foundry.config.tree import COMMAND_LINE, Branch, Leaf, Node, Scalar, as_one_layer, merge, place
from vla_foundry.config.values import BOOL_WORDS
from vla_foundry.config.yaml_source import is_null, load_config, parse_inline

HELP_WORDS = ("--help", "-h")
_INCLUDE = "include "


@dataclass(frozen=True, kw_only=True)
class Words:
    """A command line, split."""

    # (dotted path, value or None), in order
    flags: tuple[tuple[str, str | None], ...] = ()
    # words that belong to no flag
    positional: tuple[str, ...] = ()
    # the word after --help ("" if there is none); None: no --help
    help_topic: str | None = None

    def values_of(self, name: str) -> list[str]:
        """Return every value given for one flag."""
        return [text for flag, text in self.flags if flag == name and text is not None]

    def without(self, *names: str) -> "Words":
        """Return the same words without some flags."""
        return replace(self, flags=tuple(flag for flag in self.flags if flag[0] not in names))


def split_words(argv: list[str], is_switch: Callable[[str], bool]) -> Words:
    """Split a command line.

    Args:
        argv: the words after the command.
        is_switch: whether the flag with this dotted path is boolean, so that it may stand without a value.

    Raises:
        ValueError: a word starts with one dash and is not a number.
    """
    flags: list[tuple[str, str | None]] = []
    positional: list[str] = []
    help_topic = None
    index = 0
    while index < len(argv):
        word, following = argv[index], argv[index + 1] if index + 1 < len(argv) else None
        index += 1
        has_value = following is not None and not following.startswith("--")
        if word in HELP_WORDS:
            help_topic = str(following) if has_value else ""
            index += has_value
        elif word.startswith("--help="):
            help_topic = word.partition("=")[2]
        elif word == "--":
            positional += argv[index:]
            break
        elif word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            if not equals and has_value and (not is_switch(name) or _is_switch_value(str(following))):
                flags.append((name, following))
                index += 1
            else:
                flags.append((name, text if equals else None))
        elif word.startswith("-") and word != "-" and not word[1:2].isdigit():
            raise ValueError(f"'{word}' is not a flag: flags begin with two dashes, as --{word.lstrip('-')}.")
        else:
            positional.append(word)
    return Words(flags=tuple(flags), positional=tuple(positional), help_topic=help_topic)


def _is_switch_value(word: str) -> bool:
    return word.lower() in BOOL_WORDS or is_null(Scalar(word))


def flags_to_tree(cls: Any, words: Words) -> Branch:
    """Merge the flags of a command line: includes first, then mappings, then leaves, in any order of the words.

    A deeper path overrides a shallower one. A repeated flag overrides the earlier one.

    Raises:
        ValueError: a flag has no name, or its mapping is not YAML.
        FileNotFoundError: an included file does not exist.
    """
    includes: list[tuple[tuple[str, ...], Node]] = []
    values: list[tuple[tuple[str, ...], Node]] = []
    for name, text in words.flags:
        path = tuple(name.split("."))
        if not all(path):
            raise ValueError(f"'--{name}' is not a flag: write --section.field.")
        is_include, node = _flag_node(cls, name, text)
        (includes if is_include else values).append((path, node))
    tree = merge(_merge_shallow_first(includes), as_one_layer(_merge_shallow_first(values)))
    assert isinstance(tree, Branch)
    return tree


def _merge_shallow_first(flags: list[tuple[tuple[str, ...], Node]]) -> Node:
    tree: Node = Branch({}, COMMAND_LINE)
    for path, node in sorted(flags, key=lambda flag: len(flag[0])):
        tree = merge(tree, place(path, node))
    return tree


def _flag_node(cls: Any, name: str, text: str | None) -> tuple[bool, Node]:
    """Return whether the flag is an include, and its value."""
    if text is None:
        return False, Leaf(True, COMMAND_LINE)
    hints = schema.lookup(cls, name)
    holds_keys = any(schema.section_class(hint) or schema.dict_value_type(hint) is not None for hint in hints)
    stripped = text.strip()
    holds_list = any(schema.is_list(option) for hint in hints for option in schema.options(hint))
    if (holds_keys or holds_list) and stripped.startswith(_INCLUDE):
        try:
            return True, load_config(stripped.removeprefix(_INCLUDE).strip())
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--{name}: {error}") from None
    if holds_keys and stripped.startswith("{"):
        try:
            return False, parse_inline(stripped)
        except ValueError as error:
            raise ValueError(f"--{name} '{text}': {error}") from None
    # null is not a value here, so that keys may follow
    return False, Leaf(None if holds_keys and is_null(Scalar(text)) else Scalar(text), COMMAND_LINE)
