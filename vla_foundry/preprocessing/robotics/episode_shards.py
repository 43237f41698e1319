"""Write a shard of whole episodes: read, check, resample, choose anchors, encode each frame once, collect statistics.

Each task writes one shard. A failed episode is reported by name and leaves no trace: the shard is cut back to where the
episode began, and statistics cover only what was written.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from vla_foundry.images.codec import is_upright
from vla_foundry.images.geometry import ImageOperations
from vla_foundry.params.commands.preprocessing_robotics import RoboticsPreprocessParams
from vla_foundry.preprocessing.output import PROGRESS_FOLDER, record_task
from vla_foundry.preprocessing.robotics.converters.converter import (
    BaseRoboticsConverter,
    CameraFrames,
    Episode,
    EpisodeRef,
    decode_frame,
)
from vla_foundry.preprocessing.robotics.episode_checks import Left, check_episode
from vla_foundry.preprocessing.robotics.recipe import Anchors, Recipe, choose_anchors
from vla_foundry.preprocessing.robotics.resampling import resample_episode
from vla_foundry.preprocessing.shard_writer import ShardWriter, open_shard
from vla_foundry.preprocessing.tasks import Task
from vla_foundry.robotics.accumulator import StatisticsAccumulator
from vla_foundry.robotics.episode_blocks import (
    EPISODE_SUFFIX,
    EXTRINSICS,
    LOWDIM_SUFFIX,
    ORIGINAL_INTRINSICS,
    RESCALED_INTRINSICS,
    TIMESTAMP_FIELD,
    EpisodeCamera,
    EpisodeInfo,
    format_episode,
    frame_suffix,
)
from vla_foundry.robotics.statistics_format import pack_statistics
from vla_foundry.storage.npz import format_arrays
from vla_foundry.storage.uri import delete, join_uri, write_bytes

_logger = logging.getLogger(__name__)
_JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """What the tasks of a job share."""

    recipe: Recipe
    # output folder
    folder: str
    # fingerprint of the versions of the source files
    versions: str = ""

    def episode_shard(self, number: int) -> str:
        """Return the name of a task's shard of episodes, within the folder: a file of the dataset, or of _progress."""
        is_final = self.recipe.params.layout == "episodes"
        return f"shard_{number:06d}" if is_final else f"{PROGRESS_FOLDER}/episodes_{number:06d}"


@dataclass(eq=False)
class Clock:
    """Adds up the seconds of each stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


class _Empty(Exception):
    """No episode of a shard was written, so there is no shard."""


def statistics_name(number: int) -> str:
    """Return the path of a task's statistics within the output folder."""
    return f"{PROGRESS_FOLDER}/statistics_{number:06d}.npz"


def write_episode_shard(job: ShardJob, task: Task) -> dict[str, Any]:
    """Write one shard of episodes and its statistics; see _try_episode for what is reported of each episode.

    Returns:
        {"entry": line of the manifest or None, "episodes": [...], "seconds": {stage: seconds}, "versions": those of the
        job}, recorded as done.
    """
    recipe, clock, shard = job.recipe, Clock(), job.episode_shard(task.number)
    converter = recipe.converter_class(recipe.params)
    accumulator = StatisticsAccumulator(recipe.window.anchor)
    episodes: list[dict[str, Any]] = []
    entry = None
    try:
        with open_shard(job.folder, shard) as writer:
            for ref in task.payload:
                episodes.append(_try_episode(writer, converter, ref, recipe, accumulator, clock))
            if not any(episode["outcome"] == "written" for episode in episodes):
                raise _Empty
        entry = writer.entry
    except _Empty:
        for ending in (".tar", ".index.json"):  # an earlier run may have written some of it
            delete(join_uri(job.folder, shard + ending))
    if recipe.params.compute_statistics:
        with clock.measure("statistics"):
            counted = format_arrays(pack_statistics(accumulator.finish()))
            write_bytes(join_uri(job.folder, statistics_name(task.number)), counted)
    made = {"seconds": clock.seconds, "versions": job.versions}
    result = {"entry": None if entry is None else asdict(entry), "episodes": episodes, **made}
    record_task(job.folder, task.number, result)
    return result


def _try_episode(
    writer: ShardWriter,
    converter: BaseRoboticsConverter,
    ref: EpisodeRef,
    recipe: Recipe,
    accumulator: StatisticsAccumulator,
    clock: Clock,
) -> dict[str, Any]:
    """Write an episode if possible, and return what became of it.

    Returns:
        {"episode", "source", "outcome": "written" | "left out" | "failed", "reason"}, and the facts of a written one.
    """
    said = {"episode": ref.episode_id, "source": ref.source}
    try:
        with writer.all_or_nothing():
            fields, anchors, facts = _write_episode(writer, converter, ref, recipe, clock)
    except Left as left:
        return {**said, "outcome": "left out", "reason": left.reason}
    except (ValueError, FileNotFoundError) as error:
        return {**said, "outcome": "failed", "reason": " ".join(str(error).split())}
    except Exception as error:  # the border of an episode: it is named, counted and reported
        if _may_pass(error):
            raise
        _logger.warning("%s failed in a way that its converter did not foresee", ref.source, exc_info=True)
        return {**said, "outcome": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    if recipe.params.compute_statistics:
        with clock.measure("statistics"):
            for windows, values in recipe.iterate_windows(fields, anchors.frames, facts["frames"]):
                accumulator.update(values, ~windows.is_padding)
    return {**said, "outcome": "written", **facts}


def _may_pass(error: Exception) -> bool:
    """True for trouble of the machine or the network, after which the whole task is run again."""
    # libraries raise OSError without a number for files that are broken
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)


def _write_episode(
    writer: ShardWriter, converter: BaseRoboticsConverter, ref: EpisodeRef, recipe: Recipe, clock: Clock
) -> tuple[dict[str, np.ndarray], Anchors, dict[str, Any]]:
    params = recipe.params
    with clock.measure("read"):
        episode = converter.read_episode(ref)
        check_episode(episode, recipe)
        sources = np.arange(len(episode.timestamps))
        if params.target_fps is not None:
            episode, sources = resample_episode(episode, params.target_fps, recipe.fields, recipe.pose_groups)
        anchors = choose_anchors(episode.fields, len(episode.timestamps), recipe)
    if not len(anchors.frames):
        far = "their windows reach too far beyond the episode (--future_lowdim_steps, --max_padding_right)"
        raise Left(f"no samples: {'nothing moves' if anchors.dropped['still'] else far}")
    operations = {name: choose_operations(params, name) for name in recipe.cameras}
    cameras = {name: describe_camera(episode.cameras[name], operations[name]) for name in recipe.cameras}
    info = _describe_episode(episode, anchors, cameras)
    with clock.measure("write"):
        writer.add(
            ref.episode_id,
            {
                EPISODE_SUFFIX: format_episode(info).encode("utf-8"),
                LOWDIM_SUFFIX: format_arrays(_lowdim(episode, recipe, operations)),
            },
        )
    streams = {name: encode_frames(name, episode.cameras[name], operations[name], sources) for name in recipe.cameras}
    for frame in range(info.num_frames):
        with clock.measure("images"):
            files = {
                frame_suffix(name, frame, cameras[name].extension): next(stream) for name, stream in streams.items()
            }
        with clock.measure("write"):
            writer.add(ref.episode_id, files)
    with clock.measure("images"):
        for stream in streams.values():  # run to the end, which finds surplus frames
            next(stream, None)
    return episode.fields, anchors, _facts(info, anchors, params.layout)


def _describe_episode(episode: Episode, anchors: Anchors, cameras: dict[str, EpisodeCamera]) -> EpisodeInfo:
    return EpisodeInfo(
        episode_id=episode.ref.episode_id,
        task=episode.task if episode.task is not None else episode.ref.task,
        num_frames=len(episode.timestamps),
        fps=float(episode.fps),
        anchors=tuple(anchors.frames.tolist()),
        cameras=cameras,
        instructions=tuple(episode.instructions),
        metadata=episode.metadata,
    )


def _lowdim(episode: Episode, recipe: Recipe, operations: Mapping[str, ImageOperations]) -> dict[str, np.ndarray]:
    arrays = {name: episode.fields[name] for name in recipe.fields} | {TIMESTAMP_FIELD: episode.timestamps}
    for name in recipe.cameras:
        if name in episode.intrinsics:
            intrinsics = episode.intrinsics[name]
            arrays[ORIGINAL_INTRINSICS + name] = intrinsics
            arrays[RESCALED_INTRINSICS + name] = rescale_intrinsics(intrinsics, episode.cameras[name], operations[name])
        if name in episode.extrinsics:
            arrays[EXTRINSICS + name] = episode.extrinsics[name]
    return arrays


def _facts(info: EpisodeInfo, anchors: Anchors, layout: str) -> dict[str, Any]:
    return {
        "frames": info.num_frames,
        "fps": info.fps,
        "samples": len(info.anchors),
        # for the shards of samples
        "anchors": list(info.anchors) if layout == "samples" else [],
        "dropped": anchors.dropped,
        "cameras": {name: asdict(camera) for name, camera in info.cameras.items()},
        "language_types": sorted({kind for span in info.instructions for kind in span.texts}),
    }


def choose_operations(params: RoboticsPreprocessParams, camera: str) -> ImageOperations:
    """Return the operations on the images of a camera."""
    size = params.resize_images_size
    return ImageOperations(
        turns=(params.camera_rotations or {}).get(camera, 0) % 4,
        size=None if size is None else (size[1], size[0]),
        method=params.image_resizing_method,
        jpeg_quality=params.jpeg_quality,
    )


def describe_camera(frames: CameraFrames, operations: ImageOperations) -> EpisodeCamera:
    """Describe the stored images of a camera."""
    width, height = frames.size
    stored = operations.pixel_map((height, width)).target_size
    return EpisodeCamera(
        original_size=(width, height), size=(stored[1], stored[0]), extension="png" if frames.is_depth else "jpg"
    )


def rescale_intrinsics(
    intrinsics: Float[np.ndarray, "*L 3 3"], frames: CameraFrames, operations: ImageOperations
) -> Float[np.ndarray, "*L 3 3"]:
    """Return the matrices that project points of the same camera frame into the stored image.

    After a quarter turn they are not upper triangular, because the camera frame stays where it is: extrinsics apply to
    the recorded and to the stored image alike.
    """
    width, height = frames.size
    return operations.pixel_map((height, width)).map_intrinsics(intrinsics.astype(np.float64))


def encode_frames(
    name: str, frames: CameraFrames, operations: ImageOperations, sources: Int64[np.ndarray, " N"]
) -> Iterator[bytes]:
    """Yield N encoded images; each recorded frame is encoded at most once, and none is kept in memory.

    Args:
        name: the camera, for messages.
        sources: the recorded frame of each image, ascending; frames may repeat or be left out.

    Raises:
        ValueError: a frame cannot be decoded, has another size, or frames are missing.
    """
    width, height = frames.size
    is_kept = operations.keeps((height, width))
    recorded = enumerate(frames)
    number, data = -1, b""
    for source in sources.tolist():
        while number < source:
            found = next(recorded, None)
            if found is None:
                raise ValueError(f"camera '{name}' ends after {number + 1} of {frames.num_frames} frames.")
            number, frame = found
            if number == source:
                image = decode_frame(frames, number, frame)  # also to check files that are kept as they are
                if is_kept and isinstance(frame, bytes) and frame.startswith(_JPEG) and is_upright(frame):
                    data = frame
                else:
                    data = operations.encode(image)
        yield data
    num_found = number + 1 + sum(1 for _ in recorded)
    if num_found != frames.num_frames:
        raise ValueError(f"camera '{name}' has {num_found} frames, not {frames.num_frames} as it says.")
