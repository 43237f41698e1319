"""Parse the command line and config files of every command into a frozen dataclass, or report a one-line error."""

import contextlib
import errno
import importlib
import json
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from vla_foundry.config import schema
from vla_foundry.config.decode import Decoding, decode
from vla_foundry.config.help import format_help
from vla_foundry.config.schema import MissingError
from vla_foundry.config.tree import COMMAND_LINE, Branch, Leaf, Node, Origin, Scalar, merge, without
from vla_foundry.config.values import decode_value
from vla_foundry.config.words import Words, flags_to_tree, split_words
from vla_foundry.config.yaml_source import load_mapping
from vla_foundry.registry import unknown_name_message
from vla_foundry.run_folder import CHECKPOINTS_FOLDER, MODEL_CONFIG_NAME
from vla_foundry.shards import MANIFEST_NAME
from vla_foundry.storage.uri import is_remote
from vla_foundry.world import is_first_process, read_rank

P = TypeVar("P")

CONFIG_FLAG = "config_path"
PLUGINS_FLAG = "plugins"
PLUGINS_VARIABLE = "VLA_FOUNDRY_PLUGINS"
ENTRY_POINT_GROUP = "vla_foundry.plugins"
# what a user can mend; any other exception is a bug
EXPECTED_ERRORS = (ValueError, OSError)
_ISSUES = "https://github.com/vla-foundry/vla_foundry/issues"
# letters of a printed error
_MAX_LINE = 2000
# user and password in a URL
_PASSWORD = re.compile(r"://[^/\s@]+@")
# plug-ins that the user has named so far; spawned processes must import them again
_named: list[str] = []
# those that installed packages declare
_installed: list[str] = []


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """The params of a command line, and the origin of each value."""

    # the decoded dataclass
    params: Any
    # config path of each given leaf -> where it was written
    origins: dict[str, Origin]
    # lines that the user should see
    notices: list[str]


def parse_command(cls: type[P], argv: list[str], *, prog: str, positional: tuple[str, ...] = ()) -> P:
    """Parse the words of a command into its params; print notices to standard error.

    Accepts `--a.b VALUE`, `--a.b=VALUE`, `--a.b` (true), `--config_path FILE`, `--section "include FILE"`,
    `--plugins MODULE`, and `--help [TOPIC]`, which prints and raises SystemExit(0). For each leaf the command line
    overrides the file, the file its includes, and those the defaults, in any order of the words.

    Args:
        cls: the dataclass of the command.
        argv: the words after the command.
        prog: the command as the user types it, for the help.
        positional: fields filled in order by words without a flag; if the last one is a list, it takes all the rest.

    Raises:
        ValueError: an error that the user can fix; one line.
        FileNotFoundError: a config file does not exist.
    """
    parsed = parse(cls, argv, prog=prog, positional=positional)
    print_notices(parsed.notices)
    return parsed.params


def print_notices(notices: list[str]) -> None:
    """Print notices to standard error, on the first process only."""
    if is_first_process():
        for notice in notices:
            sys.stderr.write(f"note: {notice}\n")


@contextmanager
def errors_once(*, on_each_node: bool = False) -> Iterator[None]:
    """Report an error that all processes have on the first one only; the others exit silently with code 2.

    Args:
        on_each_node: report it on the first process of each machine, because machines may differ.
    """
    try:
        yield
    except (ValueError, OSError):
        if not is_first_process(on_node=on_each_node):
            raise SystemExit(2) from None
        raise


def parse(cls: Any, argv: list[str], *, prog: str, positional: tuple[str, ...] = ()) -> Parsed:
    """Parse like `parse_command`, and return origins and notices too."""
    import_installed_plugins()
    # import plug-ins first: they may add types, and types say which flags are switches
    early = split_words(argv, lambda name: False)
    plugins = [
        name for text in early.values_of(PLUGINS_FLAG) for name in _plugin_names(Leaf(Scalar(text), COMMAND_LINE))
    ]
    import_plugins(plugins, f"--{PLUGINS_FLAG}")
    # without positional words, the word after a flag is its value, right or wrong
    words = split_words(argv, lambda name: bool(positional) and _is_switch(cls, name))
    files = words.values_of(CONFIG_FLAG)
    if len(files) > 1:
        raise ValueError(f"--{CONFIG_FLAG} is given twice: {' and '.join(files)}. Include one from the other.")
    tree = load_mapping(files[0]) if files else Branch({}, COMMAND_LINE)
    node = tree.children.get(PLUGINS_FLAG)
    file_plugins = _plugin_names(node)
    if node is not None and _came_with_data(node.origin.source):
        check_file_plugins(tree)
    else:
        import_plugins(file_plugins, "" if node is None else str(node.origin))
    if words.help_topic is not None:
        sys.stdout.write(format_help(cls, prog, words.help_topic, positional))
        raise SystemExit(0)
    given = _command_line_tree(cls, words, positional)
    tree, given = _check_section_plugins(tree), _check_section_plugins(given)
    if plugins:
        # the run saves every plug-in that was imported
        names = [Scalar(name) for name in dict.fromkeys((*file_plugins, *plugins))]
        given = merge(given, Branch({PLUGINS_FLAG: Leaf(names, COMMAND_LINE)}, COMMAND_LINE))
    return decode_tree(cls, merge(tree, given))


def _came_with_data(source: str) -> bool:
    """Return whether a config file is remote, or lies in the folder of a run or a dataset."""
    folder = os.path.dirname(source) or "."
    marks = (MODEL_CONFIG_NAME, CHECKPOINTS_FOLDER, MANIFEST_NAME)
    return is_remote(source) or any(os.path.exists(os.path.join(folder, mark)) for mark in marks)


def _check_section_plugins(tree: Branch) -> Branch:
    """Check and drop the plug-ins of included sections: a saved config_model.yaml names them."""
    children = dict(tree.children)
    for name, child in children.items():
        if isinstance(child, Branch) and PLUGINS_FLAG in child.children:
            check_file_plugins(child)
            children[name] = without(child, PLUGINS_FLAG)
    return replace(tree, children=children)


def _is_switch(cls: Any, name: str) -> bool:
    return any(bool in schema.options(hint) for hint in schema.lookup(cls, name))


def _command_line_tree(cls: Any, words: Words, positional: tuple[str, ...]) -> Branch:
    for flag, text in words.flags:
        if flag in (CONFIG_FLAG, PLUGINS_FLAG) and not text:
            raise ValueError(f"--{flag} needs a value.")
    tree = flags_to_tree(cls, words.without(CONFIG_FLAG, PLUGINS_FLAG))
    added = dict(tree.children)
    rest = list(words.positional)
    for name in positional:
        if rest and name not in added:
            takes_all = name == positional[-1] and schema.is_list(schema.field_types(cls)[name])
            added[name] = Leaf([Scalar(word) for word in rest] if takes_all else Scalar(rest[0]), COMMAND_LINE)
            rest = [] if takes_all else rest[1:]
    if rest:
        wanted = f" after {', '.join(positional)}" if positional else ""
        raise ValueError(f"'{rest[0]}' belongs to no flag{wanted}. Write --flag VALUE.")
    return replace(tree, children=added)


def check_file_plugins(tree: Branch) -> None:
    """Check that the user has agreed to the plug-ins named by a saved config, because a plug-in is code.

    The user agrees by naming them with --plugins, by importing them, or by listing them, separated by commas, in the
    variable VLA_FOUNDRY_PLUGINS, whose modules are imported here.

    Raises:
        ValueError: a plug-in is not imported yet, and the variable does not name it.
    """
    node = tree.children.get(PLUGINS_FLAG)
    agreed = [name.strip() for name in os.environ.get(PLUGINS_VARIABLE, "").split(",")]
    for name in _plugin_names(node):
        if name in sys.modules:
            continue
        if name not in agreed:
            raise ValueError(
                f"{node.origin if node else ''}: the plug-in {name} is code, and is imported only if you name it too. "
                f"Add --{PLUGINS_FLAG} {name}, import it first, or set {PLUGINS_VARIABLE}={name}."
            )
        import_plugins([name], PLUGINS_VARIABLE)


def _plugin_names(node: Node | None) -> list[str]:
    return decode_value(list[str], node.value, PLUGINS_FLAG, node.origin) if isinstance(node, Leaf) else []


def named_plugins() -> tuple[str, ...]:
    """Return the plug-ins that the user has named so far in this process."""
    return tuple(dict.fromkeys(_named))


def agreed_plugins() -> tuple[str, ...]:
    """Return the plug-ins that the user has named or installed: code that may run."""
    return tuple(dict.fromkeys((*_named, *_installed)))


def import_installed_plugins() -> None:
    """Import the plug-ins that installed packages declare as entry points.

    Raises:
        ValueError: a plug-in cannot be imported; the message names its package.
    """
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        owner = f" of the package {entry.dist.name}" if entry.dist is not None else ""
        _import(entry.module, f"The plug-in {entry.value}{owner}")
        _installed.append(entry.module)


def import_plugins(modules: Iterable[str], origin: str) -> None:
    """Import the plug-ins that the user named; the working directory is searched too.

    Args:
        modules: dotted names.
        origin: where they are named, for messages.

    Raises:
        ValueError: a plug-in does not exist or cannot be imported.
    """
    for module in modules:
        search_working_directory()
        _import(module, f"{origin}: the plug-in {module}")
        _named.append(module)


def search_working_directory() -> None:
    """Let imports find modules in the working directory, after all others."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())


def _import(module: str, what: str) -> None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise ValueError(
                f"{what} was not found. Give a module that Python can import, as my_package.my_module."
            ) from None
        raise ValueError(f"{what} needs the module {error.name}, which is not installed.") from error
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"{what} cannot be imported: {error}.") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the border to code that is not ours, which may even call sys.exit
        raise ValueError(f"{what} cannot be imported: {describe_any(error)}{_place_of(error, module)}.") from error


def _place_of(error: BaseException, *plugins: str) -> str:
    """Return " (FILE, line N)" of the innermost code of a plug-in that an error came through; "" if there is none."""
    packages = {module.partition(".")[0] for module in plugins} - {"vla_foundry"}
    places = [
        f" ({frame.f_code.co_filename}, line {line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).partition(".")[0] in packages
    ]
    return places[-1] if places else ""


def decode_tree(cls: Any, tree: Node, path: str = "", decoding: Decoding | None = None) -> Parsed:
    """Decode a tree into a dataclass or a role's concrete class; `path` is its config path.

    Args:
        decoding: what was found before; None: nothing.

    Raises:
        ValueError: a key is unknown, or a value is wrong or missing.
    """
    takes_plugins = any(PLUGINS_FLAG in schema.accepted_keys(member) for member in schema.concrete_classes(cls))
    if isinstance(tree, Branch) and not takes_plugins:
        tree = without(tree, PLUGINS_FLAG)
    decoding = decoding or Decoding(root=cls)
    try:
        params = decode(cls, tree, decoding, path)
    except MissingError as error:
        error.found = tree
        raise
    return Parsed(params=params, origins=decoding.origins, notices=decoding.notices + _migration_notice(decoding))


def _migration_notice(decoding: Decoding) -> list[str]:
    """Return the line that says what the migrations table changed; none if nothing."""
    parts = [f"{old} is called {new} now" for old, new in decoding.renamed.items()]
    if decoding.implied:
        values = ", ".join(f"{key} is {value}" for key, value in decoding.implied.items())
        parts.append(f"as in the earlier implementation, {values}")
    if decoding.ignored:
        parts.append(f"without effect: {', '.join(f'{key} ({why})' for key, why in decoding.ignored.items())}")
    return [f"{'; '.join(parts)}."] if parts else []


def run_command(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Run a command. Print an error that the user can fix as one line `error: ...`; `--debug` shows the traceback.

    An error that no user can fix is a bug: one line names it and the file that keeps its traceback. If it came through
    a plug-in, the line names the plug-in's file and line.

    Raises:
        SystemExit: 2 after an error that the user can fix, 1 after another one, 130 after an interrupt, 141 if nobody
            reads the output any more.
    """
    is_debug = "--debug" in argv
    try:
        main([word for word in argv if word != "--debug"])
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except SystemExit as error:
        if error.code and (place := _place_of(error, *_named, *_installed)):
            print_error(f"a plug-in{place} ended the command: SystemExit: {error.code}.")
            raise SystemExit(1) from None
        raise
    except BaseException as error:  # the border of the process
        if isinstance(error, BrokenPipeError) and _has_lost_reader():
            raise SystemExit(128 + signal.SIGPIPE) from None
        if is_debug:
            raise
        is_expected = isinstance(error, EXPECTED_ERRORS)
        print_error(describe_error(error) if is_expected else _describe_bug(error))
        raise SystemExit(2 if is_expected else 1) from None


def print_error(text: str) -> None:
    """Print an error as one line, which names the process if there are several, and tell the launcher."""
    where = "" if is_first_process() else f"process {read_rank()}: "
    line = f"error: {where}{text}"
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{line}\n")
    _tell_launcher(line)


def _has_lost_reader() -> bool:
    """True if standard output is a pipe that nobody reads any more; what is left in its buffer is dropped then."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if not any(event & select.POLLERR for _, event in poll.poll(0)):
            return False
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # it is no file
        return False
    return True


def describe_any(error: BaseException) -> str:
    """Return an error's type and text in one line, whatever its own methods do."""
    text = "".join(traceback.format_exception_only(error)).strip()
    # without the module of its type
    kind, colon, rest = text.partition(":")
    return " ".join(f"{kind.rpartition('.')[2]}{colon}{rest}".split())[:500]


def _describe_bug(error: BaseException) -> str:
    """Describe an unexpected error in one line, and keep its traceback in a file."""
    what = describe_any(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({what}). Use a smaller batch, sequence, image or model; --debug shows where."
    kept = "shown by --debug"
    with (
        contextlib.suppress(OSError),
        tempfile.NamedTemporaryFile(
            "w", prefix="vla_foundry_", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file,
    ):
        file.writelines(traceback.format_exception(error))
        kept = f"kept in {file.name}"
    if place := _place_of(error, *_named, *_installed):
        return f"{what}. It came through a plug-in{place}; its traceback is {kept}."
    return f"{what}. This is a bug. Please report it at {_ISSUES}, with the command and the traceback {kept}."


def _tell_launcher(line: str) -> None:
    """Write an error where torchrun looks for it: it ends its own report with that file, and would bury the line."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": line, "timestamp": int(time.time())}, file)


def describe_error(error: ValueError | OSError) -> str:
    """Describe an error that the user can fix in one line, not too long; a full disk with the space that is left."""
    # str(error) may fail: an error can be of a user's own class
    message = "".join(traceback.format_exception_only(error)).partition(": ")[2]
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}."
        if error.errno == errno.ENOSPC:
            folder = next((path for path in Path(error.filename).absolute().parents if path.is_dir()), Path("/"))
            message += f" {shutil.disk_usage(folder).free / 1e6:,.1f} MB are free there; make room and run it again."
    line = _PASSWORD.sub("://***@", " ".join(message.split())) or type(error).__name__
    # a value that it shows may have a million letters; the key is at the start, and the fix at the end
    return line if len(line) <= _MAX_LINE else f"{line[: _MAX_LINE // 2]} ... {line[-_MAX_LINE // 2 :]}"


def unknown_command_message(name: str, known: list[str]) -> str:
    """Return the error message for an unknown command."""
    return unknown_name_message("The command", name, known, listed_as="There are")
