"""Params of text datasets."""

from dataclasses import dataclass

from vla_foundry.params.base import register_data_params
from vla_foundry.params.data.base import DataParams


@register_data_params("text")
@dataclass(frozen=True, kw_only=True)
class TextDataParams(DataParams):
    """Tokenized text: records of seq_len + 1 tokens."""

    # attention stays within documents, and a document's first token is not predicted from the one before
    mask_documents: bool = True
    # tokenizer the text was tokenized with (name or folder): saved with the run, and checked against the model
    tokenizer: str | None = None


@register_data_params("text_untokenized")
@dataclass(frozen=True, kw_only=True)
class TextUntokenizedDataParams(TextDataParams):
    """Raw text, tokenized while training and packed into rows."""
