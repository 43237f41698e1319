"""Params of robot policies: a backbone that encodes the observation, and a head that predicts actions."""

from dataclasses import dataclass, replace
from typing import Any

from vla_foundry.config.schema import Derived, Unavailable
from vla_foundry.params.facts import Facts
from vla_foundry.params.models.action_heads import ActionHeadParams, RegressionParams
from vla_foundry.params.models.backbones import BackboneParams
from vla_foundry.params.models.roles import ImageInputs, ModelParams, TokenLimits, register_model_params


@dataclass(frozen=True, kw_only=True)
class RobotPolicyParams(ModelParams):
    """Shared by policies: map images, an instruction and proprioception to a chunk of actions."""

    # encodes images and instruction
    vision_language_backbone: BackboneParams
    # predicts actions from the backbone's output
    action_head: ActionHeadParams
    # width of an action; null: as in the data
    action_dim: int | None = None
    # width of a step of proprioception; 0: none; null: as in the data
    proprioception_dim: int | None = None

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
        """Check that action and proprioception widths agree between data and model."""
        for name, found in root.data.robot_widths().items():
            own = getattr(self, name)
            if None not in (own, found) and own != found:
                raise ValueError(
                    f"{path}.{name} ({own}) must be that of the data ({found}). Leave {path}.{name} out, or change "
                    "the fields of the data."
                )
        return []

    def token_limits(self) -> TokenLimits:
        """Return the backbone's token limits."""
        return self.vision_language_backbone.token_limits()

    def image_inputs(self) -> ImageInputs:
        """Return the backbone's image inputs."""
        return self.vision_language_backbone.image_inputs()

    def with_model_files(self, folder: str) -> "RobotPolicyParams":
        """Return these params, with Hugging Face parts read from the files saved with a run."""
        return replace(self, vision_language_backbone=self.vision_language_backbone.with_model_files(folder))


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
