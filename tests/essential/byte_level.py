"""Small byte-level BPE tokenizers, trained in the tests."""

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def train_tokenizer(vocab_size: int, texts: Iterable[str], special: Sequence[str], **names: Any) -> Any:
    """Train a fast tokenizer, as `preprocess tokenizer` does.

    Args:
        special: special tokens, which get the first ids.
        names: what transformers calls its tokens, such as `eos_token`.
    """
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)
