"""Measure the robotics loader: samples/s of one core for both layouts, next to a bare JPEG decode loop.

    OMP_NUM_THREADS=1 python benchmarks/loader_robotics.py [--num_samples 64] [--repeats 7]

A sample has 8 images of 256 px (4 cameras at 2 times) and a window of 16 steps of 20 action and 20 proprioception
dimensions, including relative poses. Synthetic episodes are written to a temporary folder in both layouts. The bare
loop only decodes the same files, read into memory before, and drops the pixels; a second one keeps them and stacks
them to batches, which new memory makes slow. Readers take turns. Prints one JSON object: the median of each reader in
samples per second of processor time, and the median over the rounds of its ratio to that round's bare loops. Run it on
an idle machine: caches and memory bandwidth are shared.
"""

import argparse
import io
import json
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vla_foundry.data import create_dataloader
from vla_foundry.images.codec import decode_image
from vla_foundry.params.data.images import (
    ColorJitterParams,
    CropParams,
    DataAugmentationParams,
    ImageAugmentationParams,
)
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.robotics.accumulator import StatisticsAccumulator
from vla_foundry.robotics.fields import Window, image_names, parse_pose_groups
from vla_foundry.robotics.statistics_format import format_statistics
from vla_foundry.robotics.transforms import RelativePoses
from vla_foundry.robotics.windows import create_windows
from vla_foundry.world import World

SIDE, NUM_FRAMES, NUM_EPISODES, BATCH_SIZE = 256, 64, 4, 16
CAMERAS = ["scene_right", "scene_left", "wrist_left", "wrist_right"]
IMAGE_INDICES = [-1, 0]
WINDOW = Window(1, 14)
SIDES = ("left", "right")
POSES = [f"robot__action__poses__{side}::panda__{part}" for side in SIDES for part in ("xyz", "rot_6d")]
GRIPPERS = [f"robot__{{}}__grippers__{side}::panda_hand" for side in SIDES]
OTHERS = [
    f"robot__actual__joint_{kind}__{side}::panda" for kind in ("position", "velocity", "torque") for side in SIDES
]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_samples", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        readers = create_readers(Path(name), arguments.num_samples)
        rates: dict[str, list[float]] = {reader: [] for reader in readers}
        for round_number in range(arguments.repeats + 1):
            for reader, read in readers.items():
                start = time.process_time()
                read()
                rate = arguments.num_samples / (time.process_time() - start)
                if round_number:  # the first round fills caches
                    rates[reader].append(rate)
    ratios = {
        f"ratio_to_{loop.replace(' ', '_')}": {
            reader: round(statistics.median(rate / base for rate, base in zip(values, rates[loop], strict=True)), 3)
            for reader, values in rates.items()
        }
        for loop in ("bare decode", "bare decode to batches")
    }
    result = {
        "images": f"{len(CAMERAS) * len(IMAGE_INDICES)} of {SIDE} px",
        "window": WINDOW.num_steps,
        "samples_per_second": {reader: round(statistics.median(values), 1) for reader, values in rates.items()},
        **ratios,
        "all_runs": {reader: [round(value, 1) for value in values] for reader, values in rates.items()},
    }
    json.dump(result, sys.stdout, indent=2)
    print()


def create_readers(folder: Path, num_samples: int) -> dict[str, Callable[[], None]]:
    """Write the data and return the readers to measure: each call reads `num_samples` samples."""
    rng = np.random.default_rng(0)
    episodes = [draw_episode(rng) for _ in range(NUM_EPISODES)]
    files = [image for _, frames in episodes for images in frames.values() for image in images]
    num_images = num_samples * len(CAMERAS) * len(IMAGE_INDICES)
    # in random order, as the loader reads them, so that the processor's caches do not help
    order = rng.integers(0, len(files), num_images).tolist()

    def decode() -> None:
        for number in order:
            decode_image(files[number])

    def decode_to_batches() -> None:
        per_batch = BATCH_SIZE * len(CAMERAS) * len(IMAGE_INDICES)
        for first in range(0, num_images, per_batch):
            torch.stack([decode_image(files[number]).movedim(0, -1) for number in order[first : first + per_batch]])

    readers: dict[str, Callable[[], None]] = {"bare decode": decode, "bare decode to batches": decode_to_batches}
    crop = ImageAugmentationParams(
        crop=CropParams(enabled=True, shape=(224, 224)), color_jitter=ColorJitterParams(enabled=True)
    )
    for layout in ("episodes", "samples"):
        write_dataset(folder / layout, episodes, layout)
        for what, options in (
            ("", {"image_size": SIDE}),
            (", cropped", {"image_size": 224, "augmentation": DataAugmentationParams(image=crop)}),
        ):
            readers[layout + what] = start_loader(folder / layout, num_samples, **options)
    return readers


def start_loader(folder: Path, num_samples: int, **options: Any) -> Callable[[], None]:
    """Return a function that reads the next samples, in this process."""
    params = RoboticsDataParams(
        dataset_manifest=[str(folder / "manifest.jsonl")],
        action_fields=[*(f"{name}_relative" for name in POSES), *(name.format("action") for name in GRIPPERS)],
        proprioception_fields=[
            *(name.replace("action", "actual") for name in POSES),
            *(name.format("actual") for name in GRIPPERS),
        ],
        num_workers=0,
        allow_multiple_epochs=True,
        **options,
    )
    loader = create_dataloader(params, World(), global_batch_size=BATCH_SIZE, per_gpu_batch_size=BATCH_SIZE, seed=0)
    batches = loader.microbatches(0)

    def read() -> None:
        for _ in islice(batches, num_samples // BATCH_SIZE):
            pass

    return read


def draw_episode(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, list[bytes]]]:
    """Return the fields and the JPEG frames of a synthetic episode, of the size of camera frames of quality 95."""
    fields: dict[str, np.ndarray] = {}
    for name in (*POSES, *(name.replace("action", "actual") for name in POSES)):
        if name.endswith("xyz"):
            fields[name] = rng.normal(size=(NUM_FRAMES, 3)).astype(np.float32)
        else:
            q, _ = np.linalg.qr(rng.normal(size=(NUM_FRAMES, 3, 3)))
            fields[name] = q[:, :2].reshape(NUM_FRAMES, 6).astype(np.float32)
    for name in GRIPPERS:
        fields |= {name.format(source): rng.random((NUM_FRAMES, 1), np.float32) for source in ("action", "actual")}
    fields |= {name: rng.random((NUM_FRAMES, 7), np.float32) for name in OTHERS}
    frames = {camera: [draw_image(rng) for _ in range(NUM_FRAMES)] for camera in CAMERAS}
    return fields, frames


def draw_image(rng: np.random.Generator) -> bytes:
    """Draw smooth shapes with some noise and return them as JPEG, about 40 kB."""
    coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(coarse, np.int16) + rng.integers(-6, 7, (SIDE, SIDE, 3))
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_dataset(
    folder: Path, episodes: list[tuple[dict[str, np.ndarray], dict[str, list[bytes]]]], layout: str
) -> None:
    """Write episodes as a robotics dataset: tar, manifest, spec, statistics."""
    folder.mkdir()
    described = [
        {"name": name, "position_key": name, "rotation_key": name.replace("xyz", "rot_6d")}
        for name in POSES
        if name.endswith("xyz")
    ]
    groups = parse_pose_groups(described)
    accumulator = StatisticsAccumulator(WINDOW.anchor)
    with tarfile.open(folder / "shard_000000.tar", "w") as tar:
        for number, (fields, frames) in enumerate(episodes):
            windows = create_windows(np.arange(NUM_FRAMES), NUM_FRAMES, WINDOW)
            values = {name: windows.apply(array) for name, array in fields.items()}
            values |= RelativePoses(tuple(groups), WINDOW.anchor).apply(values)
            accumulator.update(values, ~windows.is_padding)
            key = f"episode_{number}"
            if layout == "episodes":
                add_episode(tar, key, fields, frames)
            else:
                add_samples(tar, key, values, frames, windows)
    found = accumulator.finish()
    spec = {
        "version": 1,
        "layout": layout,
        "fps": 10.0,
        "past_lowdim_steps": WINDOW.past,
        "future_lowdim_steps": WINDOW.future,
        "image_indices": IMAGE_INDICES,
        "padding_strategy": "copy",
        "cameras": {camera: {"size": [SIDE, SIDE], "original_size": None, "is_depth": False} for camera in CAMERAS},
        "fields": {name: {"shape": [field.width]} for name, field in found.items()},
        "pose_groups": described,
        "language_types": ["original"],
    }
    line = {"shard": "shard_000000", "num_sequences": NUM_FRAMES * len(episodes)}
    (folder / "manifest.jsonl").write_text(json.dumps(line), encoding="utf-8")
    (folder / "robotics.json").write_text(json.dumps(spec), encoding="utf-8")
    (folder / "stats.json").write_text(format_statistics(found), encoding="utf-8")


def add_episode(tar: tarfile.TarFile, key: str, fields: dict[str, np.ndarray], frames: dict[str, list[bytes]]) -> None:
    """Append an episode as a block."""
    info = {
        "version": 1,
        "episode_id": key,
        "task": None,
        "num_frames": NUM_FRAMES,
        "fps": 10.0,
        "anchors": list(range(NUM_FRAMES)),
        "cameras": {
            camera: {"original_size": [SIDE, SIDE], "size": [SIDE, SIDE], "extension": "jpg"} for camera in frames
        },
        "instructions": [{"start": 0, "end": NUM_FRAMES, "texts": {"original": ["put the box away"]}}],
        "metadata": {},
    }
    add_member(tar, f"{key}.episode.json", json.dumps(info).encode())
    buffer = io.BytesIO()
    arrays: dict[str, Any] = fields
    np.savez(buffer, **arrays)
    add_member(tar, f"{key}.lowdim.npz", buffer.getvalue())
    for frame in range(NUM_FRAMES):
        for camera, images in frames.items():
            add_member(tar, f"{key}.{camera}.{frame:06d}.jpg", images[frame])


def add_samples(
    tar: tarfile.TarFile, key: str, values: dict[str, np.ndarray], frames: dict[str, list[bytes]], windows: Any
) -> None:
    """Append the windows of an episode, each as a sample."""
    for anchor in range(NUM_FRAMES):
        sample = f"{key}_t{anchor:06d}"
        shown = [(camera, max(0, anchor + offset)) for offset in IMAGE_INDICES for camera in CAMERAS]
        for name, (camera, frame) in zip(image_names(CAMERAS, IMAGE_INDICES), shown, strict=True):
            add_member(tar, f"{sample}.{name}.jpg", frames[camera][frame])
        buffer = io.BytesIO()
        masks = {"past_mask": windows.past_mask[anchor], "future_mask": windows.future_mask[anchor]}
        np.savez_compressed(buffer, **{name: array[anchor] for name, array in values.items()}, **masks)
        add_member(tar, f"{sample}.lowdim.npz", buffer.getvalue())
        metadata = {"episode_id": key, "anchor_timestep": anchor, "anchor_relative_idx": WINDOW.anchor}
        add_member(tar, f"{sample}.metadata.json", json.dumps(metadata).encode())
        add_member(tar, f"{sample}.language_instructions.json", b'{"original": ["put the box away"]}')


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append one member."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main()
