"""The toy simulator, found by tests and by the processes that they start."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from vla_foundry.config.command_line import import_plugins
from vla_foundry.simulators.mujoco_renderer import choose_opengl

# before a test imports MuJoCo, which would choose a library that needs a display; without any the tests say so
with suppress(ValueError):
    choose_opengl()


@pytest.fixture(scope="module")
def toy_simulator() -> Iterator[None]:
    """Register the simulator `toy` as a user's plug-in is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        patch.setenv("OMP_NUM_THREADS", "1")
        # without what other tests named, and forgotten at the end
        patch.setattr("vla_foundry.config.command_line._named", [])
        import_plugins(["toy_simulator"], "tests")
        yield
