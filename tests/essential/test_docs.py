"""The documentation's commands parse, its Python and YAML are sound, and what it imports exists."""

import ast
import contextlib
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from vla_foundry import cli
from vla_foundry.config import command_line
from vla_foundry.config.decode import MissingError

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
PAGES += [*sorted((ROOT / "config_presets").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_SHELL = ("bash", "sh", "shell", "console")


class _Parsed(SystemExit):
    """A command line was accepted."""


def blocks(*kinds: str) -> list[tuple[str, str]]:
    """(page and line, text) of each block of these languages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            if match[1] in kinds:
                line = text[: match.start()].count("\n") + 1
                found.append((f"{page.relative_to(ROOT)}:{line}", match[2]))
    return found


def commands(script: str) -> Iterator[list[str]]:
    """The words after `vla-foundry` of each of its commands in a script; torchrun's are those of `train`."""
    variables: dict[str, str] = {}
    for line in script.replace("\\\n", " ").splitlines():
        assigned = re.fullmatch(r'([A-Z_]+)="(.*)"', line)
        if assigned is not None:
            variables[assigned[1]] = assigned[2]
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split, lexer.commenters = True, "#"
        command: list[str] = []
        for word in [*lexer, ";"]:
            if re.fullmatch(r"[|&;()<>]+", word):
                yield from read_command(command)
                command = []
            else:
                command.append(word)


def read_command(words: list[str]) -> Iterator[list[str]]:
    """Yield the words after the program, if it is ours."""
    for place, word in enumerate(words):
        if word == "vla-foundry":
            yield words[place + 1 :]
            return
        if word in ("vla_foundry.main", "vla_foundry/main.py"):
            yield ["train", *words[place + 1 :]]
            return


def without_placeholders(words: list[str], empty: Path) -> list[str]:
    """Leave out what stands for a reader's files and flags; a config file of theirs is an empty one."""
    kept: list[str] = []
    for word in words:
        path = word.removeprefix("include ").strip()
        is_missing = not any((folder / path).exists() for folder in (ROOT, ROOT / "config_presets"))
        if is_missing and word.startswith("include "):
            kept.pop()
        elif is_missing and kept and kept[-1] == "--config_path":
            kept.append(str(empty))
        elif word != "..." or kept[-1].startswith("--"):
            kept.append(word)
    return kept


COMMANDS = [
    pytest.param(words, id=f"{place} {' '.join(words[:2])}")
    for place, script in blocks(*_SHELL)
    for words in commands(script)
    if "--plugins" not in words  # its entries would stay in this process; test_plugins.py runs it
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_of_the_documentation_is_taken(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "empty.yaml").write_text("{}", encoding="utf-8")
    decode = command_line.decode_tree

    def stop(*args: object) -> None:
        with contextlib.suppress(MissingError):  # a reader gives it
            decode(*args)
        raise _Parsed

    monkeypatch.setattr(command_line, "decode_tree", stop)
    with pytest.raises(SystemExit) as end:
        cli.main(without_placeholders(words, tmp_path / "empty.yaml"))
    assert isinstance(end.value, _Parsed) or (end.value.code == 0 and "--help" in words), capsys.readouterr().err


@pytest.mark.parametrize(("place", "text"), blocks("yaml"))
def test_yaml_of_the_documentation_is_sound(place: str, text: str) -> None:
    yaml.safe_load(re.sub(r"!include\s+\S+", "{}", text))


@pytest.mark.parametrize(("place", "text"), blocks("python"))
def test_python_of_the_documentation_imports_what_exists(place: str, text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vla_foundry"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")
