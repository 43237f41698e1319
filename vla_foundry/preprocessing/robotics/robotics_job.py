"""`vla-foundry preprocess robotics`: find episodes, write them in one pass, merge their statistics, publish.

Each task writes a shard of whole episodes and its statistics. In layout "episodes" these shards are the dataset; in
layout "samples" a second round of tasks copies every sample out of them, in shuffled order.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vla_foundry.params.commands.preprocessing_robotics import RoboticsPreprocessParams
from vla_foundry.preprocessing.output import PROGRESS_FOLDER, REPORT_NAME, OutputFolder, digest_of, format_provenance
from vla_foundry.preprocessing.robotics.converters.converter import EpisodeRef, create_converter
from vla_foundry.preprocessing.robotics.episode_shards import BlockJob, statistics_name, write_block
from vla_foundry.preprocessing.robotics.recipe import (
    Recipe,
    check_refs,
    count_frames,
    create_recipe,
    group_episodes,
    split_refs,
)
from vla_foundry.preprocessing.robotics.report import (
    CONFIG_NAME,
    METADATA_NAME,
    STATISTICS_NAME,
    Report,
    create_spec,
    describe_processing,
    format_config,
)
from vla_foundry.preprocessing.robotics.sample_shards import Sample, SampleJob, group_samples, write_samples
from vla_foundry.preprocessing.robotics.statistics import merge_parts
from vla_foundry.preprocessing.tasks import Task, ray_cluster, run_unfinished
from vla_foundry.progress import say
from vla_foundry.robotics.spec import SPEC_NAME, format_spec
from vla_foundry.robotics.statistics_format import format_statistics
from vla_foundry.shards import MANIFEST_NAME, ManifestEntry
from vla_foundry.storage.uri import absolute_uri, exists, join_uri, write_text

COMMAND = "preprocess robotics"
# raised when the same plan would give other bytes than it gave before
PLAN_VERSION = 1
# params that do not shape the output
_PLAIN_FIELDS = (
    "source_episodes",
    "output_dir",
    "camera_names",
    "num_workers",
    "ray_address",
    "overwrite",
    "max_failed_fraction",
)
_OUTPUT_FLAG = "--output_dir"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Episodes that become one dataset: all, or those to train on, or those to validate with."""

    # "", "train" or "validation"
    name: str
    refs: list[EpisodeRef]
    recipe: Recipe
    # what tells that the source has changed
    source: dict[str, Any]

    @property
    def folder(self) -> str:
        """Where it is written."""
        return join_uri(absolute_uri(self.recipe.params.output_dir), self.name)


def preprocess_robotics(params: RoboticsPreprocessParams) -> None:
    """Write recordings as one dataset, or as two with validation, or go on where a killed run left off.

    Raises:
        ValueError: what the user can fix; more episodes failed than may.
        FileNotFoundError: a source does not exist.
    """
    _check_apart(params)
    converter = create_converter(params)
    refs = check_refs(converter.discover_episodes(), params.max_episodes_to_process)
    recipe = create_recipe(params, converter)
    source = converter.describe_source()
    parts = [
        Part(name=name, refs=part, recipe=recipe, source=source) for name, part in split_refs(refs, params).items()
    ]
    for part in parts:
        if part.name and exists(join_uri(params.output_dir, MANIFEST_NAME)):
            raise ValueError(f"{_OUTPUT_FLAG} {params.output_dir} holds a dataset that is not split. Choose another.")
        _write_part(part)


def _write_part(part: Part) -> None:
    params, started = part.recipe.params, time.monotonic()
    output = OutputFolder(part.folder, _create_plan(part), flag=_OUTPUT_FLAG)
    state = output.begin(overwrite=params.overwrite)
    if state == "complete":
        say(f"{part.folder} is complete; nothing to do.")
        say(_summary(output.read_provenance()["dataset"]))
        return
    done = output.finished() if state == "begun" else {}
    with ray_cluster(params.num_workers, params.ray_address):
        blocks = _write_blocks(part, done)
        seconds = _add_seconds(blocks)
        report = Report([episode for block in blocks for episode in block["episodes"]], params.source_episodes)
        for line in report.describe():
            say(line)
        report_uri = join_uri(part.folder, REPORT_NAME)
        write_text(report_uri, _to_json(report.to_json(seconds)))
        report.check(params.max_failed_fraction, report_uri)
        spec = create_spec(part.recipe, report)
        shards = blocks
        if params.layout == "samples":
            shards = _write_samples(part, blocks, done)
            seconds |= _add_seconds(shards)
        files = {
            SPEC_NAME: format_spec(spec),
            CONFIG_NAME: format_config(part.recipe),
            METADATA_NAME: _to_json(describe_processing(part.recipe, part.source, report)),
        }
        if params.compute_statistics:
            merging = time.monotonic()
            files[STATISTICS_NAME] = _merge_statistics(part, blocks)
            seconds["merge"] = time.monotonic() - merging
    seconds["all (wall clock)"] = time.monotonic() - started
    files[REPORT_NAME] = _to_json(report.to_json(seconds))
    entries = [ManifestEntry(**shard["entry"]) for shard in shards if shard["entry"] is not None]
    counts = report.counts()
    facts = {
        "kind": "robotics",
        "layout": params.layout,
        "num_episodes": counts["written"],
        "num_frames": counts["frames"],
        "num_sequences": sum(entry.num_sequences for entry in entries),
        "num_shards": len(entries),
        "num_bytes": sum(entry.num_bytes or 0 for entry in entries),
        "num_failed": counts["failed"],
    }
    encoded = {name: text.encode("utf-8") for name, text in files.items()}
    output.publish(entries, format_provenance(output.plan, facts, counts), encoded)
    say(f"{part.folder}: {_summary(facts)}; {time.monotonic() - started:.1f} s")


def _create_plan(part: Part) -> dict[str, Any]:
    """All that determines the bytes of the dataset, without paths of this machine."""
    params, recipe = part.recipe.params, part.recipe
    values = {
        name: os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value
        for name, value in asdict(params).items()
        if name not in _PLAIN_FIELDS
    }
    episodes = [(ref.episode_id, ref.task, ref.num_frames) for ref in part.refs]
    described = {name: asdict(field) for name, field in recipe.fields.items()}
    groups = [asdict(group) for group in recipe.pose_groups]
    return {
        "command": COMMAND,
        "version": PLAN_VERSION,
        "type": params.type,
        "part": part.name,
        "params": values,
        "cameras": list(recipe.cameras),
        "fields": digest_of([described, groups]),
        "source": {**part.source, "episodes": len(episodes), "episodes_digest": digest_of(episodes)},
    }


def _write_blocks(part: Part, done: Mapping[int, Any]) -> list[dict[str, Any]]:
    """Write the shards of episodes that are not written, and return what is said of all, in order."""
    params = part.recipe.params
    tasks = [
        Task(number=number, name=f"shard {number} ({refs[0].episode_id}, ...)", weight=count_frames(refs), payload=refs)
        for number, refs in enumerate(group_episodes(part.refs, params))
    ]
    # what failed is tried again: it may have been mended
    done = {
        task.number: done[task.number]
        for task in tasks
        if task.number in done and not any(episode["outcome"] == "failed" for episode in done[task.number]["episodes"])
    }
    job = BlockJob(recipe=part.recipe, folder=part.folder, shard_pattern=_shard_pattern(params))
    return _run(job, write_block, tasks, done, params, title=" ".join(filter(None, (COMMAND, part.name))))


def _shard_pattern(params: RoboticsPreprocessParams) -> str:
    return "shard_{number:06d}" if params.layout == "episodes" else f"{PROGRESS_FOLDER}/episodes_{{number:06d}}"


def _write_samples(part: Part, blocks: Sequence[Mapping[str, Any]], done: Mapping[int, Any]) -> list[dict[str, Any]]:
    """Write the shards of samples that are not written, and return what is said of all, in order."""
    params, pattern = part.recipe.params, _shard_pattern(part.recipe.params)
    samples: list[Sample] = [
        (pattern.format(number=number), episode["episode"], anchor)
        for number, block in enumerate(blocks)
        for episode in block["episodes"]
        if episode["outcome"] == "written"
        for anchor in episode["anchors"]
    ]
    tasks = [
        Task(number=len(blocks) + number, name=f"shard {number}", weight=len(payload), payload=payload)
        for number, payload in enumerate(group_samples(samples, params.samples_per_shard, params.seed))
    ]
    done = {
        task.number: done[task.number]
        for task in tasks
        if task.number in done and done[task.number]["plan"] == digest_of(task.payload)
    }
    job = SampleJob(recipe=part.recipe, folder=part.folder, num_blocks=len(blocks))
    return _run(job, write_samples, tasks, done, params, title="samples")


def _run(
    job: Any, function: Any, tasks: list[Task], done: Mapping[int, Any], params: RoboticsPreprocessParams, *, title: str
) -> list[dict[str, Any]]:
    return run_unfinished(
        function,
        tasks,
        done,
        shared=job,
        title=title,
        noun="shards",
        num_workers=params.num_workers,
        ray_address=params.ray_address,
    )


def _merge_statistics(part: Part, blocks: Sequence[Mapping[str, Any]]) -> str:
    params = part.recipe.params
    names = [statistics_name(number) for number, block in enumerate(blocks) if block["entry"] is not None]
    merged = merge_parts(part.folder, names, num_workers=params.num_workers, ray_address=params.ray_address)
    return format_statistics(merged)


def _add_seconds(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for result in results:
        for stage, seconds in result["seconds"].items():
            total[stage] = total.get(stage, 0.0) + seconds
    return total


def _check_apart(params: RoboticsPreprocessParams) -> None:
    """Refuse an output folder within a source or around it: a second run would read what the first one wrote."""
    output = absolute_uri(params.output_dir)
    for source in map(absolute_uri, params.source_episodes):
        if f"{output}/".startswith(f"{source}/") or f"{source}/".startswith(f"{output}/"):
            raise ValueError(
                f"{_OUTPUT_FLAG} {output} and --source_episodes {source} lie in each other. Keep them apart."
            )


def _summary(facts: Mapping[str, Any]) -> str:
    return (
        f"{facts['num_episodes']:,} episodes, {facts['num_frames']:,} frames, {facts['num_sequences']:,} samples, "
        f"{facts['num_bytes'] / 1e6:,.1f} MB in {facts['num_shards']:,} shards; {facts['num_failed']:,} failed"
    )


def _to_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
