"""Hugging Face processors give what they give by themselves, with uint8 pixels and exact targets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.essential import image_text_families
from vla_foundry.data.pipelines.image_caption import create_image_processor
from vla_foundry.images.colors import normalize_images
from vla_foundry.images.processor import TOKEN_KEYS, load_processor
from vla_foundry.images.processor_hf import HuggingFaceProcessor, load_hugging_face_processor
from vla_foundry.params.data.images import ImageProcessorParams
from vla_foundry.run_folder import PROCESSOR_CONFIG_NAME
from vla_foundry.text.chat import Turn

# the original PaliGemma processor, asked for tensors, uses them in a way that numpy deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TURNS = [Turn("user", "<image><image>Describe the image."), Turn("assistant", "A red cube lies on a green table.")]
FAMILIES = ["qwen", "paligemma", "idefics", "smolvlm"]
ENDS = {"qwen": "<|im_end|>", "paligemma": "<eos>", "idefics": "<end_of_utterance>", "smolvlm": "<end_of_utterance>"}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(family: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{family}_folder")


@pytest.fixture
def processor(folder: Path) -> HuggingFaceProcessor:
    return load_hugging_face_processor(str(folder))


@pytest.fixture
def images(create_image) -> list[torch.Tensor]:
    return [create_image(40, 40, seed=1), create_image(36, 36, seed=2)]


def original_inputs(processor: HuggingFaceProcessor, images: list[torch.Tensor], **options: Any) -> dict[str, Any]:
    """What the processor gives when it is called as its authors do, on the prompt alone."""
    original = processor.processor
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Describe the image."}]
    if original.chat_template:
        text = original.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
        )
    else:
        text = "<image><image>Describe the image."
    return dict(original(images=[images], text=[text], return_tensors="pt", **options))


def test_the_prompt_and_the_pixels_are_those_of_the_original(
    family: str, processor: HuggingFaceProcessor, images: list[torch.Tensor]
) -> None:
    options = {"do_image_splitting": False, "size": {"longest_edge": 16}} if family in ("idefics", "smolvlm") else {}
    original = original_inputs(processor, images, **options)
    ours = processor.encode(images, TURNS[:1])
    assert ours["input_ids"].tolist() == original["input_ids"][0].tolist()
    assert ours["pixel_values"].dtype == torch.uint8
    normalized = normalize_images(ours["pixel_values"], processor.image_mean, processor.image_std)
    pixel_values = original["pixel_values"].reshape(normalized.shape)
    torch.testing.assert_close(normalized, pixel_values, atol=1e-5, rtol=0)
    for key in ("image_grid_thw", "mm_token_type_ids", "token_type_ids"):
        assert (key in ours) == (key in original)
        if key in ours:
            assert ours[key].flatten().tolist() == original[key].flatten().tolist()


def test_supervised_text_is_the_answer_and_its_end(
    family: str, processor: HuggingFaceProcessor, images: list[torch.Tensor]
) -> None:
    sample = processor.encode(images, TURNS)
    answer = sample["input_ids"][sample["target_mask"]]
    assert processor.tokenizer.decode(answer).lstrip() == TURNS[1].content + ENDS[family]
    assert processor.decode(answer.tolist()) == TURNS[1].content
    assert answer[-1] == processor.stop_token_ids()[0]
    prompt = processor.encode(images, TURNS[:1])["input_ids"].tolist()
    assert sample["input_ids"][: len(prompt)].tolist() == prompt
    for key in TOKEN_KEYS:
        assert key not in sample or len(sample[key]) == len(sample["input_ids"])


def test_paligemma_is_causal_from_the_answer_on(paligemma_folder: Path, images: list[torch.Tensor]) -> None:
    processor = load_hugging_face_processor(str(paligemma_folder))
    sample = processor.encode(images, TURNS)
    original = processor.processor(
        images=[images], text=["<image><image>Describe the image."], suffix=[TURNS[1].content], return_tensors="pt"
    )
    assert sample["input_ids"].tolist() == original["input_ids"][0].tolist()
    assert sample["token_type_ids"].tolist() == original["token_type_ids"][0].tolist()
    assert sample["target_mask"].tolist() == (original["labels"][0] != -100).tolist()


def test_every_row_of_pixels_knows_its_image_and_maps_are_exact(
    family: str, processor: HuggingFaceProcessor, create_image
) -> None:
    images = [create_image(40, 60, seed=1), create_image(36, 28, seed=2)]
    sample = processor.encode(images, TURNS)
    assert len(sample["image_index"]) == len(sample["pixel_values"])
    assert sample["image_index"].unique().tolist() == [0, 1]
    for image, pixel_map in zip(images, sample["pixel_maps"], strict=True):
        assert pixel_map.source_size == tuple(image.shape[1:])
        edge = np.array([[image.shape[2] - 0.5, image.shape[1] - 0.5]])
        height, width = pixel_map.target_size
        np.testing.assert_allclose(pixel_map.map_points(edge), [[width - 0.5, height - 0.5]], atol=1e-9)
    if family == "qwen":
        sizes = [(4 * int(h), 4 * int(w)) for _, h, w in sample["image_grid_thw"]]
        assert sizes == [pixel_map.target_size for pixel_map in sample["pixel_maps"]]


def test_images_are_split_where_that_is_asked_for_as_the_original_does(
    idefics_folder: Path, images: list[torch.Tensor]
) -> None:
    split = load_hugging_face_processor(str(idefics_folder), split_images=True)
    original = original_inputs(split, images)
    ours = split.encode(images, TURNS[:1])
    # 4 x 4 tiles and the whole, for each of two images
    assert len(ours["pixel_values"]) == 34
    assert ours["input_ids"].tolist() == original["input_ids"][0].tolist()
    assert torch.bincount(ours["image_index"]).tolist() == [17, 17]
    assert "pixel_maps" not in ours
    whole = load_hugging_face_processor(str(idefics_folder)).encode(images, TURNS[:1])
    assert len(whole["pixel_values"]) == 2
    assert len(whole["input_ids"]) < len(ours["input_ids"]) / 5


def test_a_saved_processor_gives_the_same_bits(folder: Path, images: list[torch.Tensor], tmp_path: Path) -> None:
    first = create_image_processor(ImageProcessorParams(processor=str(folder), prompt_layout="plain"))
    first.save(tmp_path)
    assert (tmp_path / PROCESSOR_CONFIG_NAME).is_file()
    second = load_processor(tmp_path)
    ours, theirs = first.encode(images, TURNS), second.encode(images, TURNS)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, theirs[key], rtol=0, atol=0)
    assert first.stop_token_ids() == second.stop_token_ids()


def test_options_of_the_image_processor_are_passed_on(paligemma_folder: Path, images: list[torch.Tensor]) -> None:
    processor = create_image_processor(
        ImageProcessorParams(processor=str(paligemma_folder), processor_kwargs={"size": {"height": 14, "width": 42}})
    )
    assert processor.encode(images, TURNS)["pixel_values"].shape == (2, 3, 14, 42)


def test_what_is_no_processor_of_images_and_text_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"data.processor '.*nowhere' cannot be loaded: "):
        load_hugging_face_processor(str(tmp_path / "nowhere"))
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"data.processor"):
        load_hugging_face_processor(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("llava_next", ""), ("llava_onevision", ""), ("pixtral", "images of different sizes do not fit into one batch")],
)
def test_families_whose_images_cannot_be_passed_on_are_refused_by_name(name: str, reason: str) -> None:
    original = image_text_families.create_processor(name)
    with pytest.raises(ValueError, match=rf"images of a {type(original).__name__} cannot be .*{reason}") as caught:
        HuggingFaceProcessor(original)
    assert "\n" not in str(caught.value)


def test_no_pixels_are_mixed_where_the_nearest_is_asked_for(
    processor: HuggingFaceProcessor, images: list[torch.Tensor]
) -> None:
    noise = torch.where(torch.rand(50, 90, generator=torch.Generator().manual_seed(0)) < 0.5, 10, 200).to(torch.uint8)
    pair = [images[0], noise.expand(3, -1, -1).contiguous()]
    plain, inputs = processor.encode(pair, TURNS), processor.encode(pair, TURNS, nearest=[False, True])
    is_depth = inputs["image_index"] == 1
    assert torch.equal(inputs["pixel_values"][~is_depth], plain["pixel_values"][~is_depth])
    assert len(plain["pixel_values"][is_depth].unique()) > 10
    assert inputs["pixel_values"][is_depth].unique().tolist() == [10, 200]
    assert torch.equal(inputs["input_ids"], plain["input_ids"])


@pytest.mark.parametrize("scaling", [{"do_rescale": False}, {"rescale_factor": 1 / 127.5}, {"do_normalize": False}])
@pytest.mark.parametrize("as_option", [False, True])
def test_pixels_are_scaled_as_the_image_processor_scales_them(scaling: dict[str, Any], as_option: bool) -> None:
    original = image_text_families.create_processor("llava")
    if not as_option:
        for name, value in scaling.items():
            setattr(original.image_processor, name, value)
    processor = HuggingFaceProcessor(original, processor_kwargs=scaling if as_option else None)
    image = torch.arange(3 * 40 * 40).reshape(3, 40, 40).to(torch.uint8)
    pixels = processor.encode([image], [Turn("user", "<image>a")])["pixel_values"]
    found = normalize_images(pixels, processor.image_mean, processor.image_std)
    expected = original.image_processor([image], return_tensors="pt", **scaling)["pixel_values"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_error_of_the_library_in_the_comparison_is_one_line_that_names_the_family() -> None:
    original = image_text_families.create_processor("llava")
    original.chat_template = "{{ raise_exception('no answer\nwithout a question') }}"
    with pytest.raises(ValueError, match=r"images of a LlavaProcessor cannot be .* \(TemplateError: no answer\)"):
        HuggingFaceProcessor(original)


def test_paligemma_is_compared_with_its_own_processor_too(paligemma_folder: Path) -> None:
    original = load_hugging_face_processor(str(paligemma_folder)).processor
    original.chat_template = "{% for message in messages %}<image>{% endfor %}"
    with pytest.raises(ValueError, match="images of a PaliGemmaProcessor cannot be passed on"):
        HuggingFaceProcessor(original)


def test_gemma_marks_its_image_tokens() -> None:
    processor = HuggingFaceProcessor(image_text_families.create_processor("gemma3"))
    sample = processor.encode([torch.zeros(3, 30, 40, dtype=torch.uint8)], [Turn("user", "<image>What is it?")])
    is_image = sample["input_ids"] == processor.tokenizer.image_token_id
    assert int(is_image.sum()) == 4
    assert sample["token_type_ids"].bool().tolist() == is_image.tolist()
    assert "num_crops" not in sample
