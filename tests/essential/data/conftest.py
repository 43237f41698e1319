"""Datasets on disk as the spec in vla_foundry/shards.py describes them, made with tarfile alone."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.essential.robot_data import create_params as create_params
from tests.essential.robot_data import create_recording as create_recording
from tests.essential.robot_data import read_batch as read_batch
from tests.essential.robot_data import tokenizer_folder as tokenizer_folder
from tests.essential.robot_data import write_robot_data as write_robot_data


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _write_manifest(folder: Path, counts: dict[str, int], with_checksums: bool) -> Path:
    lines = []
    for shard, count in counts.items():
        line: dict[str, object] = {"shard": shard, "num_sequences": count}
        if with_checksums:
            content = (folder / f"{shard}.tar").read_bytes()
            line |= {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        lines.append(json.dumps(line))
    (folder / "manifest.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "manifest.jsonl"


@pytest.fixture(scope="session")
def write_records() -> Callable[..., Path]:
    """Write a dataset of tokenized records; `documents[n]` are the ends of the documents in record n of the dataset."""

    def write(
        folder: Path,
        shard_sizes: Sequence[int],
        record_length: int,
        *,
        dtype: str = "uint16",
        first_token: int = 0,
        documents: Sequence[Sequence[int]] | None = None,
        with_checksums: bool = False,
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        first, counts = 0, {}
        for number, size in enumerate(shard_sizes):
            name = f"shard_{number:06d}"
            # record n holds n + first_token, n + first_token + 1, ...: its first token tells which it is
            tokens = first_token + np.arange(first, first + size)[:, None] + np.arange(record_length)
            ends = [list(documents[n]) if documents else [record_length] for n in range(first, first + size)]
            offsets = np.cumsum([0] + [len(row) for row in ends])
            info = {"dtype": dtype, "record_length": record_length, "num_sequences": size}
            with tarfile.open(folder / f"{name}.tar", "w") as tar:
                _add(tar, f"{name}.tokens.u{dtype[4:]}", tokens.astype(f"<u{int(dtype[4:]) // 8}").tobytes())
                _add(
                    tar,
                    f"{name}.document_ends.u32",
                    np.asarray([end for row in ends for end in row], dtype="<u4").tobytes(),
                )
                _add(tar, f"{name}.document_offsets.u64", offsets.astype("<u8").tobytes())
                _add(tar, f"{name}.records.json", json.dumps(info).encode())
            counts[name] = size
            first += size
        return _write_manifest(folder, counts, with_checksums)

    return write


@pytest.fixture(scope="session")
def write_samples() -> Callable[..., Path]:
    """Write a dataset of WebDataset samples: each shard is a list of {suffix: bytes}."""

    def write(folder: Path, shards: Sequence[Sequence[dict[str, bytes]]], *, claimed: int | None = None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        counts = {}
        for number, samples in enumerate(shards):
            name = f"shard_{number:06d}"
            with tarfile.open(folder / f"{name}.tar", "w") as tar:
                for row, members in enumerate(samples):
                    for suffix, content in members.items():
                        _add(tar, f"{number:04d}{row:028x}.{suffix}", content)
            counts[name] = len(samples) if claimed is None else claimed
        return _write_manifest(folder, counts, with_checksums=False)

    return write


@pytest.fixture
def json_tokens() -> Callable[[Sequence[int]], dict[str, bytes]]:
    """Return a sample as the reference stores tokenized text: a gzipped JSON list."""
    return lambda tokens: {"json.gz": gzip.compress(json.dumps(list(tokens)).encode())}


@pytest.fixture
def s3_folder(s3_bucket: str, tmp_path: Path) -> str:
    """A folder of the store, of this test alone: s3://<bucket>/<name>."""
    return f"{s3_bucket}/{tmp_path.name}"


@pytest.fixture
def put_folder() -> Callable[[Path, str], None]:
    """Upload the files of a folder."""
    from vla_foundry.storage.uri import join_uri, upload

    def put(folder: Path, uri: str) -> None:
        for path in sorted(folder.iterdir()):
            upload(str(path), join_uri(uri, path.name))

    return put
