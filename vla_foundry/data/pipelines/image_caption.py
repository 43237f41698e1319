"""Modality `image_caption`: images with a caption or a conversation; only the answers are supervised.

A sample's members are those of img2dataset, plus several images and conversations:

| member                      | meaning                                                                          |
|-----------------------------|----------------------------------------------------------------------------------|
| jpg, jpeg, png, webp        | the image                                                                        |
| image_0.jpg, image_1.png ...| several images, in numeric order; also 0.jpg, 1.jpg, ...                         |
| mp4, webm, gif, mov, mkv    | with data.video_frames: a video, of which so many frames are images of the       |
|                             | sample; several: video_0.mp4, ..., numbered with the images                      |
| txt                         | the caption                                                                      |
| json                        | `conversations` or `messages`: all turns; else the caption. Other strings are    |
|                             | fields of prompt templates                                                       |

Each sample becomes one document. Documents are packed first-fit into rows of one length per microbatch, which keeps
padding low. For models that take one sample per row, each row is padded to the longest instead. Rows depend only on the
samples of the microbatch. A sample that does not fit into a row is dropped, or its last answer is truncated; images and
prompts are never cut.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from vla_foundry.batch import Batch
from vla_foundry.data.pipelines.augment import add_images
from vla_foundry.data.pipelines.rows import ROW_MULTIPLE, bucket, join_samples
from vla_foundry.data.pipelines.stages import (
    BatchStage,
    Dropped,
    Pipeline,
    Rows,
    Sample,
    Stage,
    check_text,
    register_pipeline,
)
from vla_foundry.data.pipelines.text_untokenized import pack
from vla_foundry.data.reader import ShardReader
from vla_foundry.images.processor import ImageTextProcessor, Processor, load_processor
from vla_foundry.images.video import check_installed, read_frames
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.image_caption import ImageCaptionDataParams, ImageTextDataParams
from vla_foundry.params.data.images import DataAugmentationParams, ImageProcessorParams
from vla_foundry.randomness import draw_index
from vla_foundry.run_folder import PROCESSOR_CONFIG_NAME
from vla_foundry.text.captions import Unusable, read_texts
from vla_foundry.text.chat import IMAGE_MARKER, Turn, create_caption_turns, place_images
from vla_foundry.text.tokenizers import load_tokenizer

_IMAGE_SUFFIX = re.compile(r"(?:(?:image_)?(\d+)\.)?(?:jpe?g|png|webp)")
_VIDEO_SUFFIX = re.compile(r"(?:(?:video_)?(\d+)\.)?(?:gif|m4v|mkv|mov|mp4|webm)")
_MARKER = re.compile(f"{IMAGE_MARKER}|<video>")


def find_images(members: Iterable[str]) -> list[str]:
    """Return the suffixes of a sample's images in order, the unnumbered one first, the frames of a video together."""
    return list(_find_images(tuple(members)))


# the samples of a dataset have few different sets of members
@lru_cache(maxsize=1024)
def _find_images(members: tuple[str, ...]) -> tuple[str, ...]:
    found = []
    for name in members:
        file, _, frame = name.partition("/")
        if match := (_VIDEO_SUFFIX if frame else _IMAGE_SUFFIX).fullmatch(file):
            found.append((int(match[1] or -1), file, int(frame or 0), name))
    return tuple(name for *_, name in sorted(found))


def file_of(image: str) -> str:
    """Return the member that an image of `find_images` comes from: itself, or the video."""
    return image.partition("/")[0]


def hint_of(sample: Sample) -> str:
    """Return what to add about missing images: nothing unless the sample has videos."""
    return "; data.video_frames reads videos" if any(map(_VIDEO_SUFFIX.fullmatch, sample)) else ""


class SampleVideos:
    """A stage: adds evenly spaced frames of each video as images MEMBER/0, MEMBER/1, ..., uint8 [3, H, W]."""

    def __init__(self, num_frames: int) -> None:
        self.num_frames = num_frames

    def __call__(self, sample: Sample) -> Sample:
        """Decode the frames.

        Raises:
            Dropped: a video cannot be used.
        """
        frames: Sample = {}
        for name in filter(_VIDEO_SUFFIX.fullmatch, sample):
            try:
                found = read_frames(sample[name], self.num_frames)
            except ValueError as error:
                raise Dropped("bad video", f"{name}: {error}") from None
            frames |= {f"{name}/{number}": frame for number, frame in enumerate(found)}
        return {**sample, **frames}


class CreateTurns(BatchStage):
    """A stage: text members -> `turns`, with `<image>` where the images go.

    It runs on the whole microbatch before the first image is decoded, and tokenizes there, too: pixels drive everything
    else out of the processor's caches, so that the same work takes twice as long between them.

    Args:
        prompts: templates of the user turn that the caption answers; one is drawn per sample.
        caption_key: key of the caption in the JSON; None: the text member, or else the key "caption". Of a list of
            captions, one that can be trained on is drawn.
        encode: the stage that will encode the turns; None: they are not tokenized here.
    """

    def __init__(self, prompts: Sequence[str], caption_key: str | None, encode: "Encode | None" = None) -> None:
        self.prompts = tuple(prompt.replace("<video>", IMAGE_MARKER) for prompt in prompts)
        self.caption_key = caption_key
        self.encode = encode

    def apply(self, samples: Sequence[Sample]) -> list[Sample | ValueError]:
        """See BatchStage."""
        results: list[Sample | ValueError] = []
        for sample in samples:
            try:
                results.append(self(sample))
            except ValueError as error:
                results.append(error)
        if self.encode is not None:
            made = [result["turns"] for result in results if isinstance(result, dict)]
            self.encode.load().tokenize_ahead(made)
        return results

    def __call__(self, sample: Sample) -> Sample:
        """Create the turns.

        Raises:
            Dropped: the sample has no image, or no text that can be trained on.
            ValueError: prompt and sample do not fit together.
        """
        images = find_images(sample)
        if not images:
            members = ", ".join(sorted(name for name in sample if not name.startswith("__")))
            raise Dropped("no image", f"its members are {members or 'none'}{hint_of(sample)}")
        txt = sample.get("txt") if self.caption_key is None else None
        try:
            texts = read_texts(txt, sample.get("json"), key=self.caption_key or "caption")
        except Unusable as error:
            place = f"it has no usable text under {self.caption_key or 'txt or caption'}"
            raise Dropped(error.reason, str(error) or place) from None
        if texts.conversation:
            return {**sample, "turns": _place_in_first(_show_videos(texts.conversation, images), len(images))}
        seed, position = sample["__seed__"], sample["__position__"]
        number = 0
        if len(texts.captions) > 1:
            number = draw_index(len(texts.captions), seed=seed, position=position, purpose="caption")
        turns = create_caption_turns(
            texts.captions[number],
            self.prompts,
            num_images=len(images),
            seed=seed,
            position=position,
            fields={name: value for name, value in (texts.values or {}).items() if isinstance(value, str)},
        )
        check_text(turns[0].content)
        return {**sample, "turns": turns}


def _show_videos(turns: list[Turn], images: Sequence[str]) -> list[Turn]:
    """Replace the marker of each video by those of its frames, if there is one marker for each image or video."""
    counts = Counter(map(file_of, images))
    if counts.keys() == set(images) or sum(len(_MARKER.findall(turn.content)) for turn in turns) != len(counts):
        return turns
    waiting = iter(counts.values())
    return [Turn(turn.role, _MARKER.sub(lambda _: IMAGE_MARKER * next(waiting), turn.content)) for turn in turns]


def _place_in_first(turns: list[Turn], num_images: int) -> list[Turn]:
    """Put the image markers into the first user turn, if no turn has any."""
    if any(IMAGE_MARKER in turn.content for turn in turns):
        return turns
    first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise ValueError("its conversation has no user turn")
    turns[first] = Turn("user", place_images(turns[first].content, num_images))
    return turns


class PrepareImages:
    """A stage: image members -> `images`, cropped if configured, and `color_factors` in training.

    Args:
        params: the image params.
    """

    def __init__(self, params: DataAugmentationParams) -> None:
        self.params = params

    def __call__(self, sample: Sample) -> Sample:
        """Decode and augment.

        Raises:
            Dropped: an image cannot be used.
        """
        return prepare_members(sample, find_images(sample), self.params)


def prepare_members(sample: Sample, names: Sequence[str], params: DataAugmentationParams) -> Sample:
    """Return the sample with the members of these names as images, see `augment.add_images`, without frames of videos.

    Raises:
        Dropped: an image cannot be used.
    """
    images = [sample[name] for name in names]
    frames = {name for name in find_images(sample) if file_of(name) != name}
    return add_images({name: value for name, value in sample.items() if name not in frames}, images, params)


class Encode:
    """A stage: `images` and `turns` -> `inputs`, encoded by the processor.

    Args:
        params: the processor params.
        max_tokens: most tokens in a sample.
        truncate_answers: truncate the last answer of a longer sample instead of dropping the sample.
        processor: the processor; None: load the one that the params describe.
    """

    def __init__(
        self,
        params: ImageProcessorParams,
        *,
        max_tokens: int,
        truncate_answers: bool = False,
        processor: Processor | None = None,
    ) -> None:
        self.params = params
        self.max_tokens = max_tokens
        self.truncate_answers = truncate_answers
        self._processor = processor

    def __getstate__(self) -> dict[str, object]:
        """Pickle without the processor, so that each loader process loads its own."""
        return {**self.__dict__, "_processor": None}

    def load(self) -> Processor:
        """Return the processor, loading it on first use.

        Raises:
            ValueError: the processor cannot be loaded.
        """
        if self._processor is None:
            self._processor = create_image_processor(self.params)
        return self._processor

    def __call__(self, sample: Sample) -> Sample:
        """Encode the sample.

        Raises:
            Dropped: the sample is too long.
            ValueError: the sample cannot be encoded.
        """
        # decoded images are large: they must not wait for the rest of the microbatch
        inputs, length = self._encode(self.load(), sample)
        return {**sample, "inputs": inputs, "num_tokens": length, "images": None}

    def _encode(self, processor: Processor, sample: Sample) -> tuple[dict[str, Any], int]:
        inputs = processor.encode(sample["images"], sample["turns"])
        length = len(inputs["input_ids"])
        if length > self.max_tokens and self.truncate_answers:
            try:
                inputs = processor.encode(sample["images"], sample["turns"], max_tokens=self.max_tokens)
            except ValueError as error:
                raise Dropped("too long", str(error)) from None
        elif length > self.max_tokens:
            raise Dropped("too long", f"{length} tokens do not fit into data.seq_len + 1 = {self.max_tokens}")
        return inputs, length


def create_image_processor(params: ImageProcessorParams) -> Processor:
    """Create the processor that the params describe.

    Raises:
        ValueError: neither data.processor nor data.tokenizer is given, it cannot be loaded, or the image size is
            unknown.
    """
    if params.processor is not None:
        if (Path(params.processor) / PROCESSOR_CONFIG_NAME).is_file():
            return load_processor(params.processor)
        from vla_foundry.images.processor_hf import load_hugging_face_processor

        return load_hugging_face_processor(
            params.processor,
            prompt_layout=params.prompt_layout,
            processor_kwargs=params.processor_kwargs,
            split_images=params.split_images,
        )
    if params.image_size is None or params.img_num_tokens is None:
        raise ValueError(
            f"data.image_size ({params.image_size}) and data.img_num_tokens ({params.img_num_tokens}) must be given "
            "for our own processor, or follow from the model."
        )
    if params.tokenizer is None:
        raise ValueError("data.processor or data.tokenizer must be given: images and text need one of them.")
    mean, std = params.colors
    return ImageTextProcessor(
        load_tokenizer(params.tokenizer),
        image_size=(params.image_size, params.image_size),
        img_num_tokens=params.img_num_tokens,
        resize_method=params.image_resizing_method,
        interpolation=params.image_interpolation,
        image_mean=mean,
        image_std=std,
        prompt_layout=params.prompt_layout or "chat",
    )


class ImageTextPipeline(Pipeline):
    """Makes rows of images and text.

    Args:
        params: the data params.
        encode: the stage that encodes them.
        default: stages that turn members into `inputs`, ending with `encode`.
        stages: others in their place; None: the default ones.
    """

    def __init__(
        self,
        params: ImageTextDataParams,
        encode: Encode,
        default: Sequence[Stage],
        stages: Sequence[Stage] | None,
    ) -> None:
        self.seq_len = params.seq_len
        self.packs = params.pack is not False
        self.encode = encode
        self.num_frames = params.video_frames
        videos = [] if self.num_frames is None else [SampleVideos(self.num_frames)]
        self.stages = self.name_stages(params, [*videos, *default]) if stages is None else stages

    def check(self, reader: ShardReader) -> None:
        """See Pipeline. Load the processor, so that its errors appear before any process starts."""
        if self.num_frames is not None:
            check_installed()
        self.encode.load()

    def create_batch(self, rows: Rows) -> Batch:
        """See Pipeline."""
        return self._join(rows.read_samples(self.stages))

    def create_empty_batch(self) -> Batch:
        """See Pipeline. The batch has an image, so that all ranks run the same modules, but no target."""
        black = torch.zeros((3, 8, 8), dtype=torch.uint8)
        inputs = self.encode.load().encode([black], [Turn("user", IMAGE_MARKER), Turn("assistant", "a")])
        batch = self._join([{"inputs": inputs}])
        batch["target_mask"][:] = False
        return batch

    def _join(self, samples: Sequence[Sample]) -> Batch:
        lengths = [len(sample["inputs"]["input_ids"]) for sample in samples]
        if self.packs:
            length, rows = pack(lengths, self.seq_len, multiple=ROW_MULTIPLE)
        else:
            length, rows = bucket(max(lengths), self.seq_len), [[number] for number in range(len(samples))]
        return join_samples(samples, rows, length, processor=self.encode.load())


class ImageCaptionPipeline(ImageTextPipeline):
    """Makes rows of captioned images.

    Args:
        params: the data params.
        stages: stages that turn members into `inputs`, ending with `Encode`; None: the default ones.
    """

    def __init__(self, params: ImageCaptionDataParams, stages: Sequence[Stage] | None = None) -> None:
        encode = Encode(params, max_tokens=params.seq_len + 1, truncate_answers=params.truncate_answers)
        turns = CreateTurns(params.prompts, params.caption_key, encode)
        default = (turns, PrepareImages(params.augmentation), encode)
        super().__init__(params, encode, default, stages)


@register_pipeline("image_caption")
def create_image_caption_pipeline(params: DataParams) -> ImageCaptionPipeline:
    """Create the pipeline for captioned images."""
    assert isinstance(params, ImageCaptionDataParams), "modality image_caption needs data.type image_caption"
    return ImageCaptionPipeline(params)
