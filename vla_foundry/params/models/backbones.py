"""Params of backbones, which encode a robot's observation (images, instruction) for an action head."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vla_foundry.config.schema import LEGACY, ChoiceParams, Derived, Location, NumTokens, Unavailable
from vla_foundry.params.facts import Facts
from vla_foundry.params.models.roles import Depth, ImageInputs, PublishedParams, TokenLimits, register_model_params
from vla_foundry.params.models.vit import ImageEncoderParams
from vla_foundry.params.models.vlm import VLMHFParams, VLMParams


@dataclass(frozen=True, kw_only=True)
class BackboneParams(ChoiceParams):
    """Role: anything that maps images and an instruction to conditioning tokens."""

    _choice_registry = {}
    choice_path = "model.vision_language_backbone.type"
    native_type = "vlm_foundry_backbone"
    checkpoint_key = "resume_from_checkpoint"

    # run or checkpoint of the wrapped model to load weights from; null: its own initial weights
    resume_from_checkpoint: Location | None = None
    # freeze all of its weights
    freeze: bool = False

    def token_limits(self, facts: Facts) -> TokenLimits:
        """Return which tokens it can take."""
        return TokenLimits()

    def image_inputs(self) -> ImageInputs:
        """Return which images it takes and whether it takes text."""
        return ImageInputs(takes_packed_rows=False)


@dataclass(frozen=True, kw_only=True)
class LanguageBackboneParams(BackboneParams):
    """Shared by vision-language backbones."""

    # what the head sees: an observation token after the text, or every token (prefix)
    conditioning: Literal["observation_token", "prefix"] = "observation_token"
    # number of last layers whose hidden states are concatenated
    num_vlm_layers_to_use: Depth = 4
    # train its output head and final norm too; null: if the data has text or captions besides the robots
    language_loss: bool | None = None

    def derive(self, root: Any, facts: Facts) -> dict[str, Derived]:
        """Derive whether the language model still learns to write."""
        if self.language_loss is not None:
            return {}
        return {"language_loss": Derived(root.data.has_language(), "the data")}

    def check(self, root: Any, facts: Facts, path: str) -> list[str]:
        """Check that the language model has as many layers as the head reads."""
        layers = self.token_limits(facts).num_layers
        if layers is not None and self.num_vlm_layers_to_use > layers:
            raise ValueError(
                f"{path}.num_vlm_layers_to_use ({self.num_vlm_layers_to_use}) is more than the {layers} layers of the "
                f"language model. Use --{path}.num_vlm_layers_to_use {layers} or fewer."
            )
        return super().check(root, facts, path)


@register_model_params("vlm_foundry_backbone")
@dataclass(frozen=True, kw_only=True)
class VLMFoundryBackboneParams(LanguageBackboneParams):
    """Our vision-language model."""

    # its architecture; null: the one of resume_from_checkpoint
    vlm: VLMParams | None = None
    # apply the model's final norm to the last hidden state; false: legacy checkpoints
    final_norm: bool = field(default=True, metadata=LEGACY)

    def derive(self, root: Any, facts: Facts) -> dict[str, Derived]:
        """Also derive the architecture from the run that provides the weights."""
        derived = super().derive(root, facts)
        if self.vlm is not None:
            return derived
        if self.resume_from_checkpoint is None:
            needs = Unavailable("a run of type vlm in resume_from_checkpoint, or an architecture in vlm")
            return derived | {"vlm": Derived(needs, "nothing")}
        found = facts.checkpoint_models.get(self.resume_from_checkpoint)
        if found is None:
            needs = Unavailable(f"the config of {self.resume_from_checkpoint}")
            return derived | {"vlm": Derived(needs, "nothing")}
        if not isinstance(found, VLMParams):
            raise ValueError(
                f"model.vision_language_backbone.resume_from_checkpoint ({self.resume_from_checkpoint}) is of type "
                f"{found.type}, not vlm. Give a run of type vlm."
            )
        # take weights from this run, not from what it started from, and unfreeze what it froze
        fresh: dict[str, Any] = {"resume_from_checkpoint": None, "resume_weights_only": False, "freeze": False}
        parts = {name: replace(getattr(found, name), **fresh) for name in ("vit", "transformer")}
        whole = replace(found, **fresh, **parts)
        return derived | {"vlm": Derived(whole, f"the config of {self.resume_from_checkpoint}")}

    def token_limits(self, facts: Facts) -> TokenLimits:
        """Return the limits of its language model, minus the observation token."""
        if self.vlm is None:
            return TokenLimits()
        limits = self.vlm.token_limits(facts).below("vision_language_backbone.vlm")
        if limits.max_seq_len is None or self.conditioning == "prefix":
            return limits
        return replace(limits, max_seq_len=limits.max_seq_len - 1)

    def image_inputs(self) -> ImageInputs:
        """Return the inputs of its image encoder."""
        inputs = ImageInputs() if self.vlm is None else self.vlm.image_inputs()
        return replace(inputs, takes_packed_rows=False)


@register_model_params("vlm_backbone")
@dataclass(frozen=True, kw_only=True)
class VLMBackboneParams(PublishedParams, LanguageBackboneParams):
    """Any Hugging Face image-text model."""

    # number of tokens; the token tables grow to it; null: that of the data's tokenizer
    vocab_size: NumTokens | None = None

    def derive(self, root: Any, facts: Facts) -> dict[str, Derived]:
        """Also derive the number of tokens from the data's tokenizer."""
        return super().derive(root, facts) | self.model_params().derive(root, facts)

    def model_params(self) -> VLMHFParams:
        """Return the params of the wrapped model."""
        return VLMHFParams(
            hf_pretrained=self.hf_pretrained,
            hf_load_weights=self.hf_load_weights,
            hf_new_weights=self.hf_new_weights,
            vocab_size=self.vocab_size,
        )

    def token_limits(self, facts: Facts) -> TokenLimits:
        """Return the limits of the wrapped model."""
        return self.model_params().token_limits(facts).below("vision_language_backbone")

    def image_inputs(self) -> ImageInputs:
        """Return the image inputs of the model's own processor."""
        return self.model_params().image_inputs()


@register_model_params("clip_backbone")
@dataclass(frozen=True, kw_only=True)
class CLIPBackboneParams(PublishedParams, BackboneParams):
    """A Hugging Face CLIP model: one token for the instruction, and one for each image."""

    # leave the instruction out
    disable_text: bool = False
    # freeze the text encoder
    freeze_text_encoder: bool = False
    # freeze the image encoder
    freeze_image_encoder: bool = False
    # legacy checkpoints: normalise the instruction before its projection, not after
    text_norm_before_projection: bool = field(default=False, metadata=LEGACY)

    def token_limits(self, facts: Facts) -> TokenLimits:
        """Return the number of tokens in the published config; none if it reads no text."""
        return TokenLimits() if self.disable_text else replace(self.published_limits(facts), max_seq_len=None)

    def image_inputs(self) -> ImageInputs:
        """Return the image inputs of the model's own processor."""
        processor = self.hf_pretrained.removeprefix("hf://")
        return ImageInputs(processor=processor, takes_packed_rows=False, takes_text=not self.disable_text)


@register_model_params("vit_backbone")
@dataclass(frozen=True, kw_only=True)
class ViTBackboneParams(BackboneParams):
    """An image encoder alone: all patches of all images; the instruction is not read."""

    # the image encoder
    vit: ImageEncoderParams

    def image_inputs(self) -> ImageInputs:
        """Return the encoder's image inputs."""
        return replace(self.vit.image_inputs(), takes_packed_rows=False, takes_text=False)
