"""Params of datasets of images and text: captioned images, and documents of text and images in order."""

from dataclasses import dataclass, field
from typing import Any

from vla_foundry.config.schema import Count, Derived, Size
from vla_foundry.params.data.base import DataParams, register_data_params
from vla_foundry.params.data.images import DataAugmentationParams, ImageProcessorParams
from vla_foundry.params.facts import Facts
from vla_foundry.text.chat import CAPTION_PROMPTS, template_fields

_VIDEOS = "sample_videos"


@dataclass(frozen=True, kw_only=True)
class ImageTextDataParams(ImageProcessorParams, DataParams):
    """Images and text in rows of tokens."""

    # pack several samples into a row, each seeing only itself; null: if the model supports it
    pack: bool | None = None
    # evenly spaced frames of each video (mp4, webm, gif, ...) that are images of its sample; null: videos are not read
    video_frames: Size | None = None
    # random changes in training; validation uses centre crops
    augmentation: DataAugmentationParams = field(default_factory=DataAugmentationParams)

    def __post_init__(self) -> None:
        order = None if _VIDEOS in self.stages else self.stage_order
        if order is not None and (_VIDEOS in order) != (self.video_frames is not None):
            raise ValueError(
                f"stage_order [{', '.join(order)}] and video_frames ({self.video_frames}) disagree: {_VIDEOS} takes "
                "the frames. Leave stage_order out (null)."
            )
        super().__post_init__()

    def derive(self, root: Any, facts: Facts) -> dict[str, Derived]:
        """Also derive the processor or tokenizer, image size, tokens per image, and whether rows are packed."""
        model = root.model.image_inputs()
        derived = super().derive(root, facts) | self.derive_processor(model, facts)
        if self.pack is None:
            derived["pack"] = Derived(model.takes_packed_rows, "the model")
        return derived

    def check(self, root: Any, facts: Facts, path: str) -> list[str]:
        """Check that a processor is given and that it fits the model and the row length."""
        notices = super().check(root, facts, path)
        model = root.model.image_inputs()
        self.check_processor(model, path, seq_len=self.seq_len, num_images=self.video_frames or 1)
        notices += self.compare_images(facts, path, is_accepted=self.accept_contradictions)
        if self.pack and not model.takes_packed_rows:
            raise ValueError(
                f"{path}.pack is true, but model.type {root.model.type} takes one sample a row. Leave it out."
            )
        return notices

    def video_stages(self) -> list[str]:
        """Return the names of the stages before those of images."""
        return [_VIDEOS] if self.video_frames is not None else []


@register_data_params("image_caption")
@dataclass(frozen=True, kw_only=True)
class ImageCaptionDataParams(ImageTextDataParams):
    """Images with captions or conversations; the loss is on the answers only."""

    modalities = ("image_caption",)

    # user turns before the caption, one drawn per sample; <image> marks where images go, {name} is a JSON string
    prompts: list[str] = field(default_factory=lambda: list(CAPTION_PROMPTS))
    # key of the caption in the JSON member; null: use the text member, else the key "caption"
    caption_key: str | None = None
    # truncate the last answer of samples longer than seq_len; false: drop such samples
    truncate_answers: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompts:
            raise ValueError("prompts is empty. Give at least one, or leave it out.")
        for prompt in self.prompts:
            template_fields(prompt)  # a broken template is an error before anything is read

    def default_stages(self) -> list[str]:
        """Return the names of the stages of a captioned image."""
        return [*self.video_stages(), "create_turns", "prepare_images", "encode"]


@register_data_params("interleaved")
@dataclass(frozen=True, kw_only=True)
class InterleavedDataParams(ImageTextDataParams):
    """Documents of text and images in order; the loss is on all text."""

    modalities = ("interleaved",)

    # a document ends before the image after these; null: as many as fit into seq_len
    max_images: Count | None = None

    def default_stages(self) -> list[str]:
        """Return the names of the stages of a document."""
        return [*self.video_stages(), "read_document", "prepare_pictures", "encode_document"]

    def derive(self, root: Any, facts: Facts) -> dict[str, Derived]:
        """Also derive how many images fit."""
        derived = super().derive(root, facts)
        tokens = root.model.image_inputs().img_num_tokens if self.processor is not None else self.img_num_tokens
        if self.max_images is None and tokens:
            derived["max_images"] = Derived(
                max(1, self.seq_len // tokens), f"{self.seq_len} // {tokens} tokens an image"
            )
        return derived
