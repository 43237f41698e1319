"""Time `vla-foundry stats` on synthetic recordings of a robot with two arms: 80 columns, half of them relative poses.

Usage: python benchmarks/robot_statistics.py [--frames 1000000] [--workers 4] [--folder DIR]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from vla_foundry.params.commands.preprocessing_robotics import StatsParams
from vla_foundry.preprocessing.robotics.statistics import compute_statistics
from vla_foundry.preprocessing.shard_writer import open_shard
from vla_foundry.robotics.episode_blocks import EpisodeInfo, format_episode
from vla_foundry.robotics.fields import PoseGroup
from vla_foundry.robotics.rotations import matrix_to_rotation
from vla_foundry.robotics.spec import DatasetSpec, FieldDescription, format_spec
from vla_foundry.shards import MANIFEST_NAME, format_manifest
from vla_foundry.storage.npz import format_arrays

SHARD_FRAMES, EPISODE_FRAMES = 2048, 256
SIDES = ("left", "right")


def create_fields(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return an episode: measured and commanded poses and grippers of two arms."""
    fields = {}
    for source in ("actual", "action"):
        for side in SIDES:
            stem = f"robot__{source}__poses__{side}::panda"
            fields[f"{stem}__xyz"] = rng.normal(size=(EPISODE_FRAMES, 3)).cumsum(axis=0).astype(np.float32) / 100
            turned, _ = np.linalg.qr(np.eye(3) + 0.3 * rng.normal(size=(EPISODE_FRAMES, 3, 3)))
            turned *= np.sign(np.linalg.det(turned))[:, None, None]
            fields[f"{stem}__rot_6d"] = matrix_to_rotation(turned, "rot_6d_rows").astype(np.float32)
            gripper = f"robot__{source}__grippers__{side}::panda_hand"
            fields[gripper] = rng.random((EPISODE_FRAMES, 1), dtype=np.float32)
    return fields


def write_dataset(folder: Path, num_frames: int) -> None:
    """Write shards of episodes without cameras."""
    rng = np.random.default_rng(0)
    entries, fields = [], create_fields(rng)
    anchors = tuple(range(EPISODE_FRAMES))
    for number in range(-(-num_frames // SHARD_FRAMES)):
        with open_shard(str(folder), f"shard_{number:06d}") as writer:
            for episode in range(SHARD_FRAMES // EPISODE_FRAMES):
                fields = create_fields(rng)
                info = EpisodeInfo(
                    episode_id=f"episode_{number:06d}_{episode}",
                    task=None,
                    num_frames=EPISODE_FRAMES,
                    fps=10.0,
                    anchors=anchors,
                    cameras={},
                )
                files = {"episode.json": format_episode(info).encode(), "lowdim.npz": format_arrays(fields)}
                writer.add(info.episode_id, files)
        entries.append(writer.entry)
    groups = [
        PoseGroup(name=name[: -len("__xyz")], position_key=name, rotation_key=name[: -len("xyz")] + "rot_6d")
        for name in fields
        if name.endswith("__xyz")
    ]
    widths = {name: values.shape[1] for name, values in fields.items()}
    widths |= {f"{key}_relative": widths[key] for key in widths if "__poses__" in key}
    spec = DatasetSpec(
        layout="episodes",
        fps=10.0,
        past_lowdim_steps=1,
        future_lowdim_steps=14,
        image_indices=(0,),
        padding_strategy="copy",
        cameras={},
        fields={name: FieldDescription(shape=(width,)) for name, width in widths.items()},
        pose_groups=tuple(groups),
    )
    (folder / "robotics.json").write_text(format_spec(spec), encoding="utf-8")
    (folder / MANIFEST_NAME).write_text(format_manifest(entries), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--folder", help="keep the dataset here, and use it if it is there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        if not (folder / MANIFEST_NAME).exists():
            write_dataset(folder, args.frames)
        start = time.perf_counter()
        compute_statistics(StatsParams(folder=str(folder), num_workers=args.workers, overwrite=True))
        seconds = time.perf_counter() - start
    print(json.dumps({"frames": args.frames, "workers": args.workers, "seconds": round(seconds, 2)}))


if __name__ == "__main__":
    main()
