"""What every model's params share, and the roles that slots for models are typed by."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from vla_foundry.config.schema import ChoiceParams, register_choice

T = TypeVar("T", bound=type)


def register_model_params(name: str) -> Callable[[T], T]:
    """Register a dataclass as the params of the model, backbone or action head `name`."""
    return register_choice(name)


@dataclass(frozen=True, kw_only=True)
class TokenLimits:
    """Which tokens a model can take."""

    # token ids are below this; None: not known from the params
    vocab_size: int | None = None
    # longest sequence, tokens; None: not known from the params
    max_seq_len: int | None = None


@dataclass(frozen=True, kw_only=True)
class ImageInputs:
    """Which images and rows a model takes; what data with images derives its own params from."""

    # side of its images, pixels; None: not known, or any
    image_size: int | None = None
    # tokens that an image becomes; None: not known, or not fixed
    img_num_tokens: int | None = None
    # the published model that its processor comes from, by folder or name; None: any processor will do
    processor: str | None = None
    # several samples may share a row; False: one sample a row, as its positions depend on what the row holds
    takes_packed_rows: bool = True
    # it takes tokens beside images; False: images and numbers alone
    takes_text: bool = True


@dataclass(frozen=True, kw_only=True)
class ModelParams(ChoiceParams):
    """`--model.` The model; `type` chooses its kind."""

    _choice_registry = {}
    choice_path = "model.type"
    checkpoint_key = "resume_from_checkpoint"

    # where to take the weights from: a run or step folder, .safetensors, .pt, s3:// or hf://
    resume_from_checkpoint: str | None = None
    # take only the weights; false: go on with that run's optimizer, data order and step count
    resume_weights_only: bool = False
    # keep these weights as they are
    freeze: bool = False

    def token_limits(self) -> TokenLimits:
        """Which tokens this model can take; a model that holds a language model passes that one's on."""
        return TokenLimits()

    def image_inputs(self) -> ImageInputs:
        """Which images this model takes."""
        return ImageInputs()


@dataclass(frozen=True, kw_only=True)
class LanguageModelParams(ModelParams):
    """Role: anything that maps tokens or their embeddings to hidden states and logits."""

    _choice_registry = {}
    native_type = "transformer"
