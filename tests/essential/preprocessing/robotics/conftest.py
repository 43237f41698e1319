"""Recordings of an imaginary robot, the converter that reads them, and an independent reader of tars."""

import importlib.util
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

RIG = Path(__file__).with_name("rig_converter.py")


@pytest.fixture(scope="session")
def rig() -> ModuleType:
    """The module rig_converter.py, which registers the converter `rig`."""
    if "rig_converter" in sys.modules:
        return sys.modules["rig_converter"]
    spec = importlib.util.spec_from_file_location("rig_converter", RIG)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rig_converter"] = module
    spec.loader.exec_module(module)
    return module


def rotations(generator: np.random.Generator, num_frames: int) -> np.ndarray:
    """Smoothly turning rotation matrices (L, 3, 3)."""
    from scipy.spatial.transform import Rotation

    axis = generator.normal(size=3)
    angles = np.linspace(0, generator.uniform(0.5, 2.5), num_frames)
    start = Rotation.from_rotvec(generator.normal(size=3))
    return (start * Rotation.from_rotvec(angles[:, None] * axis / np.linalg.norm(axis))).as_matrix()


def create_episode(rig: ModuleType, seed: int, num_frames: int, *, fps: float = 10.0, size=(24, 32)) -> dict[str, Any]:
    """Arrays of a recording: smooth motion, smooth pictures, depth, calibration."""
    generator = np.random.default_rng(seed)
    arrays: dict[str, Any] = {
        "fps": np.float64(fps),
        "timestamps": np.arange(num_frames) / fps,
        "task": np.array("pick the cup" if seed % 2 else "drop it"),
        "breaks_at": np.int64(-1),
        "intrinsics": np.array([[30.0, 0, 15.5], [0, 31.0, 11.5], [0, 0, 1]]),
        "extrinsics": np.eye(4)[None].repeat(num_frames, 0),
    }
    for source in ("actual", "action"):
        matrices = rotations(generator, num_frames)
        arrays[f"field|robot__{source}__poses__arm::hand__xyz"] = generator.normal(size=(num_frames, 3)).cumsum(0) / 50
        arrays[f"field|robot__{source}__poses__arm::hand__rot_6d"] = matrices[:, :2].reshape(num_frames, 6)
    arrays[f"field|{rig.GRIPPER}"] = (np.arange(num_frames)[:, None] % 10 < 5).astype(np.float32) * np.float32(0.08)
    rows, columns = np.mgrid[: size[0], : size[1]]
    for number, camera in enumerate(rig.CAMERAS[:2]):
        ramp = (rows * 3 + columns * 2 + number * 40)[None] + np.arange(num_frames)[:, None, None] * 2
        arrays[f"images|{camera}"] = np.stack([ramp, 255 - ramp, ramp // 2], -1).clip(0, 255).astype(np.uint8)
    depth = (rows * 100 + columns)[None] + np.arange(num_frames)[:, None, None] * 1000
    arrays[f"images|{rig.CAMERAS[2]}"] = depth.astype(np.uint16)
    return arrays


@pytest.fixture(scope="session")
def write_episodes(rig: ModuleType) -> Callable[..., dict[str, dict[str, Any]]]:
    """A function that writes recordings of these lengths to a folder, and returns them by episode id."""

    def write(folder: Path, lengths: list[int], **options: Any) -> dict[str, dict[str, Any]]:
        folder.mkdir(parents=True, exist_ok=True)
        episodes = {f"run_{seed}": create_episode(rig, seed, length, **options) for seed, length in enumerate(lengths)}
        for name, arrays in episodes.items():
            np.savez(folder / f"{name}.npz", **arrays)
        return episodes

    return write


@pytest.fixture(scope="session")
def preprocess(rig: ModuleType) -> Callable[..., Path]:
    """A function that runs the job in this process, and returns its output folder."""

    def run(source: Path, output: Path | str, **options: Any) -> Any:
        from vla_foundry.preprocessing.robotics.robotics_job import preprocess_robotics

        options = {"num_workers": 0, "past_lowdim_steps": 2, "future_lowdim_steps": 5, **options}
        preprocess_robotics(rig.RigParams(source_episodes=[str(source)], output_dir=str(output), **options))
        return output

    return run


@pytest.fixture(scope="session")
def read_tars() -> Callable[[Path], dict[str, dict[str, Any]]]:
    """A function that reads all tars of a folder by the standard library: {sample key: {suffix: content}}."""

    def read(folder: Path) -> dict[str, dict[str, Any]]:
        samples: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    key, _, suffix = member.name.partition(".")
                    file = tar.extractfile(member)
                    assert file is not None
                    content = file.read()
                    value: Any = content
                    if suffix.endswith(".json"):
                        value = json.loads(content)
                    elif suffix == "lowdim.npz":
                        with np.load(io.BytesIO(content)) as archive:
                            value = dict(archive)
                    assert suffix not in samples.setdefault(key, {}), member.name
                    samples[key][suffix] = value
        return samples

    return read
