"""Chunks of actions come back from their tokens, whatever happened to these on the way."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.fft import dct

from vla_foundry.robotics.action_tokens import BinTokenizer, FastTokenizer, read_fast_tokenizer

T, A = 16, 7


def create_chunks(num: int, seed: int = 0) -> np.ndarray:
    """Smooth motions within [-1, 1], float32 (N, T, A)."""
    steps = np.random.default_rng(seed).normal(size=(num, T, A)) * 0.1
    return np.cumsum(steps, axis=1).clip(-1, 1).astype(np.float32)


@pytest.fixture(scope="module")
def fast() -> FastTokenizer:
    return FastTokenizer.train(create_chunks(1000), vocab_size=512, scale=10.0, fields=["arm"])


def test_fast_loses_no_more_than_rounding_and_needs_fewer_tokens(fast: FastTokenizer) -> None:
    chunks = create_chunks(200, seed=1)
    tokens = fast.encode(chunks)
    assert np.mean([len(ids) for ids in tokens]) < T * A / 2
    for chunk, ids in zip(chunks, tokens, strict=True):
        # the transform keeps lengths, and each coefficient is off by at most half a unit
        assert np.linalg.norm(fast.decode(ids) - chunk) <= 0.5 * np.sqrt(T * A) / fast.scale
        assert fast.lengths[ids].sum() == T * A


def test_fast_writes_the_rounded_cosine_transform_lowest_frequency_first(fast: FastTokenizer) -> None:
    chunk = create_chunks(1, seed=2)
    expected = np.rint(10 * dct(chunk[0].astype(np.float64), axis=0, norm="ortho")).clip(fast.least, None)
    written = np.concatenate([fast._coefficients[token] for token in fast.encode(chunk)[0]])
    assert np.array_equal(written, expected.flatten())


def test_more_scale_is_finer_and_longer() -> None:
    chunks, errors, lengths = create_chunks(500), [], []
    for scale in (5.0, 20.0):
        tokenizer = FastTokenizer.train(chunks, vocab_size=600, scale=scale)
        tokens = tokenizer.encode(chunks)
        errors.append(np.mean([np.abs(tokenizer.decode(ids) - chunk).max() for ids, chunk in zip(tokens, chunks)]))  # noqa: B905
        lengths.append(np.mean([len(ids) for ids in tokens]))
    assert errors[1] < errors[0] / 2
    assert lengths[1] > lengths[0]


@pytest.mark.parametrize("kind", ["fast", "bins"])
def test_damaged_tokens_still_give_a_full_finite_chunk(kind: str, fast: FastTokenizer) -> None:
    tokenizer = fast if kind == "fast" else BinTokenizer(256, (-1.0, 1.0), num_steps=T, action_dim=A)
    generator = np.random.default_rng(0)
    tokens = tokenizer.encode(create_chunks(1))[0]
    for damaged in ([], tokens[:3], tokens * 3, [-5, 10**9, *tokens], generator.integers(0, 200, 500).tolist()):
        chunk = tokenizer.decode(damaged)
        assert chunk.shape == (T, A)
        assert np.isfinite(chunk).all()


def test_actions_that_training_did_not_see_are_clipped(fast: FastTokenizer) -> None:
    assert np.isfinite(fast.decode(fast.encode(np.full((1, T, A), 1e6))[0])).all()


def test_bins_are_equal_and_stand_for_their_centre() -> None:
    tokenizer = BinTokenizer(4, (-1.0, 1.0), num_steps=1, action_dim=6)
    chunk = np.array([[[-9.0, -0.9, -0.1, 0.1, 0.9, 9.0]]])
    assert tokenizer.encode(chunk) == [[0, 0, 1, 2, 3, 3]]
    assert tokenizer.decode([0, 0, 1, 2, 3, 3])[0].tolist() == [-0.75, -0.75, -0.25, 0.25, 0.75, 0.75]


def test_a_file_gives_the_same_tokenizer(fast: FastTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "fast.json"
    path.write_text(fast.to_json(), encoding="utf-8")
    read = read_fast_tokenizer(str(path))
    chunks = create_chunks(20, seed=3)
    assert read.encode(chunks) == fast.encode(chunks)
    assert (read.fields, read.num_steps, read.action_dim) == (["arm"], T, A)
    assert read.to_json() == fast.to_json()


def test_too_many_coefficients_name_the_fix() -> None:
    with pytest.raises(ValueError, match=r"vocab_size \(64\) is less than the \d+ coefficients .* Raise vocab_size or"):
        FastTokenizer.train(create_chunks(100), vocab_size=64, scale=100.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "other"},
        {"num_steps": 0},
        {"num_steps": 10**9},
        {"action_dim": "7"},
        {"scale": 0},
        {"scale": 1e300},
        {"fields": [1]},
        {"normalization": {}},
        {"num_coefficients": 3},
        {"least_coefficient": 0.5},
        {"bpe": {"version": "1.0"}},
        {"bpe": None},
    ],
)
def test_a_hostile_file_is_one_line(changes: dict, fast: FastTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "fast.json"
    path.write_text(json.dumps({**json.loads(fast.to_json()), **changes}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"fast\.json is (damaged|not a FAST tokenizer)") as error:
        read_fast_tokenizer(str(path))
    assert "\n" not in str(error.value)
