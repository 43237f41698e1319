"""Scores of captions equal those of pycocoevalcap, and those computed by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from vla_foundry.cli import main as run_cli
from vla_foundry.evaluation.captions import score_captions, tokenize

# made with pycocoevalcap 1.2 and its PTBTokenizer: captions with their tokens, and the metrics of all
REFERENCE: dict[str, Any] = json.loads(Path(__file__).with_name("captions_reference.json").read_text(encoding="utf-8"))
BY_HAND = {
    # five words of six: exp(1 - 6/5)
    **{f"BLEU-{n}": math.exp(-0.2) for n in (1, 2, 3)},
    # no caption has four words: 1e-15 of 1e-9
    "BLEU-4": math.exp(-0.2) * 1e-6**0.25,
    # precision 1, recall 3/4; and a perfect one
    "ROUGE-L": (2.44 * 0.75 / (0.75 + 1.44) + 1) / 2,
    # 3, 2 and 1 shared n-grams, all as rare, one pair of words less; and two of four orders
    "CIDEr-D": 10 / 4 * (math.exp(-1 / 72) * (3 / 12**0.5 + 2 / 6**0.5 + 1 / 2**0.5) + 2) / 2,
}


def test_scores_are_those_of_pycocoevalcap() -> None:
    images = REFERENCE["images"]
    found = score_captions(
        {image["image"]: image["caption"] for image in images},
        {image["image"]: image["references"] for image in images},
    )
    assert list(found) == list(REFERENCE["metrics"])
    for name, value in REFERENCE["metrics"].items():
        assert found[name]["value"] == pytest.approx(value, abs=1e-9)
        assert found[name]["n"] == len(images)
        low, high = found[name]["interval"]
        assert low < value < high


def test_tokens_are_those_of_the_treebank_tokenizer() -> None:
    images = REFERENCE["images"]
    assert tokenize([image["caption"] for image in images]) == [image["tokens"][0] for image in images]
    texts = [text for image in images for text in image["references"]]
    assert tokenize(texts) == [tokens for image in images for tokens in image["tokens"][1:]]
    for line, tokens in zip(*zip(*REFERENCE["lines"], strict=True), strict=True):
        assert tokenize([line, "the end"])[0] == tokens


def test_scores_are_those_computed_by_hand() -> None:
    found = score_captions({1: "A cat sat.", 2: "the dog"}, {1: ["A cat sat down."], 2: ["The dog!"]})
    assert {name: metric["value"] for name, metric in found.items()} == pytest.approx(BY_HAND, abs=1e-8)


def test_a_perfect_caption_scores_one_and_another_zero() -> None:
    found = score_captions({1: "a red bus drives"}, {1: ["a red bus drives", "x"]})
    assert found["BLEU-4"]["value"] == pytest.approx(1)
    assert found["ROUGE-L"]["value"] == 1
    found = score_captions({1: "", 2: "no word of it"}, {1: ["a b c d"], 2: ["a red bus drives"]})
    assert [metric["value"] for metric in found.values()] == pytest.approx([0] * 6, abs=1e-6)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """The case computed by hand, as COCO files; the order of images differs."""
    annotations = [
        {"image_id": 2, "id": 0, "caption": "The dog!"},
        {"image_id": 1, "id": 1, "caption": "A cat sat down."},
    ]
    images = [{"id": 1, "file_name": "1.png"}, {"id": 2, "file_name": "2.png"}]
    text = json.dumps({"images": images, "annotations": annotations})
    (tmp_path / "annotations.json").write_text(text, encoding="utf-8")
    results = [{"image_id": 2, "caption": "the dog"}, {"image_id": 1, "caption": "A cat sat."}]
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return tmp_path


def score(coco: Path, *words: str) -> None:
    run_cli(["evaluate", "captions", "--annotations", str(coco / "annotations.json"), *words])


def test_the_command_scores_a_result_file(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score(coco, "--results", str(coco / "results.json"), "--output", str(coco / "scores" / "captions.json"))
    table = json.loads((coco / "scores" / "captions.json").read_text(encoding="utf-8"))
    assert {name: metric["value"] for name, metric in table["metrics"].items()} == pytest.approx(BY_HAND, abs=1e-8)
    assert table["name"] == "captions"
    assert table["settings"] == {"annotations": "annotations.json", "results": "results.json"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[5].startswith("CIDEr-D 5.4458 [")
    assert lines[5].endswith("] n=2")


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (
            [{"image_id": 1, "caption": "x"}],
            "lacks 1 of 2 annotated images. Caption them, or score the others with --a",
        ),
        ([{"image_id": 1, "caption": "x"}] * 2, "has two captions of image 1"),
        ([{"image_id": 9, "caption": "x"}], "image 9 is not in"),
        ([{"image_id": 1}], "is not a COCO result file of captions: an entry has no 'caption'"),
        ([{"image_id": "1", "caption": "x"}], "image_id '1' is no whole number"),
        ([{"image_id": 1, "caption": 5}], "caption of image 1 is no text"),
        ({"image_id": 1}, "is not a COCO result file"),
        ([], "lacks 2 of 2"),
    ],
)
def test_a_faulty_result_file_is_one_line(
    results: Any, message: str, coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (coco / "results.json").write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        score(coco, "--results", str(coco / "results.json"), "--output", str(coco / "scores.json"))
    assert message in capsys.readouterr().err
    assert not (coco / "scores.json").exists()


def test_missing_images_may_be_left_out(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (coco / "results.json").write_text('[{"image_id": 2, "caption": "the dog"}]', encoding="utf-8")
    score(coco, "--results", str(coco / "results.json"), "--allow_missing", "true")
    assert "ROUGE-L 1.0000 [1.0000, 1.0000] n=1" in capsys.readouterr().out
