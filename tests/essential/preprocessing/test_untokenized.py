"""`preprocess text_untokenized`: bounded samples whose texts, in order, are the documents."""

import json
import tarfile
from pathlib import Path

import pytest

from vla_foundry.params.commands.preprocessing import PreprocessTextUntokenizedParams
from vla_foundry.preprocessing.manifest import verify_dataset
from vla_foundry.preprocessing.text.text_job import preprocess_text_untokenized


def read_samples(folder: Path) -> dict[str, dict]:
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
    samples = read_samples(tmp_path / "out")
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
    with pytest.raises(ValueError, match="max_sample_bytes must be 64 or more, got 5"):
        PreprocessTextUntokenizedParams(source=["x"], output="y", max_sample_bytes=5)
