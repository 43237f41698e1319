"""Layout "samples": copy every sample out of the shards of episodes, shuffled over the whole dataset.

Frames are encoded once, when the episodes are written; their bytes are copied to every sample that shows them. One
sample is read and written at a time, so memory does not grow with the dataset.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np

from vla_foundry.preprocessing.output import digest_of, record_task
from vla_foundry.preprocessing.robotics.episode_shards import Clock, ShardJob
from vla_foundry.preprocessing.robotics.recipe import Recipe
from vla_foundry.preprocessing.shard_writer import write_shard
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
from vla_foundry.robotics.windows import Windows, image_frames
from vla_foundry.shards import EpisodeSpans, MemberSpan, parse_index
from vla_foundry.storage.npz import NpzFile
from vla_foundry.storage.uri import join_uri, read_range, read_text

# indexes of shards of episodes that a task keeps in memory
_MAX_INDEXES = 32

# (shard of episodes within the folder, episode id, anchor)
Sample = tuple[str, str, int]


def group_samples(samples: Sequence[Sample], samples_per_shard: int, seed: int) -> list[list[Sample]]:
    """Shuffle samples and divide them into shards."""
    order = np.random.default_rng([seed, len(samples)]).permutation(len(samples)).tolist()
    stretches = [order[first : first + samples_per_shard] for first in range(0, len(order), samples_per_shard)]
    return [[samples[number] for number in stretch] for stretch in stretches]


def write_sample_shard(job: ShardJob, task: Task) -> dict[str, Any]:
    """Write one shard of samples; the payload is (name of the shard, samples).

    Returns:
        {"entry": line of the manifest, "plan": digest of its samples, "seconds": {stage: seconds}, "versions": those of
        the job}, recorded as done.
    """
    clock, (name, samples) = Clock(), task.payload

    @lru_cache(_MAX_INDEXES)
    def read_index(shard: str) -> dict[str, EpisodeSpans]:
        uri = join_uri(job.folder, f"{shard}.index.json")
        return {episode.key: episode for episode in parse_index(read_text(uri), uri).episodes}

    def create(sample: Sample) -> tuple[str, dict[str, bytes]]:
        shard, episode, anchor = sample
        tar = join_uri(job.folder, f"{shard}.tar")

        def read(span: MemberSpan) -> bytes:
            return read_range(tar, span.offset, span.size)

        return f"{episode}_t{anchor:06d}", _create_sample(read_index(shard)[episode], read, anchor, job.recipe)

    with clock.measure("samples"):
        entry = write_shard(job.folder, name, map(create, samples))
    made = {"seconds": clock.seconds, "versions": job.versions}
    result = {"entry": asdict(entry), "plan": digest_of(samples), **made}
    record_task(job.folder, task.number, result)
    return result


def _create_sample(
    spans: EpisodeSpans, read: Callable[[MemberSpan], bytes], anchor: int, recipe: Recipe
) -> dict[str, bytes]:
    """Return the members of a sample as published: images, lowdim.npz, metadata.json, language_instructions.json."""
    info = parse_episode(read(spans.members[EPISODE_SUFFIX]), spans.key)
    lowdim = NpzFile.from_bytes(read(spans.members[LOWDIM_SUFFIX]))
    arrays = {name: lowdim.read(name) for name in lowdim.names}
    anchors, image_indices = np.array([anchor], dtype=np.int64), recipe.params.image_indices
    ((windows, values),) = recipe.iterate_windows(arrays, anchors, info.num_frames)
    frames = image_frames(anchors, image_indices, info.num_frames)[0].tolist()
    members = {
        f"{image_name(camera, offset)}.{description.extension}".lower(): read(spans.frames[camera][frame])
        for offset, frame in zip(image_indices, frames, strict=True)
        for camera, description in info.cameras.items()
    }
    members[LOWDIM_SUFFIX] = format_arrays(_lowdim(arrays, windows, values), compressed=True)
    members["metadata.json"] = _to_json(_metadata(info, arrays, windows, frames))
    texts = info.instructions_at(anchor)
    if texts:
        members["language_instructions.json"] = _to_json(texts)
    return members


def _lowdim(
    arrays: Mapping[str, np.ndarray], windows: Windows, values: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    result = {name: array[0] for name, array in values.items()}
    # calibration is always padded with the nearest frame: zeros would not be a camera
    steps = windows.anchors[:, None] + np.array(windows.window.offsets)
    for name, array in arrays.items():
        if name.startswith(CALIBRATION_PREFIXES):
            clipped = np.clip(steps[0], 0, max(len(array) - 1, 0))
            result[name] = array[clipped] if array.ndim == 3 else np.repeat(array[None], steps.shape[1], axis=0)
    result["past_mask"], result["future_mask"] = windows.past_mask[0], windows.future_mask[0]
    return result


def _metadata(
    info: EpisodeInfo, arrays: Mapping[str, np.ndarray], windows: Windows, frames: list[int]
) -> dict[str, Any]:
    window = windows.window
    anchor = int(windows.anchors[0])
    first, last = anchor - window.past, anchor + window.future
    return {
        **info.metadata,
        "episode_id": info.episode_id,
        "sample_id": f"{info.episode_id}_t{anchor:06d}",
        "task": info.task,
        "fps": info.fps,
        "timestamp": float(arrays[TIMESTAMP_FIELD][anchor]),
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
