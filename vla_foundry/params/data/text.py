"""Params of text datasets."""

from dataclasses import dataclass
from typing import Any

from vla_foundry.config.schema import Derived, Location, NumTokens
from vla_foundry.params.data.base import DataParams, register_data_params
from vla_foundry.params.facts import Facts


@register_data_params("text")
@dataclass(frozen=True, kw_only=True)
class TextDataParams(DataParams):
    """Tokenized text: records of seq_len + 1 tokens, or longer ones that are cut into samples."""

    modalities = ("text", "text_untokenized")

    # keep attention within documents, and do not predict a document's first token from the previous document
    mask_documents: bool = True
    # tokenizer of the text (name or folder); saved with the run and checked against the model
    tokenizer: Location | None = None
    # drop records with token ids that are not below this; null: the rows of the model's token table
    vocab_size: NumTokens | None = None

    def default_stages(self) -> list[str]:
        """Return the names of the stages of tokenized or of raw text."""
        if (self.dataset_modality or self.modalities)[0] == "text":
            return ["decode_json_tokens", "require_tokens"]
        return ["decode_text", "drop_empty", "tokenize", "bound_length"]

    def count_pieces(self, seq_len: int) -> int:
        """Return how many samples a stored record of seq_len + 1 tokens is cut into.

        Each token but the record's first is the target of exactly one of them.
        """
        return max(1, -(-seq_len // self.seq_len))

    def tokenizer_name(self) -> str | None:
        """Return the tokenizer named here."""
        return self.tokenizer

    def derive(self, root: Any, facts: Facts) -> dict[str, Derived]:
        """Also derive the tokenizer from a dataset's folder, and the limit of token ids from the model."""
        derived = super().derive(root, facts)
        found = next((dataset.tokenizer for dataset in facts.datasets if dataset.tokenizer is not None), None)
        if self.tokenizer is None and found is not None:
            derived["tokenizer"] = Derived(found.name, "the dataset's folder")
        known = root.model.token_limits(facts).vocab_size
        if self.vocab_size is None and known is not None:
            derived["vocab_size"] = Derived(known, "the model")
        return derived

    def check(self, root: Any, facts: Facts, path: str) -> list[str]:
        """Check that raw text has a tokenizer."""
        notices = super().check(root, facts, path)
        if self.tokenizer is None and "text_untokenized" in (
            *self.modalities[:1],
            *self.dataset_modality,
            *self.val_dataset_modality,
        ):
            raise ValueError(
                f"{path}.tokenizer is missing. Give --{path}.tokenizer NAME_OR_FOLDER to tokenize the text."
            )
        return notices


@register_data_params("text_untokenized")
@dataclass(frozen=True, kw_only=True)
class TextUntokenizedDataParams(TextDataParams):
    """Raw text, tokenized while training and packed into rows."""

    modalities = ("text_untokenized",)
