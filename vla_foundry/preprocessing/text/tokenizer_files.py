"""Read a tokenizer as the files of its Hugging Face folder: a dataset keeps a copy, and tasks encode with it."""

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from typing import Any

from vla_foundry.storage.uri import is_remote, join_uri, read_bytes

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
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
    return is_remote(name) or os.path.isdir(os.path.expanduser(name))


def _read_folder(folder: str) -> dict[str, bytes]:
    files = {}
    for name in (TOKENIZER_NAME, CONFIG_NAME, *_OTHER_NAMES):
        with contextlib.suppress(FileNotFoundError):
            files[name] = read_bytes(join_uri(folder, name))
    return files


def _read_by_transformers(name: str) -> dict[str, bytes]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--tokenizer '{name}' is neither a tokenizer's folder nor a known name: {reason}") from None
    if not tokenizer.is_fast:
        raise ValueError(f"--tokenizer '{name}' has no fast form ({TOKENIZER_NAME}). Choose another tokenizer.")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return _read_folder(folder)


def _find_eos_token(files: dict[str, bytes]) -> str | None:
    for name in (CONFIG_NAME, "special_tokens_map.json"):
        token: Any = json.loads(files.get(name, b"{}")).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return None


@functools.lru_cache(maxsize=1)
def create_encoder(definition: str) -> Any:
    """Create a `tokenizers.Tokenizer` that encodes whole texts, and reads no special token out of them.

    A text that holds the words "<|endoftext|>" does not end there.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(definition)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer
