"""Match a config to robot datasets: what to read from each sample (`WindowSpec`), and where the specs contradict it.

Everything is matched by name, and every contradiction is one line. A camera whose name has dots
(`observation.images.top`) may be given by its last part, if no other camera ends in that part.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any

from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.episode_blocks import RESCALED_INTRINSICS
from vla_foundry.robotics.fields import PaddingStrategy, PoseGroup, Window, absolute_field, is_relative_field
from vla_foundry.robotics.spec import DatasetSpec, FieldDescription, NamedSpec

# centers and scales that differ by at most this share of the scale are the same: statistics are stored as decimals
_SAME_SHARE = 1e-4
# columns of published poses: xyz and the 6D rotation
_POSITION_WIDTH, _ROTATION_WIDTH = 3, 6


@dataclass(frozen=True, eq=False, kw_only=True)
class FieldSources:
    """Where a dataset's values for the fields of a config come from."""

    # {array to read: what its numbers mean}
    stored: dict[str, FieldDescription]
    # pose groups whose relative poses are computed from these arrays
    pose_groups: tuple[PoseGroup, ...]
    # {field, in config order: what its numbers mean}; fields that the dataset lacks are absent
    fields: dict[str, FieldDescription]


@dataclass(frozen=True, eq=False, kw_only=True)
class WindowSpec:
    """What a model needs from each sample of a dataset, or from a robot's episode."""

    window: Window
    # values of steps outside the episode
    padding: PaddingStrategy
    actions: FieldSources
    proprioception: FieldSources
    # names in the dataset, in config order
    cameras: tuple[str, ...]
    # frame offsets from the anchor; images are time-major, cameras within a time
    image_indices: tuple[int, ...]
    # (height, width) of each image: a missing image is replaced by a black one of this size
    image_sizes: tuple[tuple[int, int], ...]
    # (name in the config, array) of each camera calibration; only the row at the anchor is read
    calibration: tuple[tuple[str, str], ...] = ()

    @cached_property
    def stored(self) -> dict[str, FieldDescription]:
        """The arrays to read over the window."""
        return self.actions.stored | self.proprioception.stored

    @cached_property
    def pose_groups(self) -> tuple[PoseGroup, ...]:
        """The groups whose relative poses are computed."""
        return tuple(dict.fromkeys([*self.actions.pose_groups, *self.proprioception.pose_groups]))

    @property
    def num_steps_back(self) -> int:
        """How many steps the window reaches back, images included."""
        return max(self.window.past, -min(self.image_indices, default=0))

    @cached_property
    def observed(self) -> dict[str, FieldDescription]:
        """Fields that a robot must measure: proprioception and the reference poses of relative actions."""
        references = [name for group in self.actions.pose_groups for name in group.reference_keys]
        return self.proprioception.stored | {name: self.actions.stored[name] for name in references}

    @cached_property
    def commanded(self) -> dict[str, FieldDescription]:
        """Fields that the robot is commanded with, in the model's order; poses are absolute."""
        names = map(absolute_field, self.actions.fields)
        return {name: self.actions.stored.get(name) or self.actions.fields[name] for name in names}


def find_camera(name: str, spec: DatasetSpec, origin: str) -> str | None:
    """Return the dataset's camera for a name in a config, or None if the dataset does not have it.

    Raises:
        ValueError: several cameras end in the name.
    """
    found = match_camera(name, list(spec.cameras))
    if len(found) > 1:
        raise ValueError(
            f"data.camera_names: '{name}' can be {' or '.join(found)} of {origin}. Give the whole name of one."
        )
    return found[0] if found else None


def match_camera(name: str, cameras: Sequence[str]) -> list[str]:
    """Return the camera of this name, or else those whose last part it is (`top` of `observation.images.top`)."""
    return [name] if name in cameras else [camera for camera in cameras if camera.rpartition(".")[2] == name]


def check_cameras(
    camera_names: Sequence[str], dataset: NamedSpec, *, may_be_missing: bool, depth: Collection[str] = ()
) -> None:
    """Check that a dataset has the cameras, and that those in `depth` and no others are depth cameras.

    Raises:
        ValueError: a camera is missing or of the other kind, or two names mean the same camera.
    """
    found: dict[str, str] = {}
    for name in camera_names:
        camera = find_camera(name, dataset.spec, dataset.name)
        if camera is None and not may_be_missing:
            message = unknown_name_message("data.camera_names: camera", name, list(dataset.spec.cameras))
            raise ValueError(
                f"{message} {dataset.name} has only these; with data.pad_missing_images, missing images are black."
            )
        if camera is not None and dataset.spec.cameras[camera].is_depth != (name in depth):
            if name in depth:
                raise ValueError(f"data.depth_cameras: '{camera}' of {dataset.name} holds colours. Leave it out there.")
            raise ValueError(
                f"data.camera_names: '{camera}' of {dataset.name} holds depth. Leave it out, or say which distances "
                f"matter, in metres: --data.depth_cameras '{{{name}: [0.1, 2.0]}}'."
            )
        if camera is not None and camera in found:
            raise ValueError(
                f"data.camera_names: '{found[camera]}' and '{name}' are both {camera} of {dataset.name}. Remove one."
            )
        if camera is not None:
            found[camera] = name


def check_window(window: Window, image_indices: Sequence[int], dataset: NamedSpec) -> None:
    """Check that a dataset of single windows holds all steps and images; whole episodes can supply any window.

    Raises:
        ValueError: steps or images are missing.
    """
    spec = dataset.spec
    if spec.layout == "episodes":
        return
    for name, asked, held in (
        ("past", window.past, spec.past_lowdim_steps),
        ("future", window.future, spec.future_lowdim_steps),
    ):
        if asked > held:
            raise ValueError(
                f"data.lowdim_{name}_timesteps ({asked}) is more than {dataset.name} holds ({held}). Use "
                f"--data.lowdim_{name}_timesteps {held}, or preprocess with --{name}_lowdim_steps {asked}."
            )
    missing = [index for index in image_indices if index not in spec.image_indices]
    if missing:
        raise ValueError(
            f"data.image_indices has {missing[0]}, but {dataset.name} holds images at "
            f"{', '.join(map(str, spec.image_indices))}. Choose from these, or preprocess with the layout episodes."
        )


def check_instructions(types: Sequence[str], dataset: NamedSpec) -> None:
    """Check that a dataset has instructions of one of the types.

    Raises:
        ValueError: it has none.
    """
    known = dataset.spec.language_types
    if types and not any(name in known for name in types):
        has = f"has only {', '.join(known)}" if known else "has no instructions"
        raise ValueError(
            f"data.language_instruction_types is {', '.join(types)}, but {dataset.name} {has}. Name what it has, or "
            "give an empty list to train without instructions."
        )


def find_fields(
    names: Sequence[str],
    dataset: NamedSpec,
    *,
    pose_groups: Sequence[PoseGroup] | None,
    path: str,
    may_be_missing: bool = False,
) -> FieldSources:
    """Find what to read, and what to compute from it, for the fields of a config.

    Args:
        names: fields, in column order.
        pose_groups: the config's pose groups; None: the dataset's own.
        path: config path of the fields, for messages.
        may_be_missing: leave out a field that the dataset lacks.

    Raises:
        ValueError: a field is unknown, given twice, relative to a relative field, or not in any pose group.
    """
    spec = dataset.spec
    groups = spec.pose_groups if pose_groups is None else tuple(pose_groups)
    stored: list[str] = []
    used: list[PoseGroup] = []
    fields: dict[str, FieldDescription] = {}
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ValueError(f"{path} lists '{name}' twice. Remove one.")
        if name in spec.fields and not (is_relative_field(name) and spec.layout == "episodes"):
            stored.append(name)
            fields[name] = spec.fields[name]
            continue
        base = absolute_field(name)
        if not is_relative_field(name) or (base not in spec.fields and not is_relative_field(base)):
            if may_be_missing:
                continue
            raise ValueError(f"{unknown_name_message(path + ': field', name, sorted(spec.fields))} ({dataset.name})")
        group = _find_group(name, groups, dataset, path)
        used.append(group)
        stored += [group.position_key, group.rotation_key, *group.reference_keys]
        fields[name] = replace(spec.fields[base], representation="relative")
    return FieldSources(
        stored={name: spec.fields[name] for name in stored}, pose_groups=tuple(dict.fromkeys(used)), fields=fields
    )


def _find_group(name: str, groups: Sequence[PoseGroup], dataset: NamedSpec, path: str) -> PoseGroup:
    base, spec = absolute_field(name), dataset.spec
    if is_relative_field(base) or spec.fields[base].representation != "absolute":
        kind = "relative" if is_relative_field(base) else spec.fields[base].representation
        raise ValueError(
            f"{path}: '{name}' would be the relative of '{base}', which is already {kind} in {dataset.name}. "
            f"Use '{base}'."
        )
    group = next((group for group in groups if base in (group.position_key, group.rotation_key)), None)
    if group is None:
        known = ", ".join(group.name for group in groups) or "none"
        raise ValueError(
            f"{path}: '{name}' needs a pose group that holds '{base}'; {dataset.name} has the groups {known}. "
            "Give data.pose_groups [{name, position_key, rotation_key}]."
        )
    for key in (group.position_key, group.rotation_key, *group.reference_keys):
        if key not in spec.fields:
            raise ValueError(
                f"{unknown_name_message(f'pose group {group.name}: field', key, sorted(spec.fields))} ({dataset.name})"
            )
    written = spec.fields[group.rotation_key].rotation
    if written is not None and written != group.rotation_format:
        raise ValueError(
            f"pose group {group.name} says that '{group.rotation_key}' is {group.rotation_format}, but {dataset.name} "
            f"says {written}. Correct data.pose_groups."
        )
    return group


def find_contradictions(described: Sequence[tuple[NamedSpec, Mapping[str, FieldDescription]]]) -> list[str]:
    """Return the contradictions between any two datasets, or a dataset and the run a model starts from; one line each.

    Args:
        described: each of them, and the fields used of it.
    """
    found = []
    for (first, fields), (second, others) in combinations(described, 2):
        rates = first.spec.fps, second.spec.fps
        if None not in rates and rates[0] != rates[1]:
            found.append(
                f"{first.name} has {rates[0]:g} frames a second and {second.name} {rates[1]:g}: the same action would "
                f"take a different time. Preprocess one of them with --target_fps."
            )
        for name in [name for name in fields if name in others]:
            found += _compare_field(name, (first.name, fields[name]), (second.name, others[name]))
    return found


def _compare_field(
    name: str, first: tuple[str, FieldDescription], second: tuple[str, FieldDescription]
) -> Iterator[str]:
    (here, one), (there, other) = first, second
    for key in ("shape", "representation", "rotation", "unit", "frame", "gripper"):
        values = getattr(one, key), getattr(other, key)
        if None not in values and values[0] != values[1]:
            yield (
                f"field '{name}': its {key} is {_say(values[0])} in {here}, and {_say(values[1])} in {there}. "
                "Preprocess one of them again, or use a field on which they agree."
            )
    # other names may be another spelling; the same names in another order are other numbers
    if one.names != other.names and sorted(one.names) == sorted(other.names):
        yield (
            f"field '{name}': its columns are {', '.join(one.names)} in {here}, and {', '.join(other.names)} in "
            f"{there}. Put those of one into the order of the other."
        )


def find_changed_normalization(
    run: str, known: Mapping[str, Any], fields: Mapping[str, Any], *, statistics: str
) -> list[str]:
    """Return how the numbers of fields differ between a run and the data that its model continues on; one line each.

    Args:
        run: folder of the run, or its checkpoint.
        known, fields: {field: its normalization (RoboticsNormalizer.state)} of the run and of the data.
        statistics: the run's statistics file.
    """
    found = []
    for name in sorted(fields.keys() & known.keys()):
        before, now = known[name], fields[name]
        changed = ("rule", before["rule"], now["rule"]) if before["rule"] != now["rule"] else _find_changed(before, now)
        if changed is not None:
            key, one, other = changed
            found.append(
                f"field '{name}' is normalized with {key} {_say(one)} in {run}, and {_say(other)} by the data's "
                f"statistics: the model's numbers would mean something else. Use the run's data.normalization and, for "
                f"each dataset, --data.dataset_statistics {statistics}."
            )
    return found


def _find_changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, float, float] | None:
    """Return (key, before, now) of the first number that differs by more than rounding; steps are aligned by anchor."""
    shift = (before["anchor_index"] or 0) - (now["anchor_index"] or 0)
    for step, scales in enumerate(before["scale"]):
        if not 0 <= step - shift < len(now["scale"]):
            continue
        for key in ("center", "scale"):
            for one, other, unit in zip(before[key][step], now[key][step - shift], scales, strict=False):
                if abs(one - other) > _SAME_SHARE * unit:
                    return key, one, other
    return None


def find_swapped_cameras(camera_names: Sequence[str], run: NamedSpec) -> list[str]:
    """Return a list with one line if the run used the same cameras in another order; else an empty list."""
    known = list(run.spec.cameras)
    if sorted(known) == sorted(camera_names) and known != list(camera_names):
        return [
            f"data.camera_names is {', '.join(camera_names)}, but the model comes from {run.name}, which was trained "
            f"on {', '.join(known)}. Use that order."
        ]
    return []


def width_of(name: str, sources: Sequence[FieldSources], path: str) -> int:
    """Return the number of columns of a field in the sources of each dataset.

    Raises:
        ValueError: no dataset has the field, or they disagree.
    """
    widths = sorted({source.fields[name].width for source in sources if name in source.fields})
    if not widths:
        known = sorted({field for source in sources for field in source.stored})
        raise ValueError(unknown_name_message(f"{path}: field", name, known))
    if len(widths) > 1:
        raise ValueError(f"{path}: '{name}' has {' and '.join(map(str, widths))} columns in different datasets.")
    return widths[0]


def create_window_spec(
    dataset: NamedSpec,
    *,
    window: Window,
    actions: FieldSources,
    proprioception: FieldSources,
    camera_names: Sequence[str],
    image_indices: Sequence[int],
    calibration_fields: Sequence[str],
) -> WindowSpec:
    """Work out what to read from each sample of a dataset that fits the config.

    Raises:
        ValueError: a camera's name is ambiguous.
    """
    spec = dataset.spec
    cameras = [find_camera(name, spec, dataset.name) for name in camera_names]
    # a camera that the dataset lacks gets the size of the first camera
    sizes = {name: (camera.size[1], camera.size[0]) for name, camera in spec.cameras.items()}
    other = next(iter(sizes.values()), (224, 224))
    image_sizes = tuple(other if camera is None else sizes[camera] for camera in cameras)
    return WindowSpec(
        window=window,
        padding=spec.padding_strategy,
        actions=actions,
        proprioception=proprioception,
        cameras=tuple(camera or name for camera, name in zip(cameras, camera_names, strict=True)),
        image_indices=tuple(image_indices),
        image_sizes=image_sizes * len(image_indices),
        calibration=tuple((name, _calibration_array(name, dataset)) for name in calibration_fields),
    )


def _calibration_array(name: str, dataset: NamedSpec) -> str:
    kind, _, camera = name.partition(".")
    # intrinsics of the stored image; published presets use a name that does not occur in shards
    prefix = RESCALED_INTRINSICS if kind == "intrinsics" else f"{kind}."
    return prefix + (find_camera(camera, dataset.spec, dataset.name) or camera)


def create_statistics_window(spec: DatasetSpec, window: Window) -> WindowSpec:
    """Work out what to read from each stored window for statistics: all fields, no images."""
    nothing = FieldSources(stored={}, pose_groups=(), fields={})
    return WindowSpec(
        window=window,
        padding=spec.padding_strategy,
        actions=replace(nothing, stored=spec.fields),
        proprioception=nothing,
        cameras=(),
        image_indices=(),
        image_sizes=(),
    )


def add_live_poses(spec: DatasetSpec, pose_groups: Sequence[PoseGroup]) -> DatasetSpec:
    """Add the absolute poses that a robot reports to the spec of a run whose data hold only relative poses."""
    fields = dict(spec.fields)
    for group in pose_groups:
        if any(name in fields for name in group.relative_keys):
            keys = zip(group.relative_keys, (group.position_key, group.rotation_key), group.reference_keys, strict=True)
            for (relative, *absolute), usual in zip(keys, (_POSITION_WIDTH, _ROTATION_WIDTH), strict=True):
                width = fields[relative].width if relative in fields else usual
                for name in absolute:
                    fields.setdefault(name, FieldDescription(shape=(width,)))
    return replace(spec, fields=fields)


def format_pose_groups(datasets: Sequence[NamedSpec]) -> list[dict[str, str]]:
    """Return the pose groups of all datasets in config form.

    Raises:
        ValueError: two groups with the same name differ.
    """
    groups: dict[str, PoseGroup] = {}
    for name, spec in datasets:
        for group in spec.pose_groups:
            if groups.setdefault(group.name, group) != group:
                raise ValueError(
                    f"pose group {group.name} differs between {datasets[0].name} and {name}. Give data.pose_groups."
                )
    return [{key: value for key, value in asdict(group).items() if value is not None} for group in groups.values()]


def agree_on(path: str, values: Mapping[str, Sequence[object]]) -> list[object]:
    """Return the values at a config path that all datasets agree on, given {dataset: its values}.

    Raises:
        ValueError: the datasets disagree.
    """
    (name, first), *others = values.items()
    for other, value in others:
        if list(value) != list(first):
            raise ValueError(
                f"{path} is {_say(first)} in {name} and {_say(value)} in {other}. Choose one with --{path}."
            )
    return list(first)


def _say(value: object) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    return str(value)
