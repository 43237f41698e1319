"""Our own processor gives the same inputs in training, after it was saved, and in inference."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vla_foundry.data.pipelines.image_caption import create_image_processor
from vla_foundry.images.codec import decode_image, image_from_array, image_to_array
from vla_foundry.images.processor import (
    ImageTextProcessor,
    add_image_token,
    load_processor,
)
from vla_foundry.params.data.images import ImageProcessorParams
from vla_foundry.run_folder import PROCESSOR_CONFIG_NAME
from vla_foundry.text.chat import Turn, create_caption_turns

TURNS = [Turn("user", "<image>What does this image show?"), Turn("assistant", "A red cube lies on a green table.")]


def assert_same_inputs(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, second[key], rtol=0, atol=0)
        else:
            for a, b in zip(value, second[key], strict=True):
                np.testing.assert_array_equal(a.matrix, b.matrix)


@pytest.fixture
def processor(tokenizer: Any) -> ImageTextProcessor:
    return ImageTextProcessor(
        tokenizer,
        image_size=(28, 42),
        img_num_tokens=6,
        resize_method="resize_fit",
        interpolation="bicubic",
        image_mean=(0.1, 0.2, 0.3),
    )


def test_the_image_token_is_added_once(tokenizer: Any) -> None:
    before = len(tokenizer)
    assert add_image_token(tokenizer) == before
    assert add_image_token(tokenizer) == before
    assert len(tokenizer) == before + 1
    assert tokenizer.encode("a<image>b")[1] == before


def test_an_image_becomes_its_number_of_tokens_and_uint8_pixels(processor: ImageTextProcessor, create_image) -> None:
    sample = processor.encode([create_image(50, 60)], TURNS)
    assert (sample["input_ids"] == processor.image_token_id).sum() == 6
    assert sample["input_ids"].dtype == torch.int32
    assert sample["pixel_values"].shape == (1, 3, 28, 42)
    assert sample["pixel_values"].dtype == torch.uint8
    assert sample["image_index"].tolist() == [0]
    assert sample["pixel_maps"][0].target_size == (28, 42)
    answer = sample["input_ids"][sample["target_mask"]]
    assert processor.tokenizer.decode(answer) == " A red cube lies on a green table.<|endoftext|>"
    assert processor.decode(answer.tolist()) == "A red cube lies on a green table."
    assert answer[-1] == processor.stop_token_ids()[0]


def test_several_images_keep_their_order_and_none_is_fine(processor: ImageTextProcessor, create_image) -> None:
    images = [create_image(50, 60, seed) for seed in range(3)]
    turns = create_caption_turns("A red cube.", num_images=3, seed=0, position=5)
    sample = processor.encode(images, turns)
    for number, image in enumerate(images):
        single = processor.encode([image], [Turn("user", "<image>")])
        torch.testing.assert_close(sample["pixel_values"][number], single["pixel_values"][0], rtol=0, atol=0)
    assert (sample["input_ids"] == processor.image_token_id).sum() == 18
    assert processor.encode([], [Turn("user", "Hello")])["pixel_values"].shape == (0, 3, 28, 42)


def test_tokens_made_ahead_are_those_of_the_turns_as_they_are_now(processor: ImageTextProcessor, create_image) -> None:
    image, turns = create_image(50, 60), list(TURNS)
    expected = processor.encode([image], turns)
    longer = [*TURNS, Turn("user", "Why?")]
    processor.tokenize_ahead([turns, [Turn("user", "<image><image>two")], [Turn("assistant", "")]])
    assert_same_inputs(processor.encode([image], turns), expected)
    turns.append(longer[-1])  # a stage may change them in between
    assert len(processor.encode([image], turns)["input_ids"]) > len(expected["input_ids"])
    assert len(processor.encode([image], TURNS, max_tokens=24)["input_ids"]) == 24
    with pytest.raises(ValueError, match="2 times, but there are 1 images"):
        processor.encode([image], [Turn("user", "<image><image>two")])


def test_a_saved_processor_gives_the_same_bits(processor: ImageTextProcessor, create_image, tmp_path: Path) -> None:
    processor.save(tmp_path / "run" / "processor")
    assert not list(tmp_path.rglob("*.pkl"))
    loaded = load_processor(tmp_path / "run" / "processor")
    again = create_image_processor(ImageProcessorParams(processor=str(tmp_path / "run" / "processor")))
    images = [create_image(50, 60)]
    for other in (loaded, again):
        assert_same_inputs(processor.encode(images, TURNS), other.encode(images, TURNS))
        assert (other.image_mean, other.image_std) == (processor.image_mean, processor.image_std)
        assert other.stop_token_ids() == processor.stop_token_ids()
        assert len(other.tokenizer) == len(processor.tokenizer)


def test_inference_sees_what_training_saw(processor: ImageTextProcessor, create_image, tmp_path: Path) -> None:
    """Training reads a file and knows the answer; inference gets a camera's array and does not."""
    processor.save(tmp_path)
    frame, file = image_to_array(create_image(50, 60)), io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    trained = processor.encode([decode_image(file.getvalue())], TURNS)
    served = load_processor(tmp_path).encode([image_from_array(frame)], TURNS[:1])
    torch.testing.assert_close(trained["pixel_values"], served["pixel_values"], rtol=0, atol=0)
    num_prompt = int(trained["target_mask"].int().argmax())
    assert served["input_ids"].tolist() == trained["input_ids"][:num_prompt].tolist()
    assert not served["target_mask"].any()


def test_a_folder_without_a_processor_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{PROCESSOR_CONFIG_NAME} is missing"):
        load_processor(tmp_path)
    (tmp_path / PROCESSOR_CONFIG_NAME).write_text('{"type": "other"}', encoding="utf-8")
    with pytest.raises(ValueError, match="is of type 'other', which must be native or hugging_face"):
        load_processor(tmp_path)


def test_a_tokenizer_or_a_processor_is_needed(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.processor or data.tokenizer must be given"):
        create_image_processor(ImageProcessorParams(image_size=28, img_num_tokens=4))
    tokenizer.save_pretrained(tmp_path)
    created = create_image_processor(ImageProcessorParams(tokenizer=str(tmp_path), image_size=28, img_num_tokens=4))
    assert created.encode([], [Turn("user", "Hi")])["input_ids"].tolist() == tokenizer.encode("User: Hi\nAssistant:")


def test_a_processor_travels_to_loader_processes(processor: ImageTextProcessor, create_image) -> None:
    travelled = pickle.loads(pickle.dumps(processor))
    images = [create_image(50, 60)]
    assert_same_inputs(processor.encode(images, TURNS), travelled.encode(images, TURNS))
