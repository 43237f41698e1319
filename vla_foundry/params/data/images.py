"""Params of image processors and of image augmentation."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from vla_foundry.config.schema import BaseParams, Bounds, Derived, Fraction, Location, Size
from vla_foundry.params.facts import Facts, ImageFacts
from vla_foundry.params.models.roles import ImageInputs
from vla_foundry.run_folder import PROCESSOR_FOLDER

_DEFAULT_COLORS = ImageFacts(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
_Hue = Annotated[float, Bounds(least=-0.5, most=0.5)]
_Share = Annotated[float, Bounds(above=0, most=1)]
_Strength = Annotated[float, Bounds(least=0, most=1000)]
_Ratio = Annotated[float, Bounds(above=0, most=1000)]
_Pixels = Annotated[int, Bounds(above=0, most=1_000_000)]
_Metres = Annotated[float, Bounds(least=0, most=1000)]
# nearest and farthest
DepthRange = tuple[_Metres, _Metres]
_PixelsOrShare = Annotated[float, Bounds(above=0, most=1_000_000)]


def _list(value: Any) -> Any:
    return [round(number, 6) for number in value] if isinstance(value, tuple) else value


def _check_ascending(name: str, limits: tuple[float, float]) -> None:
    if limits[0] > limits[1]:
        raise ValueError(f"{name} must be [low, high], got {list(limits)}.")


@dataclass(frozen=True, kw_only=True)
class ColorJitterParams(BaseParams):
    """Colour changes in this order, identical for all images of a sample. Training only."""

    # on or off
    enabled: bool = False
    # multiply brightness by a factor within 1 - x .. 1 + x
    brightness: _Strength = 0.2
    # multiply contrast by a factor within 1 - x .. 1 + x
    contrast: _Strength = 0.4
    # multiply saturation by a factor within 1 - x .. 1 + x
    saturation: _Strength = 0.2
    # shift hue by an amount in this range, in turns of the colour wheel
    hue: tuple[_Hue, _Hue] = (-0.05, 0.05)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ascending("hue", self.hue)


@dataclass(frozen=True, kw_only=True)
class CropParams(BaseParams):
    """Crop each image, at the same place in all images of a sample. Outside training: a centre crop."""

    # on or off
    enabled: bool = False
    # height and width: pixels, or fractions of the image if both are 1 or less
    shape: tuple[_Pixels, _Pixels] | tuple[_PixelsOrShare, _PixelsOrShare] = (224, 224)
    # random: anywhere; center: in the middle
    mode: Literal["random", "center"] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        are_pixels = all(side > 1 and side == int(side) for side in self.shape)
        if not are_pixels and max(self.shape) > 1:
            raise ValueError(f"shape must be two whole numbers of pixels or two fractions, got {list(self.shape)}.")


@dataclass(frozen=True, kw_only=True)
class RandomResizedCropParams(BaseParams):
    """Crop at a random place and size, and resize. Outside training: a centre crop of the mean size."""

    # on or off
    enabled: bool = False
    # area of the crop, as a fraction of the image
    scale: tuple[_Share, _Share] = (0.8, 1.0)
    # aspect ratio of the crop, width / height, relative to the image's own
    ratio: tuple[_Ratio, _Ratio] = (0.9, 1.1)
    # height and width of the result, pixels; null: as in the image
    size: tuple[Size, Size] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ascending("scale", self.scale)
        _check_ascending("ratio", self.ratio)


@dataclass(frozen=True, kw_only=True)
class HorizontalFlipParams(BaseParams):
    """Mirror all images of a sample left to right, or none. Words ("left") and robot actions do not change."""

    # on or off
    enabled: bool = False
    # fraction of samples to mirror
    probability: Fraction = 0.5


@dataclass(frozen=True, kw_only=True)
class ImageAugmentationParams(BaseParams):
    """`--data.augmentation.image.` In this order: crop, random resized crop, flip, colours."""

    # colours
    color_jitter: ColorJitterParams = field(default_factory=ColorJitterParams)
    # crop of fixed size
    crop: CropParams = field(default_factory=CropParams)
    # crop of random size
    random_resized_crop: RandomResizedCropParams = field(default_factory=RandomResizedCropParams)
    # mirroring
    horizontal_flip: HorizontalFlipParams = field(default_factory=HorizontalFlipParams)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop.enabled and self.random_resized_crop.enabled:
            raise ValueError(
                "crop and random_resized_crop are both enabled: each chooses the crop. Enable one of them."
            )


@dataclass(frozen=True, kw_only=True)
class DataAugmentationParams(BaseParams):
    """`--data.augmentation.` Random changes to samples."""

    # false: no augmentation, not even in training
    enabled: bool = True
    # changes to images
    image: ImageAugmentationParams = field(default_factory=ImageAugmentationParams)


@dataclass(frozen=True, kw_only=True)
class ImageProcessorParams(BaseParams):
    """`--data.` How images and text become model inputs; data types with images inherit these fields."""

    # saved or Hugging Face processor, by folder or name; null: our own, with the tokenizer below
    processor: Location | None = None
    # options of a Hugging Face image processor, e.g. {size: {height: 224, width: 224}}
    processor_kwargs: dict[str, Any] = field(default_factory=dict)
    # SmolVLM, Idefics3: split images into tiles, which gives up to 17 times as many image tokens
    split_images: bool = False
    # tokenizer of our own processor, by folder or name
    tokenizer: Location | None = None
    # side of our own processor's images, pixels; null: as in the model
    image_size: Size | None = None
    # tokens per image of our own processor; null: as in the model
    img_num_tokens: Size | None = None
    # how our own processor resizes images: centre crop, distort, or pad with black
    image_resizing_method: Literal["center_crop", "resize_no_crop", "resize_fit"] = "center_crop"
    # interpolation of resized pixels
    image_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    # our own processor: mean subtracted from red, green and blue in 0 .. 1, on the device; null: as for the model's
    # weights, else 0.5
    image_mean: tuple[Fraction, Fraction, Fraction] | None = None
    # our own processor: standard deviation that they are then divided by; null: as for the model's weights, else 0.5
    image_std: tuple[_Ratio, _Ratio, _Ratio] | None = None
    # prompt layout: chat, plain, caption, or chat_template (the tokenizer's); null: the processor's own
    prompt_layout: str | None = None

    def tokenizer_name(self) -> str | None:
        """Return the processor or tokenizer named here."""
        return self.processor or self.tokenizer

    def derive_processor(self, model: ImageInputs, facts: Facts) -> dict[str, Derived]:
        """Derive the processor or tokenizer, image size and tokens per image from the model.

        Args:
            model: the images it takes.
            facts: facts about the run that it starts from.
        """
        derived: dict[str, Derived] = {}
        processor = self.processor
        if self.tokenizer_name() is None:
            if model.processor is not None:
                processor = model.processor
                derived["processor"] = Derived(processor, "the model's own")
            elif facts.started_from is not None:
                name = facts.started_from.name
                is_processor = name.rstrip("/").endswith(f"/{PROCESSOR_FOLDER}")
                processor = name if is_processor else None
                derived["processor" if is_processor else "tokenizer"] = Derived(
                    name, "the run that the model starts from"
                )
        if processor is None:
            derived |= self.derive_colors(facts)
            for name in ("image_size", "img_num_tokens"):
                if getattr(self, name) is None and getattr(model, name) is not None:
                    derived[name] = Derived(getattr(model, name), "the model")
        return derived

    def derive_colors(self, facts: Facts) -> dict[str, Derived]:
        """Derive mean and standard deviation of colours from the images that the model's weights were trained on."""
        known = {name: images for name, images in facts.weights_images.items() if images and len(images.mean) == 3}
        source, images = next(iter(known.items()), ("the default", _DEFAULT_COLORS))
        values = {"image_mean": images.mean, "image_std": images.std}
        return {name: Derived(value, source) for name, value in values.items() if getattr(self, name) is None}

    @property
    def colors(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of colours for our own processor."""
        return self.image_mean or _DEFAULT_COLORS.mean, self.image_std or _DEFAULT_COLORS.std

    def compare_images(self, facts: Facts, path: str, *, is_accepted: bool) -> list[str]:
        """Compare how images are prepared here with how those were that the model's weights learned by.

        Returns:
            Accepted differences, and what cannot be compared.

        Raises:
            ValueError: a difference is not accepted.
        """
        own = facts.images
        if self.processor is None:
            size = None if self.image_size is None else (self.image_size, self.image_size)
            mean, std = self.colors
            own = ImageFacts(mean=mean, std=std, size=size)
        if own is None:
            return []
        notices, differences = [], []
        for name, known in facts.weights_images.items():
            found = None if known is None else known.find_difference(own)
            if known is None:
                notices.append(f"{name} keeps no image processor, so it is not compared with the data's.")
            elif found is not None:
                key, theirs, ours = (_list(value) for value in found)
                fix = f"Use --{path}.image_{key} {theirs[0] if key == 'size' else theirs}."
                differences.append(
                    f"The weights of {name} were trained on images of {key} {theirs}, but {path} gives {ours}. "
                    + (fix if self.processor is None else "Use the processor that they were trained with.")
                )
        if differences and not is_accepted:
            raise ValueError(f"{differences[0]} Or continue as is with --{path}.accept_contradictions true.")
        return differences + notices

    def check_processor(self, model: ImageInputs, path: str, *, seq_len: int, num_images: int = 1) -> None:
        """Check that a processor is given and that our own one fits the model and the row length.

        Raises:
            ValueError: they do not fit.
        """
        if self.tokenizer_name() is None:
            raise ValueError(
                f"{path}.processor and {path}.tokenizer are missing. Give --{path}.tokenizer NAME_OR_FOLDER for our "
                f"own processor, or --{path}.processor NAME_OR_FOLDER."
            )
        num_tokens = model.img_num_tokens if self.processor is not None else self.img_num_tokens
        if num_tokens is not None and num_images * num_tokens >= seq_len:
            tokens = f"{num_images} x {num_tokens}" if num_images > 1 else str(num_tokens)
            raise ValueError(
                f"{path}.seq_len ({seq_len}) must be more than the tokens of the images ({tokens}): images and their "
                f"text share a row. Use a larger {path}.seq_len."
            )
        if self.processor is not None:
            return
        for name, own, taken in (
            ("image_size", self.image_size, model.image_size),
            ("img_num_tokens", self.img_num_tokens, model.img_num_tokens),
        ):
            if own is None:
                raise ValueError(f"{path}.{name} is missing, and the model does not say. Give --{path}.{name}.")
            if taken is not None and own != taken:
                raise ValueError(f"{path}.{name} ({own}) must equal the model's ({taken}). Leave {path}.{name} out.")
