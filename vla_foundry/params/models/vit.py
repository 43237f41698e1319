"""Params of image encoders: the native vision transformer, and encoders from Hugging Face and timm."""

import os
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from vla_foundry.config.schema import Bounds, Derived, Epsilon, Location, Size
from vla_foundry.params.facts import Facts
from vla_foundry.params.models.roles import Depth, ImageInputs, ModelParams, PublishedParams, register_model_params


@dataclass(frozen=True, kw_only=True)
class ImageEncoderParams(ModelParams):
    """Role: anything that maps images to a square grid of feature vectors."""

    _choice_registry = {}
    native_type = "vit"

    # side of the square of image tokens merged into one language-model token (pixel unshuffle)
    projector_pixel_shuffle_factor: Size = 1

    def tokens_after_projector(self, image_size: int | None, patch_size: int | None) -> ImageInputs:
        """Return the images it takes and the number of language-model tokens per image, if known.

        Raises:
            ValueError: the patches of an image do not divide into such squares.
        """
        if image_size is None or patch_size is None:
            return ImageInputs(image_size=image_size)
        side, factor = image_size // patch_size, self.projector_pixel_shuffle_factor
        if side < 1 or side % factor:
            raise ValueError(
                f"projector_pixel_shuffle_factor ({factor}) must divide the {side} patches along a side of an image "
                f"(img_size {image_size} / patch_size {patch_size}). Change one of them."
            )
        return ImageInputs(image_size=image_size, img_num_tokens=(side // factor) ** 2)


@register_model_params("vit")
@dataclass(frozen=True, kw_only=True)
class ViTParams(ImageEncoderParams):
    """The native vision transformer."""

    # model width
    hidden_dim: Size = 768
    # inner width of the feed-forward
    inter_dim: Size = 3072
    # side of a patch, pixels
    patch_size: Size = 16
    # side of an image, pixels; images of other sizes have their position embeddings interpolated
    img_size: Size = 384
    # attention heads
    n_heads: Size = 12
    # number of blocks
    n_layers: Depth = 12
    # dropout probability after the embedding and in each branch of a block, in training
    dropout: Annotated[float, Bounds(least=0, below=1)] = 0.0
    # epsilon of every norm
    ln_eps: Epsilon = 1e-6
    # put a class token in front of the patches; a language model does not see it
    cls_flag: bool = False
    # what the encoder returns: all tokens, the class token first (B, 1 + patches, D); or the class token alone (B, D),
    # which a language model cannot read
    output: Literal["tokens", "class_token"] = "tokens"
    # patch embedding: one linear map, or a few strided convolutions, which learn faster in small models
    stem: Literal["patch", "conv"] = "patch"
    # interpolation of position embeddings to other image sizes
    interpolation_mode: Literal["bicubic", "bilinear"] = "bicubic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_dim % self.n_heads:
            raise ValueError(f"hidden_dim ({self.hidden_dim}) must be a multiple of n_heads ({self.n_heads}).")
        if self.img_size < self.patch_size:
            raise ValueError(f"img_size ({self.img_size}) must be at least patch_size ({self.patch_size}).")
        if self.stem == "conv" and self.patch_size % 2:
            raise ValueError(f"stem conv halves the image at least once: patch_size ({self.patch_size}) must be even.")
        if self.output == "class_token" and not self.cls_flag:
            raise ValueError("output 'class_token' needs a class token. Set cls_flag true, or output tokens.")
        self.image_inputs()

    def num_weights(self) -> int:
        """Return the number of weights, without norms, biases and position embeddings."""
        block = 4 * self.hidden_dim**2 + 2 * self.hidden_dim * self.inter_dim
        return self.n_layers * block + 3 * self.patch_size * self.hidden_dim

    def image_inputs(self) -> ImageInputs:
        """Return the encoder's image inputs."""
        return self.tokens_after_projector(self.img_size, self.patch_size)


@register_model_params("vit_hf")
@dataclass(frozen=True, kw_only=True)
class ViTHFParams(PublishedParams, ImageEncoderParams):
    """Any Hugging Face or timm image encoder."""

    # Hugging Face model name, hf://owner/name or folder; or timm:NAME, where a NAME without owner/ is enough
    hf_pretrained: Location
    # side of its images, pixels; null: as published, and data.image_size must be given
    img_size: Size | None = None
    # side of its patches, pixels; null: as published, and data.img_num_tokens must be given
    patch_size: Size | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.image_inputs()

    def derive(self, root: Any, facts: Facts) -> dict[str, Derived]:
        """Derive the prefix `timm:` of a name that cannot be one of the Hugging Face hub."""
        name = self.hf_pretrained
        if "/" in name or ":" in name or os.path.isdir(name):
            return {}
        source = "a name without owner/, which is timm's"
        return {"hf_pretrained": Derived(f"timm:{name}", source, f"{name} is {source}: read as timm:{name}.")}

    def image_inputs(self) -> ImageInputs:
        """Return the encoder's image inputs, as far as the params define them."""
        return self.tokens_after_projector(self.img_size, self.patch_size)
