"""From the tokens of an image encoder to those of a language model: pixel unshuffle and one linear map."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def pixel_unshuffle(x: Float[Tensor, "N T D"], factor: int) -> Float[Tensor, "N S E"]:
    """Join each square of factor x factor neighbouring tokens into one, factor^2 times as wide.

    Tokens are the cells of a square grid, row by row, before and after; the features of a new token are those of its
    cells, row by row (the order of published checkpoints).

    Raises:
        ValueError: the tokens are no square, or its side is no multiple of the factor.
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
    """Image tokens -> fewer tokens as wide as the language model's."""

    def __init__(self, *, image_dim: int, text_dim: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.proj = nn.Linear(image_dim * factor**2, text_dim, bias=False)

    def forward(self, x: Float[Tensor, "N T D"]) -> Float[Tensor, "N S E"]:
        """Join neighbouring tokens and map them."""
        return self.proj(pixel_unshuffle(x, self.factor))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the weights: normal, sigma 0.02."""
        nn.init.normal_(self.proj.weight, std=0.02)
