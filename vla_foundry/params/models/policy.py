"""Params of robot policies: a backbone that encodes the observation, and a head that predicts actions."""

import os
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from vla_foundry.config.schema import BaseParams, Derived, Size, Steps, Unavailable
from vla_foundry.params.facts import Facts
from vla_foundry.params.models.action_heads import ActionHeadParams, RegressionParams, TransformerHeadParams
from vla_foundry.params.models.backbones import BackboneParams
from vla_foundry.params.models.roles import TIMM_PREFIX, ImageInputs, ModelParams, TokenLimits, register_model_params
from vla_foundry.params.models.vlm import VLMParams
from vla_foundry.storage.uri import exists, is_remote

T = TypeVar("T", bound=BaseParams)


@dataclass(frozen=True, kw_only=True)
class RobotPolicyParams(ModelParams):
    """Shared by policies: map images, an instruction and proprioception to a chunk of actions."""

    batch_handler = "diffusion_policy"

    # encodes images and instruction
    vision_language_backbone: BackboneParams
    # predicts actions from the backbone's output
    action_head: ActionHeadParams
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
        return notices

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


def with_model_files(params: T, folder: str, *, only_gone: bool = False) -> T:
    """Return model params whose Hugging Face parts are read from the files that a run keeps in `folder`.

    The files hold architectures, not weights.

    A model with adapters (LoRA) is made from the published weights again, so it keeps its params.

    Args:
        only_gone: only parts that came from a local folder which no longer exists.
    """
    if isinstance(params, ModelParams) and params.lora is not None:
        return params
    changed: dict[str, Any] = {}
    for item in fields(params):
        value: Any = getattr(params, item.name)
        if item.name == "hf_pretrained" and not value.startswith(TIMM_PREFIX):
            if not only_gone:
                changed[item.name] = folder
            elif os.path.isabs(value) and not os.path.exists(value):
                changed |= {item.name: folder, "hf_load_weights": False}
        elif isinstance(value, BaseParams):
            # only a VLM can have two such parts
            below = f"{folder}/{item.name}" if isinstance(params, VLMParams) else folder
            changed[item.name] = with_model_files(value, below, only_gone=only_gone)
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
