"""Any Hugging Face or timm image encoder, with the native vision transformer's forward."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from vla_foundry.models.hugging_face import HuggingFaceModule, find_blocks, load_published_model
from vla_foundry.models.registry import register_model
from vla_foundry.params.models.roles import TIMM_PREFIX
from vla_foundry.params.models.vit import ViTHFParams
from vla_foundry.storage.hub import loading_published


class ViTHF(HuggingFaceModule):
    """Wraps an image encoder; parameters keep their names, prefixed with `model.`

    Weights that do not affect the tokens (pooling heads) are frozen because they would get no gradient.
    """

    def __init__(
        self, model: nn.Module, *, hidden_dim: int, image_size: int, num_tokens: int, num_prefix_tokens: int
    ) -> None:
        super().__init__(model)
        self.hidden_dim = hidden_dim
        self.image_size = image_size
        # number of tokens of an image, prefix tokens among them
        self.num_tokens = num_tokens
        # number of tokens before the patch tokens
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, pixel_values: Float[Tensor, "*N 3 H W"]) -> Float[Tensor, "*N T D"]:
        """Return the tokens of each image: prefix tokens, then the patches, row by row."""
        shape = pixel_values.shape[:-3]
        return _encode(self.model, pixel_values.flatten(0, -4)).unflatten(0, shape)

    def list_blocks(self) -> list[nn.Module]:
        """Return the blocks in order."""
        return _find_timm_blocks(self.model) if _is_timm(self.model) else find_blocks(self.model)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise all weights as this encoder's own code does."""
        if _is_timm(self.model):
            for module in self.model.modules():
                reset: Any = getattr(module, "reset_parameters", None)
                if reset is not None:
                    reset()
            draw: Any = getattr(self.model, "init_weights", None)
            if draw is not None:
                draw()
        else:
            super().init_weights()

    def num_flops_per_image(self) -> float:
        """Return 6 FLOPs per matrix weight and token; the attention scores are not counted."""
        return (
            6.0 * self.num_tokens * sum(p.numel() for p in self.model.parameters() if p.ndim >= 2 and p.requires_grad)
        )

    def save_files(self, folder: Path) -> None:
        """Write the architecture; timm models need no file because timm defines them in code."""
        if not _is_timm(self.model):
            super().save_files(folder)


def _find_timm_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the members of a model's outermost sequences that have submodules."""
    blocks: list[nn.Module] = []
    inner: set[nn.Module] = set()
    for parent in model.modules():
        for block in parent if isinstance(parent, nn.Sequential | nn.ModuleList) else ():
            if block not in inner and any(True for _ in block.children()):
                blocks.append(block)
                inner.update(block.modules())
    return blocks


def _is_timm(model: nn.Module) -> bool:
    return not hasattr(model, "config")


def _encode(model: Any, pixel_values: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, T, D)."""
    if _is_timm(model):
        x = model.forward_features(pixel_values)
        # convolutional networks put features last only if they declare it
        if x.ndim == 4:
            x = x.flatten(1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else x.flatten(2).transpose(1, 2)
        return x
    native = getattr(model.config, "image_size", None)
    is_native = native is None or tuple(pixel_values.shape[-2:]) == _pair(native)
    options = {} if is_native else {"interpolate_pos_encoding": True}
    x = model(pixel_values=pixel_values, **options).last_hidden_state
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _run_on_meta(model: nn.Module, image_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the tokens of one image and the weights they depend on, both on the meta device."""
    # a tensor with several names stays one
    copies = {p: torch.empty_like(p, device="meta", requires_grad=True) for p in model.parameters()}
    weights = {name: copies[p] for name, p in model.named_parameters(remove_duplicate=False)}
    buffers = {name: torch.empty_like(b, device="meta") for name, b in model.named_buffers(remove_duplicate=False)}
    pixels = torch.empty(1, 3, image_size, image_size, device="meta")

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: Tensor) -> Tensor:
            return _encode(self.model, pixels)

    tensors = {f"model.{name}": value for name, value in {**weights, **buffers}.items()}
    return torch.func.functional_call(Encoder(), tensors, (pixels,), tie_weights=False), weights


def _find_used(model: nn.Module, image_size: int) -> tuple[Tensor, set[str]]:
    """Return the tokens of one image, on the meta device, and the names of the weights they depend on."""
    x, weights = _run_on_meta(model, image_size)
    gradients = torch.autograd.grad(x.sum(), list(weights.values()), allow_unused=True)
    return x, {name for name, gradient in zip(weights, gradients, strict=True) if gradient is not None}


def _wrap(model: nn.Module, image_size: int, num_patches: int | None) -> ViTHF:
    x, used = _find_used(model, image_size)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in used)
    num_tokens = x.shape[1]
    num_prefix = getattr(model, "num_prefix_tokens", 0) if num_patches is None else max(0, num_tokens - num_patches)
    return ViTHF(
        model, hidden_dim=x.shape[2], image_size=image_size, num_tokens=num_tokens, num_prefix_tokens=num_prefix
    )


@register_model("vit_hf")
def create_vit_hf(params: ViTHFParams, load_pretrained: bool = True) -> ViTHF:
    """Build the encoder that `params.hf_pretrained` names, in fp32; code shipped with it is never run.

    Raises:
        ValueError: the model does not exist or is not an image encoder.
    """
    if params.hf_pretrained.startswith(TIMM_PREFIX):
        return _create_timm(params, load_pretrained and params.hf_load_weights)
    key = "model.vit.hf_pretrained"
    with loading_published(f"{key} '{params.hf_pretrained}'"):
        config = _vision_config(AutoConfig.from_pretrained(params.hf_pretrained.removeprefix("hf://")))
        image_size = params.img_size or _pair(getattr(config, "image_size", None) or 224)[0]
        patch = params.patch_size or getattr(config, "patch_size", None)
        num_patches = (image_size // _pair(patch)[0]) ** 2 if patch is not None else 1 << 60
    model = load_published_model(
        AutoModel,
        params,
        load_pretrained=load_pretrained,
        config=config,
        key=key,
        # pooling heads do not affect the tokens
        is_needed=lambda model, name: name in _find_used(model, image_size)[1],
    )
    return _wrap(model.train(), image_size, num_patches)


def _vision_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the image encoder's config from an image-text config, with token pooling switched off."""
    config = getattr(config, "vision_config", config)
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False
    return config


def _create_timm(params: ViTHFParams, loads: bool) -> ViTHF:
    try:
        import timm
    except ImportError:
        raise ValueError(
            f"model.vit.hf_pretrained '{params.hf_pretrained}' needs timm. Install vla-foundry[timm]."
        ) from None
    name = params.hf_pretrained.removeprefix(TIMM_PREFIX)
    size: dict[str, Any] = {} if params.img_size is None else {"img_size": params.img_size}
    with loading_published(f"model.vit.hf_pretrained '{params.hf_pretrained}'"):
        model: Any = timm.create_model(name, pretrained=loads, num_classes=0, **size)
    image_size = params.img_size or model.default_cfg["input_size"][-1]
    return _wrap(model.train(), image_size, None)
