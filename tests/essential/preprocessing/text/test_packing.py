"""Packing keeps every token and every boundary, whatever the pieces it gets."""

import numpy as np
import pytest

from vla_foundry.preprocessing.text.packing import RecordPacker, Records, token_type


def pack_slowly(documents: list[list[int]], length: int) -> list[tuple[list[int], list[int]]]:
    """The same, token by token."""
    records: list[tuple[list[int], list[int]]] = []
    for document in documents:
        for place, token in enumerate(document):
            if not records or len(records[-1][0]) == length:
                records.append(([], []))
            records[-1][0].append(token)
            if place == len(document) - 1 or len(records[-1][0]) == length:
                records[-1][1].append(len(records[-1][0]))
    return records


def rows_of(records: Records) -> list[tuple[list[int], list[int]]]:
    offsets = records.document_offsets.astype(int)
    ends = [records.document_ends[offsets[n] : offsets[n + 1]].tolist() for n in range(len(records.tokens))]
    return [(row[: stops[-1]].tolist(), stops) for row, stops in zip(records.tokens, ends, strict=True)]


@pytest.mark.parametrize("seed", range(20))
def test_packing_equals_a_token_by_token_packer(seed: int):
    random = np.random.default_rng(seed)
    length = int(random.integers(2, 12))
    documents = [random.integers(1, 60000, random.integers(1, 30)).tolist() for _ in range(random.integers(1, 40))]
    packer = RecordPacker(length, "uint16")
    rows: list[tuple[list[int], list[int]]] = []
    queue = list(documents)
    while queue:
        batch = [queue.pop(0) for _ in range(min(len(queue), int(random.integers(1, 6))))]
        ends = np.cumsum([len(document) for document in batch])
        # tokens of a document may come in two calls
        tokens = np.concatenate([np.array(document) for document in batch])
        cut = int(random.integers(0, len(tokens) + 1))
        packer.add(tokens[:cut], ends[ends <= cut])
        packer.add(tokens[cut:], ends[ends > cut] - cut)
        if random.random() < 0.5:
            rows += rows_of(packer.take(int(random.integers(0, packer.num_full_records + 1))))
    num_left = packer.num_records
    last = packer.take_rest()
    assert len(last.tokens) == num_left
    assert rows + rows_of(last) == pack_slowly(documents, length)
    assert packer.num_records == 0


def test_padding_is_zero_and_only_in_the_last_record():
    packer = RecordPacker(4, "uint32")
    packer.add(np.arange(1, 11), np.array([3, 10]))
    records = packer.take_rest()
    assert records.tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 0]]
    assert records.document_ends.tolist() == [3, 4, 4, 2]
    assert records.document_offsets.tolist() == [0, 2, 3, 4]
    assert records.tokens.dtype == np.uint32


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_token_type_is_the_narrowest(vocab_size: int, dtype: str):
    assert token_type(vocab_size) == dtype
    assert np.iinfo(dtype).max >= vocab_size - 1
