"""From image files to the images that a processor takes: the same in training, validation and inference."""

from collections.abc import Sequence

from torch import Tensor

from vla_foundry.images.augment import AugmentationDraw, ImageAugmentation, augment_image
from vla_foundry.images.decode import decode_image


def prepare_images(
    files: Sequence[bytes], augmentation: ImageAugmentation | None, draw: AugmentationDraw
) -> list[Tensor]:
    """Decode a sample's images and take the drawn part of each.

    Args:
        files: JPEG, PNG or WebP.
        augmentation: what may be done to images; None: nothing.
        draw: what was drawn for the sample; `augment.CENTRE` for validation and inference.

    Returns:
        uint8 [3, H, W] each.

    Raises:
        ValueError: a file can not be decoded, or an image is smaller than the crop.
    """
    images = [decode_image(data) for data in files]
    return images if augmentation is None else [augment_image(image, augmentation, draw)[0] for image in images]
