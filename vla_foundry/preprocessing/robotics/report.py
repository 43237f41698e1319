"""Report on a robotics job: counts by reason, failures by name, and the metadata files beside the shards."""

import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any

from vla_foundry.config.loading import dump_value
from vla_foundry.params.commands.preprocessing_robotics import RoboticsPreprocessParams
from vla_foundry.preprocessing.output import digest_of, read_versions
from vla_foundry.preprocessing.robotics.recipe import Recipe
from vla_foundry.provenance import has_uncommitted_changes, read_git_commit
from vla_foundry.robotics.spec import CameraDescription, DatasetSpec, FieldDescription
from vla_foundry.storage.uri import is_remote, name_of

METADATA_NAME = "processing_metadata.json"
# episodes named for each reason in a printed line
_MAX_EXAMPLES = 3
# why frames give no samples, as printed
_DROPPED = {
    "padding": "their windows reach too far beyond the episode (--max_padding_left and _right)",
    "still": "nothing moves",
}


class Report:
    """What became of the episodes of a job.

    Args:
        episodes: results of the tasks (episode_shards.write_episode_shard), in the order of the dataset.
        source_episodes: as in the params; paths are shown relative to them.
    """

    def __init__(self, episodes: Sequence[Mapping[str, Any]], source_episodes: Sequence[str]) -> None:
        self.written = [episode for episode in episodes if episode["outcome"] == "written"]
        self.failed = [episode for episode in episodes if episode["outcome"] == "failed"]
        self.left_out = [episode for episode in episodes if episode["outcome"] == "left out"]
        self.num_episodes = len(episodes)
        self._sources = source_episodes

    @property
    def num_samples(self) -> int:
        """Number of written samples."""
        return sum(episode["samples"] for episode in self.written)

    @property
    def dropped(self) -> dict[str, int]:
        """Anchors left out of written episodes, by reason."""
        counts = Counter[str]()
        for episode in self.written:
            counts.update(episode["dropped"])
        return dict(sorted(counts.items()))

    def counts(self) -> dict[str, Any]:
        """Return the counts that depend on the source and the params alone."""
        return {
            "episodes": self.num_episodes,
            "written": len(self.written),
            "failed": len(self.failed),
            "left_out": len(self.left_out),
            "frames": sum(episode["frames"] for episode in self.written),
            "samples": self.num_samples,
            "dropped_samples": self.dropped,
        }

    def to_json(self, seconds: Mapping[str, float]) -> dict[str, Any]:
        """Return report.json; `seconds` holds the time of each stage, summed over all workers."""
        return {
            **self.counts(),
            "failed_episodes": [self._name(episode) for episode in self.failed],
            "left_out_episodes": [self._name(episode) for episode in self.left_out],
            "seconds": {stage: round(value, 3) for stage, value in sorted(seconds.items())},
        }

    def _name(self, episode: Mapping[str, Any]) -> dict[str, Any]:
        source, reason = _show_path(episode["source"], self._sources), episode["reason"]
        for root in filter(os.path.isabs, self._sources):
            # a reason names files
            reason = reason.replace(f"{root.rstrip('/')}/", f"{_show_root(root)}/")
        return {"episode": episode["episode"], "source": source, "reason": reason}

    def describe(self) -> list[str]:
        """Return lines to print."""
        lines = [f"failed: {episode['episode']} ({episode['source']}): {episode['reason']}" for episode in self.failed]
        reasons = Counter(episode["reason"] for episode in self.left_out)
        for reason, count in sorted(reasons.items()):
            names = [episode["episode"] for episode in self.left_out if episode["reason"] == reason][:_MAX_EXAMPLES]
            lines.append(f"left out: {count:,} episodes, {reason}: {', '.join(names)}{', ...' if count > 3 else ''}")
        lines += [f"skipped: {count:,} frames, {_DROPPED[reason]}" for reason, count in self.dropped.items() if count]
        return lines

    def check(self, max_failed_fraction: float, report_uri: str) -> None:
        """Stop if too many episodes failed.

        Raises:
            ValueError: they did, or no sample was written.
        """
        if len(self.failed) > max_failed_fraction * self.num_episodes:
            first = self.failed[0]
            raise ValueError(
                f"{len(self.failed):,} of {self.num_episodes:,} episodes failed, the first {first['episode']} "
                f"({first['source']}): {first['reason']} Nothing is published; {report_uri} names them all. Repair or "
                f"remove them, or give --max_failed_fraction {len(self.failed) / self.num_episodes:.2g}."
            )
        if not self.written:
            reasons = ", ".join(sorted({episode["reason"] for episode in self.left_out})) or "there are no episodes"
            raise ValueError(f"source_episodes gave no sample: {reasons}. {report_uri} names the episodes.")


def create_spec(recipe: Recipe, report: Report) -> DatasetSpec:
    """Describe the dataset.

    Raises:
        ValueError: episodes differ in their rate, or in the size or kind of a camera's images.
    """
    params, first = recipe.params, report.written[0]
    cameras = {}
    for episode in report.written:
        if episode["fps"] != first["fps"]:
            raise ValueError(
                f"episode {episode['episode']} has {episode['fps']:g} frames per second, {first['episode']} "
                f"{first['fps']:g}. Bring them to one rate: --target_fps {min(episode['fps'], first['fps']):g}."
            )
    for name in recipe.cameras:
        sizes = {tuple(episode["cameras"][name]["size"]): episode["episode"] for episode in report.written}
        if len(sizes) > 1:
            (width, height), other = list(sizes)[:2]
            raise ValueError(
                f"camera '{name}' has {width} x {height} pixels in episode {sizes[width, height]}, {other[0]} x "
                f"{other[1]} in {sizes[other]}. Bring them to one size with --resize_images_size."
            )
        originals = {tuple(episode["cameras"][name]["original_size"]) for episode in report.written}
        extensions = {episode["cameras"][name]["extension"] for episode in report.written}
        if len(extensions) > 1:
            raise ValueError(f"camera '{name}' is colour in some episodes and depth in others. Leave it out.")
        ((width, height),) = sizes
        cameras[name] = CameraDescription(
            size=(width, height),
            original_size=originals.pop() if len(originals) == 1 else None,
            is_depth=extensions == {"png"},
        )
    return DatasetSpec(
        layout=params.layout,
        fps=first["fps"],
        past_lowdim_steps=params.past_lowdim_steps,
        future_lowdim_steps=params.future_lowdim_steps,
        image_indices=tuple(params.image_indices),
        padding_strategy=params.padding_strategy,
        cameras=cameras,
        fields=recipe.fields | _relative_fields(recipe),
        pose_groups=recipe.pose_groups,
        language_types=tuple(sorted({kind for episode in report.written for kind in episode["language_types"]})),
    )


def _relative_fields(recipe: Recipe) -> dict[str, FieldDescription]:
    described = {}
    for group in recipe.pose_groups:
        for name, key in zip(group.relative_keys, (group.position_key, group.rotation_key), strict=True):
            field = recipe.fields[key]
            described[name] = FieldDescription(
                shape=field.shape,
                dtype=field.dtype,
                unit=field.unit,
                frame=f"{group.reference_keys[0]} at the anchor",
                representation="relative",
                rotation=group.rotation_format if key == group.rotation_key else None,
                role=field.role,
            )
    return described


def format_config(recipe: Recipe) -> str:
    """Format preprocessing_config.yaml: every param under its published key; absolute paths keep their last part."""
    params = recipe.params
    values = {"type": params.type, **asdict(params), "camera_names": list(recipe.cameras)}
    values["source_episodes"] = [_show_root(source) for source in params.source_episodes]
    values = {key: _show_root(value) if isinstance(value, str) else value for key, value in values.items()}
    return dump_value(values)


def describe_processing(recipe: Recipe, source: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Return processing_metadata.json: the published keys, without user, host, time and paths of this machine."""
    counts = report.counts()
    versions = read_versions()
    episodes = sorted(episode["episode"] for episode in report.written)
    return {
        "metadata_version": "2.0",
        "command_line": {
            "script_name": "vla-foundry preprocess robotics",
            "full_command": _format_command(recipe.params),
        },
        "environment": {"python_version": versions["python"], "package_versions": versions},
        "git_info": {
            "commit_hash": read_git_commit(),
            "has_uncommitted_changes": has_uncommitted_changes("vla_foundry"),
        },
        "source_data": {**source, "num_episodes": report.num_episodes, "episode_list_hash": digest_of(episodes)},
        "processing": {
            "total_samples_created": counts["samples"],
            "sample_counts": {
                "total_potential_samples": counts["samples"] + sum(report.dropped.values()),
                "still_samples_filtered": report.dropped.get("still", 0),
                "padding_samples_filtered": report.dropped.get("padding", 0),
            },
        },
    }


def _format_command(params: RoboticsPreprocessParams) -> str:
    """Return the command that gives these params: all flags that differ from their defaults."""
    words = ["vla-foundry", "preprocess", "robotics", "--type", params.type]
    for field in fields(params):
        value = getattr(params, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if value == default or field.name in ("num_workers", "ray_address", "overwrite"):
            continue
        words += [
            f"--{field.name}",
            *(_show_root(str(item)) for item in (value if isinstance(value, list) else [value])),
        ]
    return shlex.join(words)


def _show_path(path: str, roots: Sequence[str]) -> str:
    """Show a path relative to the root that contains it, without the folders above."""
    for root in roots:
        if path.startswith(root.rstrip("/")):
            return _show_root(root) + path[len(root.rstrip("/")) :]
    return _show_root(path)


def _show_root(path: str) -> str:
    return path if is_remote(path) or not os.path.isabs(path) else name_of(path)
