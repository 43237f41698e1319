"""The spec on disk: what is written is read back, and what is wrong is named."""

import gzip
import io
import json
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from vla_foundry.shards import (
    ManifestEntry,
    MemberSpan,
    ShardIndex,
    format_index,
    format_manifest,
    format_records_info,
    index_shard,
    parse_index,
    parse_manifest,
    split_member_name,
)


def create_file(content: bytes) -> BinaryIO:
    file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115
    file.write(content)
    file.seek(0)
    return file


def create_tar(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def index_of(content: bytes) -> ShardIndex:
    with create_file(content) as file:
        return index_shard(file)


def test_members_that_webdataset_skips_belong_to_no_sample():
    pair = [("a.png", b"1"), ("a.txt", b"2")]
    hidden = [("._a.png", b"x"), ("README", b"x"), ("below/.DS_Store", b"x"), ("__info__/a.json", b"x")]
    mixed = index_of(create_tar([*hidden[:3], pair[0], ("._a.txt", b"x"), pair[1], hidden[3]]))
    assert [(key, set(members)) for key, members in mixed.samples] == [("a", {"png", "txt"})]
    assert mixed.num_sequences == 1
    assert [key for key, _ in index_of(create_tar([("./b.png", b"1"), ("._d/c.png", b"2")])).samples] == [
        "./b",
        "._d/c",
    ]


def records(**changes: bytes) -> list[tuple[str, bytes]]:
    members = {
        "records.json": format_records_info(dtype="uint16", record_length=3, num_sequences=2).encode(),
        "tokens.u16": bytes(12),
        "document_ends.u32": bytes(8),
        "document_offsets.u64": bytes(24),
    } | {name.replace("_json", ".json"): content for name, content in changes.items()}
    return [(f"shard.{suffix}", content) for suffix, content in members.items() if content is not None]


def test_manifest_is_read_back():
    entries = [
        ManifestEntry(shard="shards/a", num_sequences=3, num_bytes=10, sha256="ff"),
        ManifestEntry(shard="b", num_sequences=0),
    ]
    text = format_manifest(entries)
    assert json.loads(text.splitlines()[1]) == {"shard": "b", "num_sequences": 0}
    assert parse_manifest(text, "m") == entries
    assert parse_manifest(text.replace("\n", "\n\n").replace('"b"', '"b.tar"'), "m") == entries


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "m lists no shards"),
        ("{", "m line 1 is not JSON"),
        ('{"shard": "a", "num_sequences": 1}\n[]', "m line 2 holds no JSON object"),
        ('{"num_sequences": 1}', "needs a key 'shard'"),
        ('{"shard": "a"}', "needs a key 'num_sequences' with a whole number >= 0"),
        ('{"shard": "a", "num_sequences": -1}', "got -1"),
        ('{"shard": "a", "num_sequences": true}', "got True"),
        ('{"shard": "../a", "num_sequences": 1}', "leaves the manifest's folder"),
        ('{"shard": "/a", "num_sequences": 1}', "leaves the manifest's folder"),
        ('{"shard": "pipe:touch x", "num_sequences": 1}', "m line 1: 'pipe:touch x' is a shell command"),
        ('{"shard": "{a,PIPE :x}", "num_sequences": 1}', "is a shell command, which is never run"),
        ('{"shard": "a", "num_sequences": 1}\n{"shard": "a.tar", "num_sequences": 1}', "'a' more than once"),
        ('{"shard": "a", "num_sequences": 1, "num_bytes": "x"}', "num_bytes"),
        ('{"shard": "a", "num_sequences": Infinity}', "line 1: 'num_sequences' must be a whole number"),
        ('{"shard": "a", "num_sequences": 1e30}', "line 1: 'num_sequences' must be a whole number"),
        ('{"shard": "a", "num_sequences": ' + "9" * 5000 + "}", "line 1: 'num_sequences' is a number of 5,000 digits"),
        ("[" * 100_000, "m line 1 nests lists and mappings more than 100 deep"),
    ],
)
def test_wrong_manifest_is_named(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_manifest(text, "m")


@pytest.mark.parametrize(
    ("name", "key", "suffix"),
    [
        ("a/b.c/d.Front.JPG", "a/b.c/d", "front.jpg"),
        ("key.json", "key", "json"),
        ("a.b/README", None, None),
        ("._a.png", None, None),
        ("__meta__.d/a.png", "__meta__.d/a", "png"),
        ("__a.png", "__a", "png"),
        ("__meta__/a.png", None, None),
        ("a.", "a", ""),
    ],
)
def test_member_names_split_as_webdataset_does(name: str, key: str | None, suffix: str | None):
    from webdataset.tariterators import group_by_keys, tar_file_expander

    assert split_member_name(name) == (None if key is None else (key, suffix))
    (source,) = [{"url": "a.tar", "stream": io.BytesIO(create_tar([(name, b"x")]))}]
    samples = list(group_by_keys(tar_file_expander([source])))
    assert [sample["__key__"] for sample in samples] == ([] if key is None else [key])
    assert all(suffix in sample for sample in samples)


def test_index_says_where_samples_lie():
    data = create_tar([("a.JPG", b"12345"), ("a.txt", b"x"), ("__meta__", b"no"), ("b.txt", b"yy"), ("a.txt", b"zzz")])
    index = index_of(data)
    assert [key for key, _ in index.samples] == ["a", "b", "a"]  # neighbours alone are one sample
    span = index.samples[0][1]["jpg"]
    assert data[span.offset : span.offset + span.size] == b"12345"
    assert index.num_sequences == 3
    assert index.num_bytes == len(data)
    assert parse_index(format_index(index), "i") == index


def test_index_of_token_records_is_read_back():
    index = index_of(create_tar(records()))
    assert index.num_sequences == 2
    assert index.samples == ()
    assert index.records is not None
    assert (index.records.dtype, index.records.record_length, index.records.tokens.size) == ("uint16", 3, 12)
    assert parse_index(format_index(index), "i") == index


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (records(**{"tokens.u16": bytes(10)}), "has 10 bytes of tokens for 2 records of 3"),
        (records(**{"document_offsets.u64": bytes(16)}), "has 16 bytes of offsets for 2 records"),
        (records(**{"records.json": b"{}"}), "token records are not whole"),
        (records(**{"records.json": b"{"}), "token records are not whole"),
        (records(**{"records.json": b'{"dtype": "float", "record_length": 3, "num_sequences": 2}'}), "are not whole"),
        ([member for member in records() if "ends" not in member[0]], "are not whole"),
    ],
)
def test_wrong_tar_is_named(members: list, message: str):
    with pytest.raises(ValueError, match=message):
        index_of(create_tar(members))


def test_a_member_twice_in_a_sample_begins_another_with_the_same_key():
    index = index_of(create_tar([("a.png", b"0"), ("a.txt", b"1"), ("a.TXT", b"2"), ("b.txt", b"3")]))
    assert [(key, list(members)) for key, members in index.samples] == [
        ("a", ["png", "txt"]),
        ("a", ["txt"]),
        ("b", ["txt"]),
    ]


def test_archives_one_after_another_are_read_and_other_bytes_after_the_end_are_not():
    first, second = create_tar([("a.txt", b"1")]), create_tar([("b.txt", b"22")])
    data = first + second + b"left over " * 99
    index = index_of(data)
    assert [key for key, _ in index.samples] == ["a", "b"]
    span = index.samples[1][1]["txt"]
    assert data[span.offset : span.offset + span.size] == b"22"
    assert index.ends_properly
    assert not index_of(first[:1024]).ends_properly


def test_a_damaged_header_is_an_error_not_the_end():
    data = bytearray(create_tar([("a.txt", b"1"), ("b.txt", b"2"), ("c.txt", b"3")]))
    data[1024 + 30] ^= 1
    with pytest.raises(ValueError, match="the header at byte 1024 is damaged"):
        index_of(bytes(data))


_LONG = "d/" * 60 + "x" * 90 + ".txt"


def run_tar(folder: Path, *arguments: str) -> None:
    subprocess.run(["tar", *arguments], cwd=folder, check=True, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=oldgnu"],
        ["--format=posix"],
        ["--format=posix", "--sparse", "--pax-option=comment=x"],
        ["--format=gnu", "--listed-incremental=snapshot"],
        ["--format=posix", "--label=x"],
    ],
)
def test_samples_are_what_tar_extracts(tmp_path: Path, options: list[str]):
    (tmp_path / _LONG).parent.mkdir(parents=True)
    for name, text in (("d/a.txt", "one"), (_LONG, "long" * 300), ("d/e.txt", "")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "d/b.txt").hardlink_to(tmp_path / "d/a.txt")
    (tmp_path / "d/d/c.txt").symlink_to("../b.txt")
    (tmp_path / "d/d/chain.txt").symlink_to("c.txt")
    (tmp_path / "d/folder.d").symlink_to("d")
    run_tar(tmp_path, *options, "-cf", "a.tar", "d")
    run_tar(tmp_path, "-cf", "b.tar", "--transform=s,^d/a,b,", "d/a.txt")
    # 100 zeros: what follows is not aligned
    data = (tmp_path / "a.tar").read_bytes() + bytes(100) + (tmp_path / "b.tar").read_bytes()
    for archive in ("a.tar", "b.tar"):
        (tmp_path / "x").mkdir(exist_ok=True)
        run_tar(tmp_path, "-C", "x", "-xf", archive)
    extracted = {str(path.relative_to(tmp_path / "x")): path.read_bytes() for path in (tmp_path / "x").rglob("*.txt")}
    spans = spans_of(index_of(data))
    assert {name: data[span.offset : span.offset + span.size] for name, span in spans.items()} == extracted
    assert len(spans) == 7


def spans_of(index: ShardIndex) -> dict[str, MemberSpan]:
    return {f"{key}.{suffix}": span for key, members in index.samples for suffix, span in members.items()}


def create_link(name: str, target: str, kind: bytes = tarfile.LNKTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member.tobuf(tarfile.GNU_FORMAT)


def test_a_hard_link_names_its_file_in_any_spelling():
    data = create_tar([("./a.txt", b"1")])[:1024] + create_link("b.txt", "a.txt") + create_link("./c.txt", "/b.txt")
    assert [span.offset for span in spans_of(index_of(data)).values()] == [512] * 3


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (create_link("b.txt", "c.txt"), "member 'b.txt' links to 'c.txt', which is not before it"),
        (create_link("b.txt", "b.txt"), "member 'b.txt' links to 'b.txt', which is not before it"),
        (
            create_link("b.txt", "../a.txt", tarfile.SYMTYPE),
            r"member 'b.txt' links to '\.\./a.txt', which is not in the",
        ),
        (create_link("b.txt", "b.txt", tarfile.SYMTYPE), "member 'b.txt' is a symbolic link to itself"),
        (create_link("b.txt", "", tarfile.FIFOTYPE), "member 'b.txt' is a device or a pipe"),
        (create_link("b.txt", "", b"M"), "member 'b.txt' continues a file of another volume"),
    ],
)
def test_members_that_can_not_be_read_are_named_if_they_belong_to_samples(member: bytes, message: str):
    first = create_tar([("a.txt", b"1")])
    with pytest.raises(ValueError, match=message):
        index_of(first[:1024] + member + bytes(1024))
    unsampled = tarfile.TarInfo.frombuf(member, "utf-8", "strict")
    unsampled.name = "b_txt"
    assert index_of(first[:1024] + unsampled.tobuf(tarfile.GNU_FORMAT) + bytes(1024)).num_sequences == 1


def test_members_of_unknown_types_are_files():
    member = tarfile.TarInfo("a.txt")
    member.size, member.type = 3, b"Z"
    data = member.tobuf(tarfile.GNU_FORMAT) + b"123".ljust(512, b"\0") + bytes(1024)
    assert [span.size for span in spans_of(index_of(data)).values()] == [3]


@pytest.mark.parametrize(
    "follows",
    [b"junk" + create_tar([("b.txt", b"2")]), create_tar([("b.txt", b"2")])[:300], gzip.compress(b"x")],
    ids=["behind other bytes", "cut off", "compressed"],
)
def test_an_archive_that_follows_and_can_not_be_read_is_an_error(follows: bytes):
    first = create_tar([("a.txt", b"1")])
    with pytest.raises(ValueError, match=f"another archive follows at byte {len(first)}"):
        index_of(first + follows)


def test_what_can_not_be_read_in_place_is_refused_by_name(tmp_path: Path):
    (tmp_path / "a.bin").write_bytes(b"")
    with open(tmp_path / "a.bin", "r+b") as file:
        file.truncate(1 << 20)
    subprocess.run(["tar", "-C", tmp_path, "--sparse", "-cf", tmp_path / "a.tar", "a.bin"], check=True)
    with pytest.raises(ValueError, match=r"member 'a\.bin' is stored as a sparse file"):
        index_of((tmp_path / "a.tar").read_bytes())
    with pytest.raises(ValueError, match=r"not a readable tar .* compressed: unpack it"):
        index_of(gzip.compress(create_tar([("a.txt", b"1")])))


@pytest.mark.parametrize("size", [0, 100, 600, 1500, 3000])
def test_cut_tar_is_an_error(size: int):
    data = create_tar([("a.txt", b"x" * 3000)])
    with pytest.raises(ValueError, match="not a readable tar"):
        index_of(data[:size])


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"version": 2}',
        '{"version": 1}',
        '{"version": 1, "num_sequences": 1, "num_bytes": 1, "samples": [["a"]]}',
        '{"version": 1, "num_sequences": 1, "num_bytes": 1, "records": {}}',
        '{"version": 1, "num_sequences": 1, "num_bytes": 1, "samples": [[null, {}]]}',
        '{"version": 1, "num_sequences": 1, "num_bytes": 1, "episodes": [[null, [0], {}, {}]]}',
        '{"version": 1, "num_sequences": 1, "num_bytes": 1, "episodes": [["a", [Infinity], {}, {}]]}',
        '{"version": 1, "num_sequences": 1, "num_bytes": 1, "episodes": [["a", "x", {}, {}]]}',
        '{"version": 1, "num_sequences": 1, "num_bytes": 1, "episodes": [["a", [1, 1], {}, {}]]}',
    ],
)
def test_wrong_index_is_named(text: str):
    with pytest.raises(ValueError, match=r"^i is not a shard index"):
        parse_index(text, "i")


@pytest.mark.parametrize("members", [records(), [("a.jpg", b"12345"), ("a.txt", b"x"), ("b.txt", b"yy")]])
def test_a_changed_character_of_an_index_is_noticed(members: list):
    index = index_of(create_tar(members))
    text = format_index(index)
    for place, character in enumerate(text):
        changed = text[:place] + chr(ord(character) ^ 1) + text[place + 1 :]
        try:
            assert parse_index(changed, "i") == index
        except ValueError:
            continue


def test_an_index_without_a_checksum_is_read():
    index = index_of(create_tar(records()))
    text = format_index(index).partition(',"crc32"')[0] + "}"
    assert parse_index(text, "i") == index
    with pytest.raises(ValueError, match=r"its tokens are uint17"):
        parse_index(text.replace("uint16", "uint17"), "i")


@pytest.mark.parametrize(
    ("part", "replacement", "message"),
    [
        ('[["a", {"txt": [512, 3]}]]', '[["a", {"txt": ["512", 3]}]]', "offset of 'txt' must be a whole number"),
        ('[["a", {"txt": [512, 3]}]]', '[["a", {"txt": [512, 3e9]}]]', "size of 'txt' must be a whole number"),
        ('[["a", {"txt": [512, 3]}]]', '[["a", {"txt": [-512, 3]}]]', "offset of 'txt' must be a whole number"),
        ('"num_bytes": 999', '"num_bytes": Infinity', "'num_bytes' must be a whole number from 0 to 2^48, got inf"),
        ('"num_sequences": 1', '"num_sequences": ' + "9" * 5000, "'num_sequences' is a number of 5,000 digits"),
        ('"num_sequences": 1', '"num_sequences": ' + "9" * 30, "'num_sequences' must be a whole number"),
        ('[["a", {"txt": [512, 3]}]]', "[" * 100_000, "more than 100 deep"),
        ('[["a", {"txt": [512, 3]}]]', '[["a", {"txt": [512, 488]}]]', "a member lies beyond its tar"),
        ('[["a", {"txt": [512, 3]}]]', '[[["a"], {"txt": [512, 3]}]]', "the name of a sample or episode must be text"),
        ('"num_sequences": 1', '"num_sequences": 2', "it lists 1 samples, and says 2"),
    ],
)
def test_numbers_of_an_index_are_named(part: str, replacement: str, message: str):
    text = '{"version": 1, "num_sequences": 1, "num_bytes": 999, "samples": [["a", {"txt": [512, 3]}]]}'
    assert parse_index(text, "i").samples == (("a", {"txt": MemberSpan(offset=512, size=3)}),)
    with pytest.raises(ValueError, match=rf"^i is not a shard index.*{re.escape(message)}"):
        parse_index(text.replace(part, replacement), "i")
