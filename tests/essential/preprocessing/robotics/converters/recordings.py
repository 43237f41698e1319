"""Small writers of recordings, made after the formats' descriptions and independent of the package."""

import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CAMERAS = {"observation.images.top": (48, 64), "observation.images.wrist": (32, 32)}
FPS = 10
TASKS = ["push the red block", "pull it back"]


def create_images(seed: int, num_frames: int, size: tuple[int, int]) -> np.ndarray:
    """Smooth pictures (L, H, W, 3) that differ from frame to frame and from episode to episode."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    frames = []
    for frame in range(num_frames):
        blue = np.full(size, frame * 29 + seed * 90)
        frames.append(np.stack([rows * 3 + frame * 13 + seed * 50, columns * 2 + seed * 70, blue], -1))
    return np.abs(np.stack(frames) % 510 - 255).astype(np.uint8)


def create_episodes(lengths: list[int], seed: int = 0) -> list[dict[str, Any]]:
    """Episodes of a robot: state (position, quaternion, gripper), action, a scalar, a switch, images, tasks."""
    episodes = []
    for number, length in enumerate(lengths):
        generator = np.random.default_rng([seed, number])
        quaternion = generator.normal(size=(1, 4)) + generator.normal(size=(length, 4)) / 20
        quaternion /= np.linalg.norm(quaternion, axis=1, keepdims=True)
        position = generator.normal(size=(length, 3)).cumsum(0) / 50
        gripper = (np.arange(length)[:, None] % 6 < 3) * 0.08
        state = np.concatenate([position, quaternion, gripper], 1).astype(np.float32)
        episodes.append(
            {
                "observation.state": state,
                "action": np.roll(state, -1, 0),
                "observation.temperature": generator.normal(size=(length, 1)).astype(np.float32),
                "observation.contact": generator.integers(0, 2, (length, 1)).astype(bool),
                "next.reward": np.zeros((length, 1), np.float32),
                "timestamp": (np.arange(length) / FPS).astype(np.float32),
                "task_index": np.minimum(np.arange(length) * 2 // length, number % 2),
                **{
                    name: create_images(number * 2 + camera, length, size)
                    for camera, (name, size) in enumerate(CAMERAS.items())
                },
            }
        )
    return episodes


def write_video(path: Path, frames: np.ndarray, fps: int = FPS, *, first_pts: int = 0, **options: str) -> None:
    """Encode frames by H.264 with B-frames and few key frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "12", "g": "10", "bf": "2", **options}
        stream.codec_context.thread_count = 1
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = first_pts + number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read_video(path: Path) -> np.ndarray:
    """Decode all frames of a video, from its beginning to its end."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def encode_image(image: np.ndarray, kind: str) -> bytes:
    """Encode an image as "png" or "jpeg"."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **({"quality": 90} if kind == "jpeg" else {}))
    return buffer.getvalue()


def _features(images: str) -> dict[str, Any]:
    numbers = {"observation.state": ("float32", 8), "action": ("float32", 8), "observation.temperature": ("float32", 1)}
    numbers |= {"observation.contact": ("bool", 1), "next.reward": ("float32", 1), "timestamp": ("float32", 1)}
    numbers |= {name: ("int64", 1) for name in ("frame_index", "episode_index", "index", "task_index")}
    features: dict[str, Any] = {
        name: {"dtype": dtype, "shape": [width], "names": None} for name, (dtype, width) in numbers.items()
    }
    kind = "video" if images == "video" else "image"
    for name, (height, width) in CAMERAS.items():
        features[name] = {"dtype": kind, "shape": [height, width, 3], "names": ["height", "width", "channel"]}
    return features


def _table(
    root: Path, episode: dict[str, Any], number: int, *, first_row: int, images: str, has_fixed: bool
) -> pa.Table:
    """The rows of an episode; vectors are lists of fixed or of any length, both of which there are."""
    length = len(episode["timestamp"])
    columns: dict[str, Any] = {}
    for name in ("observation.state", "action"):
        flat = pa.array(episode[name].reshape(-1))
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, 8) if has_fixed else pa.array(list(episode[name]))
    for name in ("observation.temperature", "observation.contact", "next.reward"):
        columns[name] = pa.array(episode[name][:, 0])
    if images != "video":
        for camera in CAMERAS:
            cells = []
            for frame, image in enumerate(episode[camera]):
                path = f"images/{camera}/episode_{number:06d}/frame_{frame:06d}.png"
                data = None if images == "files" else encode_image(image, images)
                if images == "files":
                    (root / path).parent.mkdir(parents=True, exist_ok=True)
                    (root / path).write_bytes(encode_image(image, "png"))
                cells.append({"bytes": data, "path": path})
            columns[camera] = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    columns["timestamp"] = pa.array(episode["timestamp"])
    columns["frame_index"] = pa.array(np.arange(length))
    columns["episode_index"] = pa.array(np.full(length, number))
    columns["index"] = pa.array(first_row + np.arange(length))
    columns["task_index"] = pa.array(episode["task_index"])
    return pa.table(columns)


def _tasks_of(episode: dict[str, Any]) -> list[str]:
    return [TASKS[index] for index in sorted(set(episode["task_index"].tolist()))]


def _write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")


def write_v2(root: Path, episodes: list[dict[str, Any]], *, images: str = "video", version: str = "v2.1") -> Path:
    """Write version 2: a parquet file and a video per episode.

    Args:
        images: "video"; "png" or "jpeg" in the rows; "files" beside them.
    """
    info = {
        "codebase_version": version, "fps": FPS, "total_episodes": len(episodes), "chunks_size": 2,
        "total_frames": sum(len(episode["timestamp"]) for episode in episodes), "features": _features(images),
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }  # fmt: skip
    _write_json(root / "meta/info.json", info)
    tasks = [{"task_index": index, "task": text} for index, text in enumerate(TASKS)]
    (root / "meta/tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks), encoding="utf-8")
    first_row, lines = 0, []
    for number, episode in enumerate(episodes):
        chunk, length = f"chunk-{number // 2:03d}", len(episode["timestamp"])
        path = root / f"data/{chunk}/episode_{number:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(_table(root, episode, number, first_row=first_row, images=images, has_fixed=True), path)
        if images == "video":
            for camera in CAMERAS:
                write_video(root / f"videos/{chunk}/{camera}/episode_{number:06d}.mp4", episode[camera])
        lines.append(json.dumps({"episode_index": number, "tasks": _tasks_of(episode), "length": length}))
        first_row += length
    (root / "meta/episodes.jsonl").write_text(
        "\n".join(reversed(lines)) + "\n", encoding="utf-8"
    )  # the order means nothing
    return root


def write_v3(root: Path, episodes: list[dict[str, Any]], *, images: str = "video", per_file: int = 3) -> Path:
    """Write version 3: several episodes in a parquet file and in a video."""
    info = {
        "codebase_version": "v3.0", "fps": FPS, "total_episodes": len(episodes), "features": _features(images),
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }  # fmt: skip
    _write_json(root / "meta/info.json", info)
    tasks = pa.table({"task_index": list(range(len(TASKS))), "__index_level_0__": TASKS})
    pq.write_table(tasks, root / "meta/tasks.parquet")
    rows: list[dict[str, Any]] = []
    first_row = 0
    for first in range(0, len(episodes), per_file):
        group, file_index = episodes[first : first + per_file], first // per_file
        path = root / f"data/chunk-000/file-{file_index:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        tables, seconds = [], 0.0
        for number, episode in enumerate(group, first):
            length = len(episode["timestamp"])
            tables.append(_table(root, episode, number, first_row=first_row, images=images, has_fixed=False))
            row = {"episode_index": number, "tasks": _tasks_of(episode), "length": length}
            row |= {"data/chunk_index": 0, "data/file_index": file_index}
            row |= {"dataset_from_index": first_row, "dataset_to_index": first_row + length}
            for camera in CAMERAS if images == "video" else ():
                row |= {f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": file_index}
                row |= {f"videos/{camera}/from_timestamp": seconds}
                row |= {f"videos/{camera}/to_timestamp": seconds + length / FPS}
            rows.append(row)
            first_row, seconds = first_row + length, seconds + length / FPS
        # row groups that hold parts of two episodes
        pq.write_table(pa.concat_tables(tables), path, row_group_size=7)
        for camera in CAMERAS if images == "video" else ():
            frames = np.concatenate([episode[camera] for episode in group])
            write_video(root / f"videos/{camera}/chunk-000/file-{file_index:03d}.mp4", frames)
    meta = root / "meta/episodes/chunk-000/file-000.parquet"
    meta.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), meta)
    return root
