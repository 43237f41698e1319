"""Batches on their way between processes."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_foundry.data import create_dataloader
from vla_foundry.data.worker import pack
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.world import World

ARRAYS = {
    "small tokens": np.arange(60, dtype=np.int32).reshape(5, 12),
    "largest narrow token": np.asarray([[0, 65_535]], dtype=np.int32),
    "large vocabulary": np.asarray([[0, 65_536]], dtype=np.int32),
    "negative": np.asarray([[-1, 3]], dtype=np.int32),
    "empty": np.zeros((0, 4), dtype=np.int32),
    "mask": np.random.default_rng(0).random((3, 5)) < 0.5,
    "empty mask": np.zeros((0, 3), dtype=bool),
    "positions": np.asarray([2**40, 0], dtype=np.int64),
    "fractions": np.linspace(0, 1, 7),
}


@pytest.mark.parametrize("name", list(ARRAYS))
@pytest.mark.parametrize("for_transport", [True, False])
def test_arrays_arrive_as_equal_tensors(name: str, for_transport: bool) -> None:
    array = ARRAYS[name]
    message = pickle.loads(pickle.dumps(pack({"x": array, "modality": "text"}, 7, for_transport=for_transport)))
    batch = message.unpack()
    assert message.report == 7
    assert batch["modality"] == "text"
    assert batch["x"].shape == array.shape
    assert batch["x"].dtype == torch.from_numpy(array).dtype
    assert torch.equal(batch["x"], torch.from_numpy(array))


def test_large_batches_of_large_tokens_arrive_whole(tmp_path: Path, write_records: Callable) -> None:
    manifest = write_records(tmp_path / "d", [300], 2049, dtype="uint32", first_token=90_000)
    batches = []
    for num_workers in (0, 1):
        params = TextDataParams(dataset_manifest=[str(manifest)], seq_len=2048, num_workers=num_workers)
        loader = create_dataloader(params, World(), global_batch_size=300, per_gpu_batch_size=300, seed=0)
        batches.append(next(loader.microbatches(0)))
        loader.close()
    assert batches[0]["input_ids"].nbytes > 2 << 20  # travels through shared memory
    assert batches[0]["input_ids"].min() == 90_000
    for key in ("input_ids", "target_mask"):
        assert torch.equal(batches[0][key], batches[1][key])
