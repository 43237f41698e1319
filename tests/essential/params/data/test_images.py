"""Params of images refuse what has no meaning, in one line with the values."""

import pytest

from vla_foundry.params.data.images import (
    ColorJitterParams,
    CropParams,
    HorizontalFlipParams,
    ImageAugmentationParams,
    ImageProcessorParams,
    RandomResizedCropParams,
)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (ColorJitterParams, {"contrast": -0.1}, r"color_jitter.contrast must be 0 or more, got -0.1\."),
        (ColorJitterParams, {"hue": (-0.6, 0.1)}, r"color_jitter.hue must be .* got \[-0.6, 0.1\]\."),
        (ColorJitterParams, {"hue": (0.2, 0.1)}, "color_jitter.hue must be"),
        (CropParams, {"shape": (224.0, 0.5)}, r"crop.shape must be two whole numbers .* got \[224.0, 0.5\]\."),
        (CropParams, {"shape": (0.0, 0.5)}, "crop.shape must be"),
        (CropParams, {"shape": (100.5, 100.5)}, "crop.shape must be"),
        (RandomResizedCropParams, {"scale": (0.0, 0.5)}, "random_resized_crop.scale must be"),
        (RandomResizedCropParams, {"scale": (0.5, 1.5)}, "random_resized_crop.scale must be"),
        (RandomResizedCropParams, {"ratio": (1.5, 1.0)}, "random_resized_crop.ratio must be"),
        (RandomResizedCropParams, {"size": (0, 10)}, "random_resized_crop.size must be"),
        (HorizontalFlipParams, {"probability": 1.5}, "horizontal_flip.probability must be within"),
        (ImageProcessorParams, {"image_std": (0.5, 0.5, 0.0)}, "data.image_std must be above 0"),
        (
            ImageAugmentationParams,
            {"crop": CropParams(enabled=True), "random_resized_crop": RandomResizedCropParams(enabled=True)},
            "crop and random_resized_crop are both enabled",
        ),
    ],
)
def test_values_without_meaning_are_refused(cls: type, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**values)


def test_shares_and_pixels_are_both_accepted() -> None:
    for shape in [(1.0, 1.0), (0.9, 0.8), (224, 200), (224.0, 224.0)]:
        assert CropParams(shape=shape).shape == shape
