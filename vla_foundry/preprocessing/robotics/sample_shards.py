"""Layout "samples": copy every sample out of the shards of episodes, shuffled over the whole dataset.

Frames are encoded once, when the episodes are written; their bytes are copied to every sample that shows them. The
windows of some samples are cut at a time, those of an episode together; the images of one sample at a time are read and
written. So memory does not grow with the dataset.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from itertools import chain
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
    parse_episode,
)
from vla_foundry.robotics.fields import image_name
from vla_foundry.robotics.windows import Windows, image_frames
from vla_foundry.shards import EpisodeSpans, MemberSpan, parse_index
from vla_foundry.storage.npz import NpzFile, ReadRange, format_arrays
from vla_foundry.storage.uri import join_uri, read_range, read_text

# indexes of shards of episodes that a task keeps in memory
_MAX_INDEXES = 32
# samples whose windows are cut at a time
_CHUNK = 128

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

    def create(chunk: Sequence[Sample]) -> Iterator[tuple[str, dict[str, bytes]]]:
        anchors: dict[tuple[str, str], list[int]] = {}
        for shard, episode, anchor in chunk:
            anchors.setdefault((shard, episode), []).append(anchor)
        made = {}
        for (shard, episode), wanted in anchors.items():
            spans = read_index(shard)[episode]
            made[shard, episode] = iter([*_cut_samples(spans, partial(_read, job.folder, shard), wanted, job.recipe)])
        for shard, episode, anchor in chunk:
            images, others = next(made[shard, episode])
            contents = _read_together(partial(_read, job.folder, shard), list(images.values()))
            yield f"{episode}_t{anchor:06d}", dict(zip(images, contents, strict=True)) | others

    chunks = (samples[first : first + _CHUNK] for first in range(0, len(samples), _CHUNK))
    with clock.measure("samples"):
        entry = write_shard(job.folder, name, chain.from_iterable(map(create, chunks)))
    made = {"seconds": clock.seconds, "versions": job.versions}
    result = {"entry": asdict(entry), "plan": digest_of(samples), **made}
    record_task(job.folder, task.number, result)
    return result


def _read(folder: str, shard: str, offset: int, size: int) -> bytes:
    return read_range(join_uri(folder, f"{shard}.tar"), offset, size)


def _read_together(read: ReadRange, spans: Sequence[MemberSpan]) -> list[bytes]:
    """Return the bytes of each span, by one call if little lies between them."""
    if not spans:
        return []
    first, end = min(span.offset for span in spans), max(span.offset + span.size for span in spans)
    if end - first > 2 * sum(span.size for span in spans):
        return [read(span.offset, span.size) for span in spans]
    content = read(first, end - first)
    return [content[span.offset - first : span.offset - first + span.size] for span in spans]


def _cut_samples(
    spans: EpisodeSpans, read: ReadRange, anchors: Sequence[int], recipe: Recipe
) -> Iterator[tuple[dict[str, MemberSpan], dict[str, bytes]]]:
    """Yield the members of samples of an episode as published: images, as their places in the tar, and the others.

    The others are lowdim.npz, metadata.json and language_instructions.json.
    """
    header, stored = _read_together(read, [spans.members[EPISODE_SUFFIX], spans.members[LOWDIM_SUFFIX]])
    info, lowdim = parse_episode(header, spans.key), NpzFile.from_bytes(stored)
    arrays = {name: lowdim.read(name) for name in lowdim.names}
    image_indices = recipe.params.image_indices
    for windows, values in recipe.iterate_windows(arrays, np.array(anchors, dtype=np.int64), info.num_frames):
        shown = image_frames(windows.anchors, image_indices, info.num_frames).tolist()
        for row, frames in enumerate(shown):
            images = {
                f"{image_name(camera, offset)}.{description.extension}".lower(): spans.frames[camera][frame]
                for offset, frame in zip(image_indices, frames, strict=True)
                for camera, description in info.cameras.items()
            }
            others = {
                LOWDIM_SUFFIX: format_arrays(_lowdim(arrays, windows, values, row), compressed=True),
                "metadata.json": _to_json(_metadata(info, arrays, windows, row, frames)),
            }
            texts = info.instructions_at(int(windows.anchors[row]))
            if texts:
                others["language_instructions.json"] = _to_json(texts)
            yield images, others


def _lowdim(
    arrays: Mapping[str, np.ndarray], windows: Windows, values: Mapping[str, np.ndarray], row: int
) -> dict[str, np.ndarray]:
    result = {name: array[row] for name, array in values.items()}
    # calibration is always padded with the nearest frame: zeros would not be a camera
    steps = windows.anchors[row] + np.array(windows.window.offsets)
    for name, array in arrays.items():
        if name.startswith(CALIBRATION_PREFIXES):
            clipped = np.clip(steps, 0, max(len(array) - 1, 0))
            result[name] = array[clipped] if array.ndim == 3 else np.repeat(array[None], len(steps), axis=0)
    result["past_mask"], result["future_mask"] = windows.past_mask[row], windows.future_mask[row]
    return result


def _metadata(
    info: EpisodeInfo, arrays: Mapping[str, np.ndarray], windows: Windows, row: int, frames: list[int]
) -> dict[str, Any]:
    window = windows.window
    anchor = int(windows.anchors[row])
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
        "is_padded": bool(windows.is_padding[row].any()),
    }


def _to_json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, indent=2, ensure_ascii=False).encode("utf-8")
