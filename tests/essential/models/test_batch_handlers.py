"""Batches of text, with and without images, become inputs, shifted targets and documents of the inputs' length."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vla_foundry.batch import IGNORE_INDEX, Documents
from vla_foundry.models import create_batch_handler, create_model
from vla_foundry.models.transformer import Transformer
from vla_foundry.params.data.image_caption import ImageCaptionDataParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.params.hparams import HyperParams
from vla_foundry.params.models.roles import ModelParams
from vla_foundry.params.models.transformer import TransformerParams
from vla_foundry.params.models.vit import ViTParams
from vla_foundry.params.models.vlm import VLMHFParams, VLMParams

IMAGE = 50
PARAMS = VLMParams(
    vit=ViTParams(hidden_dim=16, inter_dim=16, n_heads=2, n_layers=1, patch_size=7, img_size=14),
    transformer=TransformerParams(hidden_dim=16, n_layers=1, n_heads=2, vocab_size=51),
    image_token_id=IMAGE,
)
BIDIRECTIONAL = VLMParams(
    vit=PARAMS.vit, transformer=PARAMS.transformer, image_token_id=IMAGE, image_attention="bidirectional"
)


def create_text_handler(z: float = 0.0) -> Any:
    return create_batch_handler(
        TrainExperimentParams(
            data=TextDataParams(seq_len=8), model=TransformerParams(), hparams=HyperParams(z_loss_coefficient=z)
        )
    )


def create_text_batch(ids: Tensor, mask: Tensor, documents: Documents | None = None) -> dict[str, Any]:
    batch: dict[str, Any] = {"modality": "text", "input_ids": ids.to(torch.int32), "target_mask": mask}
    return batch if documents is None else {**batch, "documents": documents}


def test_targets_are_the_next_tokens_where_supervised() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    mask = torch.tensor([[False, True, False, True], [False, True, True, False]])
    handler = create_text_handler(z=0.01)
    inputs = handler.prepare(create_text_batch(ids, mask), "cpu")
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [9, 10, 11]]
    assert inputs["targets"].tolist() == [[6, IGNORE_INDEX, 8], [10, 11, IGNORE_INDEX]]
    assert inputs["documents"] is None
    assert inputs["z_loss_coefficient"] == 0.01
    assert handler.count_targets(inputs).item() == 4


def test_documents_are_cut_to_the_inputs_and_padding_may_hold_anything(
    create_tiny: Callable[..., Transformer], create_documents: Callable[..., Documents]
) -> None:
    ids = torch.randint(0, 61, (2, 13))
    ids[1, 9:] = -12345
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[:, 0] = mask[0, 5] = mask[1, 4] = False
    mask[1, 9:] = False
    inputs = create_text_handler().prepare(create_text_batch(ids, mask, create_documents([5, 7, 1], [4, 5, -4])), "cpu")
    assert inputs["documents"].lengths.tolist() == [5, 7, 4, 5, 3]
    model = create_tiny()
    loss = model(**inputs)
    alone = [(0, 0, 5), (0, 5, 13), (1, 0, 4), (1, 4, 9)]
    expected = torch.zeros((), dtype=torch.float64)
    for row, start, end in alone:
        piece = ids[row : row + 1, start:end]
        expected = expected + model(input_ids=piece[:, :-1], targets=piece[:, 1:]).sum
    # the place before a new document has a target in the row, but none that is supervised; the last one of row 0
    # is alone in its document, and predicted from the document before it by nobody
    last = model(input_ids=ids[:1, 5:12], targets=ids[:1, 6:13])
    assert last.count.item() == 7
    torch.testing.assert_close(loss.sum, expected)
    assert loss.count.item() == sum(end - start - 1 for _, start, end in alone)


def create_handler(params: ModelParams = PARAMS) -> Any:
    return create_batch_handler(
        TrainExperimentParams(
            data=ImageCaptionDataParams(tokenizer="t"), model=params, hparams=HyperParams(z_loss_coefficient=0.01)
        )
    )


def create_batch(documents: Documents | None = None, **changes: Any) -> dict[str, Any]:
    """Two rows of 12 tokens, each with an image of 4 tokens after its first token."""
    ids = torch.arange(1, 25, dtype=torch.int32).view(2, 12)
    ids[:, 1:5] = IMAGE
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, 7:10] = True
    pixels = torch.randint(0, 256, (2, 3, 14, 14), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    batch = {
        "modality": "image_caption",
        "positions": torch.arange(2),
        "input_ids": ids,
        "target_mask": mask,
        "pixel_values": pixels,
        "image_mean": (0.5, 0.4, 0.3),
        "image_std": (0.5, 0.25, 0.2),
        "image_index": torch.arange(2, dtype=torch.int32),
    }
    return {**batch, **({} if documents is None else {"documents": documents}), **changes}


def test_inputs_of_the_native_model() -> None:
    handler, batch = create_handler(), create_batch()
    inputs = handler.prepare(batch, "cpu")
    assert inputs["input_ids"].shape == inputs["targets"].shape == (2, 11)
    assert inputs["targets"][1].tolist() == [IGNORE_INDEX] * 6 + [20, 21, 22] + [IGNORE_INDEX] * 2
    assert inputs["image_positions"].tolist() == [1, 2, 3, 4, 12, 13, 14, 15]
    assert inputs["sees_ahead"] is None
    assert handler.count_targets(inputs).item() == 6
    mean, std = (torch.tensor(batch[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    torch.testing.assert_close(inputs["pixel_values"], (batch["pixel_values"].float() / 255 - mean) / std)
    model: Any = create_model(PARAMS)
    output = model(**inputs)
    looked_up = model(**{name: inputs[name] for name in ("input_ids", "pixel_values")}).logits
    cross_entropy = torch.nn.functional.cross_entropy(
        looked_up.flatten(0, 1), inputs["targets"].flatten(), reduction="sum"
    )
    torch.testing.assert_close(output.logs["cross_entropy"], cross_entropy)
    assert output.logs["z_loss"] > 0


def test_places_of_images_that_see_each_other_are_known_on_the_host() -> None:
    inputs = create_handler(BIDIRECTIONAL).prepare(create_batch(), "cpu")
    assert inputs["sees_ahead"].sum(1).tolist() == [4, 4]
    model: Any = create_model(BIDIRECTIONAL)
    looked_up = {name: value for name, value in inputs.items() if name not in ("image_positions", "sees_ahead")}
    torch.testing.assert_close(model(**inputs).sum, model(**looked_up).sum)


def test_padding_may_hold_anything(create_documents: Callable[..., Documents]) -> None:
    batch = create_batch(create_documents([12], [10, -2]))
    batch["input_ids"][1, 10:] = IMAGE
    inputs = create_handler().prepare(batch, "cpu")
    assert inputs["image_positions"].numel() == 8
    assert inputs["documents"].lengths.tolist() == [11, 10, 1]
    batch["input_ids"][1, 10:] = -7
    assert torch.equal(inputs["input_ids"], create_handler().prepare(batch, "cpu")["input_ids"])


def test_colours_are_changed_on_the_device() -> None:
    plain = create_handler().prepare(create_batch(), "cpu")["pixel_values"]
    factors = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.5, 1.0, 1.0, 0.0]])
    changed = create_handler().prepare(create_batch(color_factors=factors), "cpu")["pixel_values"]
    torch.testing.assert_close(changed[0], plain[0], rtol=1e-4, atol=1e-4)
    assert changed[1].mean() < plain[1].mean() - 0.1


def test_text_alone_needs_no_images() -> None:
    batch = {name: value for name, value in create_batch().items() if name in ("input_ids", "target_mask")}
    batch["input_ids"] = batch["input_ids"].clamp(max=40)
    inputs = create_handler().prepare({**batch, "modality": "text"}, "cpu")
    assert inputs["pixel_values"] is None
    model: Any = create_model(PARAMS)
    assert model(**inputs).sum.isfinite()


def test_inputs_of_hugging_face_models(create_documents: Callable[..., Documents]) -> None:
    types = torch.zeros(2, 12, dtype=torch.int32)
    grid = torch.tensor([[1, 2, 2]] * 2)
    batch = create_batch(create_documents([12], [10, -2]), mm_token_type_ids=types, image_grid_thw=grid)
    inputs = create_handler(VLMHFParams(hf_pretrained="x")).prepare(batch, "cpu")
    assert inputs.keys() == {
        *("input_ids", "targets", "attention_mask", "pixel_values"),
        *("mm_token_type_ids", "image_grid_thw", "z_loss_coefficient"),
    }
    assert inputs["attention_mask"].tolist() == [[1] * 11, [1] * 10 + [0]]
    assert inputs["mm_token_type_ids"].shape == (2, 11)
    assert inputs["image_grid_thw"] is grid


@pytest.mark.parametrize("rows", [[[5, 7], [12]], [[5, 5, -2], [12]]])
def test_several_samples_a_row_are_refused_for_hugging_face_models(
    rows: list[list[int]], create_documents: Callable[..., Documents]
) -> None:
    with pytest.raises(ValueError, match=r"data\.pack is true, but model\.type vlm_hf takes one sample a row"):
        create_handler(VLMHFParams(hf_pretrained="x")).prepare(create_batch(create_documents(*rows)), "cpu")


def test_a_model_without_an_image_token_is_refused() -> None:
    params = VLMParams(vit=PARAMS.vit, transformer=PARAMS.transformer)
    with pytest.raises(ValueError, match=r"model\.image_token_id is missing"):
        create_handler(params)
