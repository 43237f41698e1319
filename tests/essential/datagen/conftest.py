"""Choose the OpenGL library before a test imports MuJoCo, which would pick one that needs a display."""

from contextlib import suppress

from vla_foundry.simulators.mujoco_renderer import choose_opengl

# without any library, the tests report it themselves
with suppress(ValueError):
    choose_opengl()
