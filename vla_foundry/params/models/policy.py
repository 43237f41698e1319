"""Params of robot policies: a backbone that encodes the observation, and a head that predicts actions."""

import os
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, TypeVar

from vla_foundry.config.schema import BaseParams, Bounds, Derived, Size, Steps, Unavailable
from vla_foundry.params.facts import Facts
from vla_foundry.params.models.action_heads import (
    ActionHeadParams,
    DiscreteBinsParams,
    FastTokensParams,
    RegressionParams,
    TokenHeadParams,
    TransformerHeadParams,
)
from vla_foundry.params.models.backbones import BackboneParams, LanguageBackboneParams
from vla_foundry.params.models.roles import TIMM_PREFIX, ImageInputs, ModelParams, TokenLimits, register_model_params
from vla_foundry.params.models.vlm import VLMParams
from vla_foundry.run_folder import FAST_TOKENIZER_NAME
from vla_foundry.storage.uri import exists, is_remote

T = TypeVar("T", bound=BaseParams)
# bins of actions with standard deviation 1 must reach so far
_LEAST_BIN_LIMIT = 3.0


@dataclass(frozen=True, kw_only=True)
class RobotPolicyParams(ModelParams):
    """Shared by policies: map images, an instruction and proprioception to a chunk of actions."""

    batch_handler = "diffusion_policy"

    # encodes images and instruction
    vision_language_backbone: BackboneParams
    # predicts actions from the backbone's output
    action_head: ActionHeadParams
    # the action head's gradient stops at the backbone, which learns from action_tokens, text and captions alone
    insulate_backbone: bool = False
    # the backbone's language model also learns to write the actions as FAST tokens (Driess et al. 2025); they are
    # not used to act
    action_tokens: FastTokensParams | None = None
    # weight of their loss beside the action head's
    action_tokens_weight: Annotated[float, Bounds(above=0, most=1e6)] = 1.0
    # width of an action; null: as in the data
    action_dim: Size | None = None
    # width of a step of proprioception; 0: none; null: as in the data
    proprioception_dim: Steps | None = None

    def derive(self, root: Any, facts: Facts) -> dict[str, Derived]:
        """Derive the widths of actions and proprioception from the data."""
        derived: dict[str, Derived] = {}
        for name in ("action_dim", "proprioception_dim"):
            if getattr(self, name) is None:
                found = root.data.robot_widths().get(name)
                needs = Unavailable(f"data of type robotics, or --model.{name} N")
                derived[name] = Derived(needs if found is None else found, f"data.{name}")
        return derived

    def check(self, root: Any, facts: Facts, path: str) -> list[str]:
        """Check that action and proprioception widths agree between data and model, and that a window fits the head."""
        notices = super().check(root, facts, path)
        for name, found in root.data.robot_widths().items():
            own = getattr(self, name)
            if None not in (own, found) and own != found:
                raise ValueError(
                    f"{path}.{name} ({own}) must be that of the data ({found}). Leave {path}.{name} out, or change "
                    "the fields of the data."
                )
        head, window = self.action_head, root.data.robot_window()
        if isinstance(head, TransformerHeadParams) and window is not None:
            tokens = head.count_tokens(window, has_proprioception=bool(self.proprioception_dim))
            if tokens > head.transformer.max_seq_len and head.transformer.positional_embedding_type != "none":
                raise ValueError(
                    f"{path}.action_head.transformer.max_seq_len ({head.transformer.max_seq_len}) is less than the "
                    f"{tokens} tokens that {window.past} + 1 + {window.future} steps need. Raise it, or lower "
                    "data.lowdim_past_timesteps or data.lowdim_future_timesteps."
                )
        if isinstance(head, TokenHeadParams) and self.action_tokens is not None:
            raise ValueError(
                f"{path}.action_tokens goes with a head that writes no tokens itself, unlike {head.type}. Leave it out."
            )
        for part, name in ((self.action_head, "action_head"), (self.action_tokens, "action_tokens")):
            if isinstance(part, TokenHeadParams):
                self._check_tokens(part, root, facts, f"{path}.{name}")
        if self.insulate_backbone:
            self._check_insulation(root, path)
        if isinstance(head, TransformerHeadParams) and head.conditioning == "joint_attention":
            self._check_layers(head, path)
        return notices

    def _check_tokens(self, part: TokenHeadParams, root: Any, facts: Facts, path: str) -> None:
        """Check that the backbone can write tokens, and that they are for this data's chunks."""
        backbone = self.vision_language_backbone
        if not isinstance(backbone, LanguageBackboneParams):
            raise ValueError(
                f"{path}.type {part.type} needs a backbone with a language model, not {backbone.type}. Use "
                "vlm_foundry_backbone or vlm_backbone."
            )
        robots = check_chunk_lengths(root.data)
        if isinstance(part, FastTokensParams):
            self._check_tokenizer(part, robots, root, facts, path)
        if isinstance(part, DiscreteBinsParams):
            self._check_bins(part, robots, root, facts, path)

    def _check_tokenizer(
        self, part: FastTokensParams, robots: dict[str, Any], root: Any, facts: Facts, path: str
    ) -> None:
        """Check that a FAST tokenizer is for chunks of the data's size, fields and normalization."""
        chunk, window = facts.action_tokenizers.get(part.tokenizer), root.data.robot_window()
        width = root.data.robot_widths().get("action_dim")
        if chunk is None:
            return
        if window is not None and width is not None:
            found, needed = (chunk.num_steps, chunk.action_dim), (window.future + 1, width)
            fields = tuple(getattr(root.data.main(), "action_fields", chunk.fields))
            if found != needed or (chunk.fields and fields != chunk.fields):
                what = f"{found[0]} steps of {found[1]} values ({', '.join(chunk.fields)})"
                raise ValueError(
                    f"{path}.tokenizer is for {what}, and the data has {needed[0]} of {needed[1]} "
                    f"({', '.join(fields)}). Make one for it with `vla-foundry data action-tokenizer`."
                )
        for name, robot in robots.items():
            own, key = describe_normalization(robot.normalization), f"{_path_of(name)}.normalization"
            if chunk.normalization not in ("", own):
                raise ValueError(
                    f"{path}.tokenizer is for actions normalized by {chunk.normalization}, and {key} is {own}. Change "
                    f"{key}, or make one for it with `vla-foundry data action-tokenizer`."
                )

    def _check_bins(self, part: DiscreteBinsParams, robots: dict[str, Any], root: Any, facts: Facts, path: str) -> None:
        """Check that bins are for the data's steps and values, and that a chunk of them fits a row."""
        window, width = root.data.robot_window(), root.data.robot_widths().get("action_dim")
        if window is not None and width is not None:
            steps, limits = window.future + 1, self.token_limits(facts)
            if part.num_steps not in (None, steps):
                raise ValueError(
                    f"{path}.num_steps ({part.num_steps}) must be data.lowdim_future_timesteps + 1 ({steps}). Leave it "
                    "out."
                )
            if limits.max_seq_len is not None and steps * width >= limits.max_seq_len:
                raise ValueError(
                    f"{path}.type {part.type} writes {steps} steps of {width} values as {steps * width} tokens, but "
                    f"{limits.source}max_seq_len has room for {limits.max_seq_len} with images and text. Lower "
                    "data.lowdim_future_timesteps, or use fast_tokens."
                )
        low, high = part.limits
        for name, robot in robots.items():
            normalization, key = robot.normalization, f"{_path_of(name)}.normalization"
            if normalization.method == "std" and normalization.enabled and min(-low, high) < _LEAST_BIN_LIMIT:
                raise ValueError(
                    f"{path}.limits ({list(part.limits)}) cut off many actions normalized by their standard deviation. "
                    f"Use --{key}.method percentile_1_99 --{key}.centered_norm true, or --{path}.limits '[-5, 5]'."
                )

    def _check_layers(self, head: TransformerHeadParams, path: str) -> None:
        """Check that the backbone shows the head its layers at all tokens."""
        backbone = self.vision_language_backbone
        if not isinstance(backbone, LanguageBackboneParams) or backbone.conditioning != "prefix":
            raise ValueError(
                f"{path}.action_head.conditioning joint_attention reads layers of a language model at all tokens. Use "
                f"--{path}.vision_language_backbone.conditioning prefix, with vlm_foundry_backbone or vlm_backbone."
            )
        if backbone.num_vlm_layers_to_use > head.transformer.n_layers:
            raise ValueError(
                f"{path}.vision_language_backbone.num_vlm_layers_to_use ({backbone.num_vlm_layers_to_use}) must be at "
                f"most {path}.action_head.transformer.n_layers ({head.transformer.n_layers}): each block reads a layer."
            )

    def _check_insulation(self, root: Any, path: str) -> None:
        if isinstance(self.action_head, TokenHeadParams):
            raise ValueError(
                f"{path}.insulate_backbone is true, but {self.action_head.type} acts with the backbone itself. Leave "
                "it out, or use another head."
            )
        learns = self.action_tokens is not None or root.data.has_language()
        if not learns and not self.vision_language_backbone.freeze and not self.freeze:
            raise ValueError(
                f"{path}.insulate_backbone is true, so nothing trains the backbone. Give {path}.action_tokens, text or "
                f"captions in data.datasets, or --{path}.vision_language_backbone.freeze true."
            )

    def token_limits(self, facts: Facts) -> TokenLimits:
        """Return the backbone's token limits."""
        return self.vision_language_backbone.token_limits(facts)

    def image_inputs(self) -> ImageInputs:
        """Return the backbone's image inputs."""
        return self.vision_language_backbone.image_inputs()


@register_model_params("diffusion_policy")
@dataclass(frozen=True, kw_only=True)
class DiffusionPolicyParams(RobotPolicyParams):
    """A vision-language-action model (VLA) whose head turns noise into a chunk of actions."""


@register_model_params("regression_policy")
@dataclass(frozen=True, kw_only=True)
class RegressionPolicyParams(RobotPolicyParams):
    """A vision-language-action model (VLA) whose head predicts a chunk of actions in one pass, without noise."""

    # predicts actions from the backbone's output
    action_head: RegressionParams


def check_chunk_lengths(data: Any) -> dict[str, Any]:
    """Return the params of the robots by name, which all predict equally many steps, as action tokens need it.

    Raises:
        ValueError: they predict different numbers of steps.
    """
    robots = {name: robot for name, robot in data.parts().items() if robot.robot_window() is not None}
    futures = {name: robot.robot_window().future for name, robot in robots.items()}
    if len(set(futures.values())) > 1:
        steps = ", ".join(f"{name} {future}" for name, future in futures.items())
        raise ValueError(
            "Action tokens are for chunks of one length, but data.datasets.NAME.lowdim_future_timesteps differ "
            f"({steps}). Make them equal."
        )
    return robots


def _path_of(part: str) -> str:
    """Return the config path of a dataset by its name in `DataParams.parts`."""
    return "data" if part == "data" else f"data.datasets.{part}"


def describe_normalization(params: Any) -> str:
    """Return what normalized actions mean, in a few words; `params` is data.normalization."""
    if not params.enabled:
        return "nothing"
    centered = ", centered" if params.centered_norm or params.method == "std" else ""
    return f"{params.method}, {params.scope}{centered}"


def with_model_files(params: T, folder: str, *, only_gone: bool = False, only_tokenizers: bool = False) -> T:
    """Return model params whose Hugging Face parts and action tokenizers are the files that a run keeps in `folder`.

    The files hold architectures, not weights.

    A model with adapters (LoRA) is made from the published weights again, so it keeps its Hugging Face parts.

    Args:
        only_gone: only parts that came from a local folder which no longer exists.
        only_tokenizers: only action tokenizers.
    """
    only_tokenizers = only_tokenizers or (isinstance(params, ModelParams) and params.lora is not None)
    changed: dict[str, Any] = {}
    for item in fields(params):
        value: Any = getattr(params, item.name)
        if item.name == "tokenizer" and isinstance(params, FastTokensParams):
            if not only_gone or not (is_remote(value) or exists(value)):
                changed[item.name] = f"{folder}/{FAST_TOKENIZER_NAME}"
        elif item.name == "hf_pretrained" and not only_tokenizers and not value.startswith(TIMM_PREFIX):
            if not only_gone:
                changed[item.name] = folder
            elif os.path.isabs(value) and not os.path.exists(value):
                changed |= {item.name: folder, "hf_load_weights": False}
        elif isinstance(value, BaseParams):
            # only a VLM can have two such parts
            below = f"{folder}/{item.name}" if isinstance(params, VLMParams) else folder
            changed[item.name] = with_model_files(value, below, only_gone=only_gone, only_tokenizers=only_tokenizers)
    return replace(params, **changed)


def without_starts(params: T, *, only_gone: bool = False) -> T:
    """Return model params that describe the architecture alone: no part names a checkpoint to start from.

    A model with adapters (LoRA) is nothing without its start, and keeps it.

    Args:
        only_gone: drop only local checkpoints that no longer exist.
    """
    if isinstance(params, ModelParams) and params.lora is not None:
        return params
    changed: dict[str, Any] = {}
    for item in fields(params):
        value: Any = getattr(params, item.name)
        if isinstance(value, BaseParams):
            changed[item.name] = without_starts(value, only_gone=only_gone)
        elif item.name == "resume_from_checkpoint" and value is not None:
            changed[item.name] = value if only_gone and (is_remote(value) or exists(value)) else None
    if isinstance(params, ModelParams) and changed.get("resume_from_checkpoint", "") is None:
        changed["resume_weights_only"] = False
    return replace(params, **changed)


def list_starts(params: BaseParams) -> list[str]:
    """Return the checkpoints and published models that the weights of a model and its parts come from."""
    starts: list[str] = []
    for item in fields(params):
        value: Any = getattr(params, item.name)
        if isinstance(value, BaseParams):
            starts += list_starts(value)
        elif item.name in ("resume_from_checkpoint", "hf_pretrained") and value is not None:
            starts.append(value)
    return starts
