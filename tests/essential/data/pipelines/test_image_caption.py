"""Modality image_caption: members to turns, images and packed rows, the same for every rank and worker."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.essential.byte_level import train_tokenizer
from tests.essential.images.test_video import encode_video
from vla_foundry.batch import Batch
from vla_foundry.data import create_dataloader
from vla_foundry.data.cache import ShardCache
from vla_foundry.data.pipelines.image_caption import ImageCaptionPipeline, find_images
from vla_foundry.data.pipelines.stages import Rows
from vla_foundry.data.plan import SamplePlan
from vla_foundry.data.reader import Dataset, ShardReader
from vla_foundry.images.codec import decode_image
from vla_foundry.params import dump_params, load_params_from_yaml
from vla_foundry.params.data.image_caption import ImageCaptionDataParams
from vla_foundry.params.data.images import (
    ColorJitterParams,
    CropParams,
    DataAugmentationParams,
    ImageAugmentationParams,
)
from vla_foundry.shards import parse_manifest
from vla_foundry.world import World

WORDS = [
    "a",
    "red",
    "cube",
    "lies",
    "on",
    "the",
    "green",
    "table",
    "left",
    "of",
    "one",
    "blue",
    "mug",
    "under",
    "a",
    "lamp",
    "with",
    "a",
    "yellow",
    "shade",
]
IMAGE_TOKENS = 4


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 300 tokens, without an image token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [" ".join(WORDS)] * 3
    train_tokenizer(300, texts, ["<|endoftext|>"], eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def paligemma_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face processor that makes 4 tokens of an image."""
    from transformers import AutoTokenizer, PaliGemmaProcessor, SiglipImageProcessor

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_special_tokens({"bos_token": "<bos>", "pad_token": "<pad>"})
    image_processor: Any = SiglipImageProcessor(size={"height": 28, "width": 28})
    image_processor.image_seq_length = IMAGE_TOKENS
    folder = tmp_path_factory.mktemp("paligemma")
    PaliGemmaProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def encode_picture(number: int, *, kind: str = "PNG", size: tuple[int, int] = (24, 20)) -> bytes:
    """A picture of one grey, which tells its number; the left half is darker."""
    array = np.full((*size, 3), number, dtype=np.uint8)
    array[:, : size[1] // 2] //= 2
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def create_params(tokenizer: Path, **values: Any) -> ImageCaptionDataParams:
    settings: dict[str, Any] = {"tokenizer": str(tokenizer), "image_size": 16, "img_num_tokens": IMAGE_TOKENS}
    return ImageCaptionDataParams(**(settings | {"seq_len": 128, "prompts": ["<image>What is it?"]} | values))


def create_rows(manifest: Path, positions: Sequence[int], *, is_training: bool = True) -> Rows:
    entries = tuple(parse_manifest(manifest.read_text(encoding="utf-8"), str(manifest)))
    datasets = [Dataset(manifest=str(manifest), modality="image_caption", entries=entries)]
    plan = SamplePlan(
        [[entry.num_sequences for entry in entries]], [1.0], seed=0, global_batch_size=4, block_size=100, shuffle=False
    )
    at = np.asarray(positions)
    reader = ShardReader(datasets, ShardCache(str(manifest.parent / "cache"), 10**9))
    return Rows(at, plan.locate(at), plan, reader, is_training=is_training)


def caption_of(number: int) -> str:
    return " ".join(WORDS[: 2 + number * 5 % 15])


def create_samples(count: int) -> list[dict[str, bytes]]:
    return [{"png": encode_picture(10 + 2 * n), "txt": caption_of(n).encode()} for n in range(count)]


def read_segments(batch: Batch) -> list[tuple[list[int], list[bool]]]:
    """Tokens and targets of each sample, in row-major order; padding left out."""
    documents, found = batch["documents"], []
    rows = np.repeat(np.arange(len(documents.num_per_row)), documents.num_per_row)
    place = [0] * len(documents.num_per_row)
    for row, length, is_padding in zip(rows, documents.lengths, documents.is_padding, strict=True):
        span = slice(place[row], place[row] + length)
        place[row] += int(length)
        if not is_padding:
            found.append((batch["input_ids"][row, span].tolist(), batch["target_mask"][row, span].tolist()))
        else:
            assert not batch["target_mask"][row, span].any()
    assert set(place) == {batch["input_ids"].shape[1]}
    return found


def decode_answers(pipeline: ImageCaptionPipeline, batch: Batch) -> list[str]:
    tokenizer = pipeline.encode.load().tokenizer
    return [
        tokenizer.decode([t for t, is_t in zip(ids, mask, strict=True) if is_t]) for ids, mask in read_segments(batch)
    ]


def padding_share(batch: Batch) -> float:
    documents = batch["documents"]
    return float(documents.lengths[documents.is_padding].sum() / documents.lengths.sum())


def test_images_of_a_sample_are_found_in_order() -> None:
    members = ["image_10.jpg", "json", "image_2.png", "image_0.webp", "depth.png", "txt", "jpeg", "__key__"]
    assert find_images(members) == ["jpeg", "image_0.webp", "image_2.png", "image_10.jpg"]
    assert find_images({"1.jpg": b"", "0.jpg": b""}) == ["0.jpg", "1.jpg"]


def test_packed_rows_hold_each_sample_and_its_image_in_the_order_of_their_tokens(
    tmp_path: Path, tokenizer_folder: Path, write_samples: Callable
) -> None:
    manifest = write_samples(tmp_path / "d", [create_samples(12)])
    pipeline = ImageCaptionPipeline(create_params(tokenizer_folder))
    batch = pipeline.create_batch(create_rows(manifest, range(12)))
    assert batch["input_ids"].shape[0] < 12
    greys = [int(image[0, 0, -1]) for image in batch["pixel_values"]]
    numbers = [(grey - 10) // 2 for grey in greys]
    assert sorted(numbers) == list(range(12))
    assert numbers != list(range(12))
    assert decode_answers(pipeline, batch) == [f" {caption_of(n)}<|endoftext|>" for n in numbers]
    image_token = pipeline.encode.load().image_token_id
    assert all(sum(token == image_token for token in ids) == IMAGE_TOKENS for ids, _ in read_segments(batch))
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["pixel_values"].shape == (12, 3, 16, 16)
    assert (batch["image_mean"], batch["image_std"]) == ((0.5,) * 3, (0.5,) * 3)


def test_packing_leaves_little_padding(tmp_path: Path, tokenizer_folder: Path, write_samples: Callable) -> None:
    manifest = write_samples(tmp_path / "d", [create_samples(64)])
    packed, padded = (
        ImageCaptionPipeline(create_params(tokenizer_folder, pack=pack, seq_len=512)).create_batch(
            create_rows(manifest, range(32))
        )
        for pack in (True, False)
    )
    assert padding_share(packed) < 0.05 < padding_share(padded)


def test_one_sample_a_row_is_filled_up_to_a_bucket(
    tmp_path: Path, paligemma_folder: Path, write_samples: Callable
) -> None:
    manifest = write_samples(tmp_path / "d", [create_samples(4)])
    pipeline = ImageCaptionPipeline(ImageCaptionDataParams(processor=str(paligemma_folder), seq_len=128, pack=False))
    batch = pipeline.create_batch(create_rows(manifest, range(4)))
    segments = read_segments(batch)
    longest = max(len(ids) for ids, _ in segments)
    assert batch["input_ids"].shape == (4, -(-(longest - 1) // 16) * 16 + 1)
    assert [(int(image[0, 0, -1]) - 10) // 2 for image in batch["pixel_values"]] == [0, 1, 2, 3]
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    for row, (_, mask) in enumerate(segments):  # attention is causal from the first answer on
        assert batch["token_type_ids"][row].tolist()[: len(mask)] == [int(is_target) for is_target in mask]


@pytest.mark.parametrize("mark", ["\x85", "\u2028", "\u2029"])
def test_a_prompt_keeps_its_separators_in_a_saved_config_and_on_the_command_line(tmp_path: Path, mark: str) -> None:
    prompts = [f"<image>a{mark}b", f"<image> {mark}  c {mark}"]
    params = ImageCaptionDataParams(prompts=prompts)
    (tmp_path / "data.yaml").write_text(dump_params(params), encoding="utf-8")
    assert load_params_from_yaml(ImageCaptionDataParams, str(tmp_path / "data.yaml")).prompts == prompts
    (tmp_path / "own.yaml").write_text(f"prompts: [{prompts[0]}, '{prompts[1]}']\n", encoding="utf-8")
    assert load_params_from_yaml(ImageCaptionDataParams, str(tmp_path / "own.yaml")).prompts == prompts


def test_captions_come_from_text_json_or_a_named_key(
    tmp_path: Path, tokenizer_folder: Path, write_samples: Callable
) -> None:
    facts = {"caption": "a mug", "other": "one lamp", "who": "Ann {x}"}
    picture = {"webp": encode_picture(3, kind="WEBP")}
    samples = [
        {**picture, "txt": b" a cube\n", "json": json.dumps(facts).encode()},
        {**picture, "json": json.dumps(facts).encode()},
    ]
    rows = create_rows(write_samples(tmp_path / "d", [samples]), [0, 1])
    plain = ImageCaptionPipeline(create_params(tokenizer_folder, pack=False, prompts=["{who}: <image>?"]))
    assert decode_answers(plain, plain.create_batch(rows)) == [" a cube<|endoftext|>", " a mug<|endoftext|>"]
    ids, mask = read_segments(plain.create_batch(rows))[0]
    assert "User: Ann {x}: " in plain.encode.load().tokenizer.decode(
        [t for t, is_t in zip(ids, mask, strict=True) if not is_t]
    )
    named = ImageCaptionPipeline(create_params(tokenizer_folder, pack=False, caption_key="other"))
    assert decode_answers(named, named.create_batch(rows)) == [" one lamp<|endoftext|>"] * 2


def test_conversations_supervise_every_answer_and_take_several_images(
    tmp_path: Path, tokenizer_folder: Path, write_samples: Callable
) -> None:
    turns = [("human", "Two pictures."), ("gpt", "a cube"), ("human", "And then?"), ("gpt", "a mug")]
    conversation = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    sample = {
        "image_1.png": encode_picture(60),
        "image_0.png": encode_picture(40),
        "json": json.dumps(conversation).encode(),
    }
    pipeline = ImageCaptionPipeline(create_params(tokenizer_folder))
    batch = pipeline.create_batch(create_rows(write_samples(tmp_path / "d", [[sample]]), [0]))
    assert [int(image[0, 0, -1]) for image in batch["pixel_values"]] == [40, 60]
    (ids, _), image_token = read_segments(batch)[0], pipeline.encode.load().image_token_id
    assert sum(token == image_token for token in ids) == 2 * IMAGE_TOKENS
    assert decode_answers(pipeline, batch) == [" a cube<|endoftext|> a mug<|endoftext|>"]


def converse(content: Any) -> bytes:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "a cube"}]
    return json.dumps({"messages": turns}).encode()


@pytest.mark.parametrize("kind", ["mp4", "webm", "gif"])
@pytest.mark.parametrize(
    ("text", "question"),
    [
        ({"txt": b"a cube"}, "<V>What is it?"),
        ({"json": converse("What moves?")}, "<V>What moves?"),
        ({"json": converse("In <video>, what moves?")}, "In <V>, what moves?"),
        ({"json": converse([{"type": "text", "text": "Say "}, {"type": "video"}])}, "Say <V>"),
    ],
)
def test_evenly_spaced_frames_of_a_video_are_images_of_its_sample(
    tmp_path: Path, tokenizer_folder: Path, write_samples: Callable, kind: str, text: dict[str, bytes], question: str
) -> None:
    sample = {kind: encode_video(kind, list(range(0, 240, 10))), **text}
    pipeline = ImageCaptionPipeline(create_params(tokenizer_folder, video_frames=3, prompts=["<video>What is it?"]))
    batch = pipeline.create_batch(create_rows(write_samples(tmp_path / "d", [[sample]]), [0]))
    np.testing.assert_allclose([int(image[0, 8, 8]) for image in batch["pixel_values"]], [40, 120, 200], atol=3)
    ((ids, _),) = read_segments(batch)
    shown = pipeline.encode.load().tokenizer.decode(ids)
    assert question.replace("<V>", "<image>" * 3 * IMAGE_TOKENS) in shown
    assert decode_answers(pipeline, batch) == [" a cube<|endoftext|>"]


def test_videos_and_images_of_a_sample_stand_in_order(
    tmp_path: Path, tokenizer_folder: Path, write_samples: Callable
) -> None:
    question = "First <image>, then <video>, then <video>."
    sample = {
        "video_1.mp4": encode_video("mp4", [50, 60, 70, 80]),
        "image_0.png": encode_picture(40),
        "video_10.gif": encode_video("gif", [200]),
        "json": converse(question),
    }
    pipeline = ImageCaptionPipeline(create_params(tokenizer_folder, video_frames=2))
    batch = pipeline.create_batch(create_rows(write_samples(tmp_path / "d", [[sample]]), [0]))
    np.testing.assert_allclose([int(image[0, 0, -1]) for image in batch["pixel_values"]], [40, 60, 80, 200], atol=3)
    ((ids, _),) = read_segments(batch)
    marks = ["<image>" * IMAGE_TOKENS * count for count in (1, 2, 1)]
    shown = "First {}, then {}, then {}.".format(*marks)
    assert shown in pipeline.encode.load().tokenizer.decode(ids)


def test_videos_that_cannot_be_used_are_counted(
    tmp_path: Path, tokenizer_folder: Path, write_samples: Callable
) -> None:
    clip = encode_video("mp4", np.random.default_rng(0).integers(0, 256, 24).tolist())
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n"
    bad = [{"mp4": data, "txt": b"a cube"} for data in (clip[:-900], b"", b"cube" * 99, playlist)]
    manifest = write_samples(tmp_path / "d", [[*bad, {"mp4": clip, "txt": b"a cube"}, *create_samples(40)]])
    rows = create_rows(manifest, range(5))
    batch = ImageCaptionPipeline(create_params(tokenizer_folder, video_frames=2)).create_batch(rows)
    assert set(rows.drops.counts) == {"bad video"}
    assert len({fault.member for fault in rows.drops.faults}) == 4
    assert all("mp4: it " in fault.detail for fault in rows.drops.faults)
    assert len(batch["pixel_values"]) == 2 + 4
    rows = create_rows(manifest, range(5))
    ImageCaptionPipeline(create_params(tokenizer_folder)).create_batch(rows)
    assert set(rows.drops.counts) == {"no image"}
    assert "its members are mp4, txt; data.video_frames reads videos" in rows.drops.last
    for order, count in ((["create_turns", "prepare_images", "encode"], 2), (["sample_videos", "encode"], None)):
        with pytest.raises(ValueError, match=rf"stage_order .* and video_frames \({count}\) disagree"):
            create_params(tokenizer_folder, stage_order=order, video_frames=count)


def test_bad_samples_are_replaced_and_counted_by_reason(
    tmp_path: Path, tokenizer_folder: Path, write_samples: Callable
) -> None:
    good = create_samples(40)
    bad = [
        {"png": encode_picture(1)[:-30], "txt": b"a cut picture"},
        {"txt": b"no picture"},
        {"png": encode_picture(1)},
        {"png": encode_picture(1), "txt": b"cube " * 200},
        {"png": encode_picture(1), "json": b"[1]"},
        {"png": encode_picture(1), "txt": bytes(12)},
        {"png": encode_picture(1), "json": rb'{"caption": "\ud83d"}'},
    ]
    rows = create_rows(write_samples(tmp_path / "d", [bad + good]), range(7))
    pipeline = ImageCaptionPipeline(create_params(tokenizer_folder))
    batch = pipeline.create_batch(rows)
    assert len(batch["pixel_values"]) == 7
    reasons = {"bad image", "no image", "no caption", "too long", "bad JSON", "NUL bytes in the caption", "not Unicode"}
    assert set(rows.drops.counts) == reasons


def test_captions_are_found_wherever_they_are(tmp_path: Path, tokenizer_folder: Path, write_samples: Callable) -> None:
    picture = {"png": encode_picture(1)}
    samples = [
        picture | {"txt": b"a cube", "json": b"[1]"},
        picture | {"txt": b"\xef\xbb\xbfa mug"},
        picture | {"txt": b" \n", "json": b'{"caption": "a lamp"}'},
        picture | {"json": b'{"caption": ["", null, "a shade", 3]}'},
    ]
    pipeline = ImageCaptionPipeline(create_params(tokenizer_folder))
    for number, caption in enumerate(["a cube", "a mug", "a lamp", "a shade"]):
        rows = create_rows(write_samples(tmp_path / str(number), [samples[number : number + 1]]), [0])
        assert decode_answers(pipeline, pipeline.create_batch(rows)) == [f" {caption}<|endoftext|>"]
        assert not rows.drops.counts


def test_long_answers_are_cut_only_if_asked_for_and_images_never(
    tmp_path: Path, tokenizer_folder: Path, write_samples: Callable
) -> None:
    long = {"png": encode_picture(1), "txt": b"cube " * 200}
    crowded = {f"image_{n}.png": encode_picture(1) for n in range(20)} | {"txt": b"cube"}
    manifest = write_samples(tmp_path / "d", [[long, crowded, *create_samples(40)]])
    pipeline = ImageCaptionPipeline(create_params(tokenizer_folder, truncate_answers=True, seq_len=64))
    rows = create_rows(manifest, [0, 1])
    segments = read_segments(pipeline.create_batch(rows))
    assert len(segments[0][0]) == 65
    assert segments[0][1][-1]
    assert rows.drops.counts["too long"] == 1


AUGMENTATION = DataAugmentationParams(
    image=ImageAugmentationParams(
        crop=CropParams(enabled=True, shape=(16, 12)), color_jitter=ColorJitterParams(enabled=True)
    )
)


def test_augmentation_is_drawn_by_position_and_shared_by_the_images_of_a_sample(
    tmp_path: Path, tokenizer_folder: Path, write_samples: Callable
) -> None:
    generator = np.random.default_rng(0)

    def noise() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    picture = noise()
    sample = {"image_0.png": picture, "image_1.png": picture, "txt": b"a cube"}
    manifest = write_samples(tmp_path / "d", [[sample] * 4])
    params = create_params(tokenizer_folder, augmentation=AUGMENTATION, pack=False, image_size=12)

    def read(positions: Sequence[int], *, is_training: bool) -> Batch:
        return ImageCaptionPipeline(params).create_batch(create_rows(manifest, positions, is_training=is_training))

    whole, later = read([0, 1, 2, 3], is_training=True), read([2], is_training=True)
    pixels = whole["pixel_values"].reshape(4, 2, 3, 12, 12)
    assert torch.equal(pixels[:, 0], pixels[:, 1])
    assert len({pixels[n, 0].numpy().tobytes() for n in range(4)}) > 1
    assert torch.equal(later["pixel_values"], pixels[2])
    assert whole["color_factors"].shape == (8, 4)
    assert np.array_equal(later["color_factors"], whole["color_factors"][4:6])
    assert "image_index" not in whole  # each row of pixels is an image

    validation = read([0, 3], is_training=False)
    assert "color_factors" not in validation
    middle = decode_image(picture)[:, 4:20, 4:16]
    resized, _ = ImageCaptionPipeline(params).encode.load().resize([middle])  # pyright: ignore[reportAttributeAccessIssue]
    assert all(torch.equal(image, resized[0]) for image in validation["pixel_values"])


def test_loader_gives_the_same_batches_with_workers_and_after_a_jump(
    tmp_path: Path, tokenizer_folder: Path, write_samples: Callable
) -> None:
    manifest = write_samples(tmp_path / "d", [create_samples(16), create_samples(16)])

    def read(num_workers: int, first: int, count: int) -> list[Batch]:
        params = create_params(
            tokenizer_folder,
            dataset_manifest=[str(manifest)],
            dataset_modality=["image_caption"],
            num_workers=num_workers,
            allow_multiple_epochs=True,
            augmentation=AUGMENTATION,
        )
        loader = create_dataloader(params, World(), global_batch_size=8, per_gpu_batch_size=8, seed=1)
        try:
            return [batch for batch, _ in zip(loader.microbatches(first), range(count), strict=False)]
        finally:
            loader.close()

    here = read(0, 0, 4)
    for one, other in [*zip(here, read(2, 0, 4), strict=True), (here[3], read(0, 3, 1)[0])]:
        for key in ("input_ids", "target_mask", "pixel_values", "color_factors"):
            assert torch.equal(one[key], other[key]), key


def test_a_rank_without_samples_still_has_an_image_but_no_target(
    tokenizer_folder: Path, paligemma_folder: Path
) -> None:
    for params in (
        create_params(tokenizer_folder),
        ImageCaptionDataParams(processor=str(paligemma_folder), seq_len=64, pack=False),
    ):
        batch = ImageCaptionPipeline(params).create_empty_batch()
        assert len(batch["pixel_values"]) == 1
        assert not batch["target_mask"].any()


def test_a_processor_that_can_not_be_loaded_is_said_before_reading(tokenizer_folder: Path) -> None:
    pipeline = ImageCaptionPipeline(create_params(tokenizer_folder, image_size=None))
    with pytest.raises(ValueError, match=r"data\.image_size"):
        pipeline.encode.load()
