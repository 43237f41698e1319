"""Modality interleaved: text and images in order, whole images, and loss on text only."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.essential.byte_level import train_tokenizer
from tests.essential.data.pipelines.test_image_caption import create_rows, encode_picture, read_segments
from tests.essential.image_text_families import create_processor
from tests.essential.images.test_video import encode_video
from vla_foundry.data.pipelines.interleaved import create_interleaved_pipeline
from vla_foundry.images.processor import ImageTextProcessor
from vla_foundry.images.processor_hf import HuggingFaceProcessor
from vla_foundry.params.data.image_caption import InterleavedDataParams
from vla_foundry.text.captions import Unusable
from vla_foundry.text.interleaved import Picture, place_pictures, read_document

IMAGE_TOKENS = 4
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(300, ["a red cube lies on the green table"] * 3, [END], eos_token=END).save_pretrained(folder)
    return folder


def document(*parts: str | int) -> dict[str, bytes]:
    """A sample's members: texts, and numbers of grey images."""
    numbers = [part for part in parts if isinstance(part, int)]
    images = {f"image_{n}.png": encode_picture(grey) for n, grey in enumerate(numbers)}
    names = iter(images)
    values = [{"text": part} if isinstance(part, str) else {"image": next(names)} for part in parts]
    return {**images, "json": json.dumps({"parts": values}).encode()}


def create_pipeline(tokenizer: Path, **values: Any) -> Any:
    settings = {"tokenizer": str(tokenizer), "image_size": 16, "img_num_tokens": IMAGE_TOKENS, "seq_len": 64}
    return create_interleaved_pipeline(InterleavedDataParams(**(settings | values)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"parts": [{"text": "a"}, {"text": "b"}, {"image": "x"}, {"type": "image"}]}, ["ab", "x", None]),
        ({"texts": ["a", "b", None, "c"], "images": [None, None, "x", None]}, ["a\n\nb", "x", "c"]),
        (
            {"text_list": ["a", "b"], "image_info": [{"image_name": "y", "matched_text_index": 1}]},
            ["a", "y", "b"],
        ),
    ],
)
def test_each_layout_gives_text_and_images_in_order(values: dict[str, Any], expected: list[str | None]) -> None:
    assert [part.name if isinstance(part, Picture) else part for part in read_document(values)] == expected


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([], "bad JSON"),
        ({"text": "a"}, "no document"),
        ({"parts": []}, "no text"),
        ({"parts": [{"text": " "}, {"image": "x"}]}, "no text"),
        ({"parts": [{"text": "a", "image": "x"}]}, "bad document"),
        ({"parts": ["a"]}, "bad document"),
        ({"parts": [{"text": "a\0"}]}, "NUL bytes in the text"),
        ({"texts": ["a"], "images": []}, "bad document"),
        ({"texts": ["a"], "images": ["x"]}, "bad document"),
        ({"text_list": ["a"], "image_info": [{"image_name": "x", "matched_text_index": True}]}, "bad document"),
        ({"text_list": ["a"], "image_info": [{"image_name": "x", "matched_text_index": 1}]}, "bad document"),
    ],
)
def test_what_is_no_document_is_named(values: Any, reason: str) -> None:
    with pytest.raises(Unusable) as error:
        read_document(values)
    assert error.value.reason == reason


def test_urls_stand_for_the_stored_images_in_order() -> None:
    parts = ["a", Picture("http://x/1"), Picture("http://x/2")]
    assert place_pictures(parts, ["0.jpg", "1.png"]) == ["a", Picture("0.jpg"), Picture("1.png")]
    assert place_pictures([Picture("1.png"), Picture("1.png")], ["0.jpg", "1.png"])[0] == Picture("1.png")
    with pytest.raises(Unusable, match="names image 'http://x/2' and 1 in all, and has 2 images"):
        place_pictures(parts[2:], ["0.jpg", "1.png"])


def test_tokens_images_and_targets_are_those_of_the_document(
    tokenizer_folder: Path, write_samples, tmp_path: Path
) -> None:
    samples = [document("a red cube", 40, " lies", 80, 120, " on"), document("the table"), document(200, "green")]
    manifest = write_samples(tmp_path / "d", [samples])
    pipeline = create_pipeline(tokenizer_folder)
    batch = pipeline.create_batch(create_rows(manifest, range(3)))
    processor = pipeline.encode.load()
    image = processor.image_token_id
    texts = {}
    for ids, mask in read_segments(batch):
        assert not any(is_target and token == image for token, is_target in zip(ids, mask, strict=True))
        assert [t for t, m in zip(ids[1:], mask[1:], strict=True) if not m] == [t for t in ids[1:] if t == image]
        texts[processor.tokenizer.decode(ids)] = ids.count(image)
    pads = "<image>" * IMAGE_TOKENS
    assert texts == {
        f"a red cube{pads} lies{pads}{pads} on{END}": 3 * IMAGE_TOKENS,
        f"the table{END}": 0,
        f"{pads}green{END}": IMAGE_TOKENS,
    }
    greys = {f"a red cube{pads} lies{pads}{pads} on{END}": [40, 80, 120], f"{pads}green{END}": [200]}
    expected = [grey for text in texts for grey in greys.get(text, [])]  # the right half of a picture tells its number
    assert batch["pixel_values"][:, 0, 8, 12].tolist() == expected


@pytest.mark.parametrize("names", [["video_1.mp4", "image_0.png"], ["http://a", "http://b"]])
def test_frames_stand_where_the_document_has_their_video(
    tokenizer_folder: Path, write_samples, tmp_path: Path, names: list[str]
) -> None:
    kinds = ("video", "image") if names[0] == "video_1.mp4" else ("image", "video")
    first, second = [{kind: name} for kind, name in zip(kinds, names, strict=True)]
    parts = [{"text": "a"}, first, {"text": "b"}, second, {"text": "c"}]
    files = {"video_1.mp4": encode_video("mp4", [50, 60, 70, 80]), "image_0.png": encode_picture(40)}
    manifest = write_samples(tmp_path / "d", [[files | {"json": json.dumps({"parts": parts}).encode()}]])
    pipeline = create_pipeline(tokenizer_folder, video_frames=2, img_num_tokens=1)
    batch = pipeline.create_batch(create_rows(manifest, [0]))
    ((ids, _),) = read_segments(batch)
    videos = kinds.index("video")
    pads = ["<image>", "<image>"]
    pads[videos] = "<image><image>"
    assert pipeline.encode.load().tokenizer.decode(ids) == f"a{pads[0]}b{pads[1]}c{END}"
    expected = [60, 80, 40] if videos == 0 else [40, 60, 80]
    np.testing.assert_allclose(batch["pixel_values"][:, 0, 8, 12].tolist(), expected, atol=3)
    rows = create_rows(manifest, [0])
    with pytest.raises(ValueError, match=r"missing image: .*; data\.video_frames reads videos"):
        create_pipeline(tokenizer_folder).create_batch(rows)


@pytest.mark.parametrize(
    ("most", "text"), [(1, "a<image>b"), (2, f"a<image>b<image>{END}"), (9, f"a<image>b<image>{END}")]
)
def test_a_document_ends_before_the_image_after_the_last_allowed(
    tokenizer_folder: Path, write_samples, tmp_path: Path, most: int, text: str
) -> None:
    manifest = write_samples(tmp_path / "d", [[document("a", 40, "b", 80)]])
    pipeline = create_pipeline(tokenizer_folder, max_images=most, img_num_tokens=1)
    batch = pipeline.create_batch(create_rows(manifest, [0]))
    ((ids, _),) = read_segments(batch)
    assert pipeline.encode.load().tokenizer.decode(ids) == text
    assert len(batch["pixel_values"]) == text.count("<image>")


def test_a_long_document_keeps_whole_images_and_ends_with_text(tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    processor = ImageTextProcessor(
        AutoTokenizer.from_pretrained(tokenizer_folder), image_size=(16, 16), img_num_tokens=IMAGE_TOKENS
    )
    pictures = [torch.full((3, 20, 20), grey, dtype=torch.uint8) for grey in (40, 80, 120)]
    parts = ["a red", None, " cube", None, None, " lies on the table"]
    whole = processor.encode_document(pictures, parts, max_tokens=100)
    for most in range(4, 40):
        cut = processor.encode_document(pictures, parts, max_tokens=most)
        ids, num_images = cut["input_ids"].tolist(), len(cut["pixel_values"])
        assert len(ids) <= most
        assert ids == whole["input_ids"][: len(ids)].tolist()
        assert ids.count(processor.image_token_id) == IMAGE_TOKENS * num_images
        assert cut["target_mask"][-1]
        torch.testing.assert_close(cut["pixel_values"], whole["pixel_values"][:num_images])
    with pytest.raises(ValueError, match=r"no room for text within data.seq_len \+ 1 = 4 tokens"):
        processor.encode_document(pictures, [None, "a"], max_tokens=4)


@pytest.mark.parametrize("name", ["qwen2_vl", "idefics3", "llava"])
def test_hugging_face_processors_take_documents(name: str) -> None:
    processor = HuggingFaceProcessor(create_processor(name))
    pictures = [torch.full((3, 28, 28), grey, dtype=torch.uint8) for grey in (40, 80)]
    inputs = processor.encode_document(pictures, ["Describe", None, " the image.", None, " A"], max_tokens=200)
    ids, mask = inputs["input_ids"], inputs["target_mask"]
    assert processor.tokenizer.decode(ids[mask]) == "Describe the image. A" + processor.tokenizer.eos_token
    assert not mask[ids == processor.image_token_id].any()
    if name == "qwen2_vl":  # its template frames each image
        marks = processor.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
        assert [ids.tolist().count(mark) for mark in marks] == [2, 2]
    short = processor.encode_document(pictures, ["Describe", None, " the image.", None, " A"], max_tokens=len(ids) - 4)
    assert len(short["pixel_values"]) * 2 == len(inputs["pixel_values"])
    assert set(short["image_index"].tolist()) == {0}
    text = processor.encode_document([], ["Describe"], max_tokens=200)
    assert "pixel_values" not in text


def test_an_image_changes_only_what_follows_it(tokenizer_folder: Path, write_samples, tmp_path: Path) -> None:
    from vla_foundry.models import create_model
    from vla_foundry.params.models.transformer import TransformerParams
    from vla_foundry.params.models.vit import ViTParams
    from vla_foundry.params.models.vlm import VLMParams

    samples = [document("a red", 40, " cube lies", 80, " on"), document("the table", 120, " green")]
    pipeline = create_pipeline(tokenizer_folder)
    batch = pipeline.create_batch(create_rows(write_samples(tmp_path / "d", [samples]), range(2)))
    image = pipeline.encode.load().image_token_id
    transformer = TransformerParams(hidden_dim=32, n_layers=2, n_heads=2, max_seq_len=128, vocab_size=320)
    vit = ViTParams(hidden_dim=32, inter_dim=64, n_layers=1, n_heads=2, img_size=16, patch_size=8)
    model: Any = create_model(VLMParams(vit=vit, transformer=transformer, image_token_id=image)).eval()
    torch.manual_seed(0)
    model.init_weights()
    tokens = torch.from_numpy(batch["input_ids"]).clamp(max=319)
    pixels = torch.rand(3, 3, 16, 16)
    for number in range(3):
        other = pixels.clone()
        other[number] = 1 - other[number]
        args = {"documents": batch["documents"]}
        first = model(tokens, pixel_values=pixels, **args).logits
        second = model(tokens, pixel_values=other, **args).logits
        changed = (first != second).any(-1).flatten().numpy()
        place = np.flatnonzero(tokens.flatten().numpy() == image)[number * IMAGE_TOKENS]
        assert not changed[:place].any()
        assert changed[place]
