"""`preprocess image_caption` on real files, a real Ray cluster and a real HTTP server."""

import bz2
import functools
import gzip
import http.server
import io
import json
import lzma
import os
import re
import shutil
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.essential.images.test_video import encode_video
from vla_foundry.data.pipelines.image_caption import CreateTurns
from vla_foundry.params.commands.preprocessing import PreprocessImageCaptionParams
from vla_foundry.preprocessing.command import main
from vla_foundry.preprocessing.image_caption import image_caption_job
from vla_foundry.preprocessing.image_caption.image_caption_job import preprocess_image_caption
from vla_foundry.preprocessing.image_caption.items import group_pairs, read_list
from vla_foundry.preprocessing.manifest import main as manifest_main
from vla_foundry.preprocessing.sources import SourceFile

NUM_PAIRS = 30


def save_picture(path: Path, number: int, size: tuple[int, int] = (24, 32)) -> None:
    """A picture that is `number` everywhere, in the format of the path's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), number, dtype=np.uint8)).save(path)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Pairs in two folders: text and JSON captions, one sample of two images."""
    folder = tmp_path / "pairs"
    for number in range(NUM_PAIRS):
        stem = folder / f"part{number % 2}" / f"{number:03d}"
        save_picture(stem.with_suffix((".png", ".jpg", ".webp")[number % 3]), number)
        if number % 5:
            stem.with_suffix(".txt").write_text(f" number {number}\n", encoding="utf-8")
        else:
            stem.with_suffix(".json").write_text(json.dumps({"caption": f"number {number}"}), encoding="utf-8")
    for number in (1, 0):
        save_picture(folder / f"both.v2.image_{number}.png", 200 + number)
    turns = [{"from": "human", "value": "<image><image>Compare."}, {"from": "gpt", "value": "one is lighter"}]
    (folder / "both.v2.json").write_text(json.dumps({"conversations": turns}), encoding="utf-8")
    (folder / "readme.md").write_text("not a picture", encoding="utf-8")
    return folder


def preprocess(source: Path | list[Path], output: Path, **values: Any) -> None:
    sources = [str(place) for place in (source if isinstance(source, list) else [source])]
    settings: dict[str, Any] = {"num_workers": 0, "samples_per_shard": 8} | values
    preprocess_image_caption(PreprocessImageCaptionParams(source=sources, output=str(output), **settings))


def rows_of(path: Path, caption_key: str = "caption") -> list[Any]:
    file = SourceFile(uri=str(path), name=path.name, size=path.stat().st_size)
    return list(read_list(file, "url", caption_key, []))


def read_samples(folder: Path) -> list[dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines():
        with tarfile.open(folder / f"{json.loads(line)['shard']}.tar") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None
                samples.setdefault(key, {})[suffix] = content.read()
    return list(samples.values())


def read_files(folder: Path) -> dict[str, bytes]:
    """Return {name: content}; the commit of the code may change while tests run."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["provenance.json"] = re.sub(rb'"git_commit": .*', b"", files["provenance.json"])
    return files


def number_of(sample: dict[str, bytes], suffix: str) -> int:
    return int(np.asarray(Image.open(io.BytesIO(sample[suffix])).convert("RGB"))[0, 0, 0])


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_pairs_become_verified_shards_with_their_bytes_kept(pairs: Path, tmp_path: Path, ray_cluster: str) -> None:
    preprocess(pairs, tmp_path / "out", num_workers=2)
    manifest_main(["verify", "--folder", str(tmp_path / "out")])
    samples = read_samples(tmp_path / "out")
    assert len(samples) == NUM_PAIRS + 1
    originals = {path.read_bytes() for path in pairs.rglob("*") if path.suffix in (".png", ".jpg", ".webp")}
    kept = {
        data for sample in samples for name, data in sample.items() if name.rpartition(".")[2] in ("png", "jpg", "webp")
    }
    assert kept == originals
    seen = set()
    for sample in samples:
        if "image_0.png" in sample:
            assert (number_of(sample, "image_0.png"), number_of(sample, "image_1.png")) == (200, 201)
            assert "conversations" in json.loads(sample["json"])
            continue
        suffix = next(name for name in ("png", "jpg", "webp") if name in sample)
        text = sample["txt"].decode() if "txt" in sample else json.loads(sample["json"])["caption"]
        number = int(text.removeprefix("number "))
        assert abs(number_of(sample, suffix) - number) <= 2
        seen.add(number)
    assert seen == set(range(NUM_PAIRS))


def test_bytes_depend_on_neither_workers_nor_interruption(
    pairs: Path, tmp_path: Path, ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess(pairs, tmp_path / "ray", num_workers=2)
    whole = read_files(tmp_path / "ray")
    # a run that is cut off: as it is after two of its tasks
    from vla_foundry.preprocessing.image_caption import image_caption_job as job

    write_task, done = job.write_task, []

    def stop_after_two(shared: Any, task: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(task.number)
        return write_task(shared, task)

    with monkeypatch.context() as patch:
        patch.setattr(job, "write_task", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            preprocess(pairs, tmp_path / "cut")
    assert not (tmp_path / "cut" / "manifest.jsonl").exists()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*.tar")}
    assert len(times) == 2
    preprocess(pairs, tmp_path / "cut")
    assert read_files(tmp_path / "cut") == whole
    assert all(path.stat().st_mtime_ns == made for path, made in times.items())


def test_large_images_are_scaled_down_if_asked_for(tmp_path: Path) -> None:
    save_picture(tmp_path / "in" / "large.png", 100, (40, 80))
    save_picture(tmp_path / "in" / "small.png", 50, (10, 20))
    for name in ("large", "small"):
        (tmp_path / "in" / f"{name}.txt").write_text(name, encoding="utf-8")
    preprocess(tmp_path / "in", tmp_path / "out", max_side=20)
    sizes = {
        sample["txt"]: {name: Image.open(io.BytesIO(data)).size for name, data in sample.items() if name != "txt"}
        for sample in read_samples(tmp_path / "out")
    }
    assert sizes == {b"large": {"jpg": (20, 10)}, b"small": {"png": (20, 10)}}


def test_failures_are_reported_by_reason_and_bounded(pairs: Path, tmp_path: Path) -> None:
    save_picture(pairs / "alone.png", 1)
    (pairs / "cut.png").write_bytes((pairs / "both.v2.image_0.png").read_bytes()[:-40])
    (pairs / "cut.txt").write_text("a cut picture", encoding="utf-8")
    save_picture(pairs / "zeros.png", 1)
    (pairs / "zeros.txt").write_bytes(bytes(20))
    save_picture(pairs / "list.png", 1)
    (pairs / "list.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"4 of 35 images failed \(1 .*--max_bad_fraction 0.01"):
        preprocess(pairs, tmp_path / "out")
    preprocess(pairs, tmp_path / "out", max_bad_fraction=0.2)
    report = read_report(tmp_path / "out")
    assert report["failed"] == {"NUL bytes in the caption": 1, "bad JSON": 1, "bad image": 1, "no caption": 1}
    assert report["samples"] == NUM_PAIRS + 1
    assert report["examples"]["no caption"] == ["0/alone"]
    assert report["examples"]["bad image"][0].startswith("0/cut (PNG of ")


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_lists_of_paths_of_any_kind_are_read(tmp_path: Path, ending: str) -> None:
    for number in range(3):
        save_picture(tmp_path / "images" / f"{number}.png", number)
    urls = ["images/0.png", f"file://{tmp_path}/images/1.png", f"{tmp_path}/images/2.png"]
    rows = [{"url": url, "text": f"number {n}", "who": "Ann", "n": n} for n, url in enumerate(urls)]
    path = tmp_path / f"list.{ending}"
    if ending == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        mark = "," if ending == "csv" else "\t"
        path.write_text(
            "\n".join([mark.join(rows[0]), *(mark.join(map(str, row.values())) for row in rows)]), encoding="utf-8"
        )
    argv = ["image_caption", "--source", str(path), "--output", str(tmp_path / "out"), "--caption_key", "text"]
    main([*argv, "--extra_keys", "who", "--num_workers", "0"])
    found = {(number_of(s, "png"), s["txt"].decode(), s["json"].decode()) for s in read_samples(tmp_path / "out")}
    assert found == {(n, f"number {n}", '{"who": "Ann"}') for n in range(3)}
    with pytest.raises(ValueError, match=r"no column 'alt'.*--caption_key"):
        rows_of(path, caption_key="alt")


def test_tab_separated_captions_have_no_quoting(tmp_path: Path) -> None:
    captions = ['"red square', 'a 5" screen', '"' + "long " * 40_000, "two\u2028lines", ""]
    path = tmp_path / "list.tsv"
    lines = ["caption\turl", *(f"{caption}\t{number}.png" for number, caption in enumerate(captions)), ""]
    path.write_text("\r\n".join(lines), encoding="utf-8", newline="")
    rows = rows_of(path)
    assert [(row.url, row.caption) for row in rows] == [(f"{n}.png", text) for n, text in enumerate(captions)]
    path.write_text("caption\turl\na\tcaption\t0.png\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"list\.tsv line 2 has 3 cells, more than its 2 columns"):
        rows_of(path)


def test_long_cells_of_csv_lists_are_read_and_endless_ones_named(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text('caption,url\n"' + "long " * 40_000 + '",0.png\n', encoding="utf-8")
    assert len(rows_of(path)[0].caption) == 200_000
    path.write_text('caption,url\n"' + "x" * 11_000_000, encoding="utf-8")
    with pytest.raises(ValueError, match=r"list\.csv is not CSV after line 1 \(field larger than"):
        rows_of(path)


def test_a_list_of_missing_files_names_them(tmp_path: Path) -> None:
    save_picture(tmp_path / "0.png", 0)
    rows = [{"url": "0.png", "caption": "a"}, {"url": "1.png", "caption": "b"}, {"caption": "c"}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    preprocess(tmp_path / "list.jsonl", tmp_path / "out", max_bad_fraction=0.5)
    report = read_report(tmp_path / "out")
    assert report["failed"] == {"missing file": 1, "no URL": 1}
    assert report["examples"]["no URL"] == ["list.jsonl row 2"]


def test_files_group_by_name_whatever_dots_are_in_it() -> None:
    ignored = Counter[str]()
    names = ("a.b.png", "a.b.txt", "c.image_1.jpg", "c.image_0.jpg", "c.json", "d.txt", "e")
    items = group_pairs([SourceFile(uri=f"/x/{name}", name=name, size=1) for name in names], ignored)
    assert [(item.name, item.images, item.txt, item.json) for item in items] == [
        ("a.b", ("/x/a.b.png",), "/x/a.b.txt", None),
        ("c", ("/x/c.image_0.jpg", "/x/c.image_1.jpg"), None, "/x/c.json"),
    ]
    assert ignored == {"(none)": 1, ".txt": 1}


def test_hidden_files_are_neither_read_nor_in_the_way(pairs: Path, tmp_path: Path) -> None:
    for folder in (pairs, tmp_path / "out"):
        for name in ("part0/._000.png", ".DS_Store", ".ipynb_checkpoints/000.png", "._list.csv"):
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            (folder / name).write_bytes(b"\0\5\x16\7")
    preprocess(pairs, tmp_path / "out")
    assert read_report(tmp_path / "out")["samples"] == NUM_PAIRS + 1
    assert not read_report(tmp_path / "out")["failed"]


def test_images_of_one_name_are_counted_and_not_made_one_sample(tmp_path: Path) -> None:
    for number, name in enumerate(["cat.jpg", "cat.png", "two.image_0.jpg", "two.image_1.jpg", "one.png"]):
        save_picture(tmp_path / "in" / name, number)
    for name in ("cat", "two", "one"):
        (tmp_path / "in" / f"{name}.txt").write_text(f"it is {name}", encoding="utf-8")
    preprocess(tmp_path / "in", tmp_path / "out", max_bad_fraction=0.5)
    assert sorted(sample["txt"].decode() for sample in read_samples(tmp_path / "out")) == ["it is one", "it is two"]
    assert read_report(tmp_path / "out")["failed"] == {"several images of one name": 1}


def test_a_caption_is_kept_beside_json_that_says_nothing(tmp_path: Path) -> None:
    for number, text in enumerate(["[1, 2]", "{broken", '"a text"']):
        save_picture(tmp_path / "in" / f"{number}.png", number)
        (tmp_path / "in" / f"{number}.txt").write_text("a cat", encoding="utf-8")
        (tmp_path / "in" / f"{number}.json").write_text(text, encoding="utf-8")
    preprocess(tmp_path / "in", tmp_path / "out")
    samples = read_samples(tmp_path / "out")
    assert [(sample["txt"], "json" in sample) for sample in samples] == [(b"a cat", False)] * 3


@pytest.mark.parametrize("is_list_file", [True, False])
def test_of_a_list_of_captions_training_draws_one_or_all_become_samples(tmp_path: Path, is_list_file: bool) -> None:
    captions = ["a cat", "a red cat", "an animal"]
    save_picture(tmp_path / "in" / "0.png", 0)
    name = "list.jsonl" if is_list_file else "0.json"
    listed = ["", *captions, None, " "]
    (tmp_path / "in" / name).write_text(json.dumps({"url": "0.png", "caption": listed}), encoding="utf-8")
    source = tmp_path / "in" / name if is_list_file else tmp_path / "in"
    preprocess(source, tmp_path / "drawn")
    (sample,) = read_samples(tmp_path / "drawn")
    assert "txt" not in sample
    assert json.loads(sample["json"])["caption"] == (captions if is_list_file else listed)
    create_turns = CreateTurns(["Describe."], None)
    drawn = [create_turns({**sample, "__seed__": 1, "__position__": n})["turns"][-1].content for n in range(20)]
    assert set(drawn) == set(captions)
    assert drawn == [create_turns({**sample, "__seed__": 1, "__position__": n})["turns"][-1].content for n in range(20)]

    preprocess(source, tmp_path / "all", all_captions=True)
    assert sorted(sample["txt"].decode() for sample in read_samples(tmp_path / "all")) == captions


@pytest.mark.parametrize("ending", ["parquet", "csv", "tsv"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, ending: str) -> None:
    save_picture(tmp_path / "0.png", 0)
    path = tmp_path / f"list.{ending}"
    if ending == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        arrays = [pa.array(["0.png"]), pa.array(["a"]), pa.array(["b"])]
        pq.write_table(pa.Table.from_arrays(arrays, names=["url", "caption", "caption"]), path)
    else:
        lines = [["url", "caption", "caption"], ["0.png", "a", "b"]]
        path.write_text("\n".join(("," if ending == "csv" else "\t").join(line) for line in lines), encoding="utf-8")
    with pytest.raises(ValueError, match=r"has 2 columns named 'caption'. Rename all but one"):
        preprocess(path, tmp_path / "out")


def test_a_complete_dataset_is_left_alone(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preprocess(pairs, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    preprocess(pairs, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"params.max_side null \(now 10\)"):
        preprocess(pairs, tmp_path / "out", max_side=10)


def test_videos_are_checked_and_stored_as_they_are(tmp_path: Path) -> None:
    source = tmp_path / "clips"
    source.mkdir()
    clips = {"a.mp4": encode_video("mp4", list(range(20))), "b.webm": encode_video("webm", list(range(9)))}
    for name, data in (clips | {"c.mp4": clips["a.mp4"][:900], "d.mov": b"\0\0\0\x1cftypavif"}).items():
        (source / name).write_bytes(data)
        (source / name).with_suffix(".txt").write_text(f"clip {name}", encoding="utf-8")
    preprocess(source, tmp_path / "out", max_bad_fraction=0.6)
    found = {sample["txt"].decode(): sample for sample in read_samples(tmp_path / "out")}
    assert found == {
        "clip a.mp4": {"mp4": clips["a.mp4"], "txt": b"clip a.mp4"},
        "clip b.webm": {"webm": clips["b.webm"], "txt": b"clip b.webm"},
    }
    assert read_report(tmp_path / "out")["failed"] == {"bad video": 1, "bad image": 1}
    manifest_main(["verify", "--folder", str(tmp_path / "out")])


def test_pictures_of_all_kinds_become_images_that_training_reads(tmp_path: Path) -> None:
    for number, ending in enumerate(("gif", "BMP", "tiff", "tif", "jfif", "ppm")):
        save_picture(tmp_path / "in" / f"{number}.{ending}", 40 * number)
        (tmp_path / "in" / f"{number}.txt").write_text(f"number {40 * number}", encoding="utf-8")
    preprocess(tmp_path / "in", tmp_path / "out")
    samples = read_samples(tmp_path / "out")
    suffixes = sorted(next(name for name in sample if name != "txt") for sample in samples)
    assert suffixes == ["jpg", *["png"] * 5]
    for sample in samples:
        suffix = "png" if "png" in sample else "jpg"
        assert abs(number_of(sample, suffix) - int(sample["txt"].decode().removeprefix("number "))) <= 2


@pytest.mark.parametrize("ending", ["jsonl.zst", "csv.gz", "tsv.xz", "parquet.bz2"])
def test_lists_may_be_packed(tmp_path: Path, ending: str) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    kind, packing = ending.split(".")
    texts = {
        "jsonl": b'{"url": "a.png", "caption": "one"}\n',
        "csv": b"url,caption\na.png,one\n",
        "tsv": b"url\tcaption\na.png\tone\n",
    }
    if kind == "parquet":
        pq.write_table(pa.table({"url": ["a.png"], "caption": ["one"]}), tmp_path / "plain")
        texts["parquet"] = (tmp_path / "plain").read_bytes()
    pack = {"zst": lambda data: pa.compress(data, "zstd", asbytes=True), "gz": gzip.compress}
    packed = (pack | {"xz": lzma.compress, "bz2": bz2.compress})[packing](texts[kind])
    path = tmp_path / f"list.{ending}"
    path.write_bytes(packed)
    assert [(row.url, row.caption) for row in rows_of(path)] == [("a.png", "one")]
    path.write_bytes(packed[:-6])
    with pytest.raises(ValueError, match=rf"list\.{ending}: not valid {packing}"):
        rows_of(path)


def test_columns_of_a_list_may_lie_below_a_path_of_keys(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"url": "a.png", "text": {"en": "one", "de": "eins"}}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for ending in ("jsonl", "parquet"):
        assert [row.caption for row in rows_of(tmp_path / f"a.{ending}", "text.en")] == ["one"]
        with pytest.raises(ValueError, match=r"no column 'text\.fr', only url, text\."):
            rows_of(tmp_path / f"a.{ending}", "text.fr")
    two = pa.StructArray.from_arrays([pa.array(["one"]), pa.array(["two"])], names=["en", "en"])
    pq.write_table(pa.Table.from_arrays([pa.array(["a.png"]), two], names=["url", "text"]), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet has 2 columns named 'text\.en'"):
        rows_of(tmp_path / "b.parquet", "text.en")


def test_a_parquet_row_that_is_not_utf8_is_counted(tmp_path: Path, texts_not_utf8: pa.Array) -> None:
    save_picture(tmp_path / "0.png", 0)
    pq.write_table(pa.table({"url": ["0.png"] * 2, "caption": texts_not_utf8}), tmp_path / "list.parquet")
    preprocess(tmp_path / "list.parquet", tmp_path / "out", max_bad_fraction=0.5)
    assert [sample["txt"] for sample in read_samples(tmp_path / "out")] == [b"good"]
    assert read_report(tmp_path / "out")["examples"]["not Unicode"] == ["list.parquet row 1"]


def test_rows_that_no_encoding_can_store_are_counted_and_never_changed(tmp_path: Path) -> None:
    save_picture(tmp_path / "0.png", 0)
    notes = ["a", "cut \ud83d", "fine", "fine"]
    captions = ["fine", "fine", "cut \ud83d", "a \U0001f600"]
    rows = [
        json.dumps({"url": "0.png", "caption": caption, "note": [note]})
        for caption, note in zip(captions, notes, strict=True)
    ]
    (tmp_path / "list.jsonl").write_text("\n".join([*rows, '{"url": "0.pn']), encoding="utf-8")
    preprocess(tmp_path / "list.jsonl", tmp_path / "out", extra_keys=["note"], max_bad_fraction=0.7)
    assert {sample["txt"].decode() for sample in read_samples(tmp_path / "out")} == {"fine", "a \U0001f600"}
    report = read_report(tmp_path / "out")
    assert report["failed"] == {"not Unicode": 2, "bad JSON": 1}
    assert report["examples"]["not Unicode"] == ["list.jsonl row 1", "list.jsonl row 2"]
    with pytest.raises(ValueError, match=r"3 of 5 images failed"):
        preprocess(tmp_path / "list.jsonl", tmp_path / "few", extra_keys=["note"])
    (tmp_path / "in").mkdir()
    shutil.copy(tmp_path / "0.png", tmp_path / "in" / "0.png")
    (tmp_path / "in" / "0.json").write_text(json.dumps({"caption": "cut \ud83d"}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"1 of 1 images failed \(1 not Unicode, as 0/0"):
        preprocess(tmp_path / "in", tmp_path / "pairs")


UVX = """#!{python}
import io, json, os, sys, tarfile
import pyarrow.parquet as pq
from PIL import Image
flags = dict(word[2:].split("=", 1) for word in sys.argv if word.startswith("--") and "=" in word)
folder, size = flags["output_folder"], int(flags["number_sample_per_shard"])
os.makedirs(folder, exist_ok=True)
rows = []
for name in sorted(os.listdir(flags["url_list"])):
    rows += pq.read_table(flags["url_list"] + "/" + name).to_pylist()
for number, first in enumerate(range(0, len(rows), size)):
    if os.path.exists(f"{{folder}}/{{number:05d}}_stats.json"):
        continue  # img2dataset keeps finished shards, too
    part = rows[first : first + size]
    with tarfile.open(f"{{folder}}/{{number:05d}}.tar", "w") as tar:
        for row_number, row in enumerate(part):
            picture = io.BytesIO()
            Image.new("RGB", (16, 16)).save(picture, "PNG")
            members = {{"png": picture.getvalue(), "txt": row["caption"].encode(), "json": json.dumps(row).encode()}}
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{{number:05d}}{{row_number:04d}}.{{suffix}}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with open(f"{{folder}}/{{number:05d}}_stats.json", "w") as file:
        json.dump({{"status_dict": {{"success": len(part)}}}}, file)
"""


@pytest.fixture
def uvx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for uvx that "downloads" made-up pictures, shard by shard as img2dataset does."""
    pytest.importorskip("pyarrow")
    path = tmp_path / "bin" / "uvx"
    path.parent.mkdir()
    path.write_text(UVX.format(python=sys.executable), encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize("change", ["list", "same_size", "caption_key", "samples_per_shard"])
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.usefixtures("uvx")
def test_downloads_for_another_list_are_never_used(
    tmp_path: Path, change: str, is_shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(name: str, what: str, num_rows: int) -> Path:
        lines = [f"http://made.up/{n}.png,{what} {n},{what} no. {n}" for n in range(num_rows)]
        (tmp_path / name).write_text("\n".join(["url,caption,alt", *lines, ""]), encoding="utf-8")
        return tmp_path / name

    shared: dict[str, Any] = {"download_folder": str(tmp_path / "downloads")} if is_shared else {"overwrite": True}
    settings = {"samples_per_shard": 4} | shared
    cats = write("cats.csv", "cat", 6)
    with monkeypatch.context() as patch:  # killed when the first list is downloaded

        def stop(*args: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(image_caption_job, "run_tasks", stop)
        with pytest.raises(KeyboardInterrupt):
            preprocess(cats, tmp_path / "first", **settings)
    output = tmp_path / ("second" if is_shared else "first")
    if change in ("list", "same_size"):
        dogs = write("dogs.csv" if change == "list" else "cats.csv", "dog", 6)
        preprocess(dogs, output, **settings)
        expected = {f"dog {n}" for n in range(6)}
    elif change == "caption_key":
        preprocess(cats, output, caption_key="alt", **settings)
        expected = {f"cat no. {n}" for n in range(6)}
    else:
        preprocess(cats, output, **settings | {"samples_per_shard": 5})
        expected = {f"cat {n}" for n in range(6)}
    assert sorted(sample["txt"].decode() for sample in read_samples(output)) == sorted(expected)


@pytest.mark.usefixtures("uvx")
def test_a_killed_job_goes_on_with_what_it_has_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"url": f"http://made.up/{n}.png", "caption": f"cat {n}"} for n in range(6)]
    (tmp_path / "cats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run_tasks = image_caption_job.run_tasks

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(image_caption_job, "run_tasks", stop)
    with pytest.raises(KeyboardInterrupt):
        preprocess(tmp_path / "cats.jsonl", tmp_path / "out")
    tars = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.download").rglob("*.tar")}
    assert tars

    def check(*args: Any) -> Any:
        assert {path: path.stat().st_mtime_ns for path in tars} == tars, "a finished download was made again"
        return run_tasks(*args)

    monkeypatch.setattr(image_caption_job, "run_tasks", check)
    preprocess(tmp_path / "cats.jsonl", tmp_path / "out")
    assert read_report(tmp_path / "out")["samples"] == 6
    assert not (tmp_path / "out.download").exists()


@pytest.fixture
def server(pairs: Path) -> Iterator[str]:
    """A web server for the pairs."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    handler = functools.partial(Handler, directory=str(pairs))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uvx") is None, reason="uvx runs img2dataset")
def test_urls_are_downloaded_by_img2dataset_and_failures_reported(pairs: Path, tmp_path: Path, server: str) -> None:
    images = [path.relative_to(pairs) for path in sorted(pairs.glob("part*/*")) if path.suffix in (".png", ".jpg")]
    rows = [{"url": f"{server}/{path}", "caption": path.name, "who": "Ann"} for path in images]
    rows += [{"url": f"{server}/{name}", "caption": "x", "who": "Ann"} for name in ("none.png", "readme.md")]
    rows.append({"url": str(pairs / "both.v2.image_0.png"), "caption": "local", "who": "Ann"})
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    preprocess(tmp_path / "list.jsonl", tmp_path / "out", extra_keys=["who"], download_retries=0)
    report = read_report(tmp_path / "out")
    assert report["samples"] == len(images) + 1
    reasons = {reason: report["examples"][reason][0] for reason in report["failed"]}
    assert reasons["download: bad image"].startswith(f"{server}/readme.md")
    assert [name for reason, name in reasons.items() if "404" in reason] == [f"{server}/none.png"]
    samples = read_samples(tmp_path / "out")
    captions = {sample["txt"].decode() for sample in samples}
    assert captions == {path.name for path in images} | {"local"}
    assert {json.loads(sample["json"])["who"] for sample in samples} == {"Ann"}
    assert not Path(f"{tmp_path / 'out'}.download").exists()


def test_without_uvx_the_error_says_what_to_do(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "list.jsonl").write_text('{"url": "http://127.0.0.1:9/a.png", "caption": "a"}\n', encoding="utf-8")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"uvx is not installed. Install uv"):
        preprocess(tmp_path / "list.jsonl", tmp_path / "out")
