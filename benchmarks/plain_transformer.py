"""A decoder in plain PyTorch, to compare speeds with: torch.nn modules and dense cross-entropy."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm block: causal attention with rotary positions, then SwiGLU."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.LayerNorm(width)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, K)
        x = x + self.out(attended.transpose(1, 2).reshape(B, T, D))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head: x is (B, H, T, K), the tables are (T, K)."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class PlainTransformer(nn.Module):
    """Token embedding, blocks, final norm, head; returns the mean next-token loss."""

    def __init__(
        self, *, vocab_size: int, width: int, num_layers: int, num_heads: int, hidden: int, max_len: int
    ) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, num_heads, hidden) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        frequencies = 10000.0 ** (-torch.arange(0, width // num_heads, 2) / (width // num_heads))
        angles = torch.outer(torch.arange(max_len), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        T = input_ids.shape[1]
        x = self.embeddings(input_ids)
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
