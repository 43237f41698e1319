"""A small robotics dataset, written by the writer of shards without a converter."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vla_foundry.params.commands.preprocessing_robotics import StatsParams
from vla_foundry.preprocessing.robotics.statistics import compute_statistics
from vla_foundry.preprocessing.shard_writer import open_shard
from vla_foundry.robotics.episode_blocks import (
    EpisodeCamera,
    EpisodeInfo,
    InstructionSpan,
    format_episode,
    frame_suffix,
)
from vla_foundry.robotics.spec import CameraDescription, DatasetSpec, FieldDescription, format_spec
from vla_foundry.shards import format_manifest
from vla_foundry.storage.npz import format_arrays

SIZE, NUM_FRAMES = (96, 80), 8
CAMERAS = ("front", "wrist")


@dataclass(frozen=True)
class RobotData:
    """A dataset of one shard with two episodes, and what is in it."""

    folder: Path
    # {episode id: {field: (L, C)}}
    fields: dict[str, dict[str, np.ndarray]]
    # {(episode id, camera, frame): uint8 (H, W, 3) as decoded by Pillow}
    images: dict[tuple[str, str, int], np.ndarray]


@pytest.fixture(scope="session")
def write_data() -> Callable[..., RobotData]:
    """A function that writes the dataset to a folder."""

    def write(
        folder: Path,
        *,
        language_types: tuple[str, ...] = ("original",),
        statistics: bool = True,
        cameras: tuple[str, ...] = CAMERAS,
        unit: str = "m",
    ) -> RobotData:
        data = RobotData(folder, {}, {})
        rng = np.random.default_rng(0)
        with open_shard(str(folder), "shard_000000") as writer:
            for number in range(2):
                episode = f"episode_{number}"
                fields = {
                    "action.arm": rng.normal(size=(NUM_FRAMES, 3)).cumsum(axis=0).astype(np.float32),
                    "state": rng.normal(size=(NUM_FRAMES, 2)).astype(np.float32),
                }
                data.fields[episode] = fields
                texts = {"original": [f"move thing {number}"]} if language_types else {}
                info = EpisodeInfo(
                    episode_id=episode,
                    task=None,
                    num_frames=NUM_FRAMES,
                    fps=10.0,
                    anchors=tuple(range(NUM_FRAMES)),
                    cameras={name: EpisodeCamera(original_size=SIZE, size=SIZE, extension="jpg") for name in cameras},
                    instructions=(InstructionSpan(start=0, end=NUM_FRAMES, texts=texts),),
                )
                writer.add(
                    episode, {"episode.json": format_episode(info).encode(), "lowdim.npz": format_arrays(fields)}
                )
                for frame in range(NUM_FRAMES):
                    files = {}
                    for place, camera in enumerate(cameras):
                        image = np.full((SIZE[1], SIZE[0], 3), (20 * frame, 100 * place, 80 * number), dtype=np.uint8)
                        buffer = io.BytesIO()
                        Image.fromarray(image).save(buffer, "JPEG", quality=95)
                        files[frame_suffix(camera, frame, "jpg")] = buffer.getvalue()
                        data.images[episode, camera, frame] = np.asarray(Image.open(io.BytesIO(buffer.getvalue())))
                    writer.add(episode, files)
        assert writer.entry is not None
        (folder / "manifest.jsonl").write_text(format_manifest([writer.entry]), encoding="utf-8")
        spec = DatasetSpec(
            layout="episodes",
            fps=10.0,
            past_lowdim_steps=2,
            future_lowdim_steps=3,
            image_indices=(-1, 0),
            padding_strategy="copy",
            cameras={name: CameraDescription(size=SIZE, original_size=SIZE) for name in cameras},
            fields={
                "action.arm": FieldDescription(shape=(3,), unit=unit, role="action"),
                "state": FieldDescription(shape=(2,), names=("elbow", "wrist")),
            },
            language_types=language_types,
        )
        (folder / "robotics.json").write_text(format_spec(spec), encoding="utf-8")
        if statistics:
            compute_statistics(StatsParams(folder=str(folder), num_workers=0))
        return data

    return write


@pytest.fixture(scope="session")
def robot_data(tmp_path_factory: pytest.TempPathFactory, write_data: Callable[..., RobotData]) -> RobotData:
    """The dataset, with statistics and instructions."""
    return write_data(tmp_path_factory.mktemp("robot") / "data")
