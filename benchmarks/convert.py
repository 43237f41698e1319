"""Measure `preprocess robotics`: camera frames/s per core and bytes written, next to a bare decode + encode loop.

    python benchmarks/convert.py [--num_steps 4000] [--num_workers 4] [--repeats 3]

Writes its own recordings to a temporary folder (episodes of 200 steps, two cameras of 256 px as JPEG, 20 numbers of
state and 20 of actions with a pose). Then it alternates the bare loop and both layouts in the same Ray workers and
prints one JSON object: medians, ratios to the bare loop, bytes. The bare loop decodes each frame, encodes it again and
writes it to a file. The job also creates windows, statistics of 16 steps, shards and their checksums.
"""

import argparse
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_foundry.images.codec import decode_image, encode_jpeg, image_to_array
from vla_foundry.params.commands.preprocessing_robotics import RoboticsPreprocessParams, register_converter_params
from vla_foundry.preprocessing.robotics import BaseRoboticsConverter, register_converter
from vla_foundry.preprocessing.robotics.converters.converter import CameraFrames, Episode, EpisodeRef
from vla_foundry.preprocessing.robotics.robotics_job import preprocess_robotics
from vla_foundry.preprocessing.tasks import Task, ray_cluster, run_tasks
from vla_foundry.robotics.fields import PoseGroup
from vla_foundry.robotics.spec import FieldDescription
from vla_foundry.world import num_cores

CAMERAS = ("front", "wrist")
EPISODE_LENGTH, SIZE, FPS, QUALITY = 200, 256, 10.0, 95
POSE = PoseGroup(
    name="arm",
    position_key="action_xyz",
    rotation_key="action_rot_6d",
    reference_position_key="state_xyz",
    reference_rotation_key="state_rot_6d",
)
WIDTHS = {"xyz": 3, "rot_6d": 6, "rest": 11}


@register_converter_params("benchmark")
@dataclass(frozen=True, kw_only=True)
class BenchmarkParams(RoboticsPreprocessParams):
    """Episodes as .npz files with JPEG files in them."""


def create_frames(files: list[bytes]) -> CameraFrames:
    """Return the frames of JPEG files as pixels, so that the job encodes them again, as the bare loop does."""
    return CameraFrames(
        read=lambda: (image_to_array(decode_image(data)) for data in files), size=(SIZE, SIZE), num_frames=len(files)
    )


@register_converter("benchmark")
class BenchmarkConverter(BaseRoboticsConverter):
    """Reads the files of `write_recordings`."""

    def discover_episodes(self) -> list[EpisodeRef]:
        """Return one episode per file."""
        paths = sorted(Path(self.params.source_episodes[0]).glob("*.npz"))
        return [EpisodeRef(path.stem, str(path), None, EPISODE_LENGTH) for path in paths]

    def discover_cameras(self) -> list[str]:
        """Return both cameras."""
        return list(CAMERAS)

    def describe_fields(self) -> dict[str, FieldDescription]:
        """Return state and action: a pose, and other numbers."""
        roles: Any = {"state": "observation", "action": "action"}
        return {
            f"{what}_{part}": FieldDescription(shape=(width,), role=role)
            for what, role in roles.items()
            for part, width in WIDTHS.items()
        }

    def pose_groups(self) -> tuple[PoseGroup, ...]:
        """Return the pose of the action."""
        return (POSE,)

    def read_episode(self, ref: EpisodeRef) -> Episode:
        """Read a file."""
        with np.load(ref.source) as file:
            arrays = dict(file)
        return Episode(
            ref=ref,
            fps=FPS,
            timestamps=np.arange(EPISODE_LENGTH) / FPS,
            fields={name: arrays[name] for name in self.describe_fields()},
            cameras={name: create_frames(split_files(arrays, name)) for name in CAMERAS},
        )


def split_files(arrays: dict[str, np.ndarray], camera: str) -> list[bytes]:
    """Return the JPEG files of a camera."""
    ends = np.cumsum(arrays[f"{camera}_sizes"])
    data = arrays[camera].tobytes()
    return [data[start:end] for start, end in itertools.pairwise([0, *ends.tolist()])]


def write_recordings(folder: Path, num_steps: int) -> None:
    """Write episodes of pictures with edges, gradients and some noise that moves."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(num_steps // EPISODE_LENGTH):
        arrays: dict[str, Any] = {}
        for what, (part, width) in itertools.product(("state", "action"), WIDTHS.items()):
            values = generator.normal(size=(EPISODE_LENGTH, width)).cumsum(axis=0) / 50
            arrays[f"{what}_{part}"] = (values + np.eye(2, 3).reshape(-1) if width == 6 else values).astype(np.float32)
        for camera in CAMERAS:
            scene = torch.from_numpy(generator.integers(0, 256, (1, 3, 24, 24)).astype(np.float32))
            scene = torch.nn.functional.interpolate(scene, (SIZE + EPISODE_LENGTH, SIZE), mode="bicubic")[0]
            noise = torch.from_numpy(generator.normal(0, 4, (3, SIZE, SIZE)).astype(np.float32))
            files = [
                encode_jpeg((scene[:, step : step + SIZE] + noise).clip(0, 255).byte(), quality=QUALITY)
                for step in range(EPISODE_LENGTH)
            ]
            arrays[camera] = np.frombuffer(b"".join(files), np.uint8)
            arrays[f"{camera}_sizes"] = np.array([len(data) for data in files])
        np.savez(folder / f"episode_{number:04d}.npz", **arrays)


def bare_loop(folder: str, task: Task) -> None:
    """Decode, encode and write every frame of an episode."""
    with np.load(task.payload) as file:
        arrays = dict(file)
    with open(Path(folder) / f"{task.number}.bin", "wb") as output:
        for camera in CAMERAS:
            for data in split_files(arrays, camera):
                output.write(encode_jpeg(decode_image(data), quality=QUALITY))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_steps", type=int, default=4000)
    parser.add_argument("--num_workers", type=int, default=num_cores())
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        raw, output = Path(name) / "raw", Path(name) / "out"
        write_recordings(raw, arguments.num_steps)
        sizes: dict[str, int] = {"recordings": size_of(raw)}
        seconds: dict[str, list[float]] = {}
        with ray_cluster(arguments.num_workers, None):
            runs = create_runs(raw, output, arguments.num_workers)
            # the first round starts the workers, and is not counted
            for round_number, (run, function) in itertools.product(range(arguments.repeats + 1), runs.items()):
                shutil.rmtree(output, ignore_errors=True)
                output.mkdir()
                start = time.perf_counter()
                function()
                if round_number:
                    seconds.setdefault(run, []).append(time.perf_counter() - start)
                sizes[run] = size_of(output)
    num_frames = arguments.num_steps // EPISODE_LENGTH * EPISODE_LENGTH * len(CAMERAS)
    medians = {run: statistics.median(values) for run, values in seconds.items()}
    result = {
        "num_steps": arguments.num_steps,
        "cameras": len(CAMERAS),
        "num_workers": arguments.num_workers,
        "seconds": {run: round(value, 2) for run, value in medians.items()},
        "frames_per_second_per_core": {
            run: round(num_frames / value / arguments.num_workers, 1) for run, value in medians.items()
        },
        "ratio_to_bare_loop": {run: round(medians["bare loop"] / value, 3) for run, value in medians.items()},
        "megabytes": {run: round(size / 1e6, 1) for run, size in sizes.items()},
        "all_runs": {run: [round(value, 2) for value in values] for run, values in seconds.items()},
    }
    json.dump(result, sys.stdout, indent=2)
    print()


def create_runs(raw: Path, output: Path, num_workers: int) -> dict[str, Callable[[], None]]:
    """What is measured, by name."""
    tasks = [
        Task(number=number, name=path.stem, weight=1, payload=str(path))
        for number, path in enumerate(sorted(raw.glob("*.npz")))
    ]

    def run_bare() -> None:
        shared: dict[str, Any] = {"shared": str(output), "num_workers": num_workers, "ray_address": None}
        for _ in run_tasks(bare_loop, tasks, title="bare loop", **shared):
            pass

    def run_job(layout: Any) -> None:
        preprocess_robotics(
            BenchmarkParams(
                source_episodes=[str(raw)],
                output_dir=str(output / "dataset"),
                layout=layout,
                num_workers=num_workers,
                jpeg_quality=QUALITY,
            )
        )

    return {
        "bare loop": run_bare,
        "layout episodes": lambda: run_job("episodes"),
        "layout samples": lambda: run_job("samples"),
    }


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
