"""Layout "samples": copy every sample out of the shards of episodes, shuffled over the whole dataset.

Frames were encoded once, when the episodes were written; here their bytes are copied to each sample that shows them.
One sample is read and written at a time, so memory does not grow with the dataset.
"""

import contextlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vla_foundry.preprocessing.output import digest_of, record_task
from vla_foundry.preprocessing.robotics.anchors import create_window
from vla_foundry.preprocessing.robotics.episode_shards import Clock
from vla_foundry.preprocessing.robotics.recipe import Recipe
from vla_foundry.preprocessing.shard_writer import open_shard
from vla_foundry.preprocessing.tasks import Task
from vla_foundry.robotics.episode_blocks import (
    CALIBRATION_PREFIXES,
    EPISODE_SUFFIX,
    LOWDIM_SUFFIX,
    TIMESTAMP_FIELD,
    EpisodeInfo,
    format_arrays,
    parse_episode,
)
from vla_foundry.robotics.fields import image_name
from vla_foundry.robotics.windows import Windows, image_frames, iterate_windows
from vla_foundry.shards import EpisodeSpans, MemberSpan, parse_index
from vla_foundry.storage.npz import NpzFile
from vla_foundry.storage.uri import is_remote, join_uri, open_input, read_range, read_text

# blocks that a task keeps open: each costs a file descriptor, and its index
_MAX_OPEN = 32

# (shard of a block within the folder, episode id, anchor)
Sample = tuple[str, str, int]


@dataclass(frozen=True, kw_only=True)
class SampleJob:
    """What the tasks of the second half of a job share."""

    recipe: Recipe
    # output folder
    folder: str
    # tasks of the first half: their numbers come before
    num_blocks: int


def group_samples(samples: Sequence[Sample], samples_per_shard: int, seed: int) -> list[list[Sample]]:
    """Shuffle samples and divide them into shards."""
    order = np.random.default_rng([seed, len(samples)]).permutation(len(samples)).tolist()
    stretches = [order[first : first + samples_per_shard] for first in range(0, len(order), samples_per_shard)]
    return [[samples[number] for number in stretch] for stretch in stretches]


def write_samples(job: SampleJob, task: Task) -> dict[str, Any]:
    """Write a shard of samples.

    Returns:
        {"entry": line of the manifest, "plan": digest of its samples, "seconds": {stage: seconds}}, recorded as done.
    """
    clock, shard_name = Clock(), f"shard_{task.number - job.num_blocks:06d}"
    with (
        clock.measure("samples"),
        contextlib.closing(_Blocks(job.folder)) as blocks,
        open_shard(job.folder, shard_name) as writer,
    ):
        for shard, episode, anchor in task.payload:
            members = _create_sample(blocks.open(shard).read_episode(episode), anchor, job.recipe)
            writer.add(f"{episode}_t{anchor:06d}", members)
    assert writer.entry is not None, "open_shard sets the entry"
    result = {"entry": asdict(writer.entry), "plan": digest_of(task.payload), "seconds": clock.seconds}
    record_task(job.folder, task.number, result)
    return result


@dataclass(frozen=True, eq=False)
class _BlockEpisode:
    """An episode in a block, its frames not yet read."""

    block: "_Block"
    spans: EpisodeSpans
    info: EpisodeInfo
    arrays: dict[str, np.ndarray]

    def read_frame(self, camera: str, frame: int) -> bytes:
        return self.block.read(self.spans.frames[camera][frame])


class _Block:
    """A block of episodes, open."""

    def __init__(self, folder: str, shard: str) -> None:
        index_name = join_uri(folder, f"{shard}.index.json")
        self._episodes = {episode.key: episode for episode in parse_index(read_text(index_name), index_name).episodes}
        self._uri = join_uri(folder, f"{shard}.tar")
        # of a remote one, a file would read ahead what is not wanted
        self._file = None if is_remote(self._uri) else open_input(self._uri)

    def read(self, span: MemberSpan) -> bytes:
        """Read a member."""
        if self._file is None:
            return read_range(self._uri, span.offset, span.size)
        self._file.seek(span.offset)
        return self._file.read(span.size)

    def read_episode(self, episode: str) -> _BlockEpisode:
        """Read all of an episode but its frames."""
        spans = self._episodes[episode]
        info = parse_episode(self.read(spans.members[EPISODE_SUFFIX]), episode)
        lowdim = NpzFile.from_bytes(self.read(spans.members[LOWDIM_SUFFIX]))
        return _BlockEpisode(self, spans, info, {name: lowdim.read(name) for name in lowdim.names})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class _Blocks:
    """Opens blocks when they are asked for, and keeps the latest open."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._open: OrderedDict[str, _Block] = OrderedDict()

    def open(self, shard: str) -> _Block:
        """Return a block, open."""
        if shard not in self._open:
            self._open[shard] = _Block(self._folder, shard)
            if len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return self._open[shard]

    def close(self) -> None:
        """Close all."""
        for block in self._open.values():
            block.close()


def _create_sample(episode: _BlockEpisode, anchor: int, recipe: Recipe) -> dict[str, bytes]:
    """Return the members of a sample as published: images, lowdim.npz, metadata.json, language_instructions.json."""
    params, info = recipe.params, episode.info
    anchors = np.array([anchor], dtype=np.int64)
    ((windows, values),) = iterate_windows(
        {name: episode.arrays[name] for name in recipe.fields},
        anchors,
        info.num_frames,
        create_window(recipe),
        padding=params.padding_strategy,
        pose_groups=recipe.pose_groups,
    )
    frames = image_frames(anchors, params.image_indices, info.num_frames)[0].tolist()
    members = {
        f"{image_name(camera, offset)}.{description.extension}".lower(): episode.read_frame(camera, frame)
        for offset, frame in zip(params.image_indices, frames, strict=True)
        for camera, description in info.cameras.items()
    }
    members[LOWDIM_SUFFIX] = format_arrays(_lowdim(episode.arrays, windows, values), compressed=True)
    members["metadata.json"] = _to_json(_metadata(episode, windows, frames))
    texts = info.instructions_at(anchor)
    if texts:
        members["language_instructions.json"] = _to_json(texts)
    return members


def _lowdim(
    arrays: Mapping[str, np.ndarray], windows: Windows, values: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    result = {name: array[0] for name, array in values.items()}
    # calibration is padded by the nearest frame, whatever the strategy: zeros would be no camera
    steps = windows.anchors[:, None] + np.array(windows.window.offsets)
    for name, array in arrays.items():
        if name.startswith(CALIBRATION_PREFIXES):
            clipped = np.clip(steps[0], 0, max(len(array) - 1, 0))
            result[name] = array[clipped] if array.ndim == 3 else np.repeat(array[None], steps.shape[1], axis=0)
    result["past_mask"], result["future_mask"] = windows.past_mask[0], windows.future_mask[0]
    return result


def _metadata(episode: _BlockEpisode, windows: Windows, frames: list[int]) -> dict[str, Any]:
    info, window = episode.info, windows.window
    anchor = int(windows.anchors[0])
    first, last = anchor - window.past, anchor + window.future
    return {
        **info.metadata,
        "episode_id": info.episode_id,
        "sample_id": f"{info.episode_id}_t{anchor:06d}",
        "task": info.task,
        "fps": info.fps,
        "timestamp": float(episode.arrays[TIMESTAMP_FIELD][anchor]),
        "anchor_timestep": anchor,
        "anchor_relative_idx": window.past,
        "image_timesteps": frames,
        "lowdim_start_timestep": first,
        "lowdim_end_timestep": last,
        "past_padding": max(0, -first),
        "future_padding": max(0, last - info.num_frames + 1),
        "camera_names": list(info.cameras),
        "original_episode_length": info.num_frames,
        "original_image_sizes": {name: list(camera.original_size) for name, camera in info.cameras.items()},
        "is_padded": bool(windows.is_padding.any()),
    }


def _to_json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, indent=2, ensure_ascii=False).encode("utf-8")
