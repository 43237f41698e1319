"""What the quickstart needs of the system: something to draw simulators with."""

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence

from vla_foundry.simulators.mujoco_renderer import choose_opengl

# draws without a GPU; Debian, Ubuntu
_INSTALL = ("apt-get", "install", "--yes", "libosmesa6")


def require_renderer(
    *,
    may_install: bool,
    find: Callable[[], str] = lambda: choose_opengl(dict(os.environ)),
    run: Callable[[Sequence[str]], int] = lambda words: subprocess.run(words, check=False).returncode,
) -> None:
    """Make sure that simulators can draw.

    Args:
        may_install: install what is missing, as the system's administrator.
        find: returns the name of a renderer, or raises ValueError.
        run: runs a command and returns its exit code.

    Raises:
        ValueError: there is no renderer, and it is not or can not be installed.
    """
    try:
        find()
        return
    except ValueError as error:
        command = _INSTALL if os.geteuid() == 0 or shutil.which("sudo") is None else ("sudo", *_INSTALL)
        if not may_install:
            raise ValueError(
                f"No OpenGL renderer was found to draw the simulator. Install one with `{' '.join(command)}`, or let "
                "the quickstart do that: --install_system_packages true."
            ) from error
    if shutil.which(_INSTALL[0]) is None or run(command) != 0:
        raise ValueError(f"`{' '.join(command)}` failed. Install a library that has OSMesa or EGL by hand.")
    find()
