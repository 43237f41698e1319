"""Norms over the last dimension, by the names in `model.norm_type`."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class LowPrecisionLayerNorm(nn.LayerNorm):
    """LayerNorm computed in autocast's dtype, where the plain one would be computed in fp32."""

    def forward(self, input: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
        """Normalise the last dimension."""
        device_type = input.device.type
        dtype = input.dtype
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
        with torch.autocast(device_type, enabled=False):
            return F.layer_norm(input.to(dtype), self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight; normalised in fp32 at least."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        """Set the gain to 1."""
        nn.init.ones_(self.weight)

    def forward(self, input: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
        """Normalise the last dimension."""
        if input.dtype == self.weight.dtype:
            return F.rms_norm(input, self.weight.shape, self.weight, self.eps)
        # autocast: the fused kernel takes one dtype only
        return F.rms_norm(input, self.weight.shape, None, self.eps) * self.weight


def create_norm(norm_type: str, dim: int, eps: float) -> nn.Module:
    """Return a norm over the last dimension, of width `dim`."""
    if norm_type == "default_layer_norm":
        return nn.LayerNorm(dim, eps=eps)
    if norm_type == "gain_only_layer_norm":
        return nn.LayerNorm(dim, eps=eps, bias=False)
    if norm_type == "no_wb_layer_norm":
        return nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
    if norm_type == "lp_layer_norm":
        return LowPrecisionLayerNorm(dim, eps=eps)
    if norm_type == "gain_only_lp_layer_norm":
        return LowPrecisionLayerNorm(dim, eps=eps, bias=False)
    if norm_type == "rms_norm":
        return RMSNorm(dim, eps)
    raise ValueError(f"model.norm_type '{norm_type}' is unknown.")
