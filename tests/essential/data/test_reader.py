"""Indexed access to shards on disk."""

import io
import json
import os
import pickle
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import numpy as np
import pytest

from vla_foundry.data import indexing
from vla_foundry.data import reader as reader_module
from vla_foundry.data.cache import ShardCache
from vla_foundry.data.indexing import user_cache_folder
from vla_foundry.data.plan import Location
from vla_foundry.data.reader import Dataset, Dropped, SampleShard, ShardReader, TokenShard
from vla_foundry.shards import parse_manifest, sha256_of


def open_reader(manifest: Path) -> ShardReader:
    entries = parse_manifest(manifest.read_text(encoding="utf-8"), str(manifest))
    dataset = Dataset(manifest=str(manifest), modality="text", entries=tuple(entries))
    return ShardReader([dataset], ShardCache(str(manifest.parent / "cache"), 10**9))


@pytest.fixture(autouse=True)
def own_user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))
    return Path(user_cache_folder())


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_records_and_their_documents_are_read(tmp_path: Path, write_records: Callable, dtype: str) -> None:
    first = 0 if dtype == "uint16" else 100_000
    documents = [[3, 9], [9], [1, 2, 5]]
    manifest = write_records(
        tmp_path / "d", [2, 1], 9, dtype=dtype, first_token=first, documents=documents, with_checksums=True
    )
    reader = open_reader(manifest)
    for shard, row, number in ((1, 0, 2), (0, 0, 0), (0, 1, 1)):
        opened = reader.open(0, shard)
        assert isinstance(opened, TokenShard)
        tokens, ends = opened.read(row)
        assert tokens.tolist() == list(range(first + number, first + number + 9))
        assert ends.tolist() == documents[number]


def test_what_was_fetched_ahead_is_forgotten_when_it_is_not_needed(tmp_path: Path, write_samples: Callable) -> None:
    reader = open_reader(write_samples(tmp_path / "d", [[{"txt": b"a"}] * 2] * 2))
    wanted: dict[int, list[Any]] = {}
    for number in range(2):
        shard = reader.open(0, number)
        shard._tar = cast(Any, SimpleNamespace(want=lambda spans, number=number: wanted.update({number: spans})))
    for number in (0, 1, 0):
        reader.read_ahead(Location(*np.asarray([[0], [number], [1], [0], [0]])))
        assert (len(wanted[number]), wanted.get(1 - number)) == (1, [])


def test_samples_are_read_in_any_order(tmp_path: Path, write_samples: Callable) -> None:
    shards = [[{"txt": f"{s} {r}".encode(), "Bin": bytes([r]) * r} for r in range(5)] for s in range(3)]
    reader = open_reader(write_samples(tmp_path / "d", shards))
    for shard, row in ((2, 4), (0, 0), (1, 3), (2, 1)):
        opened = reader.open(0, shard)
        assert isinstance(opened, SampleShard)
        assert opened.key(row) == f"{shard:04d}{row:028x}"
        assert opened.read(row) == {"txt": f"{shard} {row}".encode(), "bin": bytes([row]) * row}


def test_index_is_kept_beside_the_shard_and_used(
    tmp_path: Path, write_samples: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_samples(tmp_path / "d", [[{"txt": b"a"}, {"txt": b"bc"}]])
    open_reader(manifest).open(0, 0)
    index = manifest.parent / "shard_000000.index.json"
    assert json.loads(index.read_text(encoding="utf-8"))["num_sequences"] == 2

    def refuse(file: object) -> None:
        raise AssertionError("the tar is read again")

    monkeypatch.setattr("vla_foundry.data.indexing.index_shard", refuse)
    opened = open_reader(manifest).open(0, 0)
    assert isinstance(opened, SampleShard)
    assert opened.read(1) == {"txt": b"bc"}


def test_index_goes_to_the_users_cache_where_the_folder_is_read_only(
    tmp_path: Path, write_samples: Callable, monkeypatch: pytest.MonkeyPatch, own_user_cache: Path
) -> None:
    manifest = write_samples(tmp_path / "d", [[{"txt": b"a"}]])
    real_write = indexing.write_text

    def write(uri: str, text: str) -> None:  # tests may run as root, whom no folder refuses
        if uri.startswith(str(manifest.parent)):
            raise PermissionError(uri)
        real_write(uri, text)

    monkeypatch.setattr("vla_foundry.data.indexing.write_text", write)
    for _ in range(2):
        open_reader(manifest).open(0, 0)
        assert not list(manifest.parent.glob("*.index.json"))
        assert len(list((own_user_cache / "indexes").iterdir())) == 1


def test_a_damaged_shard_is_found_at_its_first_use_and_remembered(
    tmp_path: Path, write_records: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_records(tmp_path / "d", [4, 4], 9, with_checksums=True)
    tar = tmp_path / "d" / "shard_000001.tar"
    content = bytearray(tar.read_bytes())
    content[content.index(np.arange(4, 13, dtype="<u2").tobytes()) + 3] ^= 1
    tar.write_bytes(content)
    hashed: list[str] = []

    def count(file: BinaryIO) -> str:
        hashed.append(file.name)
        return sha256_of(file)

    monkeypatch.setattr("vla_foundry.data.indexing.sha256_of", count)
    for _ in range(2):  # the second reader is that of another process
        reader = open_reader(manifest)
        assert isinstance(reader.open(0, 0), TokenShard)
        for _ in range(2):
            with pytest.raises(Dropped, match="another SHA-256 than in"):
                reader.open(0, 1)
    assert len(hashed) == 2
    tar.write_bytes(write_records(tmp_path / "e", [4, 4], 9).with_name(tar.name).read_bytes())
    assert isinstance(open_reader(manifest).open(0, 1), TokenShard)  # it was copied again


def test_the_user_cache_may_be_impossible_to_write(
    tmp_path: Path, write_samples: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = write_samples(tmp_path / "d", [[{"txt": b"a"}]])

    def refuse(uri: str, text: str) -> None:
        raise PermissionError(13, "Permission denied", uri)

    monkeypatch.setattr("vla_foundry.data.indexing.write_text", refuse)
    for _ in range(2):
        opened = open_reader(manifest).open(0, 0)
        assert isinstance(opened, SampleShard)
        assert opened.read(0) == {"txt": b"a"}
    assert caplog.text.count("Set XDG_CACHE_HOME to a folder that can be written.") == 1


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert user_cache_folder() == "/nonexistent/.cache/vla_foundry"


def test_a_key_that_comes_again_is_dropped(tmp_path: Path, write_samples: Callable) -> None:
    manifest = write_samples(tmp_path / "d", [[{"txt": b"a"}, {"txt": b"b"}]])
    tar = tmp_path / "d" / "shard_000000.tar"
    names = {f"{0:04d}{row:028x}.txt": f"{name}.txt" for row, name in enumerate("xx")}
    with tarfile.open(tar) as old:
        contents = [(names[member.name], old.extractfile(member).read()) for member in old]  # pyright: ignore[reportOptionalMemberAccess]
    with tarfile.open(tar, "w") as new:
        for name, content in contents:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            new.addfile(info, io.BytesIO(content))
    opened = open_reader(manifest).open(0, 0)
    assert isinstance(opened, SampleShard)
    assert opened.read(0) == {"txt": b"a"}
    with pytest.raises(Dropped, match="an earlier sample of the shard has the key 'x' too"):
        opened.read(1)


@pytest.mark.parametrize("change", ["size", "members", "middle", "damage"])
def test_index_of_an_earlier_state_of_the_shard_is_not_used(
    tmp_path: Path, write_samples: Callable, change: str
) -> None:
    folder = tmp_path / "d"
    manifest = write_samples(folder, [[{"txt": b"a" * 600}, {"txt": b"b" * 10}, {"txt": b"e"}]])
    open_reader(manifest).open(0, 0)
    index = folder / "shard_000000.index.json"
    old_text = index.read_text(encoding="utf-8")
    if change == "size":
        write_samples(folder, [[{"txt": b"c" * 20_000}, {"txt": b"d"}, {"txt": b"e"}]])
    elif change == "members":  # the tar is as large as before
        write_samples(folder, [[{"txt": b"c" * 10}, {"txt": b"d" * 600}, {"txt": b"e"}]])
        assert json.loads(old_text)["num_bytes"] == os.path.getsize(folder / "shard_000000.tar")
    elif change == "middle":  # the first and last members are as before too
        write_samples(folder, [[{"txt": b"a" * 600}, {"txt": b"d" * 20}, {"txt": b"e"}]])
    else:
        index.write_text(old_text[:40], encoding="utf-8")
    opened = open_reader(manifest).open(0, 0)
    assert isinstance(opened, SampleShard)
    right = {"size": b"d", "members": b"d" * 600, "middle": b"d" * 20, "damage": b"b" * 10}
    assert opened.read(1)["txt"] == right[change]


def test_manifest_that_claims_other_counts_is_refused_with_the_fix(tmp_path: Path, write_samples: Callable) -> None:
    manifest = write_samples(tmp_path / "d", [[{"txt": b"a"}] * 3], claimed=512)
    with pytest.raises(ValueError, match=r"holds 3 samples, but .* says 512.*vla-foundry manifest build"):
        open_reader(manifest).open(0, 0)


def test_shard_that_was_cut_off_is_refused(tmp_path: Path, write_records: Callable, write_samples: Callable) -> None:
    manifest = write_records(tmp_path / "d", [4], 9, with_checksums=True)
    os.truncate(tmp_path / "d" / "shard_000000.tar", 2000)
    with pytest.raises(ValueError, match=r"shard_000000.tar has 2000 bytes, but .*vla-foundry manifest verify"):
        open_reader(manifest).open(0, 0)
    foreign = write_samples(tmp_path / "e", [[{"txt": b"a" * 3000}]])
    os.truncate(tmp_path / "e" / "shard_000000.tar", 2000)
    with pytest.raises(ValueError, match=r"shard_000000.tar: .*(cut off|not a readable tar)"):
        open_reader(foreign).open(0, 0)


def test_missing_shard_is_named(tmp_path: Path, write_records: Callable) -> None:
    manifest = write_records(tmp_path / "d", [1], 9)
    (tmp_path / "d" / "shard_000000.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard_000000.tar, which .*manifest.jsonl lists, is missing"):
        open_reader(manifest).open(0, 0)
    os.mkfifo(tmp_path / "d" / "shard_000000.tar")
    with pytest.raises(ValueError, match=r"shard_000000.tar, which .*manifest.jsonl lists, is not a regular file"):
        open_reader(manifest).open(0, 0)


@pytest.mark.parametrize("documents", [[[3, 10]], [[5, 3]], [[0, 9]], [[3, 3, 9]]])
def test_impossible_document_boundaries_are_refused(
    tmp_path: Path, write_records: Callable, documents: list[list[int]]
) -> None:
    manifest = write_records(tmp_path / "d", [1], 9, documents=documents)
    with pytest.raises(ValueError, match="document boundaries do not fit"):
        open_reader(manifest).open(0, 0)


def test_reader_travels_to_other_processes_without_open_files(tmp_path: Path, write_samples: Callable) -> None:
    reader = open_reader(write_samples(tmp_path / "d", [[{"txt": b"a"}]]))
    reader.open(0, 0)
    opened = pickle.loads(pickle.dumps(reader)).open(0, 0)
    assert isinstance(opened, SampleShard)
    assert opened.read(0) == {"txt": b"a"}


def test_number_of_open_shards_is_bounded(
    tmp_path: Path, write_samples: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_MAX_OPEN_SHARDS", 4)
    reader = open_reader(write_samples(tmp_path / "d", [[{"txt": bytes([65 + s])}] for s in range(12)]))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for shard in range(12):
            opened = reader.open(0, shard)
            assert isinstance(opened, SampleShard)
            assert opened.read(0)["txt"] == bytes([65 + shard])
    assert len(os.listdir("/proc/self/fd")) <= before + 5


def test_gathering_records_is_fast(tmp_path: Path, write_records: Callable) -> None:
    manifest = write_records(tmp_path / "d", [256] * 4, 2049)
    reader = open_reader(manifest)
    order = np.random.default_rng(0).permutation(1024)
    out = np.empty((1024, 2049), dtype=np.int32)
    seconds = []
    for _ in range(3):
        start = time.thread_time()
        for place, number in enumerate(order.tolist()):
            opened = reader.open(0, number // 256)
            assert isinstance(opened, TokenShard)
            out[place] = opened.read(number % 256)[0]
        seconds.append(time.thread_time() - start)
    assert np.array_equal(out[:, 0], order)
    assert min(seconds) < 0.5  # 4 M tokens/s of the processor's time; gzipped JSON lists take longer
