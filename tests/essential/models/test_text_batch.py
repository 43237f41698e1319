"""Text batches become inputs, shifted targets and documents of the inputs' length."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vla_foundry.batch import IGNORE_INDEX, Documents
from vla_foundry.models import create_batch_handler
from vla_foundry.models.transformer import Transformer
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.params.hparams import HyperParams
from vla_foundry.params.models.transformer import TransformerParams


def create_handler(z: float = 0.0) -> Any:
    return create_batch_handler(
        TrainExperimentParams(
            data=TextDataParams(seq_len=8), model=TransformerParams(), hparams=HyperParams(z_loss_coefficient=z)
        )
    )


def create_batch(ids: Tensor, mask: Tensor, documents: Documents | None = None) -> dict[str, Any]:
    batch: dict[str, Any] = {"modality": "text", "input_ids": ids.to(torch.int32), "target_mask": mask}
    return batch if documents is None else {**batch, "documents": documents}


def test_targets_are_the_next_tokens_where_supervised() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    mask = torch.tensor([[False, True, False, True], [False, True, True, False]])
    handler = create_handler(z=0.01)
    inputs = handler.prepare(create_batch(ids, mask), "cpu")
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
    inputs = create_handler().prepare(create_batch(ids, mask, create_documents([5, 7, 1], [4, 5, -4])), "cpu")
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
