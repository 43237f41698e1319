"""Feed-forward layers, without biases."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def swiglu_hidden_dim(dim: int) -> int:
    """The inner width of a gated feed-forward: 8/3 of the model's, rounded up to a multiple of 256."""
    return 256 * -(-(8 * dim // 3) // 256)


class SwiGLU(nn.Module):
    """w3(silu(gate) * up), where the rows of w12 are [gate; up] (Shazeer 2020)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden_dim = swiglu_hidden_dim(dim)
        self.w12 = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.w3 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Apply the layer to every token."""
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)


def create_feed_forward(ffn_type: str, dim: int) -> nn.Module:
    """Return a feed-forward of model width `dim`: `swiglu`, or `gelu` with an inner width of 4 dim."""
    if ffn_type == "swiglu":
        return SwiGLU(dim)
    if ffn_type == "gelu":
        return nn.Sequential(nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False))
    raise ValueError(f"model.ffn_type '{ffn_type}' is unknown.")
