"""Params of robot data: which cameras, fields and steps make a sample, and how they are normalized."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from vla_foundry.config.schema import (
    BaseParams,
    Derived,
    ImageIndex,
    Location,
    NumTokens,
    Positive,
    Size,
    Steps,
    Unavailable,
)
from vla_foundry.params.data.base import DataParams, register_data_params
from vla_foundry.params.data.images import DataAugmentationParams, DepthRange, ImageProcessorParams
from vla_foundry.params.facts import DatasetFacts, Facts
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics import fit as fit
from vla_foundry.robotics.fields import PoseGroup, Window, image_names, parse_pose_groups
from vla_foundry.robotics.spec import SPEC_NAME, DatasetSpec, FieldDescription, NamedSpec
from vla_foundry.run_folder import NORMALIZER_NAME, STATISTICS_NAME
from vla_foundry.text.chat import INSTRUCTION_PROMPTS, template_fields

if TYPE_CHECKING:
    from vla_foundry.robotics.normalization import NormalizationRule


@dataclass(frozen=True, kw_only=True)
class FieldNormalizationParams(BaseParams):
    """Normalization of the fields that match a name or pattern; null: the general setting."""

    # false: these fields pass unchanged
    enabled: bool = True
    # std: mean and standard deviation; min_max: full range; percentile_*: range of the middle 98% or 90% of values
    method: Literal["std", "min_max", "percentile_1_99", "percentile_5_95"] | None = None
    # one set of statistics for all time steps, or one per step
    scope: Literal["global", "per_timestep"] | None = None
    # smallest scale, in the field's unit
    epsilon: Positive | None = None
    # map ranges to [-1, 1] instead of [0, 1]
    centered_norm: bool | None = None
    # widen smaller ranges (or stds) to this, in the field's unit
    range_floor: Positive | None = None
    # clip normalized values to [-clip, clip]
    clip: Positive | None = None


@dataclass(frozen=True, kw_only=True)
class NormalizationParams(BaseParams):
    """`--data.normalization.` How proprioception and actions are normalized."""

    # false: every field passes unchanged
    enabled: bool = True
    # std: mean and standard deviation; min_max: full range; percentile_*: range of the middle 98% or 90% of values
    method: Literal["std", "min_max", "percentile_1_99", "percentile_5_95"] = "std"
    # one set of statistics for all time steps of a window, or one per step
    scope: Literal["global", "per_timestep"] = "global"
    # smallest scale, in the field's unit
    epsilon: Positive = 1e-8
    # normalize only these fields; empty: all used fields
    include_fields: list[str] = field(default_factory=list)
    # map ranges to [-1, 1] instead of [0, 1]; std is always centered
    centered_norm: bool = False
    # widen smaller ranges (or stds) to this, in the field's unit; null: never
    range_floor: Positive | None = None
    # clip normalized values to [-clip, clip]; null: no clipping
    clip: Positive | None = None
    # overrides by exact field name or glob pattern ("*__rot_6d")
    field_configs: dict[str, FieldNormalizationParams] = field(default_factory=dict)
    # steps before the anchor included in the statistics; null: as in the data
    lowdim_past_timesteps: Steps | None = None
    # steps after the anchor included in the statistics; null: as in the data
    lowdim_future_timesteps: Steps | None = None

    def rules(self, fields: Iterable[str], known_fields: Iterable[str]) -> dict[str, "NormalizationRule"]:
        """Return the rule of each field.

        Args:
            fields: the fields in use.
            known_fields: all fields in the data, to distinguish misspelt patterns from unused ones.

        Raises:
            ValueError: a pattern matches no field, or two patterns disagree about a field.
        """
        used, known = list(fields), list(known_fields)
        for pattern in self.field_configs:
            if not any(_matches(name, pattern) for name in [*used, *known]):
                raise ValueError(unknown_name_message("normalization.field_configs: field", pattern, sorted(known)))
        return {name: self._rule(name) for name in used}

    def _rule(self, name: str) -> "NormalizationRule":
        from vla_foundry.robotics.normalization import NormalizationRule

        own = self._field_config(name)
        is_included = not self.include_fields or name in self.include_fields
        return NormalizationRule(
            enabled=self.enabled and own.enabled and is_included,
            method=own.method or self.method,
            scope=own.scope or self.scope,
            centered=self.centered_norm if own.centered_norm is None else own.centered_norm,
            epsilon=own.epsilon or self.epsilon,
            range_floor=own.range_floor or self.range_floor,
            clip=own.clip or self.clip,
        )

    def _field_config(self, name: str) -> FieldNormalizationParams:
        if name in self.field_configs:
            return self.field_configs[name]
        patterns = [pattern for pattern in self.field_configs if _matches(name, pattern)]
        others = [pattern for pattern in patterns if self.field_configs[pattern] != self.field_configs[patterns[0]]]
        if others:
            raise ValueError(
                f"normalization.field_configs has the patterns '{patterns[0]}' and '{others[0]}', which disagree about "
                f"'{name}'. Narrow one of them, or give '{name}' an entry of its own."
            )
        return self.field_configs[patterns[0]] if patterns else FieldNormalizationParams()


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


@register_data_params("robotics")
@dataclass(frozen=True, kw_only=True)
class RoboticsDataParams(ImageProcessorParams, DataParams):
    """Windows of robot episodes: images, an instruction, proprioception and actions."""

    modalities = ("robotics",)

    # cameras in the model's order; null: all colour and depth_cameras, on which the datasets must agree
    camera_names: list[str] | None = None
    # depth cameras: nearest and farthest distance, metres. The model sees a grey picture, dark near and bright far, and
    # black where nothing was measured; color_jitter leaves it alone
    depth_cameras: dict[str, DepthRange] = field(default_factory=dict)
    # image frames relative to the anchor, ascending; null: as in the data
    image_indices: list[ImageIndex] | None = None
    # replace missing images with black ones; false: a missing image is an error
    pad_missing_images: bool = False
    # hide these black images from the model
    mask_padded_images: bool = False
    # predicted fields, concatenated in this order
    action_fields: list[str] = field(default_factory=list)
    # observed fields, concatenated in this order
    proprioception_fields: list[str] = field(default_factory=list)
    # fill fields that a dataset lacks with 0, and mask them in actions; false: a missing field is an error
    pad_missing_fields: bool = False
    # fields that form poses: {name, position_key, rotation_key, ...}; null: as in the data
    pose_groups: list[dict[str, str]] | None = None
    # steps before the anchor; null: as in the data
    lowdim_past_timesteps: Steps | None = None
    # steps after the anchor; null: as in the data
    lowdim_future_timesteps: Steps | None = None
    # use instructions and a text processor; null: if the model takes text
    use_language: bool | None = None
    # kinds of instructions to draw from, one per sample; empty: none, the prompt has no words
    language_instruction_types: list[str] = field(default_factory=lambda: ["original"])
    # user turns, one drawn per sample; <image> marks where images go, {instruction} is the instruction
    prompts: list[str] = field(default_factory=lambda: list(INSTRUCTION_PROMPTS))
    # longest row of images and text, tokens; null: seq_len
    max_text_seq_len: NumTokens | None = None
    # camera intrinsics, by array name in the data; "intrinsics.CAMERA" follows crops and resizing
    intrinsics_fields: list[str] = field(default_factory=list)
    # camera extrinsics, by array name in the data
    extrinsics_fields: list[str] = field(default_factory=list)
    # how actions and proprioception are normalized
    normalization: NormalizationParams = field(default_factory=NormalizationParams)
    # statistics of each dataset; empty: stats.json beside each manifest
    dataset_statistics: list[Location] = field(default_factory=list)
    # weight every window equally (count), or each dataset by its dataset_weighting (mixture)
    statistics_weighting: Literal["count", "mixture"] = "count"
    # in place of dataset_statistics: those of all robots of a mixture, by manifest; null: data.merge_statistics says
    merged_statistics: dict[str, Location] = field(default_factory=dict)
    # their weights, likewise
    merged_weighting: dict[str, Positive] = field(default_factory=dict)
    # not used: validation uses the training normalization, because the model was trained on it
    val_dataset_statistics: list[Location] = field(default_factory=list)
    # random changes in training; validation uses centre crops
    augmentation: DataAugmentationParams = field(default_factory=DataAugmentationParams)
    # total width of action_fields; null: as in the data
    action_dim: Size | None = None
    # total width of proprioception_fields; null: as in the data
    proprioception_dim: Steps | None = None
    # columns of the model's actions, the last ones padding; null: action_dim, or in a mixture the widest robot's
    padded_action_dim: Size | None = None
    # columns of the model's proprioception, likewise
    padded_proprioception_dim: Steps | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for prompt in self.prompts:
            if set(template_fields(prompt)) - {"instruction"}:
                raise ValueError(f"prompts: {prompt!r} may only have the field {{instruction}}.")
        if not self.prompts:
            raise ValueError("prompts is empty. Give at least one, or leave it out.")
        indices = self.image_indices
        if indices is not None and indices != sorted(set(indices)):
            raise ValueError(f"image_indices {indices} must ascend: images are in temporal order.")
        for name in ("camera_names", "action_fields", "proprioception_fields"):
            values = getattr(self, name) or []
            if twice := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"{name} lists '{twice[0]}' twice. Remove one.")
        for name, (near, far) in self.depth_cameras.items():
            if near >= far:
                raise ValueError(f"depth_cameras.{name} must be [near, far] in metres, got {[near, far]}.")
            if name not in (self.camera_names or [name]):
                raise ValueError(f"depth_cameras has '{name}', which is not one of camera_names {self.camera_names}.")
        if self.mask_padded_images and not self.pad_missing_images:
            raise ValueError("mask_padded_images is true, but pad_missing_images is false. Set both, or none.")
        counts = len(self.dataset_statistics), len(self.dataset_manifest)
        if self.dataset_statistics and counts[0] != counts[1]:
            raise ValueError(
                f"dataset_statistics has {counts[0]} entries and dataset_manifest has {counts[1]}. "
                "Give one for each manifest, or leave it out (null)."
            )
        self.parse_groups()

    def parse_groups(self) -> tuple[PoseGroup, ...] | None:
        """Return the pose groups given here; None: take them from the data."""
        return None if self.pose_groups is None else parse_pose_groups(self.pose_groups)

    @property
    def window(self) -> Window:
        """Return the steps of a sample, once known."""
        assert self.lowdim_past_timesteps is not None, "resolve derives data.lowdim_past_timesteps"
        assert self.lowdim_future_timesteps is not None, "resolve derives data.lowdim_future_timesteps"
        return Window(self.lowdim_past_timesteps, self.lowdim_future_timesteps)

    @property
    def normalization_window(self) -> Window:
        """Return the steps included in the statistics: those of a sample unless normalization sets them."""
        past, future = self.normalization.lowdim_past_timesteps, self.normalization.lowdim_future_timesteps
        window = self.window
        # 0 is a valid number of steps, so test for None
        return Window(window.past if past is None else past, window.future if future is None else future)

    @property
    def image_names(self) -> list[str]:
        """Return a sample's image names in time-major order."""
        return image_names(self.camera_names or [], self.image_indices or [])

    @property
    def depth_ranges(self) -> list[tuple[float, float] | None]:
        """Return nearest and farthest distance of each of a sample's images; None: it is of colour."""
        return [self.depth_cameras.get(name) for name in self.camera_names or []] * len(self.image_indices or [])

    def robot_widths(self) -> dict[str, int | None]:
        """Return `action_dim` and `proprioception_dim` of the model; None: not known yet."""
        own, padded = self.proprioception_dim, self.padded_proprioception_dim
        return {
            "action_dim": self.padded_action_dim or self.action_dim,
            "proprioception_dim": own if padded is None else padded,
        }

    def robot_window(self) -> Window | None:
        """Return the steps of a sample; None: not known yet."""
        return None if None in (self.lowdim_past_timesteps, self.lowdim_future_timesteps) else self.window

    def default_stages(self) -> list[str]:
        """Return the names of the stages of a robot sample."""
        language = [] if self.use_language is False else ["choose_instruction"]
        fields = ["compute_relative_poses", "normalize_actions", "normalize_proprioception"]
        return [*fields, *language, "prepare_images", "encode"]

    def derive(self, root: Any, facts: Facts) -> dict[str, Derived]:
        """Also derive cameras, images, steps, pose groups and widths from the datasets, and the model's processor."""
        model = root.model.image_inputs()
        if self.use_language is None:
            derived = replace(self, use_language=model.takes_text).derive(root, facts)
            return derived | {"use_language": Derived(model.takes_text, "the model")}
        derived = super().derive(root, facts)
        if self.use_language:
            derived |= self.derive_processor(model, facts)
        else:
            derived |= self.derive_colors(facts)
            if self.image_size is None and model.image_size is not None:
                derived["image_size"] = Derived(model.image_size, "the model")
        if not self.dataset_statistics and self.normalization.enabled:
            folders = [manifest.rpartition("/")[:2] for manifest in self.dataset_manifest]
            paths = [f"{folder}{slash}{STATISTICS_NAME}" for folder, slash in folders]
            derived["dataset_statistics"] = Derived(paths, f"{STATISTICS_NAME} beside each manifest")
        return derived | self.derive_from_data(facts.datasets)

    def derive_from_data(self, datasets: Sequence[DatasetFacts]) -> dict[str, Derived]:
        """Derive values from the dataset specs.

        Raises:
            ValueError: the specs disagree about a value that is not given here, or lack a field.
        """
        names = ("camera_names", "image_indices", "lowdim_past_timesteps", "lowdim_future_timesteps", "pose_groups")
        wanted = [name for name in (*names, "action_dim", "proprioception_dim") if getattr(self, name) is None]
        missing = None if datasets else Unavailable("data.dataset_manifest")
        missing = next((item.robotics for item in datasets if isinstance(item.robotics, Unavailable)), missing)
        if missing is not None:
            return {name: Derived(missing, "the data") for name in wanted}
        known = specs_of(datasets)
        cameras = {dataset: self._list_cameras(spec) for dataset, spec in known}
        images = {dataset: spec.image_indices for dataset, spec in known}
        values: dict[str, Any] = {
            "camera_names": lambda: fit.agree_on("data.camera_names", cameras),
            "image_indices": lambda: fit.agree_on("data.image_indices", images),
            # the largest window that fits all datasets
            "lowdim_past_timesteps": lambda: min(spec.past_lowdim_steps for _, spec in known),
            "lowdim_future_timesteps": lambda: min(spec.future_lowdim_steps for _, spec in known),
            "pose_groups": lambda: fit.format_pose_groups(known),
            "action_dim": lambda: self._width("action_fields", known),
            "proprioception_dim": lambda: self._width("proprioception_fields", known),
        }
        return {name: Derived(values[name](), f"the data ({SPEC_NAME})") for name in wanted}

    def _width(self, name: str, datasets: Sequence[NamedSpec]) -> int:
        fields = getattr(self, name)
        if datasets and not fields and name == "action_fields":
            known = ", ".join(datasets[0].spec.fields)
            raise ValueError(f"data.{name} is empty. Name the fields that the model is to predict, out of {known}.")
        sources = [self.find_fields(name, dataset) for dataset in datasets]
        return sum(fit.width_of(field, sources, f"data.{name}") for field in fields)

    def create_window_spec(self, dataset: NamedSpec) -> fit.WindowSpec:
        """Create the spec of what to read from each sample of a dataset; needs resolved params.

        Raises:
            ValueError: the dataset does not fit.
        """
        return fit.create_window_spec(
            dataset,
            window=self.window,
            actions=self.find_fields("action_fields", dataset),
            proprioception=self.find_fields("proprioception_fields", dataset),
            camera_names=self.camera_names or [],
            image_indices=self.image_indices or [],
            calibration_fields=[*self.intrinsics_fields, *self.extrinsics_fields],
        )

    def find_fields(self, name: str, dataset: NamedSpec) -> fit.FieldSources:
        """Find the sources of `action_fields` or `proprioception_fields` in a dataset.

        Raises:
            ValueError: the dataset lacks them.
        """
        return fit.find_fields(
            getattr(self, name),
            dataset,
            pose_groups=self.parse_groups(),
            path=f"data.{name}",
            may_be_missing=self.pad_missing_fields,
        )

    def describe_fields(self, dataset: NamedSpec) -> dict[str, FieldDescription]:
        """Return what a dataset's fields mean, of those that these params name.

        Raises:
            ValueError: the dataset lacks them.
        """
        return self.find_fields("action_fields", dataset).fields | (
            self.find_fields("proprioception_fields", dataset).fields
        )

    def check(self, root: Any, facts: Facts, path: str) -> list[str]:
        """Check that the datasets, the run that the model starts from and these params agree."""
        notices = super().check(root, facts, path)
        if not self.action_fields:
            raise ValueError(f"{path}.action_fields is empty. Name the fields that the model is to predict.")
        model = root.model.image_inputs()
        if self.use_language:
            num_images = max(1, len(self.image_names))
            self.check_processor(model, path, seq_len=self.max_text_seq_len or self.seq_len, num_images=num_images)
        elif self.use_language is False and self.image_size is None and self.camera_names:
            raise ValueError(f"{path}.image_size is missing, and the model does not say. Give --{path}.image_size.")
        if self.val_dataset_statistics:
            notices.append(f"{path}.val_dataset_statistics is not used: validation is normalized as training is.")
        datasets = [item for item in (*facts.datasets, *facts.val_datasets)]
        if not any(item.robotics is None or isinstance(item.robotics, Unavailable) for item in datasets):
            notices += self.check_specs(specs_of(datasets), facts.started_from_robotics)
        notices += self.compare_images(facts, path, is_accepted=self.accept_contradictions)
        # numbers matter only where all of the policy continues, not its backbone alone
        if root.model.resume_from_checkpoint is not None:
            notices += self._compare_normalization(root.model.resume_from_checkpoint, facts)
        return notices

    def _compare_normalization(self, checkpoint: str, facts: Facts) -> list[str]:
        """Return accepted differences between the data's normalization and the checkpoint's, and what is not known.

        Raises:
            ValueError: a difference is not accepted.
        """
        run, known = facts.started_from_robotics, facts.started_from_normalization
        name = checkpoint if run is None else run.name
        if facts.normalization is None:
            return []
        if known is None:
            return [f"{name} keeps no {NORMALIZER_NAME}, so its statistics are not compared with the data's."]
        statistics = f"the run's {STATISTICS_NAME}" if run is None else f"{name}/{STATISTICS_NAME}"
        found = fit.find_changed_normalization(name, known, facts.normalization, statistics=statistics)
        if found and not self.accept_contradictions:
            raise ValueError(f"{found[0]} Or continue as is with --data.accept_contradictions true.")
        return found

    def check_specs(self, datasets: Sequence[NamedSpec], run: NamedSpec | None = None) -> list[str]:
        """Check every dataset against these params, against the others, and against the run a model starts from.

        Returns:
            Accepted contradictions.

        Raises:
            ValueError: a contradiction is not accepted; one line.
        """
        camera_names, image_indices = self.camera_names or [], self.image_indices or []
        described: list[tuple[NamedSpec, dict[str, FieldDescription]]] = []
        for dataset in datasets:
            fit.check_cameras(camera_names, dataset, may_be_missing=self.pad_missing_images, depth=self.depth_cameras)
            fit.check_window(self.window, image_indices, dataset)
            if self.use_language:
                fit.check_instructions(self.language_instruction_types, dataset)
            described.append((dataset, self.describe_fields(dataset)))
        self._check_width("action_dim", "action_fields", datasets)
        self._check_width("proprioception_dim", "proprioception_fields", datasets)
        found = fit.find_contradictions(described)
        if run is not None and datasets:
            found += fit.find_contradictions([(run, run.spec.fields), described[0]])
            found += fit.find_swapped_cameras(camera_names, run)
        if found and not self.accept_contradictions:
            raise ValueError(f"{found[0]} Or continue as is with --data.accept_contradictions true.")
        return found

    def _list_cameras(self, spec: DatasetSpec) -> list[str]:
        found = {each: name for name in self.depth_cameras for each in fit.match_camera(name, list(spec.cameras))}
        return [found.get(name, name) for name, each in spec.cameras.items() if name in found or not each.is_depth]

    def _check_width(self, name: str, fields: str, datasets: Sequence[NamedSpec]) -> None:
        given = getattr(self, name)
        found = self._width(fields, datasets) if datasets else given
        if given is not None and given != found:
            raise ValueError(
                f"data.{name} ({given}) must equal the {found} columns of data.{fields}. Leave data.{name} out."
            )
        padded = getattr(self, f"padded_{name}")
        if padded is not None and padded < found:
            raise ValueError(
                f"data.padded_{name} ({padded}) is less than the {found} columns of data.{fields}. Leave it out."
            )


def specs_of(datasets: Sequence[DatasetFacts]) -> list[NamedSpec]:
    """Return the specs of the robot datasets that are within reach."""
    return [NamedSpec(item.manifest, item.robotics) for item in datasets if isinstance(item.robotics, DatasetSpec)]
