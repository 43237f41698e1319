"""Modality `interleaved`: documents of text and images in order; all text is supervised, images are not.

A sample's members are a `json`, in a layout of `text/interleaved.py`, and the images that it names, such as
`image_0.jpg`, or videos, with data.video_frames: their frames stand in their place. A document longer than seq_len + 1
tokens is truncated: an image is kept whole or left out with all that follows. Documents are packed as captioned images
are (`image_caption.py`), and the images of a batch stand in one tensor, in the order of their tokens: there is nothing
to pad and nothing to mask.
"""

from collections.abc import Sequence
from typing import Any

from vla_foundry.data.pipelines.image_caption import (
    Encode,
    ImageTextPipeline,
    file_of,
    find_images,
    hint_of,
    prepare_members,
)
from vla_foundry.data.pipelines.stages import Dropped, Sample, Stage, register_pipeline
from vla_foundry.images.processor import Processor
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.image_caption import InterleavedDataParams
from vla_foundry.params.data.images import DataAugmentationParams
from vla_foundry.parsing import parse_record
from vla_foundry.text.captions import Unusable
from vla_foundry.text.interleaved import Part, Picture, place_pictures, read_document


class ReadDocument:
    """A stage: the member json -> `parts` (text, or None for an image), `pictures` (members) and `is_whole`.

    Args:
        max_images: a document ends before the image after these; None: no limit.
    """

    def __init__(self, max_images: int | None) -> None:
        self.max_images = max_images

    def __call__(self, sample: Sample) -> Sample:
        """Read the document.

        Raises:
            Dropped: there is none, an image is missing, or no text can be trained on.
        """
        if "json" not in sample:
            members = ", ".join(sorted(name for name in sample if not name.startswith("__")))
            raise Dropped("no document", f"it has no member json, only {members or 'none'}")
        stored: dict[str, list[Part]] = {}
        for name in find_images(sample):
            stored.setdefault(file_of(name), []).append(Picture(name))
        try:
            placed = place_pictures(read_document(parse_record(sample["json"], "its json")), list(stored))
        except Unusable as error:
            hint = hint_of(sample) if error.reason == "missing image" else ""
            raise Dropped(error.reason, (str(error) or "in its json") + hint) from None
        except ValueError as error:
            raise Dropped("bad JSON", str(error)) from None
        parts = [each for part in placed for each in ([part] if isinstance(part, str) else stored[part.name or ""])]
        places = [number for number, part in enumerate(parts) if isinstance(part, Picture)]
        cut = [] if self.max_images is None else places[self.max_images :]
        kept = parts[: cut[0]] if cut else parts
        return {
            **sample,
            "parts": [part if isinstance(part, str) else None for part in kept],
            "pictures": [part.name for part in kept if isinstance(part, Picture)],
            "is_whole": not cut,
        }


class PreparePictures:
    """A stage: the members named in `pictures` -> `images`, see `prepare_members`."""

    def __init__(self, params: DataAugmentationParams) -> None:
        self.params = params

    def __call__(self, sample: Sample) -> Sample:
        """Decode and augment; an image that cannot be used drops the document."""
        return prepare_members(sample, sample["pictures"], self.params)


class EncodeDocument(Encode):
    """A stage: `images` and `parts` -> `inputs`."""

    def _encode(self, processor: Processor, sample: Sample) -> tuple[dict[str, Any], int]:
        try:
            inputs = processor.encode_document(
                sample["images"], sample["parts"], max_tokens=self.max_tokens, is_whole=sample["is_whole"]
            )
            ids = inputs["input_ids"]
            # how long a document would be is not known: its rest is not tokenized
            is_cut = sample["is_whole"] and ids[-1] != processor.tokenizer.eos_token_id
            return inputs, self.max_tokens + 1 if is_cut else len(ids)
        except ValueError as error:
            raise Dropped("no room for text" if "no room" in str(error) else "control token", str(error)) from None


@register_pipeline("interleaved")
def create_interleaved_pipeline(params: DataParams, stages: Sequence[Stage] | None = None) -> ImageTextPipeline:
    """Create the pipeline for documents of text and images."""
    assert isinstance(params, InterleavedDataParams), "modality interleaved needs data.type interleaved"
    encode = EncodeDocument(params, max_tokens=params.seq_len + 1)
    default = (ReadDocument(params.max_images), PreparePictures(params.augmentation), encode)
    return ImageTextPipeline(params, encode, default, stages)
