"""The base class of all model params, and the roles that model slots are typed by."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from vla_foundry.config.schema import BaseParams, ChoiceParams, Location, register_choice

T = TypeVar("T", bound=type)


def register_model_params(name: str) -> Callable[[T], T]:
    """Register a dataclass as the params of the model, backbone or action head `name`."""
    return register_choice(name)


@dataclass(frozen=True, kw_only=True)
class TokenLimits:
    """Which tokens a model can take."""

    # upper bound of token ids (exclusive); None: unknown from the params
    vocab_size: int | None = None
    # longest sequence, tokens; None: unknown from the params
    max_seq_len: int | None = None


@dataclass(frozen=True, kw_only=True)
class ImageInputs:
    """Which images and rows a model takes; data with images derives its own params from this."""

    # side of its images, pixels; None: unknown or any
    image_size: int | None = None
    # tokens per image; None: unknown or not fixed
    img_num_tokens: int | None = None
    # published model that provides its processor, by folder or name; None: any processor works
    processor: str | None = None
    # several samples may share a row; False: one sample per row, because positions depend on the row's content
    takes_packed_rows: bool = True
    # it takes tokens besides images; False: only images and numbers
    takes_text: bool = True


@dataclass(frozen=True, kw_only=True)
class ModelParams(ChoiceParams):
    """`--model.` The model; `type` selects its kind."""

    _choice_registry = {}
    choice_path = "model.type"
    checkpoint_key = "resume_from_checkpoint"

    # checkpoint to start from: a run or step folder, .safetensors or .pt; local, s3:// or hf://
    resume_from_checkpoint: Location | None = None
    # load only the weights; false: resume that run's optimizer, data order and step count too
    resume_weights_only: bool = False
    # freeze the weights
    freeze: bool = False

    def token_limits(self) -> TokenLimits:
        """Return which tokens this model can take; a model that wraps a language model forwards its limits."""
        return TokenLimits()

    def image_inputs(self) -> ImageInputs:
        """Return which images this model takes."""
        return ImageInputs()


@dataclass(frozen=True, kw_only=True)
class LanguageModelParams(ModelParams):
    """Role: anything that maps tokens or their embeddings to hidden states and logits."""

    _choice_registry = {}
    native_type = "transformer"


@dataclass(frozen=True, kw_only=True)
class PublishedParams(BaseParams):
    """Shared by models from Hugging Face."""

    # Hugging Face model name, hf://owner/name or folder
    hf_pretrained: Location
    # start from the published weights; false: the architecture with new weights
    hf_load_weights: bool = True
    # weights that the published model may lack, by name or pattern ("model.projector.*"); they start with new values
    hf_new_weights: list[str] = field(default_factory=list)
