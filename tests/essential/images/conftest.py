"""Small real tokenizers and Hugging Face processors, made in code and saved to folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.essential.byte_level import train_tokenizer

SENTENCES = [
    "Describe the image. What does this image show? A red cube lies on a green table.",
    "User: pick up the drawer handle and pull. Assistant: The drawer is half open, left of the gripper.",
    "system: you are a robot. Where is the blue mug? In the upper right corner of the picture.",
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOL = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image>{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def create_tokenizer(special: list[str], **names: str) -> Any:
    """Train a byte-level BPE of 400 tokens, with `special` tokens on top."""
    return train_tokenizer(400, SENTENCES * 3, special, **names)


@pytest.fixture
def tokenizer() -> Any:
    """A tokenizer as `preprocess tokenizer` makes it: no chat template, no image token."""
    return create_tokenizer(["<|endoftext|>"], eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    vision = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = create_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *vision], eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            patch_size=4, merge_size=2, size={"shortest_edge": 256, "longest_edge": 4096}
        ),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return _save(processor, tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def paligemma_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import PaliGemmaProcessor, SiglipImageProcessor

    tokenizer = create_tokenizer(["<pad>", "<eos>", "<bos>"], eos_token="<eos>", bos_token="<bos>", pad_token="<pad>")
    image_processor = SiglipImageProcessor(size={"height": 28, "width": 28})
    image_processor.image_seq_length = 4
    processor = PaliGemmaProcessor(image_processor=image_processor, tokenizer=tokenizer)
    return _save(processor, tmp_path_factory.mktemp("paligemma"))


@pytest.fixture(scope="session")
def idefics_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Idefics3ImageProcessor, Idefics3Processor

    image_processor = Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 16})
    processor = Idefics3Processor(
        image_processor=image_processor, tokenizer=_create_tile_tokenizer(), image_seq_len=4, chat_template=SMOL
    )
    return _save(processor, tmp_path_factory.mktemp("idefics"))


@pytest.fixture(scope="session")
def smolvlm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("num2words", reason="SmolVLM's processor needs num2words")
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 16}),
        tokenizer=_create_tile_tokenizer(),
        video_processor=SmolVLMVideoProcessor(),
        image_seq_len=4,
        chat_template=SMOL,
    )
    return _save(processor, tmp_path_factory.mktemp("smolvlm"))


def _create_tile_tokenizer() -> Any:
    """A tokenizer with the tokens that mark tiles."""
    places = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    special = ["<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>", *places]
    return create_tokenizer(special, eos_token="<end_of_utterance>", bos_token="<|im_start|>")


def _save(processor: Any, folder: Path) -> Path:
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def create_image() -> Callable[[int, int], Tensor]:
    """Make a smooth random picture, so that neither JPEG nor scaling destroys it."""

    def create(height: int, width: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.randint(0, 256, (1, 3, 4, 5), generator=generator).float()
        fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
        return fine[0].clamp(0, 255).byte().permute(1, 2, 0).contiguous().permute(2, 0, 1)

    return create
