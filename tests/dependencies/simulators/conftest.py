"""Says which OpenGL library draws before a test imports MuJoCo, which would choose one that needs a display."""

from contextlib import suppress

from vla_foundry.simulators.mujoco_renderer import choose_opengl

# without any the tests say so themselves
with suppress(ValueError):
    choose_opengl()
