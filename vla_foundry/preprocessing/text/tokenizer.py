"""Read a tokenizer's files, and `vla-foundry preprocess tokenizer`: train a byte-level BPE tokenizer on documents.

A dataset keeps a copy of the Hugging Face folder, and tasks encode with its tokenizer.json.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from vla_foundry.params.commands.preprocessing import TrainTokenizerParams
from vla_foundry.parsing import as_json, parse_object
from vla_foundry.preprocessing.output import check_apart, format_provenance, hold_folder, settings_differences
from vla_foundry.preprocessing.sources import SourceFile, describe_files
from vla_foundry.preprocessing.text.document_order import divide_into_tasks, shuffled_documents
from vla_foundry.preprocessing.text.documents import DocumentTally, list_sources, read_unit
from vla_foundry.progress import say, show_progress
from vla_foundry.shards import PROVENANCE_NAME
from vla_foundry.storage.hub import loading_published
from vla_foundry.storage.uri import delete, exists, is_remote, join_uri, list_files, read_bytes, read_object, write_text
from vla_foundry.text.tokenizers import CONFIG_NAME, TOKENIZER_NAME, create_encoder

# what a tokenizer's folder may hold beside these
_OTHER_NAMES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
_PIECE_BYTES = 256 << 10
_TASK_BYTES = 8 << 20
_PLAIN_FIELDS = ("source", "output", "overwrite", "max_bad_fraction")


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """A fast tokenizer."""

    # {file name: content} of a Hugging Face tokenizer folder
    files: dict[str, bytes]
    # one more than its largest token
    vocab_size: int
    # token that ends a document
    eos_token: str
    eos_token_id: int

    @property
    def definition(self) -> str:
        """The JSON that defines it."""
        return self.files[TOKENIZER_NAME].decode("utf-8")

    @property
    def sha256(self) -> str:
        """SHA-256 of its definition."""
        return hashlib.sha256(self.files[TOKENIZER_NAME]).hexdigest()


def read_tokenizer(name_or_folder: str, *, eos_token: str | None = None) -> TokenizerFiles:
    """Read a tokenizer from a folder (local, s3:// or hf://), or by its name on the hub or in the hub's cache.

    Args:
        name_or_folder: where it is.
        eos_token: token that ends a document; None: the tokenizer's own.

    Raises:
        ValueError: there is no such tokenizer, it has no fast form, or no end-of-sequence token.
    """
    files = _read_folder(name_or_folder) if _is_folder(name_or_folder) else None
    if files is None or TOKENIZER_NAME not in files:
        files = _read_by_transformers(name_or_folder)
    tokenizer = create_encoder(files[TOKENIZER_NAME].decode("utf-8"))
    eos_token = eos_token or _find_eos_token(files)
    if eos_token is None:
        raise ValueError(f"--tokenizer {name_or_folder} has no end-of-sequence token. Name one with --eos_token.")
    eos_token_id = tokenizer.token_to_id(eos_token)
    if eos_token_id is None:
        raise ValueError(f"--tokenizer {name_or_folder} has no token '{eos_token}'. Name another with --eos_token.")
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return TokenizerFiles(files=files, vocab_size=vocab_size, eos_token=eos_token, eos_token_id=eos_token_id)


def _is_folder(name: str) -> bool:
    return is_remote(name) or os.path.isdir(name)


def _read_folder(folder: str) -> dict[str, bytes]:
    files = {}
    for name in (TOKENIZER_NAME, CONFIG_NAME, *_OTHER_NAMES):
        with contextlib.suppress(FileNotFoundError):
            files[name] = read_bytes(join_uri(folder, name))
    return files


def _read_by_transformers(name: str) -> dict[str, bytes]:
    from transformers import AutoTokenizer

    with loading_published(f"--tokenizer '{name}'", name=name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ValueError(f"--tokenizer '{name}' has no fast form ({TOKENIZER_NAME}). Choose another tokenizer.")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return _read_folder(folder)


def _find_eos_token(files: dict[str, bytes]) -> str | None:
    for name in (CONFIG_NAME, "special_tokens_map.json"):
        token: Any = parse_object(files.get(name, b"{}"), name).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return None


def train_tokenizer(params: TrainTokenizerParams) -> None:
    """Train a tokenizer on the documents of `params.source` and write its Hugging Face folder.

    Digits are tokens of their own; every text can be encoded, and decodes to itself.

    Raises:
        ValueError: the output folder holds something else, or too much of the source is bad.
        FileNotFoundError: a source does not exist.
    """
    check_apart(params.source, params.output)
    files, _ = list_sources(params.source)
    values = {name: value for name, value in asdict(params).items() if name not in _PLAIN_FIELDS}
    settings = {"command": "preprocess tokenizer", "params": values, "source": describe_files(files)}
    with hold_folder(params.output):
        if _is_complete(params, settings):
            say(f"{params.output} is complete; nothing to do.")
        else:
            _write_tokenizer(params, settings, files)


def _write_tokenizer(params: TrainTokenizerParams, settings: dict[str, Any], files: list[SourceFile]) -> None:
    tally = DocumentTally()
    tokenizer, num_bytes = _train(params, files, tally)
    tally.check_source(params.max_bad_fraction, sum(file.weight for file in files), is_final=True)
    if not tally.num_good:
        raise ValueError(f"--source has no documents: {'; '.join(tally.describe()) or 'no rows'}.")
    dataset = {
        "kind": "tokenizer",
        "vocab_size": tokenizer.get_vocab_size(),
        "eos_token_id": tokenizer.token_to_id(params.eos_token),
        "num_documents": tally.num_good,
        "num_bytes": num_bytes,
    }
    # tokenizer.json makes the folder a tokenizer, so it comes last
    delete(join_uri(params.output, TOKENIZER_NAME))
    write_text(join_uri(params.output, PROVENANCE_NAME), format_provenance(settings, dataset, tally.to_json()))
    write_text(join_uri(params.output, CONFIG_NAME), json.dumps(_config(params), indent=2) + "\n")
    write_text(join_uri(params.output, TOKENIZER_NAME), tokenizer.to_str(pretty=True) + "\n")
    for line in tally.describe():
        say(line)
    say(
        f"{dataset['vocab_size']:,} tokens, trained on {tally.num_good:,} documents, {num_bytes / 1e6:,.1f} MB"
        + (f" (--max_bytes {params.max_bytes:,})" if num_bytes == params.max_bytes else "")
    )
    if dataset["vocab_size"] < params.vocab_size:
        say(f"the text yields only {dataset['vocab_size']:,} of the {params.vocab_size:,} tokens asked for")


def _is_complete(params: TrainTokenizerParams, settings: dict[str, Any]) -> bool:
    """Return whether the output folder holds this very tokenizer."""
    has_tokenizer = exists(join_uri(params.output, TOKENIZER_NAME))
    if not exists(join_uri(params.output, PROVENANCE_NAME)):
        if exists(params.output) and not params.overwrite:
            example = list_files(params.output)[0]
            raise ValueError(f"--output {params.output} holds other files ({example}, ...). Choose an empty folder.")
        return False
    found = read_object(join_uri(params.output, PROVENANCE_NAME)).get("plan")
    differences = settings_differences(found, as_json(settings))
    if differences and has_tokenizer and not params.overwrite:
        raise ValueError(
            f"--output {params.output} was trained with {'; '.join(differences[:3])}. "
            "Choose another folder, or replace it with --overwrite true."
        )
    return has_tokenizer and not differences


def _train(params: TrainTokenizerParams, files: list[SourceFile], tally: DocumentTally) -> tuple[Any, int]:
    """Return a trained `tokenizers.Tokenizer` and the bytes of text it was trained on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=params.vocab_size,
        special_tokens=params.all_special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    num_bytes, total = 0, sum(file.weight for file in files)

    def texts() -> Iterator[str]:
        nonlocal num_bytes
        most = params.max_bytes or total * 1000
        with show_progress("preprocess tokenizer", min(most, total), 0) as advance:
            for text in _read_texts(params, files, tally):
                data = text.encode("utf-8")[: most - num_bytes]
                yield data.decode("utf-8", errors="ignore")
                num_bytes += len(data)
                advance(len(data))
                if num_bytes >= most:
                    return

    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer, num_bytes


def _read_texts(params: TrainTokenizerParams, files: list[SourceFile], tally: DocumentTally) -> Iterator[str]:
    total = sum(file.weight for file in files)
    for task in divide_into_tasks(files, seed=params.seed, task_bytes=_TASK_BYTES):
        rows = (
            row for unit in task.payload for row in read_unit(unit, text_key=params.text_key, max_bytes=_PIECE_BYTES)
        )
        for piece in shuffled_documents(rows, tally, seed=params.seed, task_number=task.number):
            yield piece.text
        tally.check_source(params.max_bad_fraction, total, is_final=False)


def _config(params: TrainTokenizerParams) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": params.eos_token,
        "pad_token": params.pad_token,
        "clean_up_tokenization_spaces": False,
    }
    if params.special_tokens:
        config["extra_special_tokens"] = params.special_tokens
    return config
