"""Modality `text_untokenized`: raw text, tokenized during training and packed into rows within the microbatch.

A document is the tokens of its text followed by one end-of-sequence token. A document longer than seq_len + 1 tokens is
split into pieces that overlap by one token, so that each token is a target exactly once. Pieces are packed first-fit,
longest first, into rows of one length T per microbatch. T - 1 is a multiple of 64 (or seq_len), chosen to minimize
rows x T. Rows depend only on the samples of the microbatch; nothing is carried over to the next one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_foundry.batch import Batch
from vla_foundry.data.pipelines.stages import Dropped, Pipeline, Rows, Sample, Stage, check_unicode, register_pipeline
from vla_foundry.data.pipelines.text import create_padding_batch, create_text_batch
from vla_foundry.data.reader import ShardReader
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.parsing import parse_record
from vla_foundry.text.tokenizers import create_encoder, encode_text, load_tokenizer, read_definition

TEXT_SUFFIXES = ("json", "txt")
ROW_MULTIPLE = 64
# a longer sample could fill the accelerator's memory on its own
MAX_ROWS_PER_SAMPLE = 16
# but this many tokens are always allowed: `preprocess text_untokenized` writes samples of fewer bytes
MIN_MAX_TOKENS = 1 << 15
_MAX_CANDIDATES = 16
_SPARE_CHOICES = 3


def decode_text(sample: Sample) -> Sample:
    """Decode a sample's text: "text" in a JSON object, a JSON string, or any other text, as it is.

    An object with `"is_last": false` is part of a document that continues in another sample. A byte order mark is not
    text.

    Raises:
        Dropped: the text is not Unicode, or the JSON is broken or of another kind.
        ValueError: the member is missing or is not UTF-8.
    """
    suffix = next((suffix for suffix in TEXT_SUFFIXES if suffix in sample), None)
    if suffix is None:
        members = ", ".join(sorted(name for name in sample if not name.startswith("__")))
        raise ValueError(f"it has no member {' or '.join(TEXT_SUFFIXES)} with text, only {members or 'none'}")
    text = sample[suffix].decode("utf-8-sig")
    start = text.lstrip()[:1]
    if suffix != "json" or start not in ("{", "[", '"'):
        return {**sample, "text": text}
    try:
        values = parse_record(text, "its json")
    except ValueError as error:
        if start == "{":
            raise Dropped("bad JSON", str(error)) from None
        return {**sample, "text": text}  # a text that begins with a quotation or a bracket
    if isinstance(values, str):
        values = {"text": values}
    if not isinstance(values, dict) or not isinstance(values.get("text"), str):
        raise Dropped("no text", "its JSON has no key 'text' with a string")
    text = check_unicode(values["text"])
    is_last = values.get("is_last", True) is not False
    return {**sample, "text": text, "is_last": is_last, "is_part": not is_last or bool(values.get("part"))}


def drop_empty(sample: Sample) -> Sample | None:
    """Drop a document without text; NUL characters alone are what is left of a damaged file.

    A part of a document is kept: blanks may fill it, and the end of the document follows the last one.
    """
    return sample if sample.get("is_part") or sample["text"].strip().strip("\0") else None


class Tokenize:
    """A stage: `text` -> `input_ids`, int32, with an end-of-sequence token at the end of the document.

    Args:
        tokenizer: name or folder of the tokenizer, loaded at the first sample.
    """

    def __init__(self, tokenizer: str) -> None:
        self.name = tokenizer
        self._encoder: Any = None
        self._end: Any = None

    def __getstate__(self) -> dict[str, object]:
        """Pickle without the tokenizer, so that each loader process loads its own."""
        return {"name": self.name, "_encoder": None, "_end": None}

    def load(self) -> None:
        """Load the tokenizer now.

        Raises:
            ValueError: the tokenizer has no end-of-sequence token.
        """
        self._encoder = create_encoder(read_definition(self.name))
        end = load_tokenizer(self.name).eos_token_id
        if not isinstance(end, int):
            raise ValueError(f"data.tokenizer '{self.name}' has no end-of-sequence token. Choose one that has.")
        self._end = end

    def __call__(self, sample: Sample) -> Sample:
        """Tokenize the sample's text as `preprocess text` does."""
        tokens = encode_text(self._encoder, sample["text"])
        end = [self._end] if sample.get("is_last", True) else []
        return {**sample, "input_ids": np.asarray([*tokens, *end], dtype=np.int32)}


class BoundLength:
    """A stage that rejects documents of more than `max_tokens` tokens."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens

    def __call__(self, sample: Sample) -> Sample:
        """Check the number of tokens.

        Raises:
            ValueError: the document is too long.
        """
        if len(sample["input_ids"]) > self.max_tokens:
            raise ValueError(
                f"{len(sample['input_ids'])} tokens are more than {self.max_tokens}; "
                "`vla-foundry preprocess text_untokenized` divides long documents"
            )
        return sample


class TextUntokenizedPipeline(Pipeline):
    """Packs text into rows.

    Args:
        params: the data params.
        stages: stages that turn a member into `input_ids`; None: the default ones.
    """

    def __init__(self, params: TextDataParams, stages: Sequence[Stage] | None = None) -> None:
        if params.tokenizer is None:
            raise ValueError("data.tokenizer is missing: modality text_untokenized needs one (name or folder).")
        self.seq_len = params.seq_len
        self.mask_documents = params.mask_documents
        self._tokenize = Tokenize(params.tokenizer)
        self._bound = BoundLength(max(MAX_ROWS_PER_SAMPLE * params.seq_len, MIN_MAX_TOKENS))
        default = (decode_text, drop_empty, self._tokenize, self._bound)
        self.stages = self.name_stages(params, default) if stages is None else stages
        self._is_loaded = False

    def __getstate__(self) -> dict[str, object]:
        """Pickle without the tokenizer, so that each loader process loads its own."""
        return {**self.__dict__, "_is_loaded": False}

    def check(self, reader: ShardReader) -> None:
        """See Pipeline."""

    def create_batch(self, rows: Rows) -> Batch:
        """See Pipeline."""
        if not self._is_loaded:
            self._tokenize.load()
            self._is_loaded = True
        documents = [sample["input_ids"] for sample in rows.read_samples(self.stages)]
        pieces = [piece for document in documents for piece in split_document(document, self.seq_len)]
        length, packed = pack([len(piece.tokens) for piece in pieces], self.seq_len)
        input_ids = np.zeros((len(packed), length), dtype=np.int32)
        ends, continued = [], []
        for row, numbers in enumerate(packed):
            place = 0
            row_ends = []
            for number in numbers:
                piece = pieces[number]
                input_ids[row, place : place + len(piece.tokens)] = piece.tokens
                if piece.is_continued:
                    continued.append((row, place))
                place += len(piece.tokens)
                row_ends.append(place)
            ends.append(np.asarray(row_ends, dtype=np.uint32))
        batch = create_text_batch(input_ids, ends, mask_documents=self.mask_documents)
        for row, place in continued:  # this token was a target in the previous piece
            batch["target_mask"][row, place] = False
        return batch

    def create_empty_batch(self) -> Batch:
        """See Pipeline."""
        return create_padding_batch(min(ROW_MULTIPLE, self.seq_len) + 1, mask_documents=self.mask_documents)


@register_pipeline("text_untokenized")
def create_text_untokenized_pipeline(params: DataParams) -> TextUntokenizedPipeline:
    """Create the pipeline for raw text."""
    assert isinstance(params, TextDataParams), "modality text_untokenized needs data.type text_untokenized"
    return TextUntokenizedPipeline(params)


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a document that fits into a row."""

    tokens: np.ndarray
    # True if its first token repeats the last token of the previous piece
    is_continued: bool


def split_document(tokens: np.ndarray, seq_len: int) -> list[Piece]:
    """Split a document into pieces of at most seq_len + 1 tokens that overlap by one."""
    starts = range(0, max(len(tokens) - 1, 1), seq_len)
    return [Piece(tokens[start : start + seq_len + 1], start > 0) for start in starts]


def pack(lengths: Sequence[int], seq_len: int, *, multiple: int = ROW_MULTIPLE) -> tuple[int, list[list[int]]]:
    """Choose the row length and the pieces in each row.

    Args:
        lengths: tokens in each piece, at most seq_len + 1.
        seq_len: rows have at most seq_len + 1 tokens.
        multiple: T - 1 is a multiple of this, or seq_len.

    Returns:
        T, and for each row the numbers of its pieces in order.
    """
    shortest = min(-(-max(max(lengths) - 1, 1) // multiple) * multiple, seq_len)
    candidates = [*range(shortest, seq_len, multiple), seq_len]
    if len(candidates) > _MAX_CANDIDATES:
        candidates = _promising(candidates, sum(lengths))
    total, order = sum(lengths), sorted(range(len(lengths)), key=lambda number: -lengths[number])
    best, best_cost = (0, []), (math.inf, math.inf)
    for size in (candidate + 1 for candidate in candidates):
        fewest = -(-total // size)
        if (fewest * size, fewest) < best_cost:
            rows = _first_fit(lengths, order, size)
            if (cost := (len(rows) * size, len(rows))) < best_cost:
                best, best_cost = (size, rows), cost
    return best


def _promising(candidates: Sequence[int], total: int) -> list[int]:
    """Choose the row lengths at which some number of rows just suffices, with little slack; fewest rows first."""
    chosen: list[int] = []
    num_rows = -(-total // (candidates[-1] + 1))
    while len(chosen) < _MAX_CANDIDATES:
        fitting = [candidate for candidate in candidates if (candidate + 1) * num_rows >= total]
        chosen += [candidate for candidate in fitting[:_SPARE_CHOICES] if candidate not in chosen]
        if len(fitting) == len(candidates):
            break
        num_rows += 1
    return chosen


def _first_fit(lengths: Sequence[int], order: Sequence[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    rooms: list[int] = []
    for number in order:
        length = lengths[number]
        row = next((row for row, room in enumerate(rooms) if room >= length), None)
        if row is None:
            row = len(rows)
            rows.append([])
            rooms.append(capacity)
        rows[row].append(number)
        rooms[row] -= length
    return rows
