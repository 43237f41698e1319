"""`vla-foundry stats DIR [--merge A B ...]`: compute the statistics of a robotics dataset anew, or merge several.

Shards are counted in groups and the groups merged as a tree, in the order of the manifest. So the result depends on
neither workers nor timing; for a dataset of layout "episodes" it is, byte for byte, what preprocessing wrote.
"""

import shutil
import time
from itertools import combinations

from vla_foundry.config.command_line import parse_command
from vla_foundry.params.commands.preprocessing_robotics import StatsParams
from vla_foundry.preprocessing.command import join_list_flags
from vla_foundry.preprocessing.output import PROGRESS_FOLDER
from vla_foundry.preprocessing.robotics.statistics_tree import merge_parts
from vla_foundry.preprocessing.robotics.stored_windows import WindowSource, read_windows
from vla_foundry.preprocessing.tasks import Task, ray_cluster, run_tasks
from vla_foundry.progress import say
from vla_foundry.robotics.accumulator import StatisticsAccumulator
from vla_foundry.robotics.episode_blocks import format_arrays
from vla_foundry.robotics.fields import Window
from vla_foundry.robotics.fit import find_contradictions
from vla_foundry.robotics.spec import DatasetSpec, NamedSpec, read_spec
from vla_foundry.robotics.statistics import MERGE_WIDTH, FieldStatistics, merge_field_statistics, merge_statistics
from vla_foundry.robotics.statistics_format import format_statistics, pack_statistics, parse_statistics
from vla_foundry.run_folder import STATISTICS_NAME
from vla_foundry.shards import MANIFEST_NAME, parse_manifest
from vla_foundry.storage.uri import (
    absolute_uri,
    delete,
    exists,
    is_remote,
    join_uri,
    list_relative,
    parent_uri,
    read_text,
    write_bytes,
    write_text,
)

Statistics = dict[str, FieldStatistics]


def main(argv: list[str]) -> None:
    """Run `vla-foundry stats`.

    Raises:
        ValueError: what the user can fix.
        FileNotFoundError: a dataset, or its statistics, are not there.
    """
    words = join_list_flags(argv, ("--merge",))
    compute_statistics(parse_command(StatsParams, words, prog="vla-foundry stats", positional=("folder",)))


def compute_statistics(params: StatsParams) -> None:
    """Write the statistics that are asked for; what is there already is kept until they are whole.

    Raises:
        ValueError: there are statistics already, shards are broken, or datasets contradict each other.
        FileNotFoundError: a dataset, or its statistics, are not there.
    """
    started = time.monotonic()
    output = absolute_uri(params.output or join_uri(params.folder, STATISTICS_NAME))
    if exists(output) and not params.overwrite:
        raise ValueError(f"{output} is there already. Replace it with --overwrite true, or give --output.")
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
    for first, second in combinations([named for named in specs if named is not None], 2):
        both = {name: first.spec.fields[name] for name in first.spec.fields if name in second.spec.fields}
        pairs = {name: (field, second.spec.fields[name]) for name, field in both.items()}
        found = find_contradictions(first, second, pairs)
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
    """The spec beside a stats.json; None if it lies alone."""
    folder = parent_uri(source)
    try:
        return NamedSpec(folder, read_spec(join_uri(folder, MANIFEST_NAME)))
    except FileNotFoundError:
        return None


def _recompute(params: StatsParams, parts_folder: str) -> Statistics:
    folder = absolute_uri(params.folder)
    manifest = join_uri(folder, MANIFEST_NAME)
    entries = parse_manifest(read_text(manifest), manifest)
    spec = read_spec(manifest)
    source = WindowSource(folder=folder, spec=spec, window=_choose_window(params, spec))
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
            finished = run_tasks(
                _count_group,
                tasks,
                shared=(source, parts_folder),
                title="stats",
                num_workers=params.num_workers,
                ray_address=params.ray_address,
            )
            for _ in finished:
                pass
            names = [_part_name(task.number) for task in tasks]
            return merge_parts(parts_folder, names, num_workers=params.num_workers, ray_address=params.ray_address)
    finally:
        _delete_folder(parts_folder)


def _choose_window(params: StatsParams, spec: DatasetSpec) -> Window:
    stored = Window(spec.past_lowdim_steps, spec.future_lowdim_steps)
    past, future = params.past_lowdim_steps, params.future_lowdim_steps
    window = Window(stored.past if past is None else past, stored.future if future is None else future)
    if spec.layout == "samples":
        stored.crop(window)
    return window


def _part_name(number: int) -> str:
    return f"{PROGRESS_FOLDER}/statistics_{number:06d}.npz"


def _count_group(shared: tuple[WindowSource, str], task: Task) -> None:
    """Write the statistics of a group of shards: the first round of merging, made where the shards are read."""
    source, parts_folder = shared
    parts = [_count_shard(source, shard) for shard in task.payload]
    merged = {
        name: merge_field_statistics([part[name] for part in parts if name in part])
        for name in sorted({name for part in parts for name in part})
    }
    write_bytes(join_uri(parts_folder, _part_name(task.number)), format_arrays(pack_statistics(merged)))


def _count_shard(source: WindowSource, shard: str) -> Statistics:
    accumulator = StatisticsAccumulator(source.window.anchor)
    try:
        for values, valid in read_windows(source, shard):
            accumulator.update(values, valid)
    except ValueError as error:
        text = str(error).rstrip(".")
        raise ValueError(f"{join_uri(source.folder, shard)}.tar: {text}. Make it again.") from None
    return accumulator.finish()


def _delete_folder(folder: str) -> None:
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for name in list_relative(folder):
        delete(join_uri(folder, name))
