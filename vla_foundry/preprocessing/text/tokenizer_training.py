"""`vla-foundry preprocess tokenizer`: train a byte-level BPE tokenizer on documents."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from vla_foundry.params.commands.preprocessing import TrainTokenizerParams
from vla_foundry.preprocessing.output import format_provenance, plan_differences
from vla_foundry.preprocessing.text.job import check_apart
from vla_foundry.preprocessing.text.plan import plan_tasks, shuffled_documents
from vla_foundry.preprocessing.text.sources import Sources, list_sources, read_unit
from vla_foundry.preprocessing.text.tally import Tally
from vla_foundry.preprocessing.text.tokenizer_files import CONFIG_NAME, TOKENIZER_NAME
from vla_foundry.progress import say, show_progress
from vla_foundry.shards import PROVENANCE_NAME
from vla_foundry.storage.uri import delete, exists, join_uri, list_files, read_text, write_text

_PIECE_BYTES = 256 << 10
_TASK_BYTES = 8 << 20
_PLAIN_FIELDS = ("source", "output", "overwrite", "max_bad_fraction")


def train_tokenizer(params: TrainTokenizerParams) -> None:
    """Train a tokenizer on the documents of `params.source` and write its Hugging Face folder.

    Digits are tokens of their own; every text can be encoded, and decodes to itself.

    Raises:
        ValueError: the output folder holds something else, or too much of the source is bad.
        FileNotFoundError: a source does not exist.
    """
    check_apart(params.source, params.output)
    sources = list_sources(params.source)
    values = {name: value for name, value in asdict(params).items() if name not in _PLAIN_FIELDS}
    plan = {"command": "preprocess tokenizer", "params": values, "source": sources.describe()}
    if _is_complete(params, plan):
        say(f"{params.output} is complete; nothing to do.")
        return
    tally = Tally()
    tokenizer, num_bytes = _train(params, sources, tally)
    tally.check(params.max_bad_fraction, sources.weight, is_final=True)
    if not tally.num_documents:
        raise ValueError(f"--source has no documents: {'; '.join(tally.describe()) or 'no rows'}.")
    dataset = {
        "kind": "tokenizer",
        "vocab_size": tokenizer.get_vocab_size(),
        "eos_token_id": tokenizer.token_to_id(params.eos_token),
        "num_documents": tally.num_documents,
        "num_bytes": num_bytes,
    }
    # what makes the folder a tokenizer comes last
    delete(join_uri(params.output, TOKENIZER_NAME))
    write_text(join_uri(params.output, PROVENANCE_NAME), format_provenance(plan, dataset, tally.to_json()))
    write_text(join_uri(params.output, CONFIG_NAME), json.dumps(_config(params), indent=2) + "\n")
    write_text(join_uri(params.output, TOKENIZER_NAME), tokenizer.to_str(pretty=True) + "\n")
    for line in tally.describe():
        say(line)
    say(
        f"{dataset['vocab_size']:,} tokens, trained on {tally.num_documents:,} documents, {num_bytes / 1e6:,.1f} MB"
        + (f" (--max_bytes {params.max_bytes:,})" if num_bytes == params.max_bytes else "")
    )
    if dataset["vocab_size"] < params.vocab_size:
        say(f"the text gives no more than {dataset['vocab_size']:,} of the {params.vocab_size:,} tokens asked for")


def _is_complete(params: TrainTokenizerParams, plan: dict[str, Any]) -> bool:
    """Look at the output folder; True if this very tokenizer is there."""
    has_tokenizer = exists(join_uri(params.output, TOKENIZER_NAME))
    if not exists(join_uri(params.output, PROVENANCE_NAME)):
        if exists(params.output) and not params.overwrite:
            example = list_files(params.output)[0]
            raise ValueError(f"--output {params.output} holds other files ({example}, ...). Choose an empty folder.")
        return False
    found = json.loads(read_text(join_uri(params.output, PROVENANCE_NAME))).get("plan")
    differences = plan_differences(found, json.loads(json.dumps(plan)))
    if differences and has_tokenizer and not params.overwrite:
        raise ValueError(
            f"--output {params.output} was trained with {'; '.join(differences[:3])}. "
            "Choose another folder, or replace it with --overwrite true."
        )
    return has_tokenizer and not differences


def _train(params: TrainTokenizerParams, sources: Sources, tally: Tally) -> tuple[Any, int]:
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
    num_bytes = 0

    def texts() -> Iterator[str]:
        nonlocal num_bytes
        most = params.max_bytes or sources.weight * 1000
        with show_progress("preprocess tokenizer", min(most, sources.weight), 0) as advance:
            for text in _read_texts(params, sources, tally):
                data = text.encode("utf-8")[: most - num_bytes]
                yield data.decode("utf-8", errors="ignore")
                num_bytes += len(data)
                advance(len(data))
                if num_bytes >= most:
                    return

    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer, num_bytes


def _read_texts(params: TrainTokenizerParams, sources: Sources, tally: Tally) -> Iterator[str]:
    for task in plan_tasks(sources.files, seed=params.seed, task_bytes=_TASK_BYTES):
        rows = (
            row for unit in task.payload for row in read_unit(unit, text_key=params.text_key, max_bytes=_PIECE_BYTES)
        )
        for piece in shuffled_documents(rows, tally, seed=params.seed, task_number=task.number):
            yield piece.text
        tally.check(params.max_bad_fraction, sources.weight, is_final=False)


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
