"""Backbone base classes, their registries, and the layout of rows with an observation token.

The observation token is appended to each row's text; the policy reads the model's hidden state there.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vla_foundry.batch import Batch, Documents
from vla_foundry.models.batch_handlers import to_device
from vla_foundry.models.layers import take_token
from vla_foundry.models.registry import save_model_files
from vla_foundry.models.weights import load_part_checkpoint
from vla_foundry.params.models.backbones import BackboneParams
from vla_foundry.registry import Registry


class Conditioning(NamedTuple):
    """A backbone's output for B samples."""

    # (B, K, C)
    tokens: Tensor
    # bool (B, K), True where a token is visible; None: all visible
    mask: Tensor | None = None
    # (B, 1 + S, D), what the language model predicts from after the prompt and after each of a suffix's S tokens
    suffix_states: Tensor | None = None


class Backbone(nn.Module):
    """Encodes observations: `forward` takes the output of its observation function and returns Conditioning.

    A base class, not a protocol: since Python 3.12 a protocol's isinstance check does not see submodules.

    Args:
        model: the wrapped model; the backbone can start from its checkpoints.
        conditioning_dim: width of the backbone's tokens.
    """

    # name of the wrapped model within larger models' checkpoints
    part_name = "vision_language_backbone.model"
    # layers whose states the backbone's tokens hold side by side
    num_states: int = 1
    # width of the language model's embeddings; 0: there is none
    width: int = 0

    def __init__(self, model: Any = None, conditioning_dim: int = 0) -> None:
        super().__init__()
        self.model: Any = model
        self.conditioning_dim = conditioning_dim

    def blocks(self) -> list[nn.Module]:
        """Return the modules that activation checkpointing, compilation and sharding wrap."""
        return self.model.blocks()

    def init_weights(self) -> None:
        """Give every parameter its initial value."""
        self.model.init_weights()

    def num_flops_per_token(self, seq_len: int) -> float:
        """Return the FLOPs of forward and backward per token, for rows of `seq_len` tokens."""
        return self.model.num_flops_per_token(seq_len)

    def save_files(self, folder: Path) -> None:
        """Write the architecture of Hugging Face parts."""
        save_model_files(self.model, folder)


class LanguageModelBackbone(Backbone):
    """Shared by backbones of vision-language models: hidden states of the last layers, without the output head.

    Args:
        width: width of a hidden state.
        head: the output head; frozen unless tied or trained on language, because it gets no gradient. None if absent.
        table: the token embeddings.
        token_std: initial standard deviation of the observation token.
    """

    def __init__(
        self, model: Any, params: Any, *, width: int, head: nn.Module | None, table: nn.Module, token_std: float
    ) -> None:
        super().__init__(model, params.num_vlm_layers_to_use * width)
        self.num_states = params.num_vlm_layers_to_use
        self._head_size = 0
        if head is not None:
            weight: Any = head.weight
            self._head_size = weight.numel()
            if weight is not table.weight and not params.language_loss:
                head.requires_grad_(False)
        self._token_std = token_std
        self.width = width
        self.observation_token = None
        if params.conditioning == "observation_token":
            self.observation_token = nn.Parameter(torch.empty(width))
            self._init_token()

    def init_weights(self) -> None:
        """Initialise the model's weights; draw the observation token like an embedding."""
        super().init_weights()
        self._init_token()

    @torch.no_grad()
    def _init_token(self) -> None:
        if self.observation_token is not None:
            nn.init.normal_(self.observation_token, std=self._token_std)

    def put_embeddings(self, embeds: Tensor, places: Tensor | None, suffix: "Suffix | None") -> Tensor:
        """Put the observation token and a suffix into embeddings (B, W, D)."""
        if self.observation_token is not None and places is not None:
            embeds = put_tokens(embeds, self.observation_token.expand(embeds.shape[0], 1, -1), places)
        return embeds if suffix is None else put_tokens(embeds, suffix.values, suffix.starts)

    def read_states(
        self, states: list[Tensor], places: Tensor | None, token_mask: Tensor | None, suffix: "Suffix | None"
    ) -> Conditioning:
        """Return the conditioning; with a suffix, `states` are of all tokens, else of those that the head sees."""
        if suffix is None:
            return Conditioning(torch.cat(states, dim=-1), token_mask)
        steps = torch.arange(suffix.values.shape[1] + 1, device=suffix.starts.device) - 1
        columns = suffix.starts[:, None] + steps  # (B, 1 + S)
        written = states[-1].gather(1, columns.unsqueeze(-1).expand(-1, -1, states[-1].shape[-1]))
        if places is not None:
            states = [take_token(state, places) for state in states]
        return Conditioning(torch.cat(states, dim=-1), token_mask, written)

    def start_writing(self, *args: Any, **kwargs: Any) -> "Writing":
        """Read what `forward` takes, from which `continue_writing` goes on."""
        raise NotImplementedError

    def continue_writing(self, writing: "Writing", token: Tensor) -> "Writing":
        """Read one more token (B, D) in each row."""
        raise NotImplementedError

    def num_flops_per_token(self, seq_len: int) -> float:
        """Return the model's FLOPs without its output head."""
        return super().num_flops_per_token(seq_len) - 6.0 * self._head_size


# (params, load_pretrained) -> backbone; create_backbone handles checkpoints and freezing
BackboneFactory = Callable[..., Backbone]
# (params, batch of modality "robotics" with or without actions, device) -> keyword arguments of forward
PrepareObservation = Callable[[Any, Batch, torch.device | str], dict[str, Any]]

_PATH = "model.vision_language_backbone"
BACKBONES: "Registry[BackboneFactory]" = Registry(
    f"{_PATH}.type", package="vla_foundry.models", decorator="register_backbone"
)
OBSERVATIONS: "Registry[PrepareObservation]" = Registry(
    f"{_PATH}.type", package="vla_foundry.models", decorator="register_observation"
)


# register a factory `(params, load_pretrained=True) -> backbone` as the backbone of this name
register_backbone = BACKBONES.register
# register the function that prepares batches for this backbone; it must not synchronise with the device
register_observation = OBSERVATIONS.register


def create_backbone(params: BackboneParams, load_pretrained: bool = True) -> Backbone:
    """Build the backbone; if `load_pretrained`, load its checkpoint or its published weights.

    Raises:
        ValueError: the type is not registered, or the checkpoint does not fit.
        FileNotFoundError: the checkpoint does not exist.
    """
    checkpoint = params.resume_from_checkpoint if load_pretrained else None
    backbone = BACKBONES.get(params.type)(params, load_pretrained=load_pretrained and checkpoint is None)
    if checkpoint is not None:
        load_part_checkpoint(backbone.model, checkpoint, part=backbone.part_name, path=_PATH)
    if params.freeze:
        backbone.requires_grad_(False)
    return backbone


def read_image_mask(batch: Batch, device: torch.device | str) -> Tensor | None:
    """Return `image_mask` on the device, or None if no image is missing."""
    image_mask: Tensor | None = batch.get("image_mask")
    return None if image_mask is None or image_mask.all() else to_device(image_mask, device)


class Suffix(NamedTuple):
    """Tokens after each prompt, which the language model learns to write."""

    # (B, S, D)
    values: Tensor
    # int64 (B,), position of the first one
    starts: Tensor


class Writing(NamedTuple):
    """A language model after some tokens."""

    # (B, D), what it predicts the next token from
    state: Tensor
    # int64 (B, tokens so far), 0 at padding
    mask: Tensor
    cache: Any


class Rows(NamedTuple):
    """Rows of one sample each, on the host."""

    # int64 (B, W), 0 in padding and at the observation token
    input_ids: Tensor
    # int64 (B,), number of tokens in each row, including the observation token and the suffix
    lengths: Tensor
    # int64 (B,), position of the observation token; None if absent
    places: Tensor | None
    # int64 (B,), number of tokens of the prompt, without the observation token and the suffix
    num_text: Tensor
    # tokens of the suffix
    num_suffix: int = 0

    @property
    def starts(self) -> Tensor:
        """Return the position after the prompt and the observation token."""
        return self.lengths - self.num_suffix

    def mask(self, lengths: Tensor | None = None) -> Tensor:
        """Return a bool mask (B, W), True at tokens; or at the first `lengths` of each row."""
        return torch.arange(self.input_ids.shape[1]) < (self.lengths if lengths is None else lengths)[:, None]

    def documents(self) -> Documents:
        """Return each row as one document followed by padding."""
        return Documents.of_counts(self.lengths.numpy(), self.input_ids.shape[1])


def arrange_rows(batch: Batch, *, has_observation_token: bool, is_trimmed: bool) -> Rows:
    """Lay out the rows of a batch, with room for an observation token and `num_suffix` tokens right after each text.

    Args:
        is_trimmed: drop columns that are padding in every row; false: keep the batch's width, which takes few
            distinct values.

    Raises:
        ValueError: a row holds several samples.
    """
    tokens: Tensor = batch["input_ids"]
    B, T = tokens.shape
    lengths = torch.full((B,), T)
    documents: Documents | None = batch.get("documents")
    if documents is not None:
        counts = documents.count_tokens()
        if counts is None:
            raise ValueError("A row of robot data holds several samples. Set --data.pack false.")
        lengths = torch.from_numpy(counts)
    places = lengths if has_observation_token else None
    num_text, num_suffix = lengths, batch.get("num_suffix", 0)
    lengths = lengths + int(has_observation_token) + num_suffix
    longest = int(lengths.max()) if B else 0
    width = max(1, longest) if is_trimmed else max(T, longest)
    ids = torch.zeros(B, width, dtype=torch.int64)
    ids[:, :T] = tokens[:, :width]
    is_text = torch.arange(width) < num_text[:, None]
    return Rows(ids * is_text, lengths, places, num_text, num_suffix)


def extend_columns(values: Tensor, width: int) -> Tensor:
    """Pad token types (B, T) with 0 to the row width."""
    grown = torch.zeros(values.shape[0], width, dtype=values.dtype)
    grown[:, : values.shape[1]] = values[:, :width]
    return grown


def drop_missing_images(batch: Batch, image_token_id: int) -> Batch:
    """Return the batch without the images that `image_mask` hides and without their tokens."""
    image_mask: Tensor | None = batch.get("image_mask")
    if image_mask is None or image_mask.all():
        return batch
    rows = arrange_rows({**batch, "num_suffix": 0}, has_observation_token=False, is_trimmed=False)
    is_text = rows.mask()
    is_image = (rows.input_ids == image_token_id) & is_text
    tokens_per_image = max(1, int(is_image.sum()) // image_mask.numel())
    image = (is_image.cumsum(1) - 1).clamp(min=0) // tokens_per_image
    is_kept = is_text & (~is_image | image_mask.gather(1, image.clamp(max=image_mask.shape[1] - 1)))
    order = torch.argsort(~is_kept, dim=1, stable=True)
    kept = rows._replace(input_ids=rows.input_ids.gather(1, order), lengths=is_kept.sum(1))
    changed = {name: batch[name][image_mask.flatten()] for name in ("pixel_values", "color_factors") if name in batch}
    return {**batch, **changed, "input_ids": kept.input_ids, "documents": kept.documents()}


def put_tokens(embeds: Tensor, tokens: Tensor, starts: Tensor) -> Tensor:
    """Replace the embeddings (B, W, D) from a position (B,) of each row on with `tokens` (B, S, D)."""
    rows = torch.arange(embeds.shape[0], device=starts.device) * embeds.shape[1] + starts
    places = rows[:, None] + torch.arange(tokens.shape[1], device=starts.device)
    flat: Any = tokens.to(embeds.dtype).flatten(0, 1)
    return embeds.flatten(0, 1).index_copy(0, places.flatten(), flat).view_as(embeds)
