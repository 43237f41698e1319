"""Backbones give what their model understood of an observation, and compute no more than that."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from vla_foundry.batch import Documents
from vla_foundry.models import create_batch_handler
from vla_foundry.models.backbones.backbone import OBSERVATIONS, Suffix, arrange_rows, create_backbone
from vla_foundry.params.models.transformer import TransformerHFParams
from vla_foundry.training.loop import train_step
from vla_foundry.world import World

HUGGING_FACE = ["qwen3_vl", "paligemma", "smolvlm2", "clip"]
LANGUAGE = ["vlm", "qwen3_vl", "paligemma", "smolvlm2"]


@pytest.fixture(scope="module")
def folder(policies: ModuleType, image_text: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each of the Hugging Face models as published."""
    folder = tmp_path_factory.mktemp("published")
    for name in HUGGING_FACE:
        model = policies.create_clip() if name == "clip" else image_text.create_original(name)
        model.save_pretrained(folder / name)
    return folder


class Encoder:
    """A backbone, and batches for it."""

    def __init__(self, policies: ModuleType, image_text: ModuleType, folder: Path, name: str, changes: Any) -> None:
        self.policies, self.image_text, self.name = policies, image_text, name
        self.params = policies.change(policies.create_backbone_params(name, folder), **changes)
        torch.manual_seed(0)
        self.backbone: Any = create_backbone(self.params)

    def create_batch(self, lengths: list[int], seed: int = 0, **options: Any) -> dict[str, Any]:
        batch = self.policies.create_batch(seed, num_samples=len(lengths), lengths=lengths, **options)
        if self.name in ("vlm", "vlm prefix", "clip", "vit"):
            if self.name == "clip":
                # CLIP pools the last token of a text
                for row, length in enumerate(lengths):
                    batch["input_ids"][row, length - 1] = 95
            return batch
        count = len(lengths) * self.policies.IMAGES_PER_SAMPLE
        images = self.image_text.create_images(self.name, count, seed)
        per_image = self.image_text.PER_IMAGE[self.name]
        ids = batch["input_ids"]
        ids[ids == self.policies.IMAGE] = 5
        for image in range(self.policies.IMAGES_PER_SAMPLE):
            # some families take neighbouring image tokens for one image
            first = 1 + image * (per_image + 1)
            ids[:, first : first + per_image] = self.policies.IMAGE
        types = {"mm_token_type_ids": (ids == self.policies.IMAGE).int()} if self.name == "qwen3_vl" else {}
        return {**batch, **images, **types}

    def observe(self, batch: dict[str, Any]) -> dict[str, Any]:
        return OBSERVATIONS.get(self.params.type)(self.params, batch, "cpu")

    def encode(self, batch: dict[str, Any]) -> Any:
        return self.backbone(**self.observe(batch))


@pytest.fixture
def create(policies: ModuleType, image_text: ModuleType, folder: Path) -> Callable[..., Encoder]:
    return lambda name, **changes: Encoder(policies, image_text, folder, name, changes)


def lengths_for(name: str) -> list[int]:
    """Of three rows, the first the longest."""
    return [48, 40, 44] if name == "paligemma" else [20, 14, 16]


def only(batch: dict[str, Any], row: int, length: int) -> dict[str, Any]:
    """One row of a batch, without padding."""
    images = len(batch["image_mask"])
    alone = {
        name: value.reshape(images, -1, *value.shape[1:])[row]
        for name, value in batch.items()
        if name in ("pixel_values", "image_grid_thw")
    }
    kept = {name: batch[name] for name in ("image_mean", "image_std")}
    tokens = {name: batch[name][row : row + 1, :length] for name in ("input_ids", "mm_token_type_ids") if name in batch}
    return {**kept, **alone, **tokens, "image_mask": batch["image_mask"][row : row + 1]}


@pytest.mark.parametrize("name", [*LANGUAGE, "vlm prefix", "clip", "vit"])
def test_a_row_is_encoded_alike_alone_and_in_a_batch_with_padding(name: str, create) -> None:
    encoder, lengths = create(name), lengths_for(name)
    encoder.backbone.eval()
    batch = encoder.create_batch(lengths, is_plain=True)
    together = encoder.encode(batch)
    for row, length in enumerate(lengths):
        alone = encoder.encode(only(batch, row, length))
        tokens = together.tokens[row : row + 1]
        tokens = tokens if together.mask is None else tokens[:, together.mask[row]]
        torch.testing.assert_close(alone.tokens, tokens, rtol=1e-4, atol=1e-5)
    assert together.tokens.shape[2] == encoder.backbone.conditioning_dim


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_observation_token_sees_images_and_text_and_is_learned(name: str, create) -> None:
    encoder = create(name)
    batch = encoder.create_batch(lengths_for(name), is_plain=True)
    tokens = encoder.encode(batch).tokens
    assert tokens.shape == (3, 1, 2 * 32)
    tokens.square().sum().backward()
    assert encoder.backbone.observation_token.grad.abs().min() > 0
    encoder.backbone.eval()
    reference = encoder.encode(batch).tokens
    for changed_input in ("pixel_values", "input_ids"):
        changed = {**batch, changed_input: batch[changed_input].clone()}
        if changed_input == "input_ids":
            last = lengths_for(name)[0] - 1
            changed[changed_input][0, last] = 3 + (batch[changed_input][0, last] + 1) % 80
        else:
            changed[changed_input][0] = 255 - changed[changed_input][0]
        other = encoder.encode(changed).tokens
        assert (other[0] - reference[0]).abs().max() > 1e-4
        torch.testing.assert_close(other[1:], reference[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*LANGUAGE, "vlm prefix"])
def test_the_output_head_is_never_run_and_gets_no_gradient(name: str, create) -> None:
    encoder = create(name)
    model = encoder.backbone.model
    head = model.transformer.output if name.startswith("vlm") else model.model.get_output_embeddings()
    calls: list[Any] = []
    head.register_forward_hook(lambda *call: calls.append(call))
    batch = encoder.create_batch(lengths_for(name), is_plain=True)
    encoder.encode(batch).tokens.sum().backward()
    assert not calls
    for parameter_name, parameter in encoder.backbone.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name


def test_the_last_layer_computes_the_observation_token_only(create) -> None:
    encoder = create("vlm")
    observation = encoder.observe(encoder.create_batch([20, 14], is_plain=True))
    shapes: list[tuple[int, ...]] = []
    for block in encoder.backbone.model.transformer.layers:
        block.feed_forward.register_forward_hook(lambda _m, inputs, _o: shapes.append(tuple(inputs[0].shape)))
    encoder.backbone(**observation)
    assert shapes == [(2, 21, 32), (2, 21, 32), (2, 1, 32)]


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_hidden_states_are_those_of_the_whole_model(attention: str, create, policies) -> None:
    vlm = policies.change(policies.VLM, image_attention=attention)
    whole = create("vlm", vlm=vlm)
    prefix = create("vlm prefix", vlm=vlm, num_vlm_layers_to_use=2)
    batch = whole.create_batch([20], is_plain=True)
    model, table = prefix.backbone.model, prefix.backbone.model.transformer.embeddings.weight
    model.load_state_dict(whole.backbone.model.state_dict())
    with torch.no_grad():
        # a token whose embedding is the observation token's
        table[60] = whole.backbone.observation_token
    ids = torch.cat((batch["input_ids"][:, :20], torch.tensor([[60]], dtype=torch.int32)), dim=1)
    states = model(
        input_ids=ids, pixel_values=whole.observe(batch)["pixel_values"], output_hidden_states=True
    ).hidden_states
    expected = torch.cat(states[-2:], dim=-1)
    torch.testing.assert_close(whole.encode(batch).tokens, expected[:, -1:], rtol=1e-5, atol=1e-5)
    documents = Documents(np.array([21], np.int32), np.array([1], np.int32), np.array([False]))
    tokens = prefix.encode({**batch, "input_ids": ids, "documents": documents}).tokens
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)


def test_missing_images_are_left_out(create) -> None:
    encoder = create("vlm")
    batch = encoder.create_batch([20, 14], is_plain=True)
    batch["image_mask"][0, 1] = False
    encoder.backbone.eval()
    made = encoder.encode(batch).tokens
    # the same without that image and its four tokens
    ids = batch["input_ids"]
    shorter = torch.cat((ids[:1, :5], ids[:1, 9:20]), dim=1)
    alone = {**only(batch, 0, 20), "input_ids": shorter, "pixel_values": batch["pixel_values"][:1]}
    del alone["image_mask"]
    torch.testing.assert_close(made[:1], encoder.encode(alone).tokens, rtol=1e-4, atol=1e-5)
    batch["pixel_values"][1] = 0
    assert torch.equal(encoder.encode(batch).tokens, made)


@pytest.mark.parametrize("name", ["clip", "vit"])
def test_missing_images_are_masked(name: str, create) -> None:
    encoder = create(name)
    batch = encoder.create_batch([20, 14], is_plain=True)
    whole = encoder.encode(batch)
    assert whole.mask is None
    batch["image_mask"][0, 1] = False
    mask = encoder.encode(batch).mask
    expected = {"clip": [[True, True, False], [True, True, True]], "vit": [[True] * 16 + [False] * 16, [True] * 32]}
    assert mask.tolist() == expected[name]
    assert whole.tokens.shape == (2, len(expected[name][0]), encoder.backbone.conditioning_dim)


@pytest.mark.parametrize("is_published", [False, True])
def test_clip_tokens_are_normalised_projections(is_published: bool, create, policies) -> None:
    encoder = create("clip", text_norm_before_projection=is_published)
    batch = encoder.create_batch([20, 14], is_plain=True)
    encoder.backbone.eval()
    clip = policies.create_clip().eval()
    observation = encoder.observe(batch)
    images = clip.vision_model(pixel_values=observation["pixel_values"]).pooler_output
    images = torch.nn.functional.normalize(clip.visual_projection(images), dim=-1)
    text = clip.text_model(
        input_ids=observation["input_ids"], attention_mask=observation["attention_mask"]
    ).pooler_output
    projected = clip.text_projection(text / text.norm(dim=-1, keepdim=True) if is_published else text)
    projected = projected if is_published else projected / projected.norm(dim=-1, keepdim=True)
    tokens = encoder.encode(batch).tokens
    torch.testing.assert_close(tokens[:, 0], projected)
    torch.testing.assert_close(tokens[:, 1:], images.unflatten(0, (2, 2)))
    silent = create("clip", disable_text=True)
    assert silent.observe(batch)["input_ids"] is None
    with pytest.raises(ValueError, match=r"disable_text true"):
        encoder.observe({name: value for name, value in batch.items() if name != "input_ids"})


def test_our_model_with_a_hugging_face_language_model(create, policies, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=96, tie_word_embeddings=False)).save_pretrained(tmp_path)
    vlm = policies.change(policies.VLM, transformer=TransformerHFParams(hf_pretrained=str(tmp_path)))
    encoder = create("vlm", vlm=vlm)
    batch = encoder.create_batch([20, 14], is_plain=True)
    encoder.backbone.eval()
    together = encoder.encode(batch).tokens
    for row, length in enumerate([20, 14]):
        alone = encoder.encode(only(batch, row, length)).tokens
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-4, atol=1e-5)
    together.sum().backward()
    for name, parameter in encoder.backbone.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in (*LANGUAGE, "vlm prefix", "clip", "vit")),
        *((name, {"conditioning": "prefix"}) for name in ("qwen3_vl", "paligemma")),
    ],
)
def test_a_policy_on_it_trains_and_samples(name: str, changes: dict[str, Any], create, policies) -> None:
    encoder = create(name, **changes)
    params = policies.create_params(encoder.params, policies.create_head_params("flow adaptive"), lr=1e-3)
    model = policies.create_policy(params)
    state = policies.create_train_state(model, model, hparams=params.hparams, ema=policies.EMAParams(), total_steps=4)
    handler: Any = create_batch_handler(params)
    batch = encoder.create_batch(lengths_for(name)[:2])
    losses = [
        train_step(state, [batch], handler=handler, hparams=params.hparams, world=World()).loss.item() for _ in range(4)
    ]
    assert losses[-1] < losses[0]
    made = model.eval().sample(handler.prepare_sampling(batch, "cpu"), seeds=torch.tensor([1, 2]), num_steps=2)
    assert made.isfinite().all()
    assert made.shape == batch["actions"].shape


def test_a_frozen_backbone_learns_nothing(create) -> None:
    assert not any(parameter.requires_grad for parameter in create("vlm", freeze=True).backbone.parameters())
    clip = create("clip", freeze_text_encoder=True).backbone
    trained = {name.split(".")[2] for name, parameter in clip.named_parameters() if parameter.requires_grad}
    assert trained == {"vision_model", "visual_projection"}


def test_rows_have_room_for_the_token_right_behind_their_text() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 99, 99]], dtype=torch.int32)
    documents = Documents(np.array([4, 2, 2], np.int32), np.array([1, 2], np.int32), np.array([False, False, True]))
    rows = arrange_rows({"input_ids": ids, "documents": documents}, has_observation_token=True, is_trimmed=True)
    assert rows.input_ids.tolist() == [[5, 6, 7, 8, 0], [5, 6, 0, 0, 0]]
    assert rows.places is not None
    assert rows.places.tolist() == [4, 2]
    assert rows.mask().sum(1).tolist() == rows.lengths.tolist() == [5, 3]
    assert rows.documents().lengths.tolist() == [5, 3, 2]
    shorter = {
        "input_ids": ids[1:],
        "documents": rows._replace(input_ids=ids[1:], lengths=Tensor([2]).long()).documents(),
    }
    assert arrange_rows(shorter, has_observation_token=True, is_trimmed=True).input_ids.shape == (1, 3)
    # to keep to few widths
    assert arrange_rows(shorter, has_observation_token=True, is_trimmed=False).input_ids.shape == (1, 4)
    packed = Documents(np.array([2, 2], np.int32), np.array([2], np.int32), np.array([False, False]))
    with pytest.raises(ValueError, match=r"Set --data\.pack false"):
        arrange_rows({"input_ids": ids[:1], "documents": packed}, has_observation_token=True, is_trimmed=True)


def test_a_model_of_another_kind_is_an_error(create, folder: Path, policies) -> None:
    with pytest.raises(ValueError, match=r"not a CLIP model"):
        create_backbone(policies.CLIPBackboneParams(hf_pretrained=str(folder / "qwen3_vl"), hf_load_weights=False))
    with pytest.raises(ValueError, match=r"has no architecture"):
        create_backbone(policies.VLMFoundryBackboneParams())


def _with_suffix(encoder: Encoder, batch: dict[str, Any], values: Tensor) -> dict[str, Any]:
    inputs = encoder.observe({**batch, "num_suffix": values.shape[1]})
    starts = inputs.pop("suffix_starts")
    return {**inputs, "suffix": Suffix(values, starts)}


@pytest.mark.parametrize("conditioning", ["observation_token", "prefix"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_tokens_written_one_by_one_see_what_those_of_a_whole_row_see(name: str, conditioning: str, create) -> None:
    encoder = create(name, conditioning=conditioning)
    encoder.backbone.eval()
    batch = encoder.create_batch(lengths_for(name))
    values = 0.3 * torch.randn(3, 5, encoder.backbone.width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = encoder.backbone(**_with_suffix(encoder, batch, values))
        writing = encoder.backbone.start_writing(**_with_suffix(encoder, batch, values[:, :2]))
        states = [writing.state]
        for step in range(2, 5):
            writing = encoder.backbone.continue_writing(writing, values[:, step])
            states.append(writing.state)
        alone = encoder.encode(batch)
    assert whole.suffix_states.shape == (3, 6, encoder.backbone.width)
    torch.testing.assert_close(torch.stack(states, 1), whole.suffix_states[:, 2:], rtol=1e-4, atol=1e-5)
    # what the head sees does not depend on what is written after it
    seen = whole.tokens if alone.mask is None else whole.tokens[:, : alone.mask.shape[1]][alone.mask]
    expected = alone.tokens if alone.mask is None else alone.tokens[alone.mask]
    torch.testing.assert_close(seen.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
    if alone.mask is not None:
        assert not whole.mask[:, alone.mask.shape[1] :].any()
