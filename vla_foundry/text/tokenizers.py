"""Load, save and describe tokenizers; only loading one imports transformers."""

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_foundry.storage.uri import download, is_remote, join_uri, list_files, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
# names of the token that image features replace, for image-text tokenizers whose config does not state it
_IMAGE_TOKENS = ("<image>", "<|image_pad|>", "<image_soft_token>")


def load_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """Load a fast tokenizer, without running any code that comes with it.

    Args:
        name: a folder (local, s3://, or hf:// with a path in it), a name on the Hugging Face hub, or hf://owner/name.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the tokenizer does not exist or has no fast version.
    """
    if _is_hub_name(name):
        return _load(name.removeprefix("hf://"), name)
    if not is_remote(name):
        folder = Path(name).expanduser()
        if not (folder / TOKENIZER_NAME).is_file() and (folder.is_absolute() or folder.is_dir()):
            raise FileNotFoundError(f"Tokenizer folder {name} has no {TOKENIZER_NAME}. Give a tokenizer's own folder.")
        return _load(str(folder) if folder.is_dir() else name, name)
    with tempfile.TemporaryDirectory(prefix="vla_foundry_tokenizer_") as copy:
        for file in list_files(name):
            download(file, os.path.join(copy, file.removeprefix(name).strip("/")))
        return _load(copy, name)


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: str | Path) -> None:
    """Write a tokenizer to a folder that `load_tokenizer` and transformers can load."""
    tokenizer.save_pretrained(str(folder))


def vocab_size_of(folder: str | Path) -> int:
    """Return the embedding rows a tokenizer needs, its highest token id plus one, without transformers or torch.

    Args:
        folder: the tokenizer's folder, local, s3:// or hf://.

    Raises:
        FileNotFoundError: tokenizer.json does not exist.
        ValueError: the file holds no tokens.
    """
    return 1 + max(_read_token_ids(folder).values())


def image_token_id_of(folder: str | Path) -> int | None:
    """Return the id of the token that image features replace, or None if there is no such token; only reads files.

    Args:
        folder: the tokenizer's or processor's folder, local, s3:// or hf://.

    Raises:
        FileNotFoundError: tokenizer.json does not exist.
        ValueError: the file holds no tokens.
    """
    ids = _read_token_ids(folder)
    try:
        named = json.loads(read_text(join_uri(str(folder), CONFIG_NAME))).get("image_token")
    except FileNotFoundError:
        named = None
    name = named.get("content") if isinstance(named, dict) else named
    return next((ids[token] for token in (name, *_IMAGE_TOKENS) if token in ids), None)


def _read_token_ids(folder: str | Path) -> dict[str, int]:
    path = join_uri(str(folder), TOKENIZER_NAME)
    content = json.loads(read_text(path))
    vocab = content.get("model", {}).get("vocab", {})
    # Unigram lists tokens in id order; other models map tokens to ids
    ids = dict(vocab) if isinstance(vocab, dict) else {token: number for number, (token, _) in enumerate(vocab)}
    ids |= {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    if not ids:
        raise ValueError(f"{path} holds no tokens.")
    return ids


def pad_token_id_of(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Return the id that fills rows: the padding token, else the end-of-sequence token, else 0. Padding is masked."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    return 0


def _is_hub_name(name: str) -> bool:
    return name.startswith("hf://") and name.removeprefix("hf://").strip("/").count("/") <= 1


def _load(location: str, name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(location, use_fast=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"Tokenizer '{name}' is neither a tokenizer's folder nor a name that is known: {reason}"
        ) from None
    if not tokenizer.is_fast:
        raise ValueError(f"Tokenizer '{name}' has no fast form ({TOKENIZER_NAME}). Choose another.")
    return tokenizer
