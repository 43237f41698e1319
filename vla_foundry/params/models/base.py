"""What every model's params share, and the roles that slots for models are typed by."""

from dataclasses import dataclass

from vla_foundry.params.base import ChoiceParams


@dataclass(frozen=True, kw_only=True)
class ModelParams(ChoiceParams):
    """`--model.` Base of every model's params; the concrete class is chosen by `type`."""

    _choice_registry = {}
    choice_path = "model.type"

    # where to take the weights from: a run or step folder, .safetensors, .pt, s3:// or hf://
    resume_from_checkpoint: str | None = None
    # take only the weights; false: go on with that run's optimizer, data order and step count
    resume_weights_only: bool = False
    # keep these weights as they are
    freeze: bool = False


@dataclass(frozen=True, kw_only=True)
class LanguageModelParams(ModelParams):
    """Role: anything that maps tokens or their embeddings to hidden states and logits."""

    _choice_registry = {}
    native_type = "transformer"
