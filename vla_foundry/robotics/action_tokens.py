"""Chunks of normalised actions as tokens of a language model, and back.

`BinTokenizer` writes one token for each value: the number of its bin (as in RT-2 and OpenVLA, Kim et al. 2024).

`FastTokenizer` is FAST (Pertsch et al. 2025): it compresses a chunk before it writes it.

    coefficients = round(scale * DCT-II of each dimension over time, orthonormal)    (T, A)
    characters   = the coefficients, lowest frequency of all dimensions first
    tokens       = byte-pair encoding of these characters, trained on the dataset

Each token stands for a known number of values, so that a decoder which counts them always ends with a full chunk.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Float64

from vla_foundry.parsing import parse_json
from vla_foundry.storage.uri import read_text

FORMAT = "vla_foundry.fast_tokenizer/1"
# a coefficient is a character from here on; a block of unicode without spaces, marks or cases
_FIRST_CHARACTER = 0x4E00
_MOST_COEFFICIENTS = 20_000
_MOST_VALUES = 100_000
_MOST_TOKENS = 1_000_000


class BinTokenizer:
    """Equal bins between two limits; values outside fall into the outermost bins, a bin stands for its centre.

    Attributes:
        lengths: values that each token stands for, int64 [num_tokens].
    """

    def __init__(self, num_bins: int, limits: tuple[float, float], *, num_steps: int, action_dim: int) -> None:
        self.num_bins, self.limits = num_bins, limits
        self.num_steps, self.action_dim = num_steps, action_dim
        self.lengths = np.ones(num_bins, dtype=np.int64)

    def encode(self, chunks: Float[np.ndarray, "B T A"]) -> list[list[int]]:
        """Return the tokens of each chunk, step after step."""
        low, high = self.limits
        bins = np.floor((chunks.astype(np.float64) - low) * (self.num_bins / (high - low)))
        return bins.clip(0, self.num_bins - 1).astype(np.int64).reshape(len(chunks), -1).tolist()

    def decode(self, tokens: Sequence[int]) -> Float64[np.ndarray, "T A"]:
        """Return the chunk; unknown tokens are left out, missing values are in the middle, others are cut."""
        low, high = self.limits
        known = np.array([token for token in tokens if 0 <= token < self.num_bins], dtype=np.float64)
        values = low + (known + 0.5) * ((high - low) / self.num_bins)
        return _fill(values, (self.num_steps, self.action_dim), (low + high) / 2)


class FastTokenizer:
    """FAST for chunks of one size; `lengths` as above.

    Args:
        bpe: a `tokenizers.Tokenizer` over characters of coefficients.
        least: smallest coefficient that has a character.
        num_coefficients: number of coefficients that have one.
        fields: names of the actions' fields, in the order of their columns.
        normalization: how the actions were normalized, in words; empty: unknown.
    """

    def __init__(
        self,
        bpe: Any,
        *,
        num_steps: int,
        action_dim: int,
        scale: float,
        least: int,
        num_coefficients: int,
        fields: Sequence[str] = (),
        normalization: str = "",
    ) -> None:
        self._bpe = bpe
        self.num_steps, self.action_dim = num_steps, action_dim
        self.scale, self.least, self.num_coefficients, self.fields = scale, least, num_coefficients, list(fields)
        self.normalization = normalization
        self._basis = _cosines(num_steps)
        names = {number: name for name, number in bpe.get_vocab().items()}
        self._coefficients = [_read_characters(names[number]) + least for number in range(len(names))]
        self.lengths = np.array([len(each) for each in self._coefficients], dtype=np.int64)

    @classmethod
    def train(
        cls,
        chunks: Float[np.ndarray, "N T A"],
        *,
        vocab_size: int,
        scale: float,
        fields: Sequence[str] = (),
        normalization: str = "",
    ) -> "FastTokenizer":
        """Train the byte-pair encoding on chunks of normalised actions.

        Raises:
            ValueError: there are more different coefficients than `vocab_size`.
        """
        from tokenizers import Tokenizer, models, trainers

        _, num_steps, action_dim = chunks.shape
        coefficients = _transform(chunks, _cosines(num_steps), scale)
        least, most = int(coefficients.min()), int(coefficients.max())
        num = most - least + 1
        if num > min(vocab_size, _MOST_COEFFICIENTS):
            raise ValueError(
                f"vocab_size ({vocab_size}) is less than the {num} coefficients from {least} to {most} that the "
                f"actions have at scale {scale}. Raise vocab_size or lower scale; data.normalization.clip, or method "
                "percentile_1_99 with centered_norm, removes outliers."
            )
        characters = [chr(_FIRST_CHARACTER + number) for number in range(num)]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=characters, show_progress=False, special_tokens=[]
        )
        bpe = Tokenizer(models.BPE())
        bpe.train_from_iterator(_write_characters(coefficients - least), trainer=trainer, length=len(chunks))
        return cls(
            bpe,
            num_steps=num_steps,
            action_dim=action_dim,
            scale=scale,
            least=least,
            num_coefficients=num,
            fields=fields,
            normalization=normalization,
        )

    def encode(self, chunks: Float[np.ndarray, "B T A"]) -> list[list[int]]:
        """Return the tokens of each chunk; coefficients that training did not see become the nearest that it saw."""
        numbers = (_transform(chunks, self._basis, self.scale) - self.least).clip(0, self.num_coefficients - 1)
        return [encoding.ids for encoding in self._bpe.encode_batch(list(_write_characters(numbers)))]

    def decode(self, tokens: Sequence[int]) -> Float64[np.ndarray, "T A"]:
        """Return the chunk; unknown tokens are left out, missing coefficients are 0, others are cut."""
        known = [self._coefficients[token] for token in tokens if 0 <= token < len(self._coefficients)]
        values = np.concatenate([np.zeros(0), *known])
        return self._basis.T @ _fill(values, (self.num_steps, self.action_dim), 0.0) / self.scale

    def to_json(self) -> str:
        """Return the text of its file."""
        return json.dumps(
            {
                "format": FORMAT,
                "num_steps": self.num_steps,
                "action_dim": self.action_dim,
                "scale": self.scale,
                "least_coefficient": self.least,
                "num_coefficients": self.num_coefficients,
                "fields": self.fields,
                "normalization": self.normalization,
                "bpe": parse_json(self._bpe.to_str(), "the tokenizer"),
            },
            ensure_ascii=False,
        )


ActionTokenizer: TypeAlias = BinTokenizer | FastTokenizer


def read_fast_tokenizer(path: str) -> FastTokenizer:
    """Read the file of a FAST tokenizer.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is not such a file, or damaged; one line.
    """
    from tokenizers import Tokenizer

    record = parse_json(read_text(path), path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} is not a FAST tokenizer. Make one with `vla-foundry data action-tokenizer`.")
    names = ("num_steps", "action_dim", "num_coefficients")
    sizes: list[Any] = [record.get(name) for name in names]
    least, scale, fields = (record.get(name) for name in ("least_coefficient", "scale", "fields"))
    normalization = record.get("normalization", "")
    if not (
        all(isinstance(size, int) and 0 < size <= _MOST_VALUES for size in sizes)
        and sizes[0] * sizes[1] <= _MOST_VALUES
        and sizes[2] <= _MOST_COEFFICIENTS
        and isinstance(least, int)
        and abs(least) <= _MOST_TOKENS
        and isinstance(scale, int | float)
        and 1e-6 < scale < 1e6
        and isinstance(fields, list)
        and all(isinstance(name, str) for name in [*fields, normalization])
    ):
        raise ValueError(
            f"{path} is damaged: {', '.join(names)}, least_coefficient, scale, fields or normalization is wrong."
        )
    try:
        bpe = Tokenizer.from_str(json.dumps(record.get("bpe")))
        vocabulary = bpe.get_vocab()
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{path} is damaged: its byte-pair encoding cannot be read ({error}).") from None
    last = _FIRST_CHARACTER + sizes[2] - 1
    characters = {character for name in vocabulary for character in name}
    if (
        sorted(vocabulary.values()) != list(range(len(vocabulary)))
        or not {chr(number) for number in range(_FIRST_CHARACTER, last + 1)} <= vocabulary.keys()
        or any(not _FIRST_CHARACTER <= ord(character) <= last for character in characters)
        or "" in vocabulary
    ):
        raise ValueError(f"{path} is damaged: its tokens are not sequences of the {sizes[2]} coefficients.")
    return FastTokenizer(
        bpe,
        num_steps=sizes[0],
        action_dim=sizes[1],
        scale=scale,
        least=least,
        num_coefficients=sizes[2],
        fields=fields,
        normalization=normalization,
    )


def _cosines(num_steps: int) -> Float64[np.ndarray, "T T"]:
    """Return the orthonormal DCT-II: row k is the k-th frequency."""
    k, t = np.arange(num_steps)[:, None], np.arange(num_steps)[None]
    basis = np.cos(np.pi / num_steps * (t + 0.5) * k) * np.sqrt(2 / num_steps)
    basis[0] /= np.sqrt(2)
    return basis


def _transform(chunks: np.ndarray, basis: np.ndarray, scale: float) -> np.ndarray:
    """Return the rounded coefficients of chunks (B, T, A), int64 of the same shape, frequency in place of time."""
    return np.rint(scale * (basis @ chunks.astype(np.float64))).astype(np.int64)


def _write_characters(numbers: np.ndarray) -> Iterable[str]:
    """Return the text of each chunk of numbers (B, T, A), lowest frequency of all dimensions first."""
    for chunk in numbers.reshape(len(numbers), -1):
        yield "".join(map(chr, chunk + _FIRST_CHARACTER))


def _read_characters(text: str) -> np.ndarray:
    return np.array([ord(character) for character in text], dtype=np.int64) - _FIRST_CHARACTER


def _fill(values: np.ndarray, shape: tuple[int, int], default: float) -> np.ndarray:
    """Return an array of the first values, with `default` for missing ones."""
    filled = np.full(shape, default).flatten()
    filled[: len(values)] = values[: filled.size]
    return filled.reshape(shape)
