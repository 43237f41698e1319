"""The native vision transformer: patches, learned positions, pre-norm blocks of attention and feed-forward.

    x = conv(pixels), one token per patch, row by row;  x = x + position_embedding
    for each block:  x = x + out_proj(attention(ln1(x)));  x = x + fc2(gelu(fc1(ln2(x))))
    tokens = layer_norm(x)

Every image token sees every other one. Module names match published checkpoints; qkv_proj is [q; k; v] with the heads
in order.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vla_foundry.models.attention import attend
from vla_foundry.models.registry import create_natively, register_model
from vla_foundry.params.models.vit import ViTParams

_INIT_STD = 0.02


class ConvStem(nn.Sequential):
    """Convolutions that halve the image once per factor of 2 in the patch size and mix neighbours at each scale.

    Each halving is a 4 x 4 convolution of stride 2 and a 3 x 3 convolution of stride 1, each with a norm and GELU
    (after Xiao et al. 2021). Convolutions see edges across patch borders; small models learn faster from them than from
    raw patches. A 4 x 4 kernel centres a token's field of view on its patch; 3 x 3 would shift it by half a patch.
    """

    def __init__(self, patch_size: int, hidden_dim: int) -> None:
        halvings = (patch_size & -patch_size).bit_length() - 1
        layers: list[nn.Module] = []
        width = 3
        for index in range(halvings):
            new_width = max(16, hidden_dim // 2 ** (halvings - 1 - index))
            layers += _convolve(nn.Conv2d(width, new_width, 4, stride=2, padding=1))
            layers += _convolve(nn.Conv2d(new_width, new_width, 3, padding=1))
            width = new_width
        super().__init__(*layers)
        self.out_channels = width
        # remaining side of a patch, pixels of the last feature map
        self.patch_size = patch_size >> halvings


def _convolve(convolution: nn.Conv2d) -> list[nn.Module]:
    width = convolution.out_channels
    return [convolution, nn.GroupNorm(math.gcd(8, width), width), nn.GELU()]


class PatchEmbedding(nn.Module):
    """Maps images to tokens with positions, after an optional class token."""

    def __init__(self, params: ViTParams) -> None:
        super().__init__()
        self.patch_size = params.patch_size
        self.grid_side = params.img_size // params.patch_size
        self.interpolation_mode = params.interpolation_mode
        self.stem = ConvStem(params.patch_size, params.hidden_dim) if params.stem == "conv" else None
        width, side = (3, params.patch_size) if self.stem is None else (self.stem.out_channels, self.stem.patch_size)
        self.conv = nn.Conv2d(width, params.hidden_dim, kernel_size=side, stride=side)
        num_prefix = int(params.cls_flag)
        self.cls_token = nn.Parameter(torch.empty(1, 1, params.hidden_dim)) if params.cls_flag else None
        self.position_embedding = nn.Parameter(torch.empty(1, self.grid_side**2 + num_prefix, params.hidden_dim))

    def forward(self, pixel_values: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N T D"]:
        """Embed the image, cropped to whole patches."""
        height, width = (side // self.patch_size for side in pixel_values.shape[-2:])
        # crop first: otherwise the stem's convolutions would see the remainder and round the size
        pixels = pixel_values[..., : height * self.patch_size, : width * self.patch_size].to(self.conv.weight.dtype)
        x = self.conv(pixels if self.stem is None else self.stem(pixels))
        x = x.flatten(2).transpose(1, 2)  # (N, T, D)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x), dim=1)
        return x + self._positions(height, width)

    def _positions(self, height: int, width: int) -> Tensor:
        """Return the position embeddings of a grid of patches, interpolated unless the size is native."""
        positions, side = self.position_embedding, self.grid_side
        if (height, width) == (side, side):
            return positions
        num_prefix = positions.shape[1] - side**2
        grid = positions[:, num_prefix:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        grid = F.interpolate(
            grid.float(), size=(height, width), mode=self.interpolation_mode, align_corners=False, antialias=True
        )
        grid = grid.flatten(2).transpose(1, 2).to(positions.dtype)
        return torch.cat((positions[:, :num_prefix], grid), dim=1)


class ImageAttention(nn.Module):
    """Full self-attention over the tokens of an image."""

    def __init__(self, params: ViTParams) -> None:
        super().__init__()
        self.num_heads = params.n_heads
        self.dropout = params.dropout
        self.qkv_proj = nn.Linear(params.hidden_dim, 3 * params.hidden_dim)
        self.out_proj = nn.Linear(params.hidden_dim, params.hidden_dim)

    def forward(self, x: Float[Tensor, "N T D"]) -> Float[Tensor, "N T D"]:
        """Attend over all tokens of each image."""
        queries, keys, values = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (N, T, H, K)
        output = attend(queries, keys, values, segments=None, is_causal=False)
        return F.dropout(self.out_proj(output.flatten(2)), self.dropout, self.training)


class ImageFeedForward(nn.Module):
    """fc2(gelu(fc1(x))), with the tanh form of GELU."""

    def __init__(self, params: ViTParams) -> None:
        super().__init__()
        self.dropout = params.dropout
        self.fc1 = nn.Linear(params.hidden_dim, params.inter_dim)
        self.fc2 = nn.Linear(params.inter_dim, params.hidden_dim)

    def forward(self, x: Float[Tensor, "N T D"]) -> Float[Tensor, "N T D"]:
        """Apply the layer to every token."""
        return F.dropout(self.fc2(F.gelu(self.fc1(x), approximate="tanh")), self.dropout, self.training)


class ImageBlock(nn.Module):
    """A pre-norm residual block: attention, then feed-forward."""

    def __init__(self, params: ViTParams) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(params.hidden_dim, eps=params.ln_eps)
        self.attn = ImageAttention(params)
        self.ln2 = nn.LayerNorm(params.hidden_dim, eps=params.ln_eps)
        self.mlp = ImageFeedForward(params)

    def forward(self, x: Float[Tensor, "N T D"]) -> Float[Tensor, "N T D"]:
        """Return x plus this block's residuals."""
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class ViT(nn.Module):
    """Maps images to tokens. `create_model` initialises its weights."""

    def __init__(self, params: ViTParams) -> None:
        super().__init__()
        self.params = params
        self.hidden_dim = params.hidden_dim
        self.image_size = params.img_size
        # number of tokens before the patch tokens
        self.num_prefix_tokens = int(params.cls_flag)
        self.patch_embedding = PatchEmbedding(params)
        # published checkpoints use this name, so the method is called list_blocks
        self.blocks = nn.ModuleList(ImageBlock(params) for _ in range(params.n_layers))
        self.layer_norm = nn.LayerNorm(params.hidden_dim, eps=params.ln_eps)

    def forward(self, pixel_values: Float[Tensor, "*N 3 H W"]) -> Float[Tensor, "*N T D"] | Float[Tensor, "*N D"]:
        """Return the tokens of each image after the final norm: prefix tokens, then the patches, row by row.

        With `output: class_token`, return the class token alone.

        Args:
            pixel_values: normalised images, (N, 3, H, W) or (B, N, 3, H, W).
        """
        shape = pixel_values.shape[:-3]
        x = self.patch_embedding(pixel_values.flatten(0, -4))
        x = F.dropout(x, self.params.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        if self.params.output == "class_token":
            x = x[:, 0]
        return self.layer_norm(x).unflatten(0, shape)

    def list_blocks(self) -> list[nn.Module]:
        """Return the blocks in order."""
        return list(self.blocks)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise matrices, convolutions and positions (normal, sigma 0.02); norms 1, biases and class token 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                std = _INIT_STD
                if isinstance(module, nn.Conv2d) and self.patch_embedding.stem is not None:
                    # sigma 0.02 would shrink the image signal to almost nothing in a stack of convolutions
                    std = (module.weight[0].numel()) ** -0.5
                nn.init.normal_(module.weight, std=std)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
                module.reset_parameters()
        nn.init.normal_(self.patch_embedding.position_embedding, std=_INIT_STD)
        if self.patch_embedding.cls_token is not None:
            nn.init.zeros_(self.patch_embedding.cls_token)

    def num_flops_per_image(self) -> float:
        """Return the FLOPs of forward and backward: per token, 6 per matrix weight plus 12 L D T for attention."""
        weights = sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2)
        weights += self.patch_embedding.conv.weight.numel()
        num_tokens = self.patch_embedding.position_embedding.shape[1]
        return num_tokens * (6.0 * weights + 12.0 * self.params.n_layers * self.hidden_dim * num_tokens)


@register_model("vit")
def create_vit(params: ViTParams, load_pretrained: bool = True) -> ViT:
    """Build the native vision transformer; it has no published weights, so `load_pretrained` has no effect."""
    return create_natively(ViT, params)
