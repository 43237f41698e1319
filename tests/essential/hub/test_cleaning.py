"""Local paths keep their last folder and name; nothing else changes."""

import json

import pytest

from vla_foundry.hub.cleaning import clean_text, read_secrets


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("/data/corpora/c4/manifest.jsonl", "c4/manifest.jsonl"),
        ("/home/somebody/manifest.jsonl", "manifest.jsonl"),
        ("/Users/some body/shards/my corpus/x", "my corpus/x"),
        ("~/runs/llm", "runs/llm"),
        ("--config_path=/data/jobs/a/job.yaml", "--config_path=a/job.yaml"),
        ("/data/jobs/a/job.yaml:12", "a/job.yaml:12"),
        *((text, text) for text in ("experiments/vla", "s3://bucket/a/b", "hf://org/name/x", "and/or", "</s>", "/top")),
        *((text, text) for text in ("https://a.org/b/c", "{{ x }}/{{ y }}", "org/name", "a // b", "1/2")),
    ],
)
def test_a_path_keeps_its_last_folder_and_name(before: str, after: str) -> None:
    assert json.loads(clean_text("config_model.json", json.dumps({"x": [before]}))) == {"x": [after]}
    assert clean_text("a/config_model.yaml", f"x: {json.dumps(before)}\n") in (
        f"x: {after}\n",
        f"x: {json.dumps(after)}\n",
    )


@pytest.mark.parametrize(
    "name", ["tokenizer/tokenizer.json", "robotics.json", "a/preprocessing_config.yaml", "notes.md"]
)
def test_names_that_look_like_paths_stay(name: str) -> None:
    text = json.dumps({"/observations/images/top": "/observations/images/top"})
    assert clean_text(name, text) == text


def test_secrets_are_values_of_variables_that_are_named_so() -> None:
    given = {
        "HF_TOKEN": "a" * 9,
        "MY_API_KEY": "b" * 9,
        "HF_TOKEN_PATH": "/a/file/of/it",
        "DB_PASSWORD": "short",
        "X": "c" * 9,
    }
    assert read_secrets(given) == [b"a" * 9, b"b" * 9]
