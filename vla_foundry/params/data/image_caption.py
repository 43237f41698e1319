"""Params of datasets of captioned images."""

from dataclasses import dataclass, field
from typing import Any

from vla_foundry.params.base import register_data_params
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.derivation import Derived, Facts
from vla_foundry.params.images import DataAugmentationParams, ImageProcessorParams
from vla_foundry.run_folder import PROCESSOR_FOLDER
from vla_foundry.text.prompts import CAPTION_PROMPTS, template_fields


@register_data_params("image_caption")
@dataclass(frozen=True, kw_only=True)
class ImageCaptionDataParams(ImageProcessorParams, DataParams):
    """Images with captions or conversations; only the answers are supervised."""

    modalities = ("image_caption",)

    # user turns that a caption answers, one drawn per sample; <image> says where images go, {name} is a JSON string
    prompts: list[str] = field(default_factory=lambda: list(CAPTION_PROMPTS))
    # the caption's key in the JSON member; null: the text member, or else the key "caption"
    caption_key: str | None = None
    # several samples to a row, each seeing only itself; null: if the model can
    pack: bool | None = None
    # cut the last answer of a sample that is longer than seq_len; false: such a sample is dropped
    truncate_answers: bool = False
    # random changes while training; validation takes the middle of each image
    augmentation: DataAugmentationParams = field(default_factory=DataAugmentationParams)

    def __post_init__(self) -> None:
        ImageProcessorParams.__post_init__(self)
        DataParams.__post_init__(self)
        if not self.prompts:
            raise ValueError("prompts is empty. Give at least one, or leave it out.")
        for prompt in self.prompts:
            template_fields(prompt)  # a broken template is said before anything is read

    def tokenizer_name(self) -> str | None:
        """The processor or tokenizer that is named here."""
        return self.processor or self.tokenizer

    def derive(self, root: Any, facts: Facts) -> dict[str, Derived]:
        """The processor or tokenizer too, the size of images and their tokens, and whether rows are packed."""
        derived = super().derive(root, facts)
        model = root.model.image_inputs()
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
            for name in ("image_size", "img_num_tokens"):
                if getattr(self, name) is None and getattr(model, name) is not None:
                    derived[name] = Derived(getattr(model, name), "the model")
        if self.pack is None:
            derived["pack"] = Derived(model.takes_packed_rows, "the model")
        return derived

    def check(self, root: Any, facts: Facts, path: str) -> list[str]:
        """Check that there is a processor, and that it, the model and the length of rows fit."""
        notices = super().check(root, facts, path)
        if self.tokenizer_name() is None:
            raise ValueError(
                f"{path}.processor and {path}.tokenizer are missing. Give --{path}.tokenizer NAME_OR_FOLDER for our "
                f"own processor, or --{path}.processor NAME_OR_FOLDER."
            )
        model = root.model.image_inputs()
        if self.pack and not model.takes_packed_rows:
            raise ValueError(
                f"{path}.pack is true, but model.type {root.model.type} takes one sample a row. Leave it out."
            )
        if self.processor is None:
            self._check_images(model.image_size, model.img_num_tokens, path)
        return notices

    def _check_images(self, image_size: int | None, img_num_tokens: int | None, path: str) -> None:
        """Check what our own processor makes of an image against what the model takes."""
        for name, own, taken in (
            ("image_size", self.image_size, image_size),
            ("img_num_tokens", self.img_num_tokens, img_num_tokens),
        ):
            if own is None:
                raise ValueError(f"{path}.{name} is missing, and the model does not say. Give --{path}.{name}.")
            if taken is not None and own != taken:
                raise ValueError(f"{path}.{name} ({own}) must equal the model's ({taken}). Leave {path}.{name} out.")
        if self.img_num_tokens is not None and self.img_num_tokens >= self.seq_len:
            raise ValueError(
                f"{path}.seq_len ({self.seq_len}) must be more than {path}.img_num_tokens ({self.img_num_tokens}): "
                "an image and its caption stand in one row."
            )
