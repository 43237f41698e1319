"""Load, save and describe tokenizers; only loading one imports transformers."""

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_foundry.storage.hub import loading_published
from vla_foundry.storage.uri import download, is_remote, join_uri, list_files, read_object, read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
# Hugging Face's file of generation settings; here only its tokens that end a text
GENERATION_NAME = "generation_config.json"
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
        folder = Path(os.path.expanduser(name))
        if not (folder / TOKENIZER_NAME).is_file() and (folder.is_absolute() or folder.is_dir()):
            raise FileNotFoundError(f"Tokenizer folder {name} has no {TOKENIZER_NAME}. Give a tokenizer's own folder.")
        return _load(str(folder) if folder.is_dir() else name, name)
    with tempfile.TemporaryDirectory(prefix="vla_foundry_tokenizer_") as copy:
        for file in list_files(name):
            download(file, os.path.join(copy, file.removeprefix(name).strip("/")))
        return _load(copy, name)


@functools.lru_cache(maxsize=1)
def create_encoder(definition: str) -> "Tokenizer":
    """Create the encoder of documents, in preprocessing and in training: it reads no control token out of a text.

    A text that holds the words "<|endoftext|>" does not end there.

    Args:
        definition: content of tokenizer.json.
    """
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(definition)
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    return encoder


def encode_text(encoder: Any, text: str) -> list[int]:
    """Return the ids of a text, without special tokens, by a tokenizer of the library tokenizers."""
    # the fast method, which does not track where in the text a token lies, is there for batches only
    return encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids


def read_definition(name: str) -> str:
    """Return the content of a tokenizer's tokenizer.json, by the names that `load_tokenizer` takes.

    Raises:
        FileNotFoundError: see `load_tokenizer`.
        ValueError: see `load_tokenizer`.
    """
    if not _is_hub_name(name) and (is_remote(name) or os.path.isdir(os.path.expanduser(name))):
        with contextlib.suppress(FileNotFoundError):
            return read_text(join_uri(name, TOKENIZER_NAME))
    return load_tokenizer(name).backend_tokenizer.to_str()


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What the token ids of a tokenizer mean, and how it cuts text into tokens."""

    # token -> id, with added tokens
    ids: dict[str, int]
    # merges (BPE) or scores (Unigram), in order
    rules: tuple[str, ...] = ()
    # tokens that plain text never becomes
    special: frozenset[str] = frozenset()
    # chat template; None: it has none
    chat_template: str | None = None
    # the token that image features replace, if the tokenizer's config names it
    named_image_token: str | None = None
    # tokens that were added to those of its training
    added: frozenset[str] = field(default=frozenset(), compare=False)
    # SHA-256 of the tokens and rules before those, if no more is known of them
    digest: str | None = None

    @property
    def size(self) -> int:
        """Embedding rows it needs: its highest token id plus one."""
        return 1 + max(self.ids.values())

    @property
    def image_token_id(self) -> int | None:
        """Id of the token that image features replace; None if there is no such token."""
        names = (self.named_image_token, *_IMAGE_TOKENS)
        return next((self.ids[token] for token in names if token in self.ids), None)

    def with_token(self, token: str) -> "Vocabulary":
        """Return it with one more special token at the end."""
        return replace(self, ids=self.ids | {token: self.size}, special=self.special | {token})

    def to_record(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it: a digest of its tokens and rules, and the tokens that were added."""
        added = {token: number for token, number in self.ids.items() if token in self.added | self.special}
        return {
            "size": self.size,
            "digest": self._read_digest(),
            "added": added,
            "special": sorted(self.special),
            "chat_template": self.chat_template,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Vocabulary":
        """Return as much of it as `to_record` kept."""
        ids, special = record["added"], frozenset(record["special"])
        return cls(ids=ids, special=special, chat_template=record["chat_template"], digest=record["digest"])

    def _read_digest(self) -> str:
        trained = sorted(item for item in self.ids.items() if item[0] not in self.added | self.special)
        parts = json.dumps([trained, self.rules]).encode("ascii")
        return self.digest or hashlib.sha256(parts).hexdigest()

    def find_difference(self, other: "Vocabulary") -> str | None:
        """Return how the two give text other ids, in words, or None. A token that only one has is no difference."""
        names = {number: token for token, number in other.ids.items()}
        for token, number in self.ids.items():
            if names.get(number, token) != token:
                return f"token {number} is {token!r} in the one and {names[number]!r} in the other"
            if other.ids.get(token, number) != number:
                return f"{token!r} is token {number} in the one and token {other.ids[token]} in the other"
        if self.digest or other.digest:
            if self._read_digest() != other._read_digest():
                return "their tokens or merges differ"
        elif self.rules != other.rules:
            for index, (own, others) in enumerate(zip(self.rules, other.rules, strict=False)):
                if own != others:
                    return f"merge or score {index} is {own!r} in the one and {others!r} in the other"
            return f"the one has {len(self.rules)} merges and the other {len(other.rules)}"
        special = sorted((self.special ^ other.special) & self.ids.keys() & other.ids.keys())
        return f"{special[0]!r} is a special token of one of them only" if special else None


def read_vocabulary(folder: str | Path) -> Vocabulary:
    """Read a tokenizer's vocabulary, without transformers or torch.

    Args:
        folder: the tokenizer's or processor's folder, local, s3:// or hf://.

    Raises:
        FileNotFoundError: tokenizer.json does not exist.
        ValueError: a file is damaged, or holds no tokens.
    """
    path = join_uri(str(folder), TOKENIZER_NAME)
    content, config = read_object(path), _read_if_there(folder, CONFIG_NAME)
    template = config.get("chat_template") or _read_template(folder)
    try:
        return _parse_vocabulary(path, content, config, template)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a tokenizer of Hugging Face ({error!r}).") from None


def _parse_vocabulary(path: str, content: dict[str, Any], config: dict[str, Any], template: Any) -> Vocabulary:
    model, added = content.get("model", {}), content.get("added_tokens", [])
    vocab = model.get("vocab", {})
    # Unigram lists tokens and scores in id order; other models map tokens to ids
    ids = dict(vocab) if isinstance(vocab, dict) else {token: number for number, (token, _) in enumerate(vocab)}
    ids |= {token["content"]: token["id"] for token in added}
    if not ids:
        raise ValueError(f"{path} holds no tokens.")
    rules = model.get("merges", ()) if isinstance(vocab, dict) else vocab
    named = {name: _content_of(value) for name, value in config.items() if name.endswith("_token")}
    special = {*(token["content"] for token in added if token.get("special")), *filter(None, named.values())}
    return Vocabulary(
        ids=ids,
        rules=tuple(rule if isinstance(rule, str) else " ".join(map(str, rule)) for rule in rules),
        special=frozenset(special & ids.keys()),
        chat_template=template if isinstance(template, str | None) else json.dumps(template),
        named_image_token=named.get("image_token"),
        added=frozenset(token["content"] for token in added),
    )


def _content_of(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _read_if_there(folder: str | Path, name: str) -> dict[str, Any]:
    try:
        return read_object(join_uri(str(folder), name))
    except FileNotFoundError:
        return {}


def _read_template(folder: str | Path) -> str | None:
    try:
        return read_text(join_uri(str(folder), TEMPLATE_NAME))
    except FileNotFoundError:
        return None


def read_end_token_ids(folder: str | Path) -> list[int]:
    """Return the tokens that end a text according to a folder's generation_config.json; none without that file.

    Raises:
        ValueError: the file is damaged.
    """
    value = _read_if_there(folder, GENERATION_NAME).get("eos_token_id")
    if not all(isinstance(token, int) for token in (value if isinstance(value, list) else [value or 0])):
        raise ValueError(f"{join_uri(str(folder), GENERATION_NAME)}: eos_token_id {value!r} must be token ids.")
    return as_token_ids(value)


def as_token_ids(value: int | list[int] | None) -> list[int]:
    """Return an `eos_token_id` of Hugging Face, which may be a token, a list or missing, as a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def decode_continuation(tokenizer: Any, prompt: Sequence[int], new: Sequence[int]) -> str:
    """Return the text that new tokens add to a prompt.

    Tokenizers such as SentencePiece's drop the space that begins a text. So the new tokens are decoded after the
    prompt, where their first space counts.
    """
    before, whole = (tokenizer.decode(list(ids)) for ids in (prompt, [*prompt, *new]))
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(list(new))


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

    with loading_published(f"Tokenizer '{name}'", name=location):
        tokenizer = AutoTokenizer.from_pretrained(location, use_fast=True, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ValueError(f"Tokenizer '{name}' has no fast form ({TOKENIZER_NAME}). Choose another.")
    return tokenizer
