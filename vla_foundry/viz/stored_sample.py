"""Shows a sample of text or of images with captions as its shard holds it."""

import io
import os
from bisect import bisect_right
from itertools import accumulate

from vla_foundry.data.cache import ShardCache
from vla_foundry.data.indexing import user_cache_folder
from vla_foundry.data.pipelines.stages import read_record
from vla_foundry.data.reader import Dataset, SampleShard, ShardReader, TokenShard
from vla_foundry.shards import parse_manifest
from vla_foundry.storage.uri import join_uri, parent_uri, read_text

_MOST_TEXT = 1500
_IMAGES = ("jpg", "jpeg", "png", "webp")
_CACHE_BYTES = 10_000_000_000


def show_stored_sample(manifest: str, number: int, output: str) -> list[str]:
    """Return what a sample holds, line by line; its first image is written to `output`.

    Args:
        manifest: of the dataset.
        number: which sample, in the order of the manifest.
        output: PNG.

    Raises:
        ValueError: there is no such sample, or its shard is broken.
    """
    entries = tuple(parse_manifest(read_text(manifest), manifest))
    ends = list(accumulate(entry.num_sequences for entry in entries))
    if number >= ends[-1]:
        raise ValueError(f"sample ({number}) must be below {ends[-1]}, the samples that there are.")
    place = bisect_right(ends, number)
    row = number - (ends[place - 1] if place else 0)
    cache = ShardCache(os.path.join(user_cache_folder(), "shards"), _CACHE_BYTES)
    shard = ShardReader([Dataset(manifest=manifest, modality="", entries=entries)], cache).open(0, place)
    if isinstance(shard, TokenShard):
        return [f"record {row} of {shard.uri}", *_describe_record(shard, row, parent_uri(manifest))]
    if not isinstance(shard, SampleShard):
        raise ValueError(f"{shard.uri} holds episodes of a robot, but no robotics.json lies beside {manifest}.")
    return [f"sample {shard.key(row)} of {shard.uri}", *_describe_members(shard.read(row), output)]


def _describe_record(shard: TokenShard, row: int, folder: str) -> list[str]:
    record = read_record(shard, row)
    ids = record["input_ids"].tolist()
    ends = record["document_ends"].tolist()
    lines = [f"{len(ids)} tokens, {len(ends)} documents that end at {ends[:8]}"]
    tokenizer = join_uri(folder, "tokenizer")
    if not os.path.isdir(tokenizer):
        return [*lines, f"tokens: {ids[:64]} ..."]
    from vla_foundry.text.tokenizers import load_tokenizer

    return [*lines, _shorten(str(load_tokenizer(tokenizer).decode(ids[: ends[-1]])))]


def _describe_members(members: dict[str, bytes], output: str) -> list[str]:
    lines, images = [], [suffix for suffix in members if suffix.rpartition(".")[2] in _IMAGES]
    for suffix, content in members.items():
        if suffix in images:
            lines.append(f"{suffix}: {len(content):,} bytes")
        else:
            lines.append(f"{suffix}: {_shorten(content.decode('utf-8', 'replace'))}")
    if images:
        from PIL import Image

        with Image.open(io.BytesIO(members[images[0]])) as image:
            image.convert("RGB").save(output, "PNG")
        lines.append(f"{output}: {images[0]}")
    return lines


def _shorten(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]} ..."
