"""Params of vision-language models: built from an image encoder and a language model, or taken from Hugging Face."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from vla_foundry.config.schema import Bounds, Derived, NumTokens, Unavailable
from vla_foundry.params.facts import Facts
from vla_foundry.params.models.roles import (
    ImageInputs,
    LanguageModelParams,
    ModelParams,
    PublishedParams,
    TokenLimits,
    register_model_params,
)
from vla_foundry.params.models.vit import ImageEncoderParams, ViTParams

# grown token tables have a multiple of this many rows, for fast matrix products
ROWS_MULTIPLE = 64


@register_model_params("vlm")
@dataclass(frozen=True, kw_only=True)
class VLMParams(ModelParams):
    """Image encoder, projector and language model; both models can start from checkpoints or be frozen."""

    batch_handler = "vlm"

    # image encoder
    vit: ImageEncoderParams
    # language model
    transformer: LanguageModelParams
    # token replaced by image features; null: the image token of the data's processor
    image_token_id: Annotated[int, Bounds(least=0, below=100_000_000)] | None = None
    # number of tokens; the token tables grow to it; null: that of the data's tokenizer
    vocab_size: NumTokens | None = None
    # whether neighbouring image tokens see only earlier ones (causal) or each other (bidirectional)
    image_attention: Literal["causal", "bidirectional"] = "causal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.vit, ViTParams) and self.vit.output == "class_token":
            raise ValueError("vit.output 'class_token' has no patches for the language model. Set vit.output tokens.")

    def derive(self, root: Any, facts: Facts) -> dict[str, Derived]:
        """Derive the image token and the number of tokens from the data's tokenizer."""
        derived: dict[str, Derived] = {}
        tokenizer = facts.tokenizer
        source = "the data's tokenizer" if tokenizer is None else f"tokenizer {tokenizer.name}"
        if self.image_token_id is None:
            found = None if tokenizer is None else tokenizer.image_token_id
            needs = Unavailable("data with a tokenizer that has an image token, or --model.image_token_id N")
            derived["image_token_id"] = Derived(needs if found is None else found, source)
        if self.vocab_size is None and tokenizer is not None:
            derived["vocab_size"] = Derived(tokenizer.vocab_size, source)
        return derived

    def check(self, root: Any, facts: Facts, path: str) -> list[str]:
        """Check that the image token matches the data's."""
        notices = super().check(root, facts, path)
        given = facts.tokenizer.image_token_id if facts.tokenizer is not None else None
        if None not in (given, self.image_token_id) and given != self.image_token_id:
            raise ValueError(
                f"{path}.image_token_id ({self.image_token_id}) must be the data's image token ({given}). "
                f"Leave {path}.image_token_id out."
            )
        return notices

    def token_limits(self, facts: Facts) -> TokenLimits:
        """Return the limits of its language model, whose table grows to `vocab_size`."""
        return _grow(self.transformer.token_limits(facts).below("transformer"), self.vocab_size)

    def image_inputs(self) -> ImageInputs:
        """Return the inputs of its image encoder."""
        return self.vit.image_inputs()


@register_model_params("vlm_hf")
@dataclass(frozen=True, kw_only=True)
class VLMHFParams(PublishedParams, ModelParams):
    """Any Hugging Face image-text model (AutoModelForImageTextToText)."""

    batch_handler = "vlm_hf"

    # number of tokens; the token tables grow to it; null: as published
    vocab_size: NumTokens | None = None

    def token_limits(self, facts: Facts) -> TokenLimits:
        """Return the limits in the published config; the token table grows to `vocab_size`."""
        return _grow(self.published_limits(facts), self.vocab_size)

    def image_inputs(self) -> ImageInputs:
        """Return the image inputs of the model's own processor."""
        return ImageInputs(processor=self.hf_pretrained.removeprefix("hf://"), takes_packed_rows=False)

    def derive(self, root: Any, facts: Facts) -> dict[str, Derived]:
        """Derive the number of tokens from the data's tokenizer."""
        if self.vocab_size is not None or facts.tokenizer is None:
            return {}
        return {"vocab_size": Derived(facts.tokenizer.vocab_size, f"tokenizer {facts.tokenizer.name}")}


def _grow(limits: TokenLimits, vocab_size: int | None) -> TokenLimits:
    """Return the limits of a model whose token table grows to `vocab_size`."""
    if vocab_size is None or limits.vocab_size is None or vocab_size <= limits.vocab_size:
        return limits
    return replace(limits, vocab_size=-(-vocab_size // ROWS_MULTIPLE) * ROWS_MULTIPLE)
