"""Fixtures of robot datasets on disk in both layouts, made with tarfile, NumPy and Pillow; and what reads them."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.essential.byte_level import train_tokenizer
from vla_foundry.batch import Batch
from vla_foundry.data import create_dataloader
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.robotics.accumulator import StatisticsAccumulator
from vla_foundry.robotics.fields import PaddingStrategy, parse_pose_groups
from vla_foundry.robotics.statistics_format import format_statistics
from vla_foundry.robotics.transforms import RelativePoses
from vla_foundry.world import World

CAMERAS = {"Scene.Left": (24, 20), "wrist": (16, 16)}
_SIDES = ("left", "right")
ACTIONS = [
    "robot__action__poses__left::panda__xyz_relative",
    "robot__action__poses__left::panda__rot_6d_relative",
    "robot__action__grippers__left::panda_hand",
]
PROPRIOCEPTION = ["robot__actual__poses__right::panda__xyz", "robot__actual__poses__right::panda__rot_6d"]


@dataclass
class Recording:
    """A made-up episode: smooth poses of two arms, a gripper, pictures that tell camera and frame."""

    episode_id: str
    num_frames: int
    # {field: (L, C)}
    fields: dict[str, np.ndarray]
    # {camera: JPEG of each frame}
    frames: dict[str, list[bytes]]
    # (first frame, end, {kind: texts})
    instructions: list[tuple[int, int, dict[str, list[str]]]]
    # {camera: (3, 3)} of the stored images
    intrinsics: dict[str, np.ndarray]


def draw_rotations(rng: np.random.Generator, count: int) -> np.ndarray:
    """Orthonormal matrices of determinant 1, float64 (count, 3, 3), by QR; each close to the one before."""
    steps = np.eye(3) + 0.2 * rng.normal(size=(count, 3, 3)).cumsum(axis=0) / np.sqrt(count)
    q, r = np.linalg.qr(steps)
    q = q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None, :]
    return q * np.sign(np.linalg.det(q))[:, None, None]


@pytest.fixture(scope="session")
def create_recording() -> Callable[..., Recording]:
    """Make up an episode."""

    def create(
        number: int, num_frames: int = 9, *, cameras: dict[str, tuple[int, int]] = CAMERAS, quality: int = 90
    ) -> Recording:
        from PIL import Image

        rng = np.random.default_rng(number)
        fields: dict[str, np.ndarray] = {}
        for source in ("actual", "action"):
            for side in _SIDES:
                name = f"robot__{source}__poses__{side}::panda"
                fields[f"{name}__xyz"] = rng.normal(size=(num_frames, 3)).cumsum(axis=0).astype(np.float32)
                rotations = draw_rotations(rng, num_frames)
                fields[f"{name}__rot_6d"] = rotations[:, :2].reshape(num_frames, 6).astype(np.float32)
        fields["robot__action__grippers__left::panda_hand"] = rng.random((num_frames, 1))
        frames: dict[str, list[bytes]] = {}
        for place, (camera, (width, height)) in enumerate(cameras.items()):
            frames[camera] = []
            for frame in range(num_frames):
                array = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
                array += np.asarray([20 * number % 195, 20 * frame % 195, 60 * place % 195], dtype=np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(array).save(buffer, "JPEG", quality=quality)
                frames[camera].append(buffer.getvalue())
        half = num_frames // 2
        texts = {"original": [f"do task {number}"], "randomized": [f"please do {number}", f"task {number} it is"]}
        return Recording(
            episode_id=f"episode_{number:03d}",
            num_frames=num_frames,
            fields=fields,
            frames=frames,
            instructions=[(0, half, texts), (half, num_frames, {"original": [f"finish task {number}"]})],
            intrinsics={
                camera: np.asarray([[20.0, 0, width / 2], [0, 21.0, height / 2], [0, 0, 1]])
                for camera, (width, height) in cameras.items()
            },
        )

    return create


def _slice_windows(recording: Recording, past: int, future: int, padding: PaddingStrategy) -> Iterator[dict[str, Any]]:
    """Cut an episode into windows by numpy.pad, one a frame."""
    names = {"copy": "edge", "zero": "constant", "reflect": "reflect"}
    for anchor in range(recording.num_frames):
        first, end = anchor - past, anchor + future + 1
        left, right = max(0, -first), max(0, end - recording.num_frames)
        inside = slice(max(0, first), min(end, recording.num_frames))
        pads = ((left, right), (0, 0))
        fields = {
            name: np.pad(values[inside], pads, mode=names[padding])  # pyright: ignore[reportArgumentType,reportCallIssue]
            for name, values in recording.fields.items()
        }
        steps = np.arange(past + 1 + future)
        is_padding = (steps < left) | (steps >= len(steps) - right)
        yield {
            "anchor": anchor,
            "fields": fields,
            "past_mask": (steps < past) & ~is_padding,
            "future_mask": (steps >= past) & ~is_padding,
            "is_padding": is_padding,
        }


def _episode_members(recording: Recording, fps: float) -> list[tuple[str, bytes]]:
    info = {
        "version": 1,
        "episode_id": recording.episode_id,
        "task": None,
        "num_frames": recording.num_frames,
        "fps": fps,
        "anchors": list(range(recording.num_frames)),
        "cameras": {
            camera: {"original_size": _size_of(frames[0]), "size": _size_of(frames[0]), "extension": "jpg"}
            for camera, frames in recording.frames.items()
        },
        "instructions": [{"start": start, "end": end, "texts": texts} for start, end, texts in recording.instructions],
        "metadata": {},
    }
    buffer = io.BytesIO()
    intrinsics = {f"rescaled_intrinsics.{camera}": values for camera, values in recording.intrinsics.items()}
    arrays: dict[str, Any] = {"timestamp": np.arange(recording.num_frames) / fps, **recording.fields, **intrinsics}
    np.savez(buffer, **arrays)
    members = [("episode.json", json.dumps(info).encode()), ("lowdim.npz", buffer.getvalue())]
    for camera, frames in recording.frames.items():
        members += [(f"{camera.lower()}.{number:06d}.jpg", frame) for number, frame in enumerate(frames)]
    return [(f"{recording.episode_id}.{suffix}", content) for suffix, content in members]


def _sample_members(
    recording: Recording, window: tuple[int, int], image_indices: Sequence[int], groups: Any, padding: PaddingStrategy
) -> list[list[tuple[str, bytes]]]:
    samples = []
    for part in _slice_windows(recording, *window, padding):
        anchor, fields = part["anchor"], part["fields"]
        relative = RelativePoses(groups, window[0], padding).apply(fields, part["is_padding"])
        num_steps = len(part["past_mask"])
        intrinsics = {
            f"rescaled_intrinsics.{camera}": np.tile(values, (num_steps, 1, 1))
            for camera, values in recording.intrinsics.items()
        }
        buffer = io.BytesIO()
        masks = {name: part[name] for name in ("past_mask", "future_mask")}
        np.savez_compressed(buffer, **fields, **relative, **intrinsics, **masks)
        texts = next(texts for start, end, texts in recording.instructions if start <= anchor < end)
        metadata = {
            "episode_id": recording.episode_id,
            "anchor_timestep": anchor,
            "anchor_relative_idx": window[0],
            "camera_names": list(recording.frames),
        }
        members = []
        for offset in image_indices:
            frame = int(np.clip(anchor + offset, 0, recording.num_frames - 1))
            members += [(f"{camera}_t{offset}.jpg", frames[frame]) for camera, frames in recording.frames.items()]
        members += [
            ("lowdim.npz", buffer.getvalue()),
            ("metadata.json", json.dumps(metadata).encode()),
            ("language_instructions.json", json.dumps(texts).encode()),
        ]
        samples.append([(f"{recording.episode_id}_t{anchor:06d}.{name}", content) for name, content in members])
    return samples


def _size_of(image: bytes) -> list[int]:
    from PIL import Image

    return list(Image.open(io.BytesIO(image)).size)


@pytest.fixture(scope="session")
def write_robot_data() -> Callable[..., Path]:
    """Write recordings as a robotics dataset, in either layout, with its spec and statistics."""

    def write(
        folder: Path,
        recordings: Sequence[Recording],
        *,
        layout: str = "episodes",
        window: tuple[int, int] = (1, 3),
        image_indices: Sequence[int] = (-1, 0),
        padding: PaddingStrategy = "copy",
        fps: float = 10.0,
        episodes_per_shard: int = 2,
        statistics_of: Sequence[Recording] | None = None,
        changes: dict[str, Any] | None = None,
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        names = [name for name in recordings[0].fields if name.endswith("__xyz")]
        described_groups = [
            {"name": name.removesuffix("__xyz"), "position_key": name, "rotation_key": name[:-3] + "rot_6d"}
            for name in names
        ]
        groups = parse_pose_groups(described_groups)
        statistics = StatisticsAccumulator(window[0])
        fields: dict[str, Any] = {}
        for recording in recordings if statistics_of is None else statistics_of:
            for part in _slice_windows(recording, *window, padding):
                relative = RelativePoses(groups, window[0], padding).apply(part["fields"], part["is_padding"])
                values = {name: array[None] for name, array in (part["fields"] | relative).items()}
                statistics.update(values, ~part["is_padding"][None])
                for name, array in values.items():
                    is_relative = name.endswith("_relative")
                    rotation = "rot_6d_rows" if "rot_6d" in name else None
                    representation = "relative" if is_relative else "absolute"
                    described = {"shape": [array.shape[-1]], "representation": representation, "rotation": rotation}
                    fields[name] = described | {"role": "action" if "__action__" in name else "observation"}
        counts: dict[str, int] = {}
        for first in range(0, len(recordings), episodes_per_shard):
            name, some = f"shard_{len(counts):06d}", recordings[first : first + episodes_per_shard]
            with tarfile.open(folder / f"{name}.tar", "w") as tar:
                for recording in some:
                    if layout == "episodes":
                        members = _episode_members(recording, fps)
                    else:
                        samples = _sample_members(recording, window, image_indices, groups, padding)
                        members = [member for sample in samples for member in sample]
                    for member, content in members:
                        entry = tarfile.TarInfo(member)
                        entry.size = len(content)
                        tar.addfile(entry, io.BytesIO(content))
            counts[name] = sum(recording.num_frames for recording in some)
        spec = {
            "version": 1,
            "layout": layout,
            "fps": fps,
            "past_lowdim_steps": window[0],
            "future_lowdim_steps": window[1],
            "image_indices": list(image_indices),
            "padding_strategy": padding,
            "cameras": {
                camera: {"size": _size_of(frames[0]), "original_size": None, "is_depth": False}
                for camera, frames in recordings[0].frames.items()
            },
            "fields": fields,
            "pose_groups": described_groups,
            "language_types": ["original", "randomized"],
        }
        (folder / "robotics.json").write_text(json.dumps(spec | (changes or {})), encoding="utf-8")
        (folder / "stats.json").write_text(format_statistics(statistics.finish()), encoding="utf-8")
        lines = (json.dumps({"shard": shard, "num_sequences": count}) for shard, count in counts.items())
        (folder / "manifest.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return folder / "manifest.jsonl"

    return write


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer: every byte is a token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(257, ["a"], ["<|endoftext|>"], eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


@pytest.fixture
def create_params() -> Callable[..., RoboticsDataParams]:
    """Params of the made-up recordings; images and numbers alone if no tokenizer is given."""

    def create(*manifests: Path, **values: Any) -> RoboticsDataParams:
        settings: dict[str, Any] = {
            "dataset_manifest": [str(manifest) for manifest in manifests],
            "action_fields": ACTIONS,
            "proprioception_fields": PROPRIOCEPTION,
            "image_size": 16,
            "img_num_tokens": 2,
            "num_workers": 0,
            "seq_len": 128,
        }
        return RoboticsDataParams(**(settings | values))

    return create


@pytest.fixture
def read_batch() -> Callable[..., Batch]:
    """Return one microbatch of the samples at the first positions."""

    def read(params: RoboticsDataParams, size: int = 4, *, first_batch: int = 0, split: Any = "train") -> Batch:
        loader = create_dataloader(
            params, World(), global_batch_size=size, per_gpu_batch_size=size, seed=3, split=split
        )
        batches = loader.microbatches(first_batch)
        try:
            return next(batches)
        finally:
            batches.close()  # pyright: ignore[reportAttributeAccessIssue]
            loader.close()

    return read
