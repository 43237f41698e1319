"""Image-text models of Hugging Face behave here as in their own code, and train alone and sharded."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GitConfig,
    GitForCausalLM,
    PreTrainedModel,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
)

from tests.essential import image_text_families
from vla_foundry.batch import IGNORE_INDEX
from vla_foundry.images.colors import normalize_images
from vla_foundry.images.processor import TOKEN_KEYS
from vla_foundry.images.processor_hf import HuggingFaceProcessor
from vla_foundry.inference.decoding import generate
from vla_foundry.models import create_model
from vla_foundry.models.vlm_hf import VLMHF
from vla_foundry.params.models.policy import with_model_files
from vla_foundry.params.models.vlm import VLMHFParams
from vla_foundry.text.chat import Turn
from vla_foundry.world import World

SCRIPT = Path(__file__).with_name("image_text_run.py")
NAMES = ["qwen3_vl", "paligemma", "smolvlm2"]
BLOCKS = {
    "qwen3_vl": ["Qwen3VLVisionBlock"] * 2 + ["Qwen3VLTextDecoderLayer"] * 2,
    "paligemma": ["SiglipEncoderLayer"] * 2 + ["GemmaDecoderLayer"] * 2,
    "smolvlm2": ["SmolVLMEncoderLayer"] * 2 + ["LlamaDecoderLayer"] * 2,
}


@pytest.fixture(scope="module")
def folder(image_text: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each of the models as published."""
    folder = tmp_path_factory.mktemp("published")
    for name in [*NAMES, "native_siglip", "llama"]:
        image_text.create_original(name).save_pretrained(folder / name)
    return folder


class Sample:
    """Inputs of a model here, and of its own code."""

    def __init__(self, image_text: ModuleType, name: str) -> None:
        self.name = name
        self.per_image: int = image_text.PER_IMAGE[name]
        images = image_text.create_images(name, 2, 5)
        self.extras: dict[str, Tensor] = {key: value for key, value in images.items() if key != "pixel_values"}
        self.pixels = images["pixel_values"].float() / 127.5 - 1
        self.ids = torch.randint(3, 89, (2, 10 + self.per_image), generator=torch.Generator().manual_seed(3))
        self.ids[:, 2 : 2 + self.per_image] = 90

    def own(self, rows: slice = slice(0, 2), length: int | None = None) -> dict[str, Any]:
        ids = self.ids[rows, :length]
        per_row = len(self.pixels) // 2
        pixels = self.pixels[rows.start * per_row : rows.stop * per_row]
        own = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        own["pixel_values"] = pixels[:, None] if self.name == "smolvlm2" else pixels
        if self.name == "qwen3_vl":
            own |= {"image_grid_thw": self.extras["image_grid_thw"][rows], "mm_token_type_ids": (ids == 90).int()}
        if self.name == "paligemma":
            own["token_type_ids"] = torch.zeros_like(ids)
        return own


@pytest.fixture(params=NAMES)
def sample(request: pytest.FixtureRequest, image_text: ModuleType) -> Sample:
    return Sample(image_text, request.param)


def load(sample: Sample, folder: Path, **changes: Any) -> Any:
    return create_model(VLMHFParams(hf_pretrained=str(folder / sample.name), **changes)).eval()


@pytest.fixture
def original(sample: Sample, image_text: ModuleType) -> PreTrainedModel:
    return image_text.create_original(sample.name).eval()


def test_logits_and_loss_are_those_of_the_original(sample: Sample, original: Any, folder: Path) -> None:
    model, own = load(sample, folder), sample.own()
    expected = original(**own, output_hidden_states=True)
    output = model(input_ids=sample.ids.int(), pixel_values=sample.pixels, output_hidden_states=True, **sample.extras)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-6)
    assert len(output.hidden_states) == 3
    torch.testing.assert_close(model.model.lm_head(output.hidden_states[-1]), output.logits, rtol=1e-5, atol=1e-6)
    targets = sample.ids.roll(-1, 1)
    targets[:, : 3 + sample.per_image] = IGNORE_INDEX
    types = {"token_type_ids": own["token_type_ids"]} if "token_type_ids" in own else {}
    loss = model(input_ids=sample.ids, pixel_values=sample.pixels, targets=targets, **sample.extras, **types)
    wanted = torch.nn.functional.cross_entropy(expected.logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss.sum, wanted, rtol=1e-5, atol=1e-5)
    assert loss.count.item() == 2 * 7


def test_the_loss_never_builds_all_logits(sample: Sample, folder: Path, record_shapes: type) -> None:
    model = load(sample, folder)
    targets = torch.full_like(sample.ids, IGNORE_INDEX)
    targets[:, -4:] = 5
    with record_shapes() as record:
        model(input_ids=sample.ids, pixel_values=sample.pixels, targets=targets, **sample.extras).sum.backward()
    assert (8, 96) in record.shapes
    assert not [shape for shape in record.shapes if shape[-1:] == (96,) and shape[:-1] == tuple(sample.ids.shape)]


def test_greedy_tokens_of_a_padded_batch_are_those_of_the_originals_own_loop(
    sample: Sample, original: Any, folder: Path
) -> None:
    model = load(sample, folder)
    lengths = [sample.ids.shape[1], sample.per_image + 5]
    mask = torch.zeros_like(sample.ids)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    rows = generate(
        model,
        sample.ids * mask,
        mask,
        max_new_tokens=5,
        prompt_inputs={"pixel_values": sample.pixels, **sample.extras},
    )
    for row, length in enumerate(lengths):
        own = sample.own(slice(row, row + 1), length)
        expected = original.generate(
            **own, max_new_tokens=5, do_sample=False, eos_token_id=None, suppress_tokens=[model.image_token_id]
        )
        assert rows[row].tokens == expected[0, length:].tolist()


def test_rows_that_end_early_leave_the_others_as_they_are(sample: Sample, folder: Path) -> None:
    model = load(sample, folder)
    inputs = {"pixel_values": sample.pixels, **sample.extras}
    whole = generate(model, sample.ids, max_new_tokens=6, prompt_inputs=inputs)
    stop = next((token for token in whole[0].tokens if token not in whole[1].tokens), None)
    if stop is None:
        pytest.skip("both rows say the same")
    cut = generate(model, sample.ids, max_new_tokens=6, end_token_ids=[stop], prompt_inputs=inputs)
    assert len(cut[0].tokens) < 6
    assert cut[1].tokens == whole[1].tokens


def test_every_weight_gets_a_gradient_with_images_and_without(sample: Sample, folder: Path) -> None:
    model = load(sample, folder).train()
    targets = sample.ids.clamp(max=80)
    types = {"token_type_ids": torch.ones_like(sample.ids)} if sample.name == "paligemma" else {}
    model(input_ids=sample.ids, pixel_values=sample.pixels, targets=targets, **sample.extras, **types).sum.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    model(input_ids=targets, targets=targets, **types).sum.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_blocks_sizes_and_tables(sample: Sample, folder: Path) -> None:
    model = load(sample, folder, vocab_size=100)
    assert [type(block).__name__ for block in model.blocks()] == BLOCKS[sample.name]
    assert model.model.get_input_embeddings().weight.shape == (128, 32)
    small = load(sample, folder)
    assert torch.equal(model.model.get_input_embeddings().weight[:96], small.model.get_input_embeddings().weight)
    weights = 2 * (32 * 32 * 2 + 16 * 32 * 2 + 3 * 32 * 48) + 96 * 32
    assert small.num_flops_per_token(10) == 6 * weights + 12 * 2 * 32 * 10
    logits = model(input_ids=sample.ids, pixel_values=sample.pixels, **sample.extras).logits
    assert logits.shape == (*sample.ids.shape, 128)


def test_a_model_made_on_the_meta_device_is_whole_once_it_has_memory(
    sample: Sample, folder: Path, tmp_path: Path
) -> None:
    whole = load(sample, folder)
    whole.save_files(tmp_path)
    params = with_model_files(VLMHFParams(hf_pretrained="gone"), str(tmp_path))
    with torch.device("meta"):
        model: Any = create_model(params, load_pretrained=False)
    model.to_empty(device="cpu")
    model.init_weights()
    model.load_state_dict(whole.state_dict())
    inputs = {"input_ids": sample.ids, "pixel_values": sample.pixels, **sample.extras}
    assert torch.equal(model.eval()(**inputs).logits, whole(**inputs).logits)


@pytest.mark.slow
def test_two_ranks_train_and_resume_as_one_process_does_sharded_or_not(
    image_text: ModuleType, check_two_ranks: Callable, folder: Path, tmp_path: Path
) -> None:
    alone = {name: image_text.train(name, folder, tmp_path / name, World()) for name in image_text.TRAINED}
    check_two_ranks(SCRIPT, folder, alone)


def test_an_unknown_model_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.hf_pretrained '.*nothing' cannot be loaded") as caught:
        create_model(VLMHFParams(hf_pretrained=str(tmp_path / "nothing")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["llava", "vipllava", "gemma3", "qwen2_vl", "qwen2_5_vl", "internvl", "aya_vision", "idefics3", "janus"],
)
def test_published_families_give_their_own_loss_and_answers_for_images_of_two_sizes(name: str) -> None:
    original = image_text_families.create_processor(name)
    processor = HuggingFaceProcessor(original)
    assert processor.image_token_id is not None
    model = image_text_families.create_model(name, processor.image_token_id)
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, *size), generator=generator).to(torch.uint8) for size in ((40, 40), (30, 50))]

    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Describe the image."}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A red cube."}]}
    messages = [{"role": "user", "content": parts}]
    options = image_text_families.OWN_OPTIONS.get(name, {})

    def call_original(*answers: Any) -> Any:
        text = original.apply_chat_template([*messages, *answers], tokenize=False, add_generation_prompt=not answers)
        return original(images=[images], text=[text], return_tensors="pt", **options)

    turns = [Turn("user", "<image><image>Describe the image."), Turn("assistant", "A red cube.")]
    wrapped = VLMHF(model)
    ids, inputs, targets = read_inputs(processor, processor.encode(images, turns))
    logits = model(**call_original(answer)).logits[:, : ids.shape[1]]
    torch.testing.assert_close(wrapped(ids, **inputs).logits, logits, rtol=1e-4, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="sum")
    torch.testing.assert_close(wrapped(ids, targets=targets, **inputs).sum, loss, rtol=1e-5, atol=1e-5)

    # a rank whose rows have no images encodes one all the same
    sample = processor.encode([], [Turn("user", "a"), turns[1]])
    plain = {key: sample[key][None].long() for key in TOKEN_KEYS if key in sample and key != "target_mask"}
    loss = torch.nn.functional.cross_entropy(model(**plain).logits[0], plain["input_ids"][0], reduction="sum")
    torch.testing.assert_close(wrapped(**plain, targets=plain["input_ids"]).sum, loss, rtol=1e-5, atol=1e-5)

    ids, inputs, _ = read_inputs(processor, processor.encode(images, turns[:1]))
    wanted = model.generate(**call_original(), max_new_tokens=5, do_sample=False, eos_token_id=None)[0, -5:].tolist()
    for use_cache in (True, False):
        found = generate(wrapped, ids, None, max_new_tokens=5, use_cache=use_cache, prompt_inputs=inputs)
        assert found[0].tokens == wanted


def read_inputs(processor: HuggingFaceProcessor, sample: dict[str, Any]) -> tuple[Tensor, dict[str, Any], Tensor]:
    """Token ids, further inputs of the model and targets of a batch of one sample."""
    pixels = normalize_images(sample["pixel_values"], processor.image_mean, processor.image_std)
    inputs = {"pixel_values": pixels}
    for key, value in sample.items():
        if key not in ("input_ids", "target_mask", "pixel_values", "image_index", "pixel_maps"):
            inputs[key] = value[None] if key in TOKEN_KEYS else value
    targets = sample["input_ids"].long().roll(-1).masked_fill(~sample["target_mask"].roll(-1), IGNORE_INDEX)
    return sample["input_ids"][None], inputs, targets[None]


def test_a_model_that_cannot_be_given_its_images_is_refused_by_name() -> None:
    size: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    config = GitConfig(**size, vocab_size=110, vision_config={**size, "image_size": 28, "patch_size": 7})
    with pytest.raises(ValueError, match="GitForCausalLM has no token that stands for an image in its text"):
        VLMHF(GitForCausalLM(config))
    text = {**size, "vocab_size": 110, "model_type": "qwen2", "num_key_value_heads": 4}
    original = VideoLlama3ForConditionalGeneration(VideoLlama3Config(vision_config=size, text_config=text))
    with pytest.raises(ValueError, match="VideoLlama3ForConditionalGeneration has an image encoder of an unknown kind"):
        VLMHF(original)
