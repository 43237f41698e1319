"""The report: one page that loads nothing, of whatever is there, whatever the files hold."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vla_foundry.evaluation.pictures import Film, animate_film
from vla_foundry.evaluation.results import EpisodeResult, write_results
from vla_foundry.quickstart.report import write_page
from vla_foundry.quickstart.steps import Step
from vla_foundry.quickstart.vla import LABELS, NUM_EPISODES, TASKS

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u202e"
TRUTH = "A drawer, open. Handle: row 3, column 4. Gripper: row 2, column 6. From it: left, ahead, below."


class Elements(HTMLParser):
    """The elements of a page, and its visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def sources(self) -> Iterator[str]:
        for _, attributes in self.tags:
            for name in ("src", "srcset", "href"):
                if attributes.get(name):
                    yield str(attributes[name])


def write_run(run: Path) -> None:
    lines = [{"kind": "train", "step": step, "loss": 100 / step} for step in (1, 10, 100)]
    lines.append({"kind": "validation", "step": 100, "loss": 1.5})
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def film_of(num_frames: int) -> bytes:
    film = Film(80)
    for number in range(num_frames):
        film.add(number, np.full((32, 32, 3), number * 37 % 256, dtype=np.uint8))
    return film.save()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A quickstart's folder after all stages, as small as it can be."""
    for stage, run in (("llm", "llm"), ("vlm", "vlm"), ("vla", "vla"), ("vla", "vla_from_nothing")):
        write_run(tmp_path / stage / "runs" / run)
    (tmp_path / "llm/losses.json").write_text('{"held_out": 5.2, "unigram": 6.4}', encoding="utf-8")
    (tmp_path / "llm/generated.txt").write_text(f"Return the {HOSTILE}\n", encoding="utf-8")
    (tmp_path / "vlm/scenes/validation").mkdir(parents=True)
    rows = []
    for number, caption in enumerate((TRUTH, TRUTH.replace("open", "closed"), HOSTILE)):
        name = f"{number:08d}.png"
        Image.new("RGB", (8, 8)).save(tmp_path / "vlm/scenes/validation" / name)
        rows.append({"picture": name, "caption": caption, "truth": TRUTH})
    (tmp_path / "vlm/captions.json").write_text(json.dumps({"captions": rows}), encoding="utf-8")
    results = tmp_path / "vla" / "evaluation"
    for model, successes in zip(LABELS, (12, 2, 0, 0), strict=True):
        for task in TASKS:
            episodes = [
                EpisodeResult(
                    task=task,
                    seed=seed,
                    outcome="success" if seed < successes else "failure",
                    num_steps=9,
                    instruction=HOSTILE,
                )
                for seed in range(12)
            ]
            path = results / model / task / "rollouts" / "2026-01-01T00-00-00" / "results.json"
            write_results(path, episodes, max_sample_size=NUM_EPISODES, settings={})
    (results / "policy" / TASKS[0] / "rollouts/2026-01-01T00-00-00" / TASKS[0] / "demonstration_0").mkdir(parents=True)
    (find_film(tmp_path)).write_bytes(film_of(90))
    (tmp_path / "vla/action_error.txt").write_text("  errors\n", encoding="utf-8")
    return tmp_path


def find_film(folder: Path) -> Path:
    (found,) = (folder / "vla").rglob("demonstration_0")
    return found / "video.mp4"


def read_page(folder: Path) -> tuple[str, Elements]:
    steps = [Step(name="train", what=f"Train {HOSTILE}", words=("train", HOSTILE))]
    text = write_page(folder, steps, folder / "done").read_text(encoding="utf-8")
    return text, Elements(text)


def test_the_page_shows_all_stages_and_loads_nothing(folder: Path) -> None:
    (folder / "done").mkdir()
    (folder / "done/train.done").write_text("fingerprint\n61.2\n120.9\n", encoding="utf-8")
    text, page = read_page(folder)
    assert re.findall(r"<p class=missing>.*", text) == []
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert {source.split(";")[0] for source in page.sources()} == {"data:image/png", "data:image/webp"}
    # two policies' curves and their held-out dots, the language model's, and the vision-language model's
    assert sum(tag == "polyline" for tag in tags) == 2 * 4
    assert [tag for tag in tags if tag in ("mark", "ins")][:2] == ["mark", "ins"]
    assert "✓ right" in page.text
    assert "policy against 'no motion': better" in page.text
    assert "61" in page.text
    assert "\u202e" not in text


def test_a_goal_is_neither_reached_nor_missed_before_all_policies_ran(folder: Path) -> None:
    assert "✓ reached" in read_page(folder)[1].text.split("1. A language model")[0]
    shutil.rmtree(folder / "vla/evaluation/random")
    goals = read_page(folder)[1].text.split("1. A language model")[0]
    assert "the policy is still to be compared with: random motion" in goals


def test_a_film_is_an_animation_of_few_frames() -> None:
    animation, still = animate_film(film_of(90))
    with Image.open(io.BytesIO(animation)) as image:
        assert image.format == "WEBP"
        assert image.n_frames == 40  # pyright: ignore[reportAttributeAccessIssue]
    with Image.open(io.BytesIO(still)) as image:
        assert np.asarray(image).mean() == pytest.approx(88 * 37 % 256, abs=6)


def test_a_stage_that_has_not_run_is_said(tmp_path: Path) -> None:
    write_run(tmp_path / "llm/runs/llm")
    text, page = read_page(tmp_path)
    assert page.text.count("This stage has not run") == 2
    assert "losses.json does not exist yet" in page.text
    assert "polyline" in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("llm/runs/llm/metrics.jsonl", b"\xff\x00"),
        ("llm/runs/llm/metrics.jsonl", b'{"kind": "train", "step": 1, "loss": [NaN]}'),
        ("llm/runs/llm/metrics.jsonl", b""),
        ("llm/losses.json", b'{"held_out": "x"}'),
        ("vlm/captions.json", b'{"captions": [3]}'),
        ("vlm/captions.json", b'{"captions": [{"picture": "../../a", "caption": "", "truth": ""}]}'),
        ("vla/evaluation/policy/other/rollouts/t/results.json", b"[]"),
        ("video", b"no film"),
    ],
)
def test_a_broken_file_is_said_and_the_rest_is_shown(folder: Path, name: str, content: bytes) -> None:
    path = find_film(folder) if name == "video" else folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    text, page = read_page(folder)
    assert 1 <= text.count("<p class=missing>") <= 3
    assert text.count("\n") < 400
    assert "Times and commands" in page.text
    assert "polyline" in text
