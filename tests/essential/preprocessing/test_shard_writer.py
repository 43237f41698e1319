"""Shards are written whole, with the same bytes every time, and with an index that fits."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from vla_foundry.preprocessing.shard_writer import open_shard, write_shard
from vla_foundry.shards import index_shard, parse_index, sha256_of

SAMPLES = [(f"folder/key{number}", {"json": b"{}", "front.jpg": bytes([number]) * 700}) for number in range(4)]


def test_bytes_depend_on_content_alone(tmp_path: Path):
    first = write_shard(str(tmp_path / "a"), "shard", SAMPLES)
    os.utime(tmp_path / "a" / "shard.tar", (1, 1))
    assert write_shard(str(tmp_path / "b"), "shard", iter(SAMPLES)) == first
    assert (tmp_path / "a" / "shard.tar").read_bytes() == (tmp_path / "b" / "shard.tar").read_bytes()
    with tarfile.open(tmp_path / "a" / "shard.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.mode == 0o644


def test_a_tar_has_the_bytes_that_tarfile_writes(tmp_path: Path):
    members = {
        "a.jpg": b"x" * 5,
        "empty": b"",
        "n" * 98: b"y" * 512,
        "é" * 50: b"z" * 513,
        "n" * 99: b"",
        "m" * 99: b"1",
    }
    write_shard(str(tmp_path), "shard", [("k", members)])
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for suffix, content in members.items():
            member = tarfile.TarInfo(f"k.{suffix}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert (tmp_path / "shard.tar").read_bytes() == expected.getvalue()


def test_entry_and_index_describe_the_tar(tmp_path: Path):
    entry = write_shard(str(tmp_path), "shard", SAMPLES)
    with open(tmp_path / "shard.tar", "rb") as file:
        index = index_shard(file)
        assert parse_index((tmp_path / "shard.index.json").read_text(encoding="utf-8"), "") == index
        file.seek(0)
        assert entry.sha256 == sha256_of(file)
        span = index.samples[2][1]["front.jpg"]
        file.seek(span.offset)
        assert file.read(span.size) == bytes([2]) * 700
    assert entry.num_sequences == 4
    assert entry.num_bytes == (tmp_path / "shard.tar").stat().st_size


def test_nothing_appears_when_writing_fails(tmp_path: Path):
    def write() -> None:
        with open_shard(str(tmp_path), "shard") as writer:
            writer.add("a", {"txt": b"x"})
            raise KeyError("stop")

    with pytest.raises(KeyError):
        write()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("key", "suffix"), [("a.b", "txt"), ("a", "TXT")])
def test_names_that_webdataset_would_change_are_refused(tmp_path: Path, key: str, suffix: str):
    with pytest.raises(AssertionError):
        write_shard(str(tmp_path), "shard", [(key, {suffix: b""})])
