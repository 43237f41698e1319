"""The command line of `vla-foundry preprocess`."""

import json
from pathlib import Path

import pytest

from vla_foundry.preprocessing.command import JOBS, join_list_flags, main


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        (["--source", "a", "b", "--seed", "1"], ["--seed", "1", "--source", '["a", "b"]']),
        (["--source", "a", "--source=b"], ["--source", '["a", "b"]']),
        (["--source", '["a"]', "--x"], ["--x", "--source", '["a"]']),
        (["--seed", "1"], ["--seed", "1"]),
    ],
)
def test_lists_are_words(words: list[str], joined: list[str]):
    assert join_list_flags(words, ["--source"]) == joined


def test_text_goes_from_words_to_shards(tokenizer: Path, source: Path, tmp_path: Path):
    files = [str(path) for path in sorted(source.iterdir())]
    words = ["text", "--source", *files, "--output", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    main([*words, "--seq_len", "2_000", "--num_workers", "0"])
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text(encoding="utf-8"))
    assert provenance["dataset"]["seq_len"] == 2000
    assert provenance["plan"]["source"]["num_files"] == 3


def test_jobs_are_listed(capsys: pytest.CaptureFixture[str]):
    main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in JOBS)


def test_flags_of_a_job_are_explained(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        main(["text", "--help"])
    assert exit_info.value.code == 0
    assert "samples_per_shard" in capsys.readouterr().out


def test_unknown_job_is_named():
    with pytest.raises(ValueError, match=r"preprocess 'texts' is unknown\. Did you mean 'text'\?"):
        main(["texts"])


def test_missing_flag_is_named():
    with pytest.raises(ValueError, match="output"):
        main(["text", "--source", "x", "--tokenizer", "y"])
