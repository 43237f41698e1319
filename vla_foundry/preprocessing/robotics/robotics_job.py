"""`vla-foundry preprocess robotics`: find episodes, write them in one pass, merge their statistics, publish.

Each task writes a shard of whole episodes and its statistics. In layout "episodes" these shards are the dataset; in
layout "samples" a second round of tasks copies every sample out of them, in shuffled order.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vla_foundry.params.commands.preprocessing_robotics import RoboticsPreprocessParams
from vla_foundry.preprocessing.output import REPORT_NAME, OutputFolder, digest_of
from vla_foundry.preprocessing.robotics.converters.converter import EpisodeRef, create_converter
from vla_foundry.preprocessing.robotics.episode_shards import ShardJob, statistics_name, write_episode_shard
from vla_foundry.preprocessing.robotics.recipe import (
    Recipe,
    check_refs,
    count_frames,
    create_recipe,
    group_episodes,
    split_refs,
)
from vla_foundry.preprocessing.robotics.report import (
    METADATA_NAME,
    Report,
    create_spec,
    describe_processing,
    format_config,
)
from vla_foundry.preprocessing.robotics.sample_shards import Sample, group_samples, write_sample_shard
from vla_foundry.preprocessing.robotics.statistics import merge_parts
from vla_foundry.preprocessing.tasks import Task, ray_cluster, run_unfinished
from vla_foundry.progress import say
from vla_foundry.robotics.spec import SPEC_NAME, format_spec
from vla_foundry.robotics.statistics_format import format_statistics
from vla_foundry.run_folder import PREPROCESSING_CONFIG_NAME, STATISTICS_NAME
from vla_foundry.shards import MANIFEST_NAME, ManifestEntry
from vla_foundry.storage.uri import absolute_uri, exists, join_uri, write_text

COMMAND = "preprocess robotics"
# raise it when the same settings give other bytes than before
SETTINGS_VERSION = 1
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


@dataclass(frozen=True, kw_only=True)
class Part:
    """Episodes that become one dataset: all of them, or the training or the validation split."""

    # "", "train" or "validation"
    name: str
    refs: list[EpisodeRef]
    recipe: Recipe
    # fingerprints of the source files, and of their versions
    source: dict[str, Any]
    versions: str

    @property
    def folder(self) -> str:
        """The output folder."""
        return join_uri(absolute_uri(self.recipe.params.output_dir), self.name)

    @property
    def job(self) -> ShardJob:
        """What the tasks share."""
        return ShardJob(recipe=self.recipe, folder=self.folder, versions=self.versions)


def preprocess_robotics(params: RoboticsPreprocessParams) -> None:
    """Write recordings as one dataset, or as two with validation; resume where a killed run stopped.

    Raises:
        ValueError: anything the user can fix; too many episodes failed.
        FileNotFoundError: a source does not exist.
    """
    _check_apart(params)
    converter = create_converter(params)
    refs = check_refs(converter.discover_episodes(), params.max_episodes_to_process)
    recipe = create_recipe(params, converter)
    source, versions = converter.describe_source(), converter.digest_versions()
    parts = [
        Part(name=name, refs=part, recipe=recipe, source=source, versions=versions)
        for name, part in split_refs(refs, params).items()
    ]
    for part in parts:
        if part.name and exists(join_uri(params.output_dir, MANIFEST_NAME)):
            raise ValueError(f"--output_dir {params.output_dir} holds a dataset that is not split. Choose another.")
        _write_part(part)


def _write_part(part: Part) -> None:
    output = OutputFolder(part.folder, _create_settings(part), flag="--output_dir")
    with output.begin(overwrite=part.recipe.params.overwrite) as done:
        if done is None:
            say(_summary(output.read_facts()))
        else:
            _write_dataset(part, output, done)


def _write_dataset(part: Part, output: OutputFolder, done: Mapping[int, Any]) -> None:
    params, started = part.recipe.params, time.monotonic()
    if any(_is_outdated(part, result) for result in done.values()):
        say("Source files were modified since the job was begun: what was made of them is made again.")
        done = {number: result for number, result in done.items() if not _is_outdated(part, result)}
    with ray_cluster(params.num_workers, params.ray_address):
        written = _write_episodes(part, done)
        seconds = _add_seconds(written)
        report = Report([episode for shard in written for episode in shard["episodes"]], params.source_episodes)
        for line in report.describe():
            say(line)
        report_uri = join_uri(part.folder, REPORT_NAME)
        write_text(report_uri, _to_json(report.to_json(seconds)))
        report.check(params.max_failed_fraction, report_uri)
        spec = create_spec(part.recipe, report)
        shards = written
        if params.layout == "samples":
            shards = _write_samples(part, written, done)
            seconds |= _add_seconds(shards)
        files = {
            SPEC_NAME: format_spec(spec),
            PREPROCESSING_CONFIG_NAME: format_config(part.recipe),
            METADATA_NAME: _to_json(describe_processing(part.recipe, part.source, report)),
        }
        if params.compute_statistics:
            merging = time.monotonic()
            names = [statistics_name(number) for number, shard in enumerate(written) if shard["entry"] is not None]
            merged = merge_parts(part.folder, names, num_workers=params.num_workers, ray_address=params.ray_address)
            files[STATISTICS_NAME] = format_statistics(merged)
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
        "num_failed": counts["failed"],
    }
    encoded = {name: text.encode("utf-8") for name, text in files.items()}
    facts = output.publish(entries, facts=facts, counts=counts, files=encoded)
    say(f"{part.folder}: {_summary(facts)}; {time.monotonic() - started:.1f} s")


def _is_outdated(part: Part, result: Mapping[str, Any]) -> bool:
    return result.get("versions", part.versions) != part.versions


def _create_settings(part: Part) -> dict[str, Any]:
    """Return everything that determines the bytes of the dataset, without paths of this machine."""
    params, recipe = part.recipe.params, part.recipe
    values = {
        name: os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value
        for name, value in asdict(params).items()
        if name not in _PLAIN_FIELDS
    }
    episodes = [(ref.episode_id, ref.task, ref.num_frames) for ref in part.refs]
    described = {name: asdict(field) for name, field in recipe.fields.items()}
    for field in described.values():
        del field["names"]  # they shape no number
    groups = [asdict(group) for group in recipe.pose_groups]
    return {
        "command": COMMAND,
        "version": SETTINGS_VERSION,
        "type": params.type,
        "part": part.name,
        "params": values,
        "cameras": list(recipe.cameras),
        "fields": digest_of([described, groups]),
        "source": {**part.source, "episodes": len(episodes), "episodes_digest": digest_of(episodes)},
    }


def _write_episodes(part: Part, done: Mapping[int, Any]) -> list[dict[str, Any]]:
    """Write the missing shards of episodes, and return the results of all, in order."""
    tasks = [
        Task(number=number, name=f"shard {number} ({refs[0].episode_id}, ...)", weight=count_frames(refs), payload=refs)
        for number, refs in enumerate(group_episodes(part.refs, part.recipe.params))
    ]
    # retry failures: their source may have been repaired
    done = {
        task.number: done[task.number]
        for task in tasks
        if task.number in done and not any(episode["outcome"] == "failed" for episode in done[task.number]["episodes"])
    }
    return _run(part, write_episode_shard, tasks, done, title=" ".join(filter(None, (COMMAND, part.name))))


def _write_samples(part: Part, written: Sequence[Mapping[str, Any]], done: Mapping[int, Any]) -> list[dict[str, Any]]:
    """Write the missing shards of samples, and return the results of all, in order."""
    params = part.recipe.params
    samples: list[Sample] = [
        (part.job.episode_shard(number), episode["episode"], anchor)
        for number, shard in enumerate(written)
        for episode in shard["episodes"]
        if episode["outcome"] == "written"
        for anchor in episode["anchors"]
    ]
    groups = group_samples(samples, params.samples_per_shard, params.seed)
    tasks = [
        Task(
            number=len(written) + number,
            name=f"shard {number}",
            weight=len(group),
            payload=(f"shard_{number:06d}", group),
        )
        for number, group in enumerate(groups)
    ]
    done = {
        task.number: done[task.number]
        for task, group in zip(tasks, groups, strict=True)
        if task.number in done and done[task.number]["plan"] == digest_of(group)
    }
    return _run(part, write_sample_shard, tasks, done, title="samples")


def _run(part: Part, function: Any, tasks: list[Task], done: Mapping[int, Any], *, title: str) -> list[dict[str, Any]]:
    return run_unfinished(
        function,
        tasks,
        done,
        shared=part.job,
        title=title,
        noun="shards",
        num_workers=part.recipe.params.num_workers,
        ray_address=part.recipe.params.ray_address,
    )


def _add_seconds(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    total = Counter[str]()
    for result in results:
        total.update(result["seconds"])
    return dict(total)


def _check_apart(params: RoboticsPreprocessParams) -> None:
    """Refuse an output folder within a source or around it: a second run would read the output of the first."""
    output = absolute_uri(params.output_dir)
    for source in map(absolute_uri, params.source_episodes):
        if f"{output}/".startswith(f"{source}/") or f"{source}/".startswith(f"{output}/"):
            raise ValueError(
                f"--output_dir {output} and --source_episodes {source}: one contains the other. Keep them apart."
            )


def _summary(facts: Mapping[str, Any]) -> str:
    return (
        f"{facts['num_episodes']:,} episodes, {facts['num_frames']:,} frames, {facts['num_sequences']:,} samples, "
        f"{facts['num_bytes'] / 1e6:,.1f} MB in {facts['num_shards']:,} shards; {facts['num_failed']:,} failed"
    )


def _to_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
