"""The vision-language model: every combination of parts, who sees whom, packing, parts from checkpoints, generation."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from vla_foundry.batch import IGNORE_INDEX, Documents
from vla_foundry.config.schema import Unavailable
from vla_foundry.inference.decoding import generate
from vla_foundry.models import create_model
from vla_foundry.models.vlm import pixel_unshuffle
from vla_foundry.params import ModelParams, load_params_from_yaml
from vla_foundry.params.facts import Facts, TokenizerFacts
from vla_foundry.params.models.policy import with_model_files
from vla_foundry.params.models.transformer import TransformerHFParams, TransformerParams
from vla_foundry.params.models.vit import ViTHFParams, ViTParams
from vla_foundry.params.models.vlm import VLMParams

IMAGE = 60
# of an image of 28 pixels: 16 patches, joined to 4 tokens
PER_IMAGE = 4
COMBINATIONS = [(vit, text) for vit in ("vit", "vit_hf") for text in ("transformer", "transformer_hf")]

Create = Callable[..., Any]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a Hugging Face image encoder and language model."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=28, patch_size=7)).save_pretrained(folder / "vit")
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=61, max_position_embeddings=96)).save_pretrained(folder / "text")
    return {"vit_hf": str(folder / "vit"), "transformer_hf": str(folder / "text")}


@pytest.fixture
def create(published: dict[str, str]) -> Create:
    def create(vit: str = "vit", text: str = "transformer", *, load_pretrained: bool = True, **changes: Any) -> Any:
        torch.manual_seed(1)
        vit_params = (
            ViTHFParams(hf_pretrained=published["vit_hf"], projector_pixel_shuffle_factor=2)
            if vit == "vit_hf"
            else ViTParams(
                hidden_dim=32,
                inter_dim=48,
                n_heads=4,
                n_layers=2,
                patch_size=7,
                img_size=28,
                projector_pixel_shuffle_factor=2,
            )
        )
        text_params = (
            TransformerHFParams(hf_pretrained=published["transformer_hf"])
            if text == "transformer_hf"
            else TransformerParams(hidden_dim=32, n_layers=2, n_heads=4, vocab_size=61, max_seq_len=96)
        )
        values: dict[str, Any] = {"vit": vit_params, "transformer": text_params, "image_token_id": IMAGE}
        return create_model(VLMParams(**{**values, **changes}), load_pretrained=load_pretrained)

    return create


def random_images(*shape: int) -> Tensor:
    return torch.randn(*shape, 3, 28, 28, generator=torch.Generator().manual_seed(2))


def caption(seed: int, length: int, num_images: int = 1) -> Tensor:
    """Tokens of a sample that begins with a token, its images, each followed by a token."""
    ids = torch.randint(3, 59, (length,), generator=torch.Generator().manual_seed(seed))
    for number in range(num_images):
        start = 1 + number * (PER_IMAGE + 1)
        ids[start : start + PER_IMAGE] = IMAGE
    return ids


def targets_of(ids: Tensor, prompt: int = 6) -> Tensor:
    targets = ids.roll(-1, -1).clone()
    targets[..., :prompt] = targets[..., -1] = IGNORE_INDEX
    return targets


def host_inputs(model: Any, ids: Tensor) -> dict[str, Any]:
    """What the batch handler adds, so that nothing waits for the device."""
    is_image = ids == IMAGE
    return {"image_positions": is_image.flatten().nonzero().squeeze(1), "sees_ahead": is_image.numpy()}


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_pixel_unshuffle_joins_squares_row_by_row(factor: int) -> None:
    cells = torch.arange(64.0).view(1, 8, 8, 1).expand(2, 8, 8, 3) + torch.tensor([0.0, 0.1, 0.2])
    joined = pixel_unshuffle(cells.reshape(2, 64, 3), factor)
    side = 8 // factor
    assert joined.shape == (2, side * side, 3 * factor**2)
    for row, column in ((0, 0), (side - 1, 0), (side - 1, side - 1)):
        square = cells[1, row * factor : (row + 1) * factor, column * factor : (column + 1) * factor]
        assert torch.equal(joined[1, row * side + column], square.reshape(-1))


def test_pixel_unshuffle_refuses_what_is_no_square() -> None:
    with pytest.raises(ValueError, match=r"pixel_shuffle_factor \(2\) must divide .* but there are 15 tokens"):
        pixel_unshuffle(torch.zeros(1, 15, 3), 2)
    with pytest.raises(ValueError, match="there are 9 tokens"):
        pixel_unshuffle(torch.zeros(1, 9, 3), 2)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize(("vit", "text"), COMBINATIONS)
def test_every_combination_of_parts_learns_one_batch(vit: str, text: str, attention: str, create: Create) -> None:
    model = create(vit, text, image_attention=attention)
    ids = torch.stack([caption(seed, 20) for seed in range(4)])
    inputs = {"input_ids": ids, "pixel_values": random_images(4), "targets": targets_of(ids), **host_inputs(model, ids)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(25):
        output = model(**inputs)
        loss = output.sum / output.count
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert output.count.item() == 4 * 13
    assert losses[-1] < 0.5 * losses[0]
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    images = [block for block in model.blocks() if "Siglip" in type(block).__name__ or "Image" in type(block).__name__]
    assert len(images) == 2
    assert len(model.blocks()) == 4


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize(("vit", "text"), COMBINATIONS)
def test_packing_changes_no_sample(
    vit: str, text: str, attention: str, create: Create, create_documents: Callable[..., Documents]
) -> None:
    model = create(vit, text, image_attention=attention)
    samples = [caption(0, 11), caption(1, 16, 2), caption(2, 9), caption(3, 13)]
    counts = [1, 2, 1, 1]
    images = random_images(5)
    rows = [torch.cat([samples[0], samples[1], torch.full((3,), 7)]), torch.cat([samples[2], samples[3], samples[0]])]
    rows = [rows[0], rows[1][:30]]
    # row 1 ends with a sample that is cut short, after its image
    ids = torch.stack(rows)
    documents = create_documents([11, 16, -3], [9, 13, 8])
    targets = torch.full_like(ids, IGNORE_INDEX)
    alone, single = [], []
    start_image = 0
    places = [(0, 0, 11), (0, 11, 27), (1, 0, 9), (1, 9, 22)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    for sample, count, (row, start, end) in zip(samples, counts, places, strict=True):
        targets[row, start:end] = targets_of(sample)
        own = images[start_image : start_image + count]
        start_image += count
        output = model(
            input_ids=sample[None],
            pixel_values=own,
            targets=targets_of(sample)[None],
            **host_inputs(model, sample[None]),
        )
        alone.append(output.sum)
        hidden = model(input_ids=sample[None], pixel_values=own, output_hidden_states=True).hidden_states[-1]
        single.append((row, start, end, hidden[0]))
    all_images = torch.cat([images, images[:1]])
    inputs = {"input_ids": ids, "pixel_values": all_images, "documents": documents, **host_inputs(model, ids)}
    packed = model(**inputs, targets=targets)
    assert packed.sum.item() == pytest.approx(torch.stack(alone).sum().item(), rel=1e-6)
    hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
    for row, start, end, expected in single:
        torch.testing.assert_close(hidden[row, start:end], expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(packed.sum, parameters)
    wanted = torch.autograd.grad(torch.stack(alone).sum(), parameters)
    for gradient, expected in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("text", ["transformer", "transformer_hf"])
def test_image_tokens_see_each_other_where_that_is_asked_for_and_text_stays_causal(text: str, create: Create) -> None:
    ids = caption(0, 20, 2)[None]
    changes = {}
    for attention in ("causal", "bidirectional"):
        model = create("vit", text, image_attention=attention)

        def hidden(x: Tensor, model: Any = model) -> Tensor:
            sees = (ids == IMAGE).numpy() if model.sees_ahead else None
            output = model.transformer.decode(inputs_embeds=x, sees_ahead=sees, output_hidden_states=True)
            return output.hidden_states[1]

        x = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(3), requires_grad=True)
        # sees[i, j]: token i depends on token j, after one block
        rows = [torch.autograd.grad(hidden(x)[0, i].sum(), x)[0][0].abs().sum(-1) > 0 for i in range(20)]
        changes[attention] = torch.stack(rows)
    causal = torch.ones(20, 20, dtype=torch.bool).tril()
    assert torch.equal(changes["causal"], causal)
    expected = causal.clone()
    expected[1:5, 1:5] = expected[6:10, 6:10] = True
    assert torch.equal(changes["bidirectional"], expected)


def test_attention_ahead_is_that_of_a_dense_mask_and_makes_none(
    create: Create, record_shapes: type, create_documents: Callable[..., Documents]
) -> None:
    model = create(image_attention="bidirectional")
    ids = torch.cat([caption(0, 40, 2), caption(1, 33)])[None]
    inputs = {"input_ids": ids, "pixel_values": random_images(3), **host_inputs(model, ids)}
    with record_shapes() as record:
        model(**inputs, targets=targets_of(ids), documents=create_documents([40, 33])).sum.backward()
    squares = {shape[-2:] for shape in record.shapes if len(shape) >= 2}
    assert not squares & {(73, 73), (40, 40), (33, 33)}


def test_masked_places_give_no_gradient(create: Create) -> None:
    model = create()
    ids = caption(0, 20)[None]
    targets = torch.full_like(ids, IGNORE_INDEX)
    targets[0, 9] = 5
    embeds: list[Tensor] = []
    model.transformer.layers[0].register_forward_pre_hook(lambda _module, inputs: embeds.append(inputs[0]))
    output = model(input_ids=ids, pixel_values=random_images(1), targets=targets)
    gradient = torch.autograd.grad(output.sum, embeds[0])[0][0].abs().sum(-1)
    assert (gradient[:10] > 0).all()
    assert (gradient[10:] == 0).all()
    model(input_ids=ids, pixel_values=random_images(1), targets=targets).sum.backward()
    # the row of the image token, and that of token 0 which is looked up in its place, get none
    rows = model.transformer.embeddings.weight.grad.abs().sum(-1)
    assert rows[IMAGE] == 0
    assert rows[0] == 0
    nothing = model(input_ids=ids, pixel_values=random_images(1), targets=torch.full_like(ids, IGNORE_INDEX))
    model.zero_grad()
    nothing.sum.backward()
    assert nothing.sum.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_images_come_as_one_list_or_by_sample(create: Create) -> None:
    model, images = create(), random_images(2, 2)
    ids = torch.stack([caption(seed, 20, 2) for seed in range(2)])
    by_sample = model(input_ids=ids, pixel_values=images).logits
    assert torch.equal(model(input_ids=ids, pixel_values=images.flatten(0, 1)).logits, by_sample)


def test_more_or_fewer_image_tokens_than_images_make_are_refused(create: Create) -> None:
    model = create()
    for ids, images in ((caption(0, 20, 2)[None], 1), (caption(0, 20)[None], 2), (caption(0, 20)[None], 0)):
        with pytest.raises(ValueError, match=r"image tokens, but its \d images make \d each\. Check data\.img_num"):
            model(input_ids=ids, pixel_values=random_images(images), targets=targets_of(ids))


def test_a_batch_without_images_still_reaches_the_image_encoder(create: Create) -> None:
    model = create("vit_hf")
    ids = caption(0, 20, 0)[None]
    output = model(input_ids=ids, targets=targets_of(ids))
    torch.testing.assert_close(output.sum, model.transformer(input_ids=ids, targets=targets_of(ids)).sum)
    output.sum.backward()
    gradients = [p.grad for p in model.vit.parameters() if p.requires_grad]
    assert all(gradient is not None and (gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("text", ["transformer", "transformer_hf"])
def test_cached_generation_of_a_padded_batch_is_that_of_each_row_alone(
    text: str, attention: str, create: Create
) -> None:
    model = create("vit", text, image_attention=attention)
    prompts, images = [caption(0, 14, 2), caption(1, 8)], random_images(3)
    ids = torch.zeros(2, 14, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    rows = generate(model, ids, mask, max_new_tokens=6, prompt_inputs={"pixel_values": images})
    for row, prompt, own in zip(rows, prompts, (images[:2], images[2:]), strict=True):
        whole = generate(model, prompt[None], max_new_tokens=6, use_cache=False, prompt_inputs={"pixel_values": own})
        assert row.tokens == whole[0].tokens


@pytest.mark.parametrize("tied", [False, True])
def test_parts_start_from_earlier_runs_and_tables_grow_for_new_tokens(tmp_path: Path, tied: bool) -> None:
    text = TransformerParams(hidden_dim=16, n_layers=1, n_heads=2, vocab_size=50, weight_tying=tied)
    vit = ViTParams(hidden_dim=16, inter_dim=16, n_heads=2, n_layers=1, patch_size=7, img_size=28)
    first, encoder = create_model(text), create_model(vit)
    for name, model in (("text", first), ("vit", encoder)):
        state = model.state_dict()
        if name == "text" and tied:
            del state["output.weight"]
        save_file(state, tmp_path / f"{name}.safetensors")
    params = VLMParams(
        vit=replace(vit, resume_from_checkpoint=str(tmp_path / "vit.safetensors"), freeze=True),
        transformer=replace(text, resume_from_checkpoint=str(tmp_path / "text.safetensors")),
        image_token_id=50,
        vocab_size=51,
    )
    model: Any = create_model(params)
    assert params.token_limits(Facts()).vocab_size == 64
    table = model.transformer.embeddings.weight
    assert table.shape == (64, 16)
    assert (model.transformer.output.weight is table) == tied
    assert torch.equal(table[:50], first.embeddings.weight)  # type: ignore[union-attr]
    assert torch.equal(model.transformer.output.weight[:50], first.output.weight)  # type: ignore[union-attr]
    assert table[50:].std() > 0.1
    assert torch.equal(model.vit.layer_norm.weight, encoder.layer_norm.weight)  # type: ignore[union-attr]
    assert torch.equal(model.vit.blocks[0].attn.qkv_proj.weight, encoder.blocks[0].attn.qkv_proj.weight)  # type: ignore
    assert not any(p.requires_grad for p in model.vit.parameters())
    assert all(p.requires_grad for p in model.transformer.parameters())
    # a checkpoint of the whole model serves as one of its parts too, whatever its table has grown to
    save_file({k: v for k, v in model.state_dict().items() if not (tied and "output" in k)}, tmp_path / "v.safetensors")
    whole = str(tmp_path / "v.safetensors")
    again = replace(
        params,
        vit=replace(vit, resume_from_checkpoint=whole),
        transformer=replace(text, resume_from_checkpoint=whole),
    )
    other: Any = create_model(again)
    assert torch.equal(other.transformer.embeddings.weight, table)
    assert torch.equal(other.vit.patch_embedding.conv.weight, model.vit.patch_embedding.conv.weight)


def test_a_part_that_does_not_fit_its_checkpoint_is_named(tmp_path: Path) -> None:
    text = TransformerParams(hidden_dim=16, n_layers=1, n_heads=2, vocab_size=50)
    save_file(create_model(text).state_dict(), tmp_path / "text.safetensors")
    wide = TransformerParams(
        hidden_dim=32,
        n_layers=1,
        n_heads=2,
        vocab_size=50,
        resume_from_checkpoint=str(tmp_path / "text.safetensors"),
    )
    vit = ViTParams(hidden_dim=16, inter_dim=16, n_heads=2, n_layers=1, patch_size=7, img_size=28)
    with pytest.raises(ValueError, match=r"\(model\.transformer\.resume_from_checkpoint\) does not fit the model"):
        create_model(VLMParams(vit=vit, transformer=wide, image_token_id=1))


def test_a_hugging_face_language_model_grows_and_keeps_its_rows(create: Create, published: dict[str, str]) -> None:
    model = create("vit", "transformer_hf", vocab_size=100, image_token_id=99)
    old = LlamaForCausalLM.from_pretrained(published["transformer_hf"])
    table = model.transformer.model.get_input_embeddings().weight
    assert table.shape == (128, 32)
    assert torch.equal(table[:61], old.get_input_embeddings().weight)
    assert torch.equal(model.transformer.model.lm_head.weight[:61], old.lm_head.weight)


def test_the_saved_architectures_are_enough_to_load_a_run(
    create: Create, published: dict[str, str], tmp_path: Path
) -> None:
    model = create("vit_hf", "transformer_hf", vocab_size=100)
    model.save_files(tmp_path)
    params = VLMParams(
        vit=ViTHFParams(hf_pretrained="gone", projector_pixel_shuffle_factor=2),
        transformer=TransformerHFParams(hf_pretrained="gone"),
        image_token_id=IMAGE,
        vocab_size=100,
    )
    again: Any = create_model(with_model_files(params, str(tmp_path)), load_pretrained=False)
    again.load_state_dict(model.state_dict())
    ids = caption(0, 20)[None]
    inputs = {"input_ids": ids, "pixel_values": random_images(1)}
    assert torch.equal(again.eval()(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize(("vit", "text"), COMBINATIONS)
def test_a_model_made_on_the_meta_device_is_whole_once_it_has_memory(vit: str, text: str, create: Create) -> None:
    with torch.device("meta"):
        model = create(vit, text, load_pretrained=False, vocab_size=100)
    model.to_empty(device="cpu")
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.projection.proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    other = create(vit, text, vocab_size=100)
    model.load_state_dict(other.state_dict())
    inputs = {"input_ids": caption(0, 20)[None], "pixel_values": random_images(1)}
    assert torch.equal(model.eval()(**inputs).logits, other.eval()(**inputs).logits)


def test_image_token_and_vocabulary_follow_from_the_tokenizer(create: Create) -> None:
    params = VLMParams(vit=ViTParams(), transformer=TransformerParams(vocab_size=4096))
    facts = Facts(tokenizer=TokenizerFacts(name="t", vocab_size=4097, image_token_id=4096))
    derived = params.derive(None, facts)
    assert {name: item.value for name, item in derived.items()} == {"image_token_id": 4096, "vocab_size": 4097}
    unknown = params.derive(None, Facts())["image_token_id"].value
    assert isinstance(unknown, Unavailable)
    assert "--model.image_token_id N" in unknown.needs
    given = VLMParams(vit=ViTParams(), transformer=TransformerParams(), image_token_id=7)
    with pytest.raises(ValueError, match=r"model\.image_token_id \(7\) must be the data's image token \(4096\)"):
        given.check(None, facts, "model")


SIZES = [
    ("vlm_11m", 10.831, 256),
    ("vlm_100m", 92.850, 256),
    ("vlm_1b", 1849.979, 256),
    ("vlm_3b", 2393.354, 256),
    ("foundry_vlm_1.3b", 1527.173, 64),
]


@pytest.mark.parametrize(("name", "millions", "tokens"), SIZES)
def test_presets_have_their_sizes(name: str, millions: float, tokens: int) -> None:
    params = load_params_from_yaml(ModelParams, f"config_presets/models/{name}.yaml")
    with torch.device("meta"):
        model: Any = create_model(params)

    def count(*modules: torch.nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    assert round(count(model) / 1e6, 3) == millions
    assert params.image_inputs().img_num_tokens == tokens
    if name == "foundry_vlm_1.3b":
        # the paper's table, billions: language model 1.23, image encoder 0.09, embedding 0.20
        ends = count(model.transformer.embeddings, model.transformer.output)
        parts = (count(model.transformer) - ends, count(model.vit), ends)
        assert [round(part / 1e9, 2) for part in parts] == [1.23, 0.09, 0.20]
        assert model.projection.proj.weight.shape == (2048, 3072)


def test_operations_count_the_image_encoder_once_a_row(create: Create) -> None:
    model = create()
    text = model.transformer.num_flops_per_token(64)
    assert model.num_flops_per_token(64) - text == pytest.approx((model.vit.num_flops_per_image() + 6 * 32 * 128) / 64)
    weights = 2 * (3 * 32 * 32 + 32 * 32 + 2 * 32 * 48) + 32 * 3 * 49
    assert model.vit.num_flops_per_image() == 16 * (6 * weights + 12 * 2 * 32 * 16)


def test_stretches_end_with_their_document(create_documents: Callable[..., Documents]) -> None:
    from vla_foundry.models.attention import create_segments

    sees = np.array([[0, 1, 1, 1, 0, 1, 0, 0]], dtype=bool)
    segments = create_segments(create_documents([3, 5]), True, torch.device("cpu"), sees_ahead=sees)
    assert segments is not None
    assert segments.ahead is not None
    queries, keys, ranges = segments.ahead
    places = [
        places.split(lengths.tolist())
        for places, lengths in ((queries, ranges.query_starts.diff()), (keys, ranges.key_starts.diff()))
    ]
    found = [(q.tolist(), k.tolist()) for q, k in zip(*places, strict=True)]
    assert found == [([3], [3]), ([5], [3, 4, 5]), ([1, 2], [0, 1, 2])]
