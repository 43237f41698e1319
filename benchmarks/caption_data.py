"""Write captioned pictures for benchmarks: shards of JPEG files with captions of realistic length, and a tokenizer."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from vla_foundry.preprocessing.shard_writer import write_shard
from vla_foundry.shards import format_manifest

VOCAB_SIZE = 4096
SAMPLES_PER_SHARD = 256
# length of a detailed caption in words, which are tokens here
MEAN_WORDS, STD_WORDS = 60, 20


def write_caption_data(folder: Path, *, num_samples: int, image_size: int, quality: int = 90, seed: int = 0) -> None:
    """Write train/ (shards with a manifest) and tokenizer/ into a folder."""
    rng = np.random.default_rng(seed)
    words = [f"w{number}" for number in range(VOCAB_SIZE - 2)]
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<eos>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    fast.save_pretrained(folder / "tokenizer")

    train = folder / "train"
    train.mkdir(parents=True)
    entries = []
    for first in range(0, num_samples, SAMPLES_PER_SHARD):
        samples = []
        for number in range(first, min(first + SAMPLES_PER_SHARD, num_samples)):
            length = max(5, round(rng.normal(MEAN_WORDS, STD_WORDS)))
            caption = " ".join(words[index] for index in rng.integers(0, len(words), length))
            picture = draw_picture(rng, image_size, quality)
            members = {"jpg": picture, "txt": caption.encode(), "json": json.dumps({"number": number}).encode()}
            samples.append((f"{number:08d}", members))
        entries.append(write_shard(str(train), f"shard_{first // SAMPLES_PER_SHARD:06d}", samples))
    (train / "manifest.jsonl").write_text(format_manifest(entries), encoding="utf-8")


def draw_picture(rng: np.random.Generator, size: int, quality: int) -> bytes:
    """Draw smooth shapes with some noise; the file is about as large as that of a photograph of this size."""
    coarse = Image.fromarray(rng.integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    pixels = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()
