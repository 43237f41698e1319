"""A renderer is found, installed if that is allowed, or asked for in one line."""

from collections.abc import Sequence

import pytest

from vla_foundry.quickstart.system import require_renderer


class System:
    """A system that has a renderer once a command was run."""

    def __init__(self, *, has_renderer: bool, exit_code: int = 0) -> None:
        self.has_renderer = has_renderer
        self.exit_code = exit_code
        self.commands: list[list[str]] = []

    def find(self) -> str:
        if not self.has_renderer:
            raise ValueError("neither EGL nor OSMesa")
        return "osmesa"

    def run(self, words: Sequence[str]) -> int:
        self.commands.append(list(words))
        self.has_renderer = self.exit_code == 0
        return self.exit_code


def test_nothing_is_installed_where_there_is_a_renderer() -> None:
    system = System(has_renderer=True)
    require_renderer(may_install=True, find=system.find, run=system.run)
    assert system.commands == []


def test_a_missing_renderer_is_asked_for_with_the_command_that_installs_it() -> None:
    system = System(has_renderer=False)
    with pytest.raises(
        ValueError, match=r"apt-get install --yes libosmesa6`, or let .* --install_system_packages true"
    ):
        require_renderer(may_install=False, find=system.find, run=system.run)
    assert system.commands == []


def test_it_is_installed_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    system = System(has_renderer=False)
    require_renderer(may_install=True, find=system.find, run=system.run)
    assert [words[-2:] for words in system.commands] == [["--yes", "libosmesa6"]]
    failing = System(has_renderer=False, exit_code=100)
    with pytest.raises(ValueError, match="failed"):
        require_renderer(may_install=True, find=failing.find, run=failing.run)
