"""Render MuJoCo scenes off screen, one small upright image at a time, with or without a GPU."""

import ctypes.util
import os
import platform
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8


@dataclass(frozen=True, kw_only=True)
class Camera:
    """One view of a MuJoCo model."""

    # the model's camera that it uses
    model_camera: str
    # whether that camera is upside down in the model, so its images are rotated by 180 degrees
    is_upside_down: bool
    # its new position, in its parent body's frame; None: unchanged
    position: tuple[float, float, float] | None = None
    # point of that frame that it looks at, with its upper edge up; None: unchanged
    looks_at: tuple[float, float, float] | None = None
    # vertical field of view in degrees; None: the model's
    fovy: float | None = None


def choose_opengl(
    environment: MutableMapping[str, str] | None = None,
    find_library: Callable[[str], str | None] = ctypes.util.find_library,
) -> str:
    """Choose the OpenGL library for rendering and set MUJOCO_GL; call before anything imports mujoco.

    The library named by MUJOCO_GL is used if installed. Without that variable, on Linux: EGL if there is a GPU, then
    OSMesa, then EGL.

    Raises:
        ValueError: no library is installed, or the named one is not.
    """
    environment = os.environ if environment is None else environment
    chosen = environment.get("MUJOCO_GL", "").lower().strip()
    if platform.system() != "Linux":
        return chosen or "native"
    present = [name for name, library in (("egl", "EGL"), ("osmesa", "OSMesa")) if find_library(library)]
    if not chosen:
        has_gpu = any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/dri/renderD128"))
        preferred = ["egl", "osmesa"] if has_gpu else ["osmesa", "egl"]
        chosen = next((name for name in preferred if name in present), "")
    if not chosen or (chosen in ("egl", "osmesa") and chosen not in present):
        raise ValueError(_no_renderer(f"MUJOCO_GL={chosen} is not installed" if chosen else "neither EGL nor OSMesa"))
    environment["MUJOCO_GL"] = chosen
    # one thread renders a small image fastest; parallelism comes from processes
    environment.setdefault("LP_NUM_THREADS", "0")
    if chosen == "osmesa":
        # OSMesa and Triton each bring an LLVM: a process that loads OSMesa's first crashes when torch imports Triton
        with suppress(ImportError):
            import triton  # noqa: F401
    return chosen


def _load_mujoco() -> Any:
    import mujoco

    return mujoco


def _no_renderer(reason: str) -> str:
    return (
        f"No OpenGL renderer was found to draw the simulator ({reason}). "
        "Install one with `apt-get install libosmesa6` and set MUJOCO_GL=osmesa before anything imports mujoco."
    )


class MujocoRenderer:
    """Renders one model at one size (width, height): no shadows, reflections, sky or antialiasing.

    mujoco's own Renderer frees its textures in whichever OpenGL context is current, which blanks the process's other
    renderers; this one makes its own context current first.
    """

    def __init__(self, model: Any, image_size: tuple[int, int]) -> None:
        mujoco = self._mujoco = _load_mujoco()
        self._model = model
        self._original = (model.cam_pos.copy(), model.cam_quat.copy(), model.cam_fovy.copy())
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height = image_size
        self._option = mujoco.MjvOption()
        # whether markers (sites) of the default group are visible
        self.shows_sites = False
        self._view = mujoco.MjvCamera()
        self._view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._scene = mujoco.MjvScene(model=model, maxgeom=2000)
        for flag in ("mjRND_SHADOW", "mjRND_REFLECTION", "mjRND_SKYBOX"):
            self._scene.flags[getattr(mujoco.mjtRndFlag, flag)] = 0
        self._rectangle = mujoco.MjrRect(0, 0, width, height)
        self._pixels = np.empty((height, width, 3), np.uint8)
        self._gl: Any = None
        try:
            self._gl = mujoco.GLContext(width, height)
            self._gl.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except (mujoco.FatalError, RuntimeError, ImportError, AttributeError) as error:
            self._gl = None
            raise ValueError(_no_renderer(f"MUJOCO_GL={os.environ.get('MUJOCO_GL')} failed: {error}")) from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)

    def render(self, data: Any, camera: Camera) -> UInt8[np.ndarray, "H W 3"]:
        """Render `data` as `camera` sees it, upright."""
        mujoco = self._mujoco
        if self._gl is None:
            raise ValueError("This renderer is closed.")
        self._view.fixedcamid = self._aim(data, camera)
        self._option.sitegroup[:] = 0
        self._option.sitegroup[0] = int(self.shows_sites)
        mujoco.mjv_updateScene(
            self._model, data, self._option, None, self._view, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        self._gl.make_current()
        mujoco.mjr_render(self._rectangle, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._rectangle, self._context)
        # OpenGL's rows run upwards; after a rotation by 180 degrees only the columns are reversed
        upright = self._pixels[:, ::-1] if camera.is_upside_down else self._pixels[::-1]
        return upright.copy()

    def project(self, data: Any, camera: Camera, position: Float[np.ndarray, "3"]) -> tuple[float, float]:
        """Return where a world point appears: (column, row) as fractions of the image from the top left corner."""
        index = self._aim(data, camera)
        right, up, back = data.cam_xmat[index].reshape(3, 3).T
        offset = position - data.cam_xpos[index]
        depth = -float(offset @ back)
        half_height = depth * np.tan(np.radians(self._model.cam_fovy[index]) / 2)
        half_width = half_height * self._rectangle.width / self._rectangle.height
        column, row = 0.5 + float(offset @ right) / (2 * half_width), 0.5 - float(offset @ up) / (2 * half_height)
        return (1 - column, 1 - row) if camera.is_upside_down else (column, row)

    def is_hidden(self, data: Any, camera: Camera, position: Float[np.ndarray, "3"], *, by_root: int) -> bool:
        """Return whether a body of the tree rooted at body `by_root` is between the camera and a point."""
        index = self._aim(data, camera)
        start = data.cam_xpos[index].copy()
        shown = self._option.geomgroup
        geom = np.full(1, -1, np.int32)
        share = self._mujoco.mj_ray(self._model, data, start, position - start, shown, 1, -1, geom)
        if geom[0] < 0 or share >= 1:
            return False
        return int(self._model.body_rootid[self._model.geom_bodyid[geom[0]]]) == by_root

    def _aim(self, data: Any, camera: Camera) -> int:
        """Put the model's camera in its place; return its index."""
        model, index = self._model, self._model.camera(camera.model_camera).id
        position, quaternion, fovy = (values[index] for values in self._original)
        model.cam_pos[index] = position if camera.position is None else camera.position
        model.cam_quat[index] = quaternion
        if camera.looks_at is not None:
            self._mujoco.mju_mat2Quat(model.cam_quat[index], _turn_to(model.cam_pos[index], camera.looks_at).ravel())
        model.cam_fovy[index] = fovy if camera.fovy is None else camera.fovy
        self._mujoco.mj_camlight(model, data)
        return index

    def close(self) -> None:
        """Free the renderer's memory; may be called twice."""
        if self._gl is not None:
            self._gl.make_current()
            self._context.free()
            self._gl.free()
            self._gl = None

    def __del__(self) -> None:
        if getattr(self, "_gl", None) is not None:
            self.close()


def _turn_to(position: Float[np.ndarray, "3"], target: tuple[float, float, float]) -> Float[np.ndarray, "3 3"]:
    """Return the rotation of a camera at `position` that looks at `target`; its columns are right, up and backward."""
    back = position - np.array(target)
    back = back / np.linalg.norm(back)
    right = np.cross((0.0, 0.0, 1.0), back)
    right = right / np.linalg.norm(right)
    return np.stack([right, np.cross(back, right), back], axis=1)
