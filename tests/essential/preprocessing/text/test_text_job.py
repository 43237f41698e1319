"""Jobs over documents: every document comes out whole, and the bytes depend on nothing but text, params and seed."""

import getpass
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from vla_foundry.params.commands.preprocessing import PreprocessTextParams, PreprocessTextUntokenizedParams
from vla_foundry.preprocessing.manifest import build_manifest, verify_dataset
from vla_foundry.preprocessing.text import text_job
from vla_foundry.preprocessing.text.text_job import preprocess_text, preprocess_text_untokenized
from vla_foundry.storage import uri


def read_folder(folder: Path) -> dict[str, bytes]:
    """{path: content} of every file below a folder; the commit of the code may change while tests run."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    if "provenance.json" in files:
        files["provenance.json"] = re.sub(rb'"git_commit": .*', b"", files["provenance.json"])
    return files


def read_records(folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every record of a dataset in order, with its document ends; shares no code with the package."""
    for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines():
        with tarfile.open(folder / (json.loads(line)["shard"] + ".tar")) as tar:
            members = {member.name.partition(".")[2]: tar.extractfile(member).read() for member in tar}  # type: ignore
        info = json.loads(members["records.json"])
        suffix, dtype = {"uint16": ("tokens.u16", "<u2"), "uint32": ("tokens.u32", "<u4")}[info["dtype"]]
        tokens = np.frombuffer(members[suffix], dtype).reshape(info["num_sequences"], info["record_length"])
        ends = np.frombuffer(members["document_ends.u32"], "<u4")
        offsets = np.frombuffer(members["document_offsets.u64"], "<u8").astype(int)
        for number in range(len(tokens)):
            yield tokens[number], ends[offsets[number] : offsets[number + 1]]


def read_documents(folder: Path) -> list[str]:
    """Decode every document of a dataset, from its records and boundaries."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    eos_token_id = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["dataset"]["eos_token_id"]
    documents, open_tokens = [], []
    for tokens, ends in read_records(folder):
        start = 0
        for end in ends.tolist():
            open_tokens += tokens[start:end].tolist()
            start = end
            if open_tokens[-1] == eos_token_id:
                assert open_tokens.count(eos_token_id) == 1
                documents.append(tokenizer.decode(open_tokens[:-1], skip_special_tokens=False))
                open_tokens = []
    assert not open_tokens
    return documents


@pytest.fixture
def params(source: Path, tokenizer: Path, tmp_path: Path) -> PreprocessTextParams:
    """A job of several tasks and shards, in this process."""
    return PreprocessTextParams(
        source=[str(source)],
        output=str(tmp_path / "out"),
        tokenizer=str(tokenizer),
        seq_len=128,
        samples_per_shard=100,
        num_workers=0,
    )


@pytest.fixture(scope="session")
def expected(source: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of that job, made without interruption."""
    folder = tmp_path_factory.mktemp("expected") / "out"
    preprocess_text(
        PreprocessTextParams(
            source=[str(source)],
            output=str(folder),
            tokenizer=str(tokenizer),
            seq_len=128,
            samples_per_shard=100,
            num_workers=0,
        )
    )
    return folder


def test_every_document_comes_out_whole(expected: Path, documents: list[str]):
    found = read_documents(expected)
    assert Counter(found) == Counter(documents)
    assert found != documents
    lengths = {len(tokens) for tokens, _ in read_records(expected)}
    assert lengths == {129}
    assert not verify_dataset(str(expected))


def test_counts_are_right(expected: Path, documents: list[str]):
    facts = json.loads((expected / "provenance.json").read_text(encoding="utf-8"))["dataset"]
    records = list(read_records(expected))
    manifest = [json.loads(line) for line in (expected / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    assert facts["num_documents"] == len(documents)
    assert facts["num_tokens"] == sum(int(ends[-1]) for _, ends in records)
    assert facts["num_tokens"] + facts["num_padding"] == 129 * len(records) == 129 * facts["num_sequences"]
    assert facts["num_sequences"] == sum(entry["num_sequences"] for entry in manifest)
    assert facts["num_padding"] < 129 * len(manifest)
    assert facts["dtype"] == "uint16"
    tokenizer = Tokenizer.from_file(str(expected / "tokenizer" / "tokenizer.json"))
    assert facts["vocab_size"] == tokenizer.get_vocab_size()
    assert tokenizer.id_to_token(facts["eos_token_id"]) == "<|endoftext|>"


def test_shards_are_neither_too_large_nor_crumbs(expected: Path, params: PreprocessTextParams):
    preprocess_text(replace(params, samples_per_shard=30))
    for folder, most in ((expected, 100), (Path(params.output), 30)):
        sizes: dict[str, list[int]] = {}
        for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            sizes.setdefault(entry["shard"][:12], []).append(entry["num_sequences"])
        assert max(max(of_task) for of_task in sizes.values()) <= most
        assert all(min(of_task) >= most // 2 for of_task in sizes.values() if len(of_task) > 1)
        assert len(sizes) > 10


def test_ray_workers_give_the_same_bytes(params: PreprocessTextParams, expected: Path, ray_cluster: str):
    preprocess_text(replace(params, num_workers=None))
    assert read_folder(Path(params.output)) == read_folder(expected)


def test_seed_changes_the_order_and_nothing_else(params: PreprocessTextParams, expected: Path):
    preprocess_text(replace(params, seed=1))
    found = read_documents(Path(params.output))
    assert found != read_documents(expected)
    assert Counter(found) == Counter(read_documents(expected))


def test_object_store_in_and_out_gives_the_same_shards(
    params: PreprocessTextParams, source: Path, expected: Path, s3_bucket: str, tmp_path: Path, ray_cluster: str
):
    for path in source.iterdir():
        uri.upload(str(path), f"{s3_bucket}/in/{path.name}")
    there = replace(params, source=[f"{s3_bucket}/in"], output=f"{s3_bucket}/out", num_workers=None)
    preprocess_text(there)
    names = uri.list_relative(f"{s3_bucket}/out")
    for name in names:
        uri.download(f"{s3_bucket}/out/{name}", str(tmp_path / "back" / name))
    assert read_folder(tmp_path / "back") == read_folder(expected)
    assert not verify_dataset(f"{s3_bucket}/out")
    preprocess_text(there)  # complete: nothing is done
    assert uri.list_relative(f"{s3_bucket}/out") == names


COMMAND = [sys.executable, "-m", "vla_foundry.cli", "preprocess", "text"]


def start_command(params: PreprocessTextParams, **environment: str) -> subprocess.Popen:
    words = ["--source", *params.source, "--output", params.output, "--tokenizer", params.tokenizer]
    words += ["--seq_len", str(params.seq_len), "--samples_per_shard", str(params.samples_per_shard)]
    words += ["--num_workers", str(params.num_workers)]
    if params.ray_address:
        words += ["--ray_address", params.ray_address]
    return subprocess.Popen(COMMAND + words, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def wait_until(is_time: Callable[[], bool], process: subprocess.Popen) -> None:
    stop = time.monotonic() + 60
    while not is_time():
        assert process.poll() is None, "the process ended too early"
        assert time.monotonic() < stop
        time.sleep(0.001)


def kill_when(process: subprocess.Popen, is_time: Callable[[], bool]) -> None:
    """Kill a process, uncatchably, as soon as something holds."""
    wait_until(is_time, process)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("on_ray", [False, True])
def test_killed_run_goes_on_to_the_same_bytes(
    params: PreprocessTextParams, expected: Path, on_ray: bool, request: pytest.FixtureRequest
):
    output = Path(params.output)
    if on_ray:
        address = request.getfixturevalue("ray_cluster")
        params = replace(params, num_workers=2, ray_address=address)
    num_tasks = len({name[:12] for name in read_folder(expected) if name.startswith("shard_")})
    for num_done in (num_tasks // 2,) if on_ray else (1, num_tasks // 2):
        process = start_command(params)
        kill_when(process, lambda least=num_done: len(list(output.glob("_progress/task_*"))) >= least)
        # it was killed with some tasks done, and some not
        assert num_done <= len(list(output.glob("_progress/task_*"))) < num_tasks
        assert not (output / "manifest.jsonl").exists()
    shards = {path: path.stat().st_mtime_ns for path in output.glob("shard_*.tar")}
    finished = {
        json.loads(path.read_text(encoding="utf-8"))["entries"][0]["shard"] for path in output.glob("_progress/task_*")
    }
    assert start_command(params).wait() == 0
    assert read_folder(output) == read_folder(expected)
    for path, time_ns in shards.items():
        assert path.stem not in finished or path.stat().st_mtime_ns == time_ns, "a finished task was done again"


def test_half_written_files_of_a_killed_run_go(params: PreprocessTextParams, expected: Path):
    output = Path(params.output)
    kill_when(start_command(params), lambda: bool(list(output.glob("_progress/task_*"))))
    (output / ".shard_000009_000.tar.0123456789ab.tmp").write_bytes(b"half")
    (output / "shard_000009_000.tar").write_bytes(b"of a task that is not done")
    with pytest.raises(ValueError, match=r"was not finished .*delete .*_progress to keep what there is"):
        build_manifest(str(output))
    (output / "manifest.jsonl").write_text("", encoding="utf-8")  # without provenance.json it does not end the job
    preprocess_text(params)
    assert read_folder(output) == read_folder(expected)


def test_complete_dataset_is_left_alone(params: PreprocessTextParams, capsys: pytest.CaptureFixture[str]):
    preprocess_text(params)
    before = {path: path.stat().st_mtime_ns for path in Path(params.output).rglob("*")}
    preprocess_text(replace(params, max_bad_fraction=0.5))
    assert {path: path.stat().st_mtime_ns for path in Path(params.output).rglob("*")} == before
    assert "is complete; nothing to do" in capsys.readouterr().out


def test_changed_configuration_is_refused_or_replaces(params: PreprocessTextParams, expected: Path):
    preprocess_text(replace(params, seq_len=64, seed=3))
    with pytest.raises(ValueError, match=r"was made with params\.seed 3 \(now 0\); params\.seq_len 64 \(now 128\)\."):
        preprocess_text(params)
    preprocess_text(replace(params, overwrite=True))
    assert read_folder(Path(params.output)) == read_folder(expected)


def test_changed_source_is_refused(params: PreprocessTextParams, write_jsonl, tmp_path: Path):
    params = replace(params, source=[str(tmp_path / "in")])
    write_jsonl(tmp_path / "in" / "a.jsonl", ["one", "two"])
    preprocess_text(params)
    write_jsonl(tmp_path / "in" / "b.jsonl", ["three"])
    with pytest.raises(ValueError, match=r"source\.num_files 1 \(now 2\)"):
        preprocess_text(params)


def test_results_of_files_that_were_edited_since_are_not_kept(
    params: PreprocessTextParams, write_jsonl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    params = replace(params, source=[str(tmp_path / "in")])
    path = write_jsonl(tmp_path / "in" / "a.jsonl", ["a cat", "a dog"])

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(text_job, "run_unfinished", stop)
        with pytest.raises(KeyboardInterrupt):
            preprocess_text(params)
    os.utime(write_jsonl(path, ["a cow", "a pig"]), ns=(0, 1))
    with pytest.raises(ValueError, match=r"was begun with source files that were modified since then\. .*--overwrite"):
        preprocess_text(params)
    preprocess_text(replace(params, overwrite=True))
    assert sorted(read_documents(Path(params.output))) == ["a cow", "a pig"]
    os.utime(path, ns=(0, 2))
    preprocess_text(params)  # complete: another machine may have other times


def test_missing_shard_of_a_complete_dataset_is_seen(params: PreprocessTextParams, expected: Path):
    preprocess_text(params)
    next(Path(params.output).glob("shard_*.tar")).unlink()
    with pytest.raises(ValueError, match="which is now missing or cut"):
        preprocess_text(params)
    preprocess_text(replace(params, overwrite=True))
    assert read_folder(Path(params.output)) == read_folder(expected)


def test_one_process_at_a_time_writes_to_a_folder(params: PreprocessTextParams, expected: Path):
    output = Path(params.output)
    process = start_command(params)
    try:
        wait_until(lambda: (output.parent / f".{output.name}.lock").exists() and output.exists(), process)
        os.kill(process.pid, signal.SIGSTOP)
        message = f"The output folder {output} is in use by process {process.pid} on {socket.gethostname()}. "
        with pytest.raises(ValueError, match=f"^{re.escape(message)}Wait until .* choose another --output"):
            preprocess_text(params)
    finally:
        process.kill()  # a dead owner holds nothing
        process.wait()
    preprocess_text(params)
    assert read_folder(output) == read_folder(expected)


def test_foreign_folder_is_never_touched(params: PreprocessTextParams):
    output = Path(params.output)
    output.mkdir()
    (output / "thesis.tex").write_text("years of work", encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds other files"):
            preprocess_text(replace(params, overwrite=overwrite))
    assert read_folder(output) == {"thesis.tex": b"years of work"}


def test_output_within_the_source_is_refused(params: PreprocessTextParams, source: Path):
    with pytest.raises(ValueError, match="lies within --source"):
        preprocess_text(replace(params, output=str(source / "out")))


def test_all_kinds_of_files_go_in_together(params: PreprocessTextParams, write_jsonl, tmp_path: Path):
    folder = tmp_path / "in"
    write_jsonl(folder / "a.jsonl", ["one <|endoftext|> is no end", "two"])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "three"}).encode()))
    pq.write_table(pa.table({"text": ["four", "five"]}), folder / "c.parquet")
    (folder / "d.txt").write_text("six\nlines\n" * 1000, encoding="utf-8")  # longer than a record, and than a shard
    preprocess_text(
        replace(params, source=[str(folder / "*.jsonl*"), str(folder / "c.parquet"), str(folder / "d.txt")])
    )
    found = read_documents(Path(params.output))
    assert Counter(found) == Counter(
        ["one <|endoftext|> is no end", "two", "three", "four", "five", "six\nlines\n" * 1000]
    )


def test_large_vocabulary_takes_four_bytes(params: PreprocessTextParams, write_jsonl, tmp_path: Path):
    from tokenizers import models, pre_tokenizers

    vocabulary = {f"w{number}": number for number in range(70_000)} | {"<eos>": 70_000}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>"])
    (tmp_path / "words").mkdir()
    tokenizer.save(str(tmp_path / "words" / "tokenizer.json"))
    write_jsonl(tmp_path / "in" / "a.jsonl", ["w69999 w5 w65536"])
    params = replace(params, source=[str(tmp_path / "in")], tokenizer=str(tmp_path / "words"), seq_len=4)
    with pytest.raises(ValueError, match=r"has no end-of-sequence token\. Name one with --eos_token"):
        preprocess_text(params)
    preprocess_text(replace(params, eos_token="<eos>"))
    [(tokens, ends)] = read_records(Path(params.output))
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == [69999, 5, 65536, 70_000, 0]
    assert ends.tolist() == [4]


def test_bad_rows_are_counted_and_bounded(
    params: PreprocessTextParams, write_jsonl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write_jsonl(tmp_path / "in" / "a.jsonl", [f"document {number}" for number in range(97)])
    path.write_bytes(path.read_bytes() + b'broken\n{"text": ""}\n{"text": null}\n{"text": null}\n')
    params = replace(params, source=[str(tmp_path / "in")])
    with pytest.raises(ValueError, match=r"^3 of 100 rows are bad \(1 bad_json, as 0/a\.jsonl byte \d+; 2 null, as"):
        preprocess_text(params)
    assert not (Path(params.output) / "manifest.jsonl").exists()
    preprocess_text(replace(params, max_bad_fraction=0.05))
    counts = json.loads((Path(params.output) / "provenance.json").read_text(encoding="utf-8"))["counts"]
    assert counts["documents"] == 97
    assert counts["skipped"] == {"bad_json": 1, "empty": 1, "null": 2}
    assert re.search(r"skipped 1 bad_json: 0/a\.jsonl byte \d+\n", capsys.readouterr().out)


def test_unreadable_file_stops_the_run_by_name(params: PreprocessTextParams, write_jsonl, tmp_path: Path):
    write_jsonl(tmp_path / "in" / "a.jsonl", [f"document {number}" for number in range(100)])
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(b"broken" * 300)
    with pytest.raises(ValueError, match=r"of the text cannot be read \(1 unreadable, as 0/b\.jsonl\.gz: not valid"):
        preprocess_text(replace(params, source=[str(tmp_path / "in")], max_bad_fraction=0.02))


def test_source_without_documents_is_an_error(params: PreprocessTextParams, write_jsonl, tmp_path: Path):
    write_jsonl(tmp_path / "in" / "a.jsonl", ["", "  "])
    with pytest.raises(ValueError, match="has no documents: skipped 2 empty"):
        preprocess_text(replace(params, source=[str(tmp_path / "in")]))


def test_provenance_names_no_person_machine_or_folder(expected: Path, source: Path):
    text = (expected / "provenance.json").read_text(encoding="utf-8")
    assert str(source.parent) not in text
    assert socket.gethostname() not in text
    assert getpass.getuser() not in text
    assert os.path.expanduser("~") not in text


def test_shard_reads_as_one_webdataset_sample(expected: Path):
    from webdataset.tariterators import group_by_keys, tar_file_expander

    path = min(expected.glob("shard_*.tar"))
    with open(path, "rb") as file:
        [sample] = group_by_keys(tar_file_expander([{"url": str(path), "stream": file}]))
    assert {"tokens.u16", "document_ends.u32", "document_offsets.u64", "records.json"} <= set(sample)


def test_tokenizer_of_the_dataset_loads(expected: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(expected / "tokenizer")
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.decode(tokenizer("größere x = 12").input_ids) == "größere x = 12"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 0}, r"seq_len \(0\) must be at least 1"),
        ({"samples_per_shard": 0}, r"samples_per_shard \(0\) must be at least 1"),
        ({"source": []}, "source is empty"),
        ({"num_workers": -1}, r"num_workers \(-1\) must be at least 0"),
        ({"max_bad_fraction": 1.5}, r"max_bad_fraction \(1\.5\) must be at least 0 and at most 1"),
        ({"seed": -1}, r"seed \(-1\) must be at least 0"),
    ],
)
def test_params_say_what_is_wrong(params: PreprocessTextParams, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(params, **changes)


def test_unknown_tokenizer_is_one_line(params: PreprocessTextParams):
    with pytest.raises(ValueError, match=r"^--tokenizer 'nobody/nothing' cannot be loaded: [^\n]*$"):
        preprocess_text(replace(params, tokenizer="nobody/nothing"))


def read_untokenized(folder: Path) -> dict[str, dict]:
    samples = {}
    for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        with tarfile.open(folder / f"{entry['shard']}.tar") as tar:
            members = tar.getmembers()
            assert len(members) == entry["num_sequences"]
            for member in members:
                assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
                key, _, suffix = member.name.partition(".")
                assert suffix == "json"
                assert key not in samples
                samples[key] = json.load(tar.extractfile(member))  # type: ignore
    return samples


def test_parts_in_order_are_the_documents(source: Path, documents: list[str], tmp_path: Path):
    params = PreprocessTextUntokenizedParams(
        source=[str(source)],
        output=str(tmp_path / "out"),
        samples_per_shard=70,
        max_sample_bytes=300,
        num_workers=0,
    )
    preprocess_text_untokenized(params)
    samples = read_untokenized(tmp_path / "out")
    parts: dict[str, list[dict]] = {}
    for sample in samples.values():
        assert set(sample) == {"text", "document", "part", "is_last"}
        assert 0 < len(sample["text"].encode()) <= 300
        parts.setdefault(sample["document"], []).append(sample)
    found = []
    for pieces in parts.values():
        pieces.sort(key=lambda piece: piece["part"])
        assert [piece["part"] for piece in pieces] == list(range(len(pieces)))
        assert [piece["is_last"] for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        found.append("".join(piece["text"] for piece in pieces))
    assert sorted(found) == sorted(documents)
    assert found != documents
    facts = json.loads((tmp_path / "out" / "provenance.json").read_text(encoding="utf-8"))["dataset"]
    assert facts["kind"] == "text_untokenized"
    assert (facts["num_documents"], facts["num_sequences"]) == (len(documents), len(samples))
    assert not verify_dataset(str(tmp_path / "out"))


def test_too_small_samples_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"max_sample_bytes \(5\) must be at least 64"):
        PreprocessTextUntokenizedParams(source=["x"], output="y", max_sample_bytes=5)
