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
from vla_foundry.params.models.roles import ImageInputs


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (ColorJitterParams, {"contrast": -0.1}, r"contrast \(-0.1\) must be at least 0 and at most 1000\."),
        (ColorJitterParams, {"hue": (-0.6, 0.1)}, r"hue\[0\] \(-0.6\) must be at least -0.5 and at most 0.5\."),
        (ColorJitterParams, {"hue": (0.2, 0.1)}, r"hue must be \[low, high\], got \[0.2, 0.1\]"),
        (CropParams, {"shape": (224.0, 0.5)}, r"shape must be two whole numbers .* got \[224.0, 0.5\]\."),
        (CropParams, {"shape": (0.0, 0.5)}, r"shape\[0\] \(0\) must be above 0"),
        (CropParams, {"shape": (100.5, 100.5)}, "shape must be"),
        (RandomResizedCropParams, {"scale": (0.0, 0.5)}, r"scale\[0\] \(0\) must be above 0 and at most 1"),
        (RandomResizedCropParams, {"scale": (0.5, 1.5)}, r"scale\[1\] \(1.5\) must be above 0 and at most 1"),
        (RandomResizedCropParams, {"ratio": (1.5, 1.0)}, r"ratio must be \[low, high\]"),
        (RandomResizedCropParams, {"size": (0, 10)}, r"size\[0\] \(0\) must be at least 1"),
        (HorizontalFlipParams, {"probability": 1.5}, r"probability \(1.5\) must be at least 0 and at most 1"),
        (ImageProcessorParams, {"image_std": (0.5, 0.5, 0.0)}, r"image_std\[2\] \(0\) must be above 0"),
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


def test_images_that_fill_a_row_are_refused_with_a_saved_processor_too() -> None:
    inputs = ImageInputs(image_size=64, img_num_tokens=4)
    params = ImageProcessorParams(processor="run/processor")
    params.check_processor(inputs, "data", seq_len=9, num_images=2)
    with pytest.raises(ValueError, match=r"^data\.seq_len \(8\) must be more than the tokens of the images \(2 x 4\)"):
        params.check_processor(inputs, "data", seq_len=8, num_images=2)
