"""`vla-foundry stats DIR [--merge A B ...]`: recompute the statistics of a robotics dataset, or merge several.

Statistics of groups of shards are merged as a tree, in the order of the manifest, so the result depends on neither
workers nor timing. For a dataset of layout "episodes" it is, byte for byte, what preprocessing wrote.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_foundry.config.command_line import parse_command
from vla_foundry.params.commands.preprocessing_robotics import StatsParams
from vla_foundry.preprocessing.command import join_list_flags
from vla_foundry.preprocessing.output import PROGRESS_FOLDER
from vla_foundry.preprocessing.tasks import Task, ray_cluster, run_tasks
from vla_foundry.progress import say
from vla_foundry.robotics.accumulator import StatisticsAccumulator
from vla_foundry.robotics.episode_blocks import EPISODE_SUFFIX, LOWDIM_SUFFIX, parse_episode
from vla_foundry.robotics.fields import Window, is_relative_field
from vla_foundry.robotics.fit import create_statistics_window, find_contradictions
from vla_foundry.robotics.spec import DatasetSpec, NamedSpec, read_spec
from vla_foundry.robotics.statistics import MERGE_WIDTH, FieldStatistics, merge_field_statistics, merge_statistics
from vla_foundry.robotics.statistics_format import (
    format_statistics,
    pack_statistics,
    parse_statistics,
    unpack_statistics,
)
from vla_foundry.robotics.windows import RobotWindow, iterate_windows, read_episode_fields, read_sample_window
from vla_foundry.run_folder import STATISTICS_NAME
from vla_foundry.shards import MANIFEST_NAME, EpisodeSpans, MemberSpan, index_shard, parse_index, parse_manifest
from vla_foundry.storage.npz import NpzFile, format_arrays
from vla_foundry.storage.uri import (
    absolute_uri,
    delete,
    exists,
    file_test,
    is_remote,
    join_uri,
    list_relative,
    open_input,
    parent_uri,
    read_range,
    read_text,
    size_of,
    write_bytes,
    write_text,
)

Statistics = dict[str, FieldStatistics]
# ({field: (n, T, C)}, (n, T) True where a step lies within the episode)
WindowBatch = tuple[dict[str, np.ndarray], np.ndarray]
# samples to read at a time
_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What the tasks share."""

    # the dataset, local or s3://
    folder: str
    spec: DatasetSpec
    # the window around each anchor; in layout samples, no larger than the stored one
    window: Window
    # folder of intermediate files
    parts_folder: str


def main(argv: list[str]) -> None:
    """Run `vla-foundry stats`.

    Raises:
        ValueError: anything the user can fix.
        FileNotFoundError: a dataset, or its statistics, do not exist.
    """
    words = join_list_flags(argv, ("--merge",))
    compute_statistics(parse_command(StatsParams, words, prog="vla-foundry stats", positional=("folder",)))


def compute_statistics(params: StatsParams) -> None:
    """Compute or merge statistics and write them; existing ones are kept until the new ones are complete.

    Raises:
        ValueError: statistics exist already, shards are broken, or datasets contradict each other.
        FileNotFoundError: a dataset, or its statistics, do not exist.
    """
    started = time.monotonic()
    output = absolute_uri(params.output or join_uri(params.folder, STATISTICS_NAME))
    if exists(output) and not params.overwrite:
        raise ValueError(f"{output} exists. Replace it with --overwrite true, or give another --output.")
    statistics = _merge(params) if params.merge else _recompute(params, f"{output}.parts")
    write_text(output, format_statistics(statistics))
    counts = [float(field.count.max(initial=0)) for field in statistics.values()]
    steps = max((field.num_steps for field in statistics.values()), default=0)
    say(
        f"{output}: {len(statistics)} fields, {int(max(counts, default=0)):,} windows of {steps} steps; "
        f"{time.monotonic() - started:.1f} s"
    )


def _merge(params: StatsParams) -> Statistics:
    sources = [name if name.endswith(".json") else join_uri(name, STATISTICS_NAME) for name in params.merge]
    specs = [_find_spec(source) for source in sources]
    found = find_contradictions([(named, named.spec.fields) for named in specs if named is not None])
    if found and not params.accept_contradictions:
        raise ValueError(f"{found[0]} Or merge them as they are with --accept_contradictions true.")
    return merge_statistics(
        [
            parse_statistics(
                read_text(source), source, anchor_index=None if named is None else named.spec.past_lowdim_steps
            )
            for source, named in zip(sources, specs, strict=True)
        ]
    )


def _find_spec(source: str) -> NamedSpec | None:
    """Read the spec beside a stats.json; None if there is none."""
    folder = parent_uri(source)
    try:
        return NamedSpec(folder, read_spec(join_uri(folder, MANIFEST_NAME)))
    except FileNotFoundError:
        return None


def _recompute(params: StatsParams, parts_folder: str) -> Statistics:
    folder = absolute_uri(params.folder)
    manifest = join_uri(folder, MANIFEST_NAME)
    entries = parse_manifest(read_text(manifest), manifest, file_test(parent_uri(manifest)))
    spec = read_spec(manifest)
    job = _Job(folder=folder, spec=spec, window=_choose_window(params, spec), parts_folder=parts_folder)
    groups = [entries[first : first + MERGE_WIDTH] for first in range(0, len(entries), MERGE_WIDTH)]
    tasks = [
        Task(
            number=number,
            name=f"{group[0].shard} to {group[-1].shard}",
            weight=sum(entry.num_sequences for entry in group),
            payload=[entry.shard for entry in group],
        )
        for number, group in enumerate(groups)
    ]
    try:
        with ray_cluster(params.num_workers, params.ray_address):
            workers: dict[str, Any] = {"num_workers": params.num_workers, "ray_address": params.ray_address}
            finished = run_tasks(_count_group, tasks, shared=job, title="stats", **workers)
            names = {task.number: name for task, name in finished}
            return merge_parts(parts_folder, [names[task.number] for task in tasks], **workers)
    finally:
        _delete_folder(parts_folder)


def _choose_window(params: StatsParams, spec: DatasetSpec) -> Window:
    stored = Window(spec.past_lowdim_steps, spec.future_lowdim_steps)
    past, future = params.past_lowdim_steps, params.future_lowdim_steps
    window = Window(stored.past if past is None else past, stored.future if future is None else future)
    if spec.layout == "samples":
        stored.crop(window)
    return window


def _count_group(job: _Job, task: Task) -> str:
    """Write the statistics of a group of shards, the first round of merging; return the name of the file."""
    parts = [_count_shard(job, shard) for shard in task.payload]
    merged = {
        name: merge_field_statistics([part[name] for part in parts if name in part])
        for name in sorted({name for part in parts for name in part})
    }
    name = f"{PROGRESS_FOLDER}/statistics_{task.number:06d}.npz"
    write_bytes(join_uri(job.parts_folder, name), format_arrays(pack_statistics(merged)))
    return name


def _count_shard(job: _Job, shard: str) -> Statistics:
    accumulator = StatisticsAccumulator(job.window.anchor)
    try:
        for values, valid in _read_windows(job, shard):
            accumulator.update(values, valid)
    except ValueError as error:
        text = str(error).rstrip(".")
        raise ValueError(f"{join_uri(job.folder, shard)}.tar: {text}. Create the shard again.") from None
    return accumulator.finish()


def _read_windows(job: _Job, shard: str) -> Iterator[WindowBatch]:
    """Yield the windows of a shard's samples without their images, some at a time, in the order of the tar."""
    with contextlib.closing(open_input(join_uri(job.folder, f"{shard}.tar"))) as file:

        def read(span: MemberSpan) -> bytes:
            file.seek(span.offset)
            content = file.read(span.size)
            if len(content) < span.size:
                raise ValueError("the tar is cut off")
            return content

        name = join_uri(job.folder, f"{shard}.index.json")
        try:
            index = parse_index(read_text(name), name)
        except FileNotFoundError:  # foreign shards have none
            index = index_shard(file)
        for episode in index.episodes:
            yield from _read_episode(job, episode, read)
        for first in range(0, len(index.samples), _CHUNK):
            yield _read_samples(job, index.samples[first : first + _CHUNK], read)


def _read_episode(job: _Job, episode: EpisodeSpans, read: Callable[[MemberSpan], bytes]) -> Iterator[WindowBatch]:
    members, key = episode.members, episode.key
    for suffix in (EPISODE_SUFFIX, LOWDIM_SUFFIX):
        if suffix not in members:
            raise ValueError(f"'{key}' has no member '{suffix}'")
    info = parse_episode(read(members[EPISODE_SUFFIX]), f"{key}.{EPISODE_SUFFIX}")
    arrays = NpzFile.from_bytes(read(members[LOWDIM_SUFFIX]))
    names = [name for name in job.spec.fields if not is_relative_field(name)]
    try:
        fields = read_episode_fields(arrays, names, info.num_frames)
    except ValueError as error:
        raise ValueError(f"'{key}': {error}") from None
    for windows, values in iterate_windows(
        fields,
        np.array(info.anchors, dtype=np.int64),
        info.num_frames,
        job.window,
        padding=job.spec.padding_strategy,
        pose_groups=job.spec.pose_groups,
    ):
        yield values, ~windows.is_padding


def _read_samples(
    job: _Job, samples: Sequence[tuple[str, dict[str, MemberSpan]]], read: Callable[[MemberSpan], bytes]
) -> WindowBatch:
    spec = create_statistics_window(job.spec, job.window)
    windows: list[RobotWindow] = []
    for key, members in samples:
        try:
            windows.append(read_sample_window(members, read, spec))
        except ValueError as error:
            raise ValueError(f"'{key}': {error}") from None
    valid = ~np.stack([window.is_padding for window in windows])
    try:
        return {name: np.stack([window.fields[name] for window in windows]) for name in spec.stored}, valid
    except ValueError:
        raise ValueError(f"samples '{samples[0][0]}' to '{samples[-1][0]}' hold fields of different widths") from None


def _delete_folder(folder: str) -> None:
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for name in list_relative(folder):
        delete(join_uri(folder, name))


def merge_parts(
    folder: str, parts: Sequence[str], *, num_workers: int | None, ray_address: str | None
) -> dict[str, FieldStatistics]:
    """Merge files of packed statistics, at least one; the result depends on the files and their order alone.

    Args:
        folder: the folder of the files.
        parts: paths of the files within it.
        num_workers, ray_address: see run_tasks.
    """
    level, names = 0, list(parts)
    while len(names) > 1:
        groups = [names[first : first + MERGE_WIDTH] for first in range(0, len(names), MERGE_WIDTH)]
        names = [f"{PROGRESS_FOLDER}/merged_{level}_{number:06d}.npz" for number in range(len(groups))]
        tasks = [
            Task(number=number, name=f"statistics {level}.{number}", weight=len(group), payload=(group, names[number]))
            for number, group in enumerate(groups)
        ]
        workers: dict[str, Any] = {"num_workers": num_workers, "ray_address": ray_address}
        list(run_tasks(_merge_group, tasks, shared=folder, title="statistics", **workers))
        level += 1
    part = _open(folder, names[0])
    return {name: _read_field(part, name) for name in _field_names(part)}


def _merge_group(folder: str, task: Task) -> None:
    group, target = task.payload
    parts = [_open(folder, name) for name in group]
    arrays: dict[str, np.ndarray] = {}
    for name in sorted({name for part in parts for name in _field_names(part)}):
        fields = [_read_field(part, name) for part in parts if f"{name}|shape" in part]
        arrays |= pack_statistics({name: merge_field_statistics(fields)})
    write_bytes(join_uri(folder, target), format_arrays(arrays))


def _open(folder: str, name: str) -> NpzFile:
    uri = join_uri(folder, name)
    return NpzFile(lambda offset, size: read_range(uri, offset, size), size_of(uri), origin=uri)


def _field_names(part: NpzFile) -> list[str]:
    return sorted(name.removesuffix("|shape") for name in part.names if name.endswith("|shape"))


def _read_field(part: NpzFile, name: str) -> FieldStatistics:
    arrays: Mapping[str, Any] = {key: part.read(key) for key in part.names if key.rpartition("|")[0] == name}
    return unpack_statistics(arrays)[name]
