"""The vision-language model: an image encoder, a projector, and a language model that reads images as tokens.

    image tokens = projection(vit(pixel_values))
    x = token embeddings of input_ids, those of the image token replaced by image tokens, in order
    transformer(inputs_embeds=x)

Each part is native or from Hugging Face.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vla_foundry.batch import Documents, LanguageModelOutput, LossOutput
from vla_foundry.models.registry import create_model, register_model, save_model_files
from vla_foundry.models.weights import count_stored_rows, load_part_checkpoint
from vla_foundry.params.models.roles import ModelParams
from vla_foundry.params.models.vlm import ROWS_MULTIPLE, VLMParams


def pixel_unshuffle(x: Float[Tensor, "N T D"], factor: int) -> Float[Tensor, "N S E"]:
    """Join each square of factor x factor neighbouring tokens into one, factor^2 times as wide.

    Tokens are the cells of a square grid, row by row, before and after. A new token's features are those of its cells,
    row by row (the order in published checkpoints).

    Raises:
        ValueError: the tokens do not form a square, or its side is not a multiple of the factor.
    """
    if factor == 1:
        return x
    N, T, D = x.shape
    side = round(T**0.5)
    if side * side != T or side % factor:
        raise ValueError(
            f"model.vit.projector_pixel_shuffle_factor ({factor}) must divide the side of a square of image tokens, "
            f"but there are {T} tokens. Change it, or the size of the images."
        )
    cells = x.reshape(N, side // factor, factor, side // factor, factor, D)  # (N, row, row offset, column, ...)
    return cells.transpose(2, 3).reshape(N, T // factor**2, factor**2 * D)


class ModalityProjector(nn.Module):
    """Maps image tokens to fewer tokens of the language model's width."""

    def __init__(self, *, image_dim: int, text_dim: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.proj = nn.Linear(image_dim * factor**2, text_dim, bias=False)

    def forward(self, x: Float[Tensor, "N T D"]) -> Float[Tensor, "N S E"]:
        """Join neighbouring tokens and project them."""
        return self.proj(pixel_unshuffle(x, self.factor))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise the weights: normal, sigma 0.02."""
        nn.init.normal_(self.proj.weight, std=0.02)


class VLM(nn.Module):
    """Maps tokens and images to hidden states, logits or a loss.

    Args:
        image_token_id: the placeholder token; each one is replaced by one image feature.
        sees_ahead: neighbouring image tokens see each other, not only earlier ones.
    """

    def __init__(
        self, vit: nn.Module, transformer: nn.Module, *, factor: int, image_token_id: int | None, sees_ahead: bool
    ) -> None:
        super().__init__()
        self.image_token_id = image_token_id
        self.sees_ahead = sees_ahead
        # each may be one of two classes
        self.vit: Any = vit
        self.transformer: Any = transformer
        self.projection = ModalityProjector(
            image_dim=self.vit.hidden_dim, text_dim=self.transformer.hidden_dim, factor=factor
        )

    @property
    def max_seq_len(self) -> int | None:
        """Return the longest sequence in tokens; None if unknown."""
        return self.transformer.max_seq_len

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Float[Tensor, "*N 3 H W"] | None = None,
        image_positions: Int[Tensor, " n"] | None = None,
        sees_ahead: np.ndarray | None = None,
        documents: Documents | None = None,
        targets: Int[Tensor, "B T"] | None = None,
        z_loss_coefficient: float = 0.0,
        output_hidden_states: bool = False,
    ) -> LossOutput | LanguageModelOutput:
        """Return the loss if there are targets, else logits; see the native transformer for the other arguments.

        Args:
            pixel_values: normalised images, (N, 3, H, W) or (B, N, 3, H, W), in the order of their tokens.
            image_positions: indices of the image tokens in the flat batch, ascending. Training passes them because
                looking them up synchronises the device.
            sees_ahead: bool (B, T) on the host, True at image tokens if these see each other. Training passes it too.

        Raises:
            ValueError: the number of image tokens does not match the images.
        """
        rows: dict[str, Any] = {"attention_mask": attention_mask, "documents": documents}
        if targets is None and pixel_values is None:
            return self.transformer(input_ids, output_hidden_states=output_hidden_states, **rows)
        inputs = self._read_images(input_ids, pixel_values, image_positions, sees_ahead)
        if targets is not None:
            return self.transformer.loss(targets=targets, z_loss_coefficient=z_loss_coefficient, **inputs, **rows)
        return self.transformer.decode(use_cache=False, output_hidden_states=output_hidden_states, **inputs, **rows)

    def decode(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Float[Tensor, "*N 3 H W"] | None = None,
        past_key_values: Any = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> LanguageModelOutput:
        """Return logits, and keys and values for the next call; see the native transformer.

        Args:
            pixel_values: images of these tokens; pass them with the prompt, not with later tokens.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if pixel_values is not None:
            inputs = self._read_images(input_ids, pixel_values, None, None)
        return self.transformer.decode(
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **inputs,
        )

    def _read_images(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        image_positions: Tensor | None,
        sees_ahead: np.ndarray | None,
    ) -> dict[str, Any]:
        """Return the language model's inputs in place of tokens."""
        if image_positions is None:
            is_image = input_ids == self._image_token()
            image_positions = is_image.flatten().nonzero().squeeze(1)
            if self.sees_ahead:
                sees_ahead = is_image.cpu().numpy()
        return {
            "inputs_embeds": self.embed(input_ids, pixel_values, image_positions),
            "sees_ahead": sees_ahead if self.sees_ahead else None,
        }

    def encode_images(self, pixel_values: Float[Tensor, "*N 3 H W"]) -> Float[Tensor, "N S D"]:
        """Return the features that replace each image's tokens."""
        features = self.vit(pixel_values.flatten(0, -4))[:, self.vit.num_prefix_tokens :]
        return self.projection(features)

    def embed(
        self,
        input_ids: Int[Tensor, "B T"],
        pixel_values: Float[Tensor, "*N 3 H W"] | None,
        image_positions: Int[Tensor, " n"],
        image_features: Float[Tensor, "N S D"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Return the token embeddings, with image features at the image tokens.

        Args:
            image_features: output of `encode_images`, in place of pixel_values.
        """
        # the image token may have no row in the embedding table
        ids = input_ids.masked_fill(input_ids == self._image_token(), 0)
        embeds = self.transformer.embed_tokens(ids)  # (B, T, D)
        if image_features is not None:
            features = image_features
        elif pixel_values is None or pixel_values.numel() == 0:
            _check_counts(image_positions.numel(), 0, 0)
            # a rank without images must join the other ranks' collectives for the encoder
            empty = torch.zeros(1, 3, self.vit.image_size, self.vit.image_size, device=ids.device)
            return embeds + 0.0 * self.encode_images(empty).sum().to(embeds.dtype)
        else:
            features = self.encode_images(pixel_values)  # (N, S, D)
        _check_counts(image_positions.numel(), features.shape[0], features.shape[1])
        flat = embeds.flatten(0, 1).index_copy(0, image_positions, features.flatten(0, 1).to(embeds.dtype))
        return flat.view_as(embeds)

    def _image_token(self) -> int:
        if self.image_token_id is None:
            raise ValueError("model.image_token_id is missing. Give --model.image_token_id N.")
        return self.image_token_id

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of the image encoder and of the language model."""
        return [*self.vit.list_blocks(), *self.transformer.blocks()]

    def init_weights(self) -> None:
        """Initialise the weights of all parts."""
        self.vit.init_weights()
        self.transformer.init_weights()
        self.projection.init_weights()

    def resize_token_embeddings(self, num_tokens: int, *, pad_to_multiple_of: int = ROWS_MULTIPLE) -> int:
        """Grow the token tables to hold `num_tokens` tokens (they never shrink); return the number of rows."""
        return self.transformer.resize_token_embeddings(num_tokens, pad_to_multiple_of=pad_to_multiple_of)

    def num_flops_per_token(self, seq_len: int) -> float:
        """Return the language model's FLOPs plus the image encoder's for one image per row."""
        images = self.vit.num_flops_per_image() + 6.0 * self.projection.proj.weight.numel()
        return self.transformer.num_flops_per_token(seq_len) + images / seq_len

    def save_files(self, folder: Path) -> None:
        """Write the architecture of the Hugging Face parts; with_model_files reads it."""
        for name, part in (("vit", self.vit), ("transformer", self.transformer)):
            save_model_files(part, folder / name)


def _check_counts(num_tokens: int, num_images: int, tokens_per_image: int) -> None:
    if num_tokens != num_images * tokens_per_image:
        raise ValueError(
            f"The batch has {num_tokens} image tokens, but its {num_images} images make {tokens_per_image} each. "
            f"Check data.img_num_tokens and model.image_token_id."
        )


@register_model("vlm")
def create_vlm(params: VLMParams, load_pretrained: bool = True) -> VLM:
    """Build the model; parts that name a checkpoint start from its weights.

    Raises:
        ValueError: a checkpoint does not fit its part.
        FileNotFoundError: the checkpoint does not exist.
    """
    vit = _create_part(params.vit, load_pretrained)
    transformer = _create_part(params.transformer, load_pretrained)
    if load_pretrained and params.vit.resume_from_checkpoint is not None:
        load_part_checkpoint(vit, params.vit.resume_from_checkpoint, part="vit", path="model.vit")
    if load_pretrained and params.transformer.resume_from_checkpoint is not None:
        _load_language_model(transformer, params.transformer.resume_from_checkpoint)
    model = VLM(
        vit,
        transformer,
        factor=params.vit.projector_pixel_shuffle_factor,
        image_token_id=params.image_token_id,
        sees_ahead=params.image_attention == "bidirectional",
    )
    model.projection.init_weights()
    if params.vocab_size is not None:
        model.resize_token_embeddings(params.vocab_size)
    return model


def _create_part(params: ModelParams, load_pretrained: bool) -> nn.Module:
    # skip its checkpoint here: names and number of tokens may differ from the part's
    loads = load_pretrained and params.resume_from_checkpoint is None
    return create_model(dataclasses.replace(params, resume_from_checkpoint=None), load_pretrained=loads)


def _load_language_model(transformer: Any, checkpoint: str) -> None:
    """Load a checkpoint with more or fewer tokens; rows missing from it stay unchanged."""
    tables = transformer.token_tables()
    rows = count_stored_rows(checkpoint, tables, part="transformer")
    if rows is not None:
        transformer.resize_token_embeddings(rows, pad_to_multiple_of=1)
    load_part_checkpoint(transformer, checkpoint, part="transformer", path="model.transformer", may_grow=tables)
