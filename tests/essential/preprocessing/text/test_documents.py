"""Every document of every kind of file is read once, whatever the division; what is not a document is named."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla_foundry.preprocessing.sources import SourceFile, read_batches
from vla_foundry.preprocessing.text.documents import (
    Piece,
    Skipped,
    Unit,
    list_sources,
    read_unit,
    split_bytes,
)

TEXTS = ["first", "größer 日本語\nwith lines", "x" * 50, '{"json": 1}', " spaces ", "last"]


def read_all(place: Path, num_parts: int = 1, *, max_bytes: int = 1000) -> list[Piece | Skipped]:
    rows: list[Piece | Skipped] = []
    for file in list_sources([str(place)])[0]:
        for part in range(num_parts):
            unit = Unit(file=file, part=part, num_parts=num_parts)
            rows += read_unit(unit, text_key="text", max_bytes=max_bytes)
    return rows


def read_file(file: SourceFile, **settings: Any) -> list[Piece | Skipped]:
    unit = Unit(file=file, part=0, num_parts=1)
    return list(read_unit(unit, **{"text_key": "text", "max_bytes": 1000} | settings))


def texts_of(rows: list[Piece | Skipped]) -> list[str]:
    assert not [row for row in rows if isinstance(row, Skipped)]
    return [row.text for row in rows if isinstance(row, Piece)]


def write_parquet(path: Path, values: list, *, row_group_size: int = 2) -> None:
    pq.write_table(pa.table({"other": [1] * len(values), "text": values}), path, row_group_size=row_group_size)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7, 200])
def test_every_line_is_in_one_part_of_a_jsonl(tmp_path: Path, num_parts: int):
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines[:3]).encode() + b"\r\n\n")
    (tmp_path / "b.jsonl").write_bytes("\n".join(lines[3:]).encode())  # no newline at the end
    assert texts_of(read_all(tmp_path, num_parts)) == TEXTS


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json.gz"])
def test_a_line_without_end_is_named_and_not_held(tmp_path: Path, ending: str):
    line = b'{"text": "' + b"x" * (65 << 20) + b'"}'
    text = b'{"text": "first"}\n' + line + b'\n{"text": "last"}\n'
    (tmp_path / f"a.{ending}").write_bytes(gzip.compress(text, compresslevel=1) if ending.endswith("gz") else text)
    first, skipped, last = read_all(tmp_path)
    assert isinstance(first, Piece)
    assert isinstance(skipped, Skipped)
    assert isinstance(last, Piece)
    assert (first.text, skipped.reason, last.text) == ("first", "bad_json", "last")


@pytest.mark.parametrize("num_parts", [1, 2, 3, 50])
def test_every_row_is_in_one_part_of_a_parquet(tmp_path: Path, num_parts: int):
    write_parquet(tmp_path / "a.parquet", TEXTS)
    rows = read_all(tmp_path, num_parts)
    assert texts_of(rows) == TEXTS
    assert [row.document for row in rows if isinstance(row, Piece)] == [f"0/a.parquet row {n}" for n in range(6)]


PACK = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zstd": lambda data: pa.compress(data, "zstd", asbytes=True),
    "zst": lambda data: b"".join(pa.compress(part, "zstd", asbytes=True) for part in (data[:100], data[100:])),
}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "txt"])
def test_packed_files_hold_the_same_documents(tmp_path: Path, kind: str, packing: str):
    plain = tmp_path / "plain" / f"a.{kind}"
    plain.parent.mkdir()
    if kind.startswith("json"):
        plain.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    elif kind == "parquet":
        write_parquet(plain, TEXTS)
    else:
        plain.write_text("\n".join(TEXTS), encoding="utf-8")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / f"a.{kind}.{packing}").write_bytes(PACK[packing](plain.read_bytes()))
    expected = ["\n".join(TEXTS)] if kind == "txt" else TEXTS
    assert texts_of(read_all(plain.parent)) == texts_of(read_all(tmp_path / "packed")) == expected


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_may_be_one_array(tmp_path: Path, num_parts: int, indent: int | None):
    rows = [{"text": text} for text in TEXTS]
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf \n" + json.dumps(rows, indent=indent).encode())
    found = read_all(tmp_path, num_parts)
    assert texts_of(found) == TEXTS
    assert [row.document for row in found if isinstance(row, Piece)][1] == "0/a.json item 1"
    (tmp_path / "a.json").write_bytes(json.dumps(rows).encode()[:-9])
    assert [row[:2] for row in read_all(tmp_path, num_parts)] == [("bad_json", "0/a.json item 0")]


def test_text_may_lie_below_a_path_of_keys(tmp_path: Path):
    rows = [
        {"meta": {"text": "a", "n": 1}},
        {"meta.text": "b"},
        {"meta": None},
        {"meta": "x"},
        {"meta": {"text": None}},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pq.write_table(pa.table({"meta": [{"text": "c", "n": 1}, None, {"text": None, "n": 2}]}), tmp_path / "b.parquet")
    found = [row for file in list_sources([str(tmp_path)])[0] for row in read_file(file, text_key="meta.text")]
    assert [row.text for row in found if isinstance(row, Piece)] == ["a", "b", "c"]
    reasons = [row.reason for row in found if isinstance(row, Skipped)]
    assert reasons == ["missing_key", "missing_key", "null", "missing_key", "null"]


def test_names_of_files_are_unicode_whatever_their_bytes(tmp_path: Path):
    (tmp_path / os.fsdecode(b"\xff.txt")).write_bytes(b"text")
    [row] = read_all(tmp_path)
    assert row[0] == "0/\\udcff.txt"


def test_long_text_file_is_one_document_in_pieces(tmp_path: Path):
    text = "".join(f"line {number} größer\n" for number in range(900_000))  # more than two blocks
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    rows = [row for row in read_all(tmp_path, max_bytes=100_000) if isinstance(row, Piece)]
    assert "".join(row.text for row in rows) == text
    assert [row.part for row in rows] == list(range(len(rows)))
    assert [row.is_last for row in rows] == [False] * (len(rows) - 1) + [True]
    assert max(len(row.text.encode()) for row in rows) <= 100_000


@pytest.mark.parametrize("text", ["日本語" * 100, "a b" * 200, "x" * 500, "é\n" * 150, "ab", "🙂" * 90])
@pytest.mark.parametrize("max_bytes", [8, 13, 64, 1000])
def test_split_bytes_loses_nothing(text: str, max_bytes: int):
    pieces = list(split_bytes(text.encode(), max_bytes))
    assert "".join(piece.decode() for piece in pieces) == text
    assert all(0 < len(piece) <= max_bytes for piece in pieces)


def test_rows_that_are_no_documents_are_named(tmp_path: Path):
    lines = [
        b'{"text": "good"}',
        b'{"text": "  "}',
        b'{"text": null}',
        b'{"text": 5}',
        b'{"other": "x"}',
        b'["text"]',
        b'{"text": "broken',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": "\\u0000\\u0000"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    rows = read_all(tmp_path)
    assert [row.text for row in rows if isinstance(row, Piece)] == ["good"]
    starts = [sum(len(line) + 1 for line in lines[:number]) for number in range(len(lines))]
    assert [(row.reason, row.where) for row in rows if isinstance(row, Skipped)] == [
        (reason, f"0/a.jsonl byte {start}")
        for reason, start in zip(
            [
                *("empty", "null", "not_a_string", "missing_key", "missing_key", "bad_json", "not_utf8"),
                *("not_unicode", "empty"),
            ],
            starts[1:],
            strict=True,
        )
    ]


def test_parquet_rows_that_are_no_documents_are_named(tmp_path: Path):
    write_parquet(tmp_path / "a.parquet", ["good", None, " "])
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"other": ["x", "y", "z"]}), tmp_path / "c.parquet")
    rows = read_all(tmp_path, 2)
    reasons = [row.reason for row in rows if isinstance(row, Skipped)]
    assert reasons == ["null", "empty", "not_a_string", "not_a_string", "missing_key", "missing_key", "missing_key"]


def test_a_parquet_row_that_is_not_utf8_is_named_and_costs_no_other(tmp_path: Path, texts_not_utf8: pa.Array):
    pq.write_table(pa.table({"text": texts_not_utf8}), tmp_path / "a.parquet")
    good, bad = read_all(tmp_path)
    assert isinstance(good, Piece)
    assert good.text == "good"
    assert isinstance(bad, Skipped)
    assert (bad.reason, bad.where) == ("not_utf8", "0/a.parquet row 1")


def test_unreadable_files_are_named_and_weighed(tmp_path: Path):
    packed = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 2000).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip at all")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 is not enough PAR1")
    (tmp_path / "cc.jsonl.zst").write_bytes(PACK["zst"](b'{"text": "x"}\n' * 9)[:-5])
    (tmp_path / "d.txt").write_bytes(b"abc \xff")
    write_parquet(tmp_path / "e.parquet", TEXTS * 500, row_group_size=3000)
    data = bytearray((tmp_path / "e.parquet").read_bytes())
    data[60:400] = bytes(340)
    (tmp_path / "e.parquet").write_bytes(data)
    skipped = [row for row in read_all(tmp_path) if isinstance(row, Skipped)]
    assert [row.reason for row in skipped] == [*["unreadable"] * 4, "not_utf8", "unreadable"]
    assert [row.where[:5] for row in skipped] == ["0/a.j", "0/b.j", "0/c.p", "0/cc.", "0/d.t", "0/e.p"]
    assert all(row.num_bytes > 0 for row in skipped)


def test_other_files_are_counted(tmp_path: Path):
    for name in ("a.txt", "b.md", "c.md", "d", "e.csv.gz"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    files, ignored = list_sources([str(tmp_path)])
    assert [file.name for file in files] == ["0/a.txt"]
    assert ignored == {".md": 2, "(none)": 1, ".csv.gz": 1}


def test_hidden_files_are_no_sources(tmp_path: Path):
    for name in ("a.txt", "._a.txt", ".DS_Store", ".ipynb_checkpoints/a-checkpoint.txt", "__MACOSX/._a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\x16\7 text")
    for place in (tmp_path, tmp_path / "*.txt", tmp_path / "**/*"):
        files, ignored = list_sources([str(place)])
        assert ([file.name for file in files], ignored) == (["0/a.txt"], {})


def test_places_without_text_are_errors(tmp_path: Path):
    (tmp_path / "b.md").write_text("x", encoding="utf-8")
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match=r"--source \S+b\.md has no text"):
        list_sources([str(tmp_path / "b.md")])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list_sources([str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match=r"a\.txt twice"):
        list_sources([str(tmp_path / "a.txt"), str(tmp_path)])


def test_file_that_changed_since_it_was_listed_is_an_error(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    unit = Unit(file=list_sources([str(tmp_path)])[0][0], part=0, num_parts=1)
    (tmp_path / "a.txt").write_text("xy", encoding="utf-8")
    with pytest.raises(ValueError, match="has changed since it was listed"):
        list(read_unit(unit, text_key="text", max_bytes=100))


def test_a_long_value_that_a_dictionary_repeats_is_read_a_few_rows_at_once(tmp_path: Path) -> None:
    # a file of a few hundred bytes; 256 rows of it would be 2 GB
    path = tmp_path / "a.parquet"
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array(["x" * (8 << 20)]))
    pq.write_table(pa.table({"text": column, "n": list(range(300))}), path, compression="zstd", store_schema=False)
    parquet = pq.ParquetFile(path)
    assert next(read_batches(parquet, ["text"], 256)).num_rows <= 32
    assert [batch.num_rows for batch in read_batches(parquet, ["n"], 256)] == [256, 44]
