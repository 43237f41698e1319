"""The base class of all model params, and the roles that model slots are typed by."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar, TypeVar

from vla_foundry.config.schema import BaseParams, Bounds, ChoiceParams, Location, Size, register_choice
from vla_foundry.params.facts import Facts

T = TypeVar("T", bound=type)


def register_model_params(name: str) -> Callable[[T], T]:
    """Register a dataclass as the params of the model, backbone or action head `name`."""
    return register_choice(name)


_MODEL = "model."
# what begins the names of models from timm, which have no config.json
TIMM_PREFIX = "timm:"
# fields that decide the shapes of all weights; a part's vocabulary may grow
_SIZES = ("hidden_dim", "n_layers", "vocab_size")
# number of blocks
Depth = Annotated[int, Bounds(least=1, most=10_000)]


# architectures with a table of positions whose first rows stand for padding: positions begin behind pad_token_id
_POSITIONS_BEHIND_PADDING = {
    *("camembert", "data2vec-text", "longformer", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"),
    "xmod",
}
# architectures with a table of positions, which has one row per position
_LEARNED_POSITIONS = _POSITIONS_BEHIND_PADDING | {
    *("bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt", "blenderbot", "blenderbot-small"),
    *("electra", "ernie", "git", "gpt_neo", "marian", "mbart", "megatron-bert", "mvp", "opt", "pegasus", "plbart"),
    *("prophetnet", "rembert", "roc_bert", "roformer", "trocr", "xlm"),
}
# the key of config.json that bounds a sequence, where that is not n_positions
_LENGTH_KEYS = {"mpt": "max_seq_len", "whisper": "max_target_positions"} | dict.fromkeys(
    _LEARNED_POSITIONS, "max_position_embeddings"
)


@dataclass(frozen=True, kw_only=True)
class TokenLimits:
    """Which tokens a model can take."""

    # upper bound of token ids (exclusive); None: unknown from the params
    vocab_size: int | None = None
    # longest sequence, tokens; None: unknown from the params
    max_seq_len: int | None = None
    # number of blocks; None: unknown from the params
    num_layers: int | None = field(default=None, compare=False)
    # where the limits are set, as a prefix of their names: a config path, or a published model
    source: str = field(default=_MODEL, compare=False)

    def below(self, part: str) -> "TokenLimits":
        """Return the same limits for a model that holds this one as its part `part`."""
        own = self.source.removeprefix(_MODEL)
        return self if own == self.source else replace(self, source=f"{_MODEL}{part}.{own}")


def count_positions(config: Mapping[str, Any]) -> int | None:
    """Return the longest sequence of a model by its config.json; None: any, because positions are computed."""
    kind = config.get("model_type")
    longest = config.get("n_positions") or config.get(_LENGTH_KEYS.get(kind or "", ""))
    if longest and kind in _POSITIONS_BEHIND_PADDING:
        padding = config.get("pad_token_id")
        return longest - 1 - (1 if padding is None else padding)
    return longest or None


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
class LoRAParams(BaseParams):
    """Train small adapters beside linear layers whose weights stay as they are (LoRA, Hu et al. 2021)."""

    # linear layers that get adapters, by patterns of their names: ["*.attention.*", "*.q_proj"]; "*": all that can
    targets: list[str] = field(default_factory=list)
    # weights that are trained whole, by patterns of their names: ["action_head.*"]; all others stay as they are
    train: list[str] = field(default_factory=list)
    # rank of an adapter: how many numbers pass between its two matrices
    rank: Size = 8
    # an adapter's output is multiplied by alpha / rank
    alpha: Annotated[float, Bounds(above=0, most=10**6)] = 16.0
    # share of an adapter's inputs that are dropped in training
    dropout: Annotated[float, Bounds(least=0, below=1)] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets:
            raise ValueError('targets is empty. Name linear layers, for example ["*.attention.*"].')


@dataclass(frozen=True, kw_only=True)
class ModelParams(ChoiceParams):
    """`--model.` The model; `type` selects its kind."""

    _choice_registry = {}
    choice_path = "model.type"
    checkpoint_key = "resume_from_checkpoint"
    # batch handler of models that register none of their own; None: they must
    batch_handler: ClassVar[str | None] = None

    # checkpoint to start from: a run or step folder, .safetensors or .pt; local, s3:// or hf://
    resume_from_checkpoint: Location | None = None
    # load only the weights; false: resume that run's optimizer, data order and step count too
    resume_weights_only: bool = False
    # freeze the weights
    freeze: bool = False
    # train adapters of the weights that the whole model starts from; null: train the weights
    lora: LoRAParams | None = None

    def check(self, root: Any, facts: Facts, path: str) -> list[str]:
        """Check that a model that takes weights alone names them; for a part of a model the key has no effect."""
        if self.lora is not None and path != "model":
            raise ValueError(
                f"{path}.lora: only a whole model can have adapters. Use model.lora, whose patterns choose parts. "
                "A run with adapters is a start for others once it is merged (vla-foundry merge)."
            )
        if self.lora is not None and self.resume_from_checkpoint is not None and not self.resume_weights_only:
            raise ValueError(
                f"{path}.lora adapts the weights of {path}.resume_from_checkpoint, whose training does not go on. Add "
                f"--{path}.resume_weights_only true."
            )
        if path == "model" and self.resume_weights_only and self.resume_from_checkpoint is None:
            raise ValueError(
                f"{path}.resume_weights_only is true, but there is no checkpoint. Give --{path}.resume_from_checkpoint "
                f"RUN, or leave {path}.resume_weights_only out."
            )
        stored = facts.checkpoint_configs.get(self.resume_from_checkpoint or "", {})
        sizes = {item.name for item in fields(self)}.intersection(_SIZES) if stored.get("type") == self.type else ()
        for name in sorted(sizes):
            own, found = getattr(self, name), stored.get(name)
            may_grow = name == "vocab_size" and path != "model"
            if isinstance(found, int) and (own < found or (own > found and not may_grow)):
                raise ValueError(
                    f"{path}.{name} ({own}) must be {found}, that of {path}.resume_from_checkpoint "
                    f"({self.resume_from_checkpoint})."
                )
        return []

    def token_limits(self, facts: Facts) -> TokenLimits:
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
    batch_handler = "transformer"


@dataclass(frozen=True, kw_only=True)
class PublishedParams(BaseParams):
    """Shared by models from Hugging Face."""

    # Hugging Face model name, hf://owner/name or folder
    hf_pretrained: Location
    # start from the published weights; false: the architecture with new weights
    hf_load_weights: bool = True
    # weights that the published model may lack, by name or pattern ("model.projector.*"); they start with new values
    hf_new_weights: list[str] = field(default_factory=list)

    def check(self, root: Any, facts: Facts, path: str) -> list[str]:
        """Say what cannot be checked because the published model is not on this machine."""
        notices = super().check(root, facts, path)
        if self.hf_pretrained in facts.model_configs or self.hf_pretrained.startswith(TIMM_PREFIX):
            return notices
        return [
            *notices,
            f"{path}.hf_pretrained: {self.hf_pretrained} is not on this machine, so its layers, tokens and images are "
            "checked when training starts.",
        ]

    def published_limits(self, facts: Facts) -> TokenLimits:
        """Return which tokens the published model can take, as far as its config.json says so."""
        config = facts.model_configs.get(self.hf_pretrained, {})
        text = config.get("text_config") or config
        layers = (text.get(name) for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"))
        return TokenLimits(
            vocab_size=text.get("vocab_size"),
            max_seq_len=count_positions(text),
            num_layers=next((count for count in layers if isinstance(count, int)), None),
            source=f"{self.hf_pretrained}: ",
        )
