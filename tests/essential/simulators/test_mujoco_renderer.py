"""The OpenGL library is the one asked for, else one that is there, else one line says how to get one."""

import platform

import pytest

from vla_foundry.simulators.mujoco_renderer import choose_opengl

linux_only = pytest.mark.skipif(platform.system() != "Linux", reason="other systems bring their own OpenGL")


def finds(*present: str):
    return lambda library: f"lib{library}.so" if library in present else None


@linux_only
def test_no_library_is_one_line_with_the_command_and_the_variable() -> None:
    with pytest.raises(ValueError, match=r"apt-get install libosmesa6.*MUJOCO_GL=osmesa") as error:
        choose_opengl({}, finds())
    assert "\n" not in str(error.value)


@linux_only
def test_a_library_that_is_asked_for_but_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"MUJOCO_GL=osmesa is not installed.*apt-get install libosmesa6"):
        choose_opengl({"MUJOCO_GL": "OSMesa"}, finds("EGL"))


@linux_only
@pytest.mark.parametrize(("present", "chosen"), [(("OSMesa",), "osmesa"), (("EGL",), "egl")])
def test_the_library_that_is_there_is_taken_and_named_for_mujoco(present: tuple[str, ...], chosen: str) -> None:
    environment: dict[str, str] = {}
    assert choose_opengl(environment, finds(*present)) == chosen
    assert environment["MUJOCO_GL"] == chosen
    assert environment["LP_NUM_THREADS"] == "0"


@linux_only
def test_what_the_user_set_is_kept() -> None:
    environment = {"MUJOCO_GL": "egl", "LP_NUM_THREADS": "3"}
    assert choose_opengl(environment, finds("EGL", "OSMesa")) == "egl"
    assert environment == {"MUJOCO_GL": "egl", "LP_NUM_THREADS": "3"}
