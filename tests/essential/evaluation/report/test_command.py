"""Reports of made-up results with hostile names, and of the published ones."""

import csv
import json
import resource
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from vla_foundry.evaluation.comparison.family import read_family
from vla_foundry.evaluation.report.command import main, write_report
from vla_foundry.params.commands.evaluation import ReportParams

HOSTILE = "<script>alert(1)</script>\"'&|`$x$"
FILES = ("report.html", "report.md", "violins.png", "violins.svg", "heat_map.png", "heat_map.svg", "rates.csv")


def write(
    root: Path, model: str, task: str, outcomes: list[bool | None], *, seconds: float = 9.0, folder: str = ""
) -> Path:
    path = root / model / (folder or task) / "rollouts" / "t" / "results.json"
    path.parent.mkdir(parents=True)
    episodes = [
        {
            "skill_type": task,
            "scenario_index": index,
            "is_success": bool(outcome),
            "total_time": seconds,
            "failure_message": None if outcome is not None else "OSError: [Errno 28] <b>No space</b> left on device",
        }
        for index, outcome in enumerate(outcomes)
    ]
    path.write_text(json.dumps({"max_sample_size_per_model": 50, "evaluations": episodes}), encoding="utf-8")
    return path


class Page(HTMLParser):
    """Collects the tags, links and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_report_shows_what_happened_and_runs_nothing_from_data(tmp_path: Path) -> None:
    root = tmp_path / "results"
    hostile = HOSTILE.replace("/", "")
    write(root, "good", HOSTILE, [True] * 50, folder="task")
    path = write(root, hostile, HOSTILE, [None, None, *[False] * 48], folder="task")
    write(root, "=cmd()", HOSTILE, [False] * 50, folder="task")
    write(root, "\u4e2d\u202e\n", HOSTILE, [None] * 3, folder="task")
    video = path.parent / 'x "><img src=x onerror=alert(1)>%23#.mp4'
    video.touch()
    (root / "good" / "contact_sheet.png").touch()
    page = write_report(ReportParams(results=str(root)))
    assert page == root / "report" / "report.html"
    assert all((page.parent / name).stat().st_size > 100 for name in FILES)
    found = Page(page)
    assert not {"script", "img", "b", "link", "iframe"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "src"]
    links = [unquote(value or "") for name, value in found.attributes if name == "href"]
    assert all((page.parent / link).exists() for link in links)
    assert len(links) == 2
    assert hostile in found.text
    # a screen reader finds a table below each figure, and a phone its own width
    parts = page.read_text(encoding="utf-8").split("<svg viewBox")
    assert all("<table>" in part for part in parts[1:])
    assert ("name", "viewport") in found.attributes
    assert "<b>No space</b>" in found.text
    assert "without a rollout that counts: \u4e2d\ufffd\ufffd." in found.text
    for name in ("violins.svg", "heat_map.svg"):
        assert "<script>" not in (page.parent / name).read_text(encoding="utf-8")
    assert "<script" not in (page.parent / "report.md").read_text(encoding="utf-8")
    rates = {row["model"]: row for row in rows_of(page.parent / "rates.csv")}
    assert rates.keys() == {"good", hostile, "'=cmd()"}
    assert (rates["good"]["letters"], rates[hostile]["letters"]) == ("a", "b")
    assert (rates[hostile]["rollouts"], rates[hostile]["invalid"]) == ("48", "2")
    failures = {row["model"]: row for row in rows_of(page.parent / "failures.csv")}
    assert failures[hostile]["infrastructure"] == "2"


def test_what_a_reader_picks_changes_no_letter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, rate in enumerate((10, 24, 32, 45)):
        for task in ("lift", "push"):
            write(tmp_path / "r", f"m{number}", task, [index < rate for index in range(50)])
    (tmp_path / "r" / "rename.yaml").write_text("tasks: {lift: Lift it}\ntask_groups: {easy: [push]}", encoding="utf-8")
    main([str(tmp_path / "r")])
    page = (tmp_path / "r" / "report" / "report.md").read_text(encoding="utf-8")
    assert "mean of 2: m3 is better than m0, decided after " in page
    assert "400 of 400 planned rollouts were run; 0 are saved so far." in page
    whole = {(row["task"], row["model"]): row for row in rows_of(tmp_path / "r" / "report" / "rates.csv")}
    main([str(tmp_path / "r"), "--models", "m1,m2", "--tasks", "Lift it", "--output", str(tmp_path / "part")])
    part = {(row["task"], row["model"]): row for row in rows_of(tmp_path / "part" / "rates.csv")}
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'part' / 'report.html'}\n")
    assert part.keys() == {(task, model) for task in ("lift", "all tasks") for model in ("m1", "m2")}
    assert all(whole[key] == row for key, row in part.items())
    assert "2 of them are shown" in (tmp_path / "part" / "report.md").read_text(encoding="utf-8")
    main([str(tmp_path / "r"), "--tasks", "easy", "--family", "all", "--output", str(tmp_path / "all")])
    assert {row["task"] for row in rows_of(tmp_path / "all" / "rates.csv")} == {"push", "all tasks"}


def test_the_family_of_a_manifest_is_never_weakened(tmp_path: Path) -> None:
    for model in ("a", "b", "c"):
        write(tmp_path, model, "lift", [True, False] * 10)
    (tmp_path / "family.yaml").write_text("models: [a, b, later]\ntasks: [lift]\nfamily: all\n", encoding="utf-8")
    with pytest.raises(ValueError, match="declares the family 'all'"):
        write_report(ReportParams(results=str(tmp_path), family="column"))
    with pytest.raises(ValueError, match="model 'c' is unknown"):
        write_report(ReportParams(results=str(tmp_path), models=["c"]))
    with pytest.raises(ValueError, match=r"task 'lifts' is unknown. Did you mean 'lift'"):
        write_report(ReportParams(results=str(tmp_path), tasks=["lifts"]))
    with pytest.raises(ValueError, match="no task here was published"):
        write_report(ReportParams(results=str(tmp_path), against="CS/LBM-MT"))
    assert not (tmp_path / "report").exists()
    page = write_report(ReportParams(results=str(tmp_path)))
    assert {row["model"] for row in rows_of(page.parent / "budget.csv")} == {"a", "b"}
    digest = read_family(tmp_path).digest  # type: ignore[union-attr]
    assert f"family.yaml declares the family (SHA-256 {digest[:16]})" in page.read_text(encoding="utf-8")


def test_trivial_starts_are_shown_and_episodes_that_do_not_count_are_refused(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path, f"m{number}", "lift", [True] * 5, seconds=0.1)
    page = write_report(ReportParams(results=str(tmp_path)))
    (row,) = rows_of(page.parent / "trivial.csv")
    assert (row["trivial"], row["floor"]) == ("5", "1")
    assert {row["without trivial starts"] for row in rows_of(page.parent / "readings.csv")} == {""}
    (tmp_path / "none").mkdir()
    write(tmp_path / "none", "m", "lift", [None] * 3)
    with pytest.raises(ValueError, match="no rollouts that count yet: all 3 are pending or invalid"):
        write_report(ReportParams(results=str(tmp_path / "none")))


def test_models_that_share_one_task_or_none(tmp_path: Path) -> None:
    for model, tasks in {"a": ("lift", "push"), "b": ("push",)}.items():
        for task in tasks:
            write(tmp_path / "one", model, task, [True, False] * 10)
    page = write_report(ReportParams(results=str(tmp_path / "one")))
    assert "all tasks: mean of 1" in page.read_text(encoding="utf-8")
    write(tmp_path / "two", "a", "lift", [True, False] * 10)
    write(tmp_path / "two", "b", "push", [True, False] * 10)
    page = write_report(ReportParams(results=str(tmp_path / "two")))
    assert {row["task"] for row in rows_of(page.parent / "rates.csv")} == {"lift", "push"}


@pytest.mark.shared_data
def test_the_published_report_in_time_and_size(shared_data: Path, tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(shared_data / "lbm_eval_results.tar.xz") as archive:
        archive.extractall(tmp_path / "results", filter="data")
    words = ["-m", "vla_foundry.cli", "report", str(tmp_path / "results"), "--output", str(tmp_path / "report")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, *words], check=True)
    # 4 s on a free machine; a busy one counts its waiting for memory too
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 10
    page = tmp_path / "report" / "report.html"
    assert page.stat().st_size < 3_000_000
    rates = {(row["task"], row["model"]): row for row in rows_of(page.parent / "rates.csv")}
    assert len(rates) == 21 * 20 - 3 * 3
    best = rates["all tasks", "CS/Foundry-Qwen3VLA-2.1B"]
    assert (best["successes"], best["rollouts"], best["letters"]) == ("2654", "3200", "a")
    # the published interval of the pooled count
    assert (float(best["low"]), float(best["high"])) == (pytest.approx(0.816, abs=1e-3), pytest.approx(0.842, abs=1e-3))
    assert sum(int(row["trivial"]) for row in rows_of(page.parent / "trivial.csv")) == 77
    failures = rows_of(page.parent / "failures.csv")
    assert sum(int(row[kind]) for row in failures for kind in ("simulator", "infrastructure", "other")) == 196


def test_the_ten_published_wins_are_found_against_published_counts(tmp_path: Path) -> None:
    from vla_foundry.evaluation.comparison.published import find_published

    for task, count in find_published("CS/Foundry-Qwen3VLA-2.1B").items():
        successes = count.successes
        path = write(tmp_path / "r", "mine", task, [index < successes for index in range(200)])
        path.write_text(path.read_text(encoding="utf-8").replace(": 50", ": 200"), encoding="utf-8")
    page = write_report(ReportParams(results=str(tmp_path / "r"), against="CS/LBM-MT"))
    verdicts = {row["task"]: row["verdict"] for row in rows_of(page.parent / "against.csv")}
    assert sorted(verdicts.values()) == ["better"] * 11 + ["not separated"] * 6
    assert verdicts["BimanualStackPlatesOnTableFromDryingRack"] == "not separated"
    assert verdicts["all tasks"] == "better"
    write_report(ReportParams(results=str(tmp_path / "r")))
    assert not (page.parent / "against.csv").exists()


def test_a_family_declared_after_the_first_rollout_is_told(tmp_path: Path) -> None:
    manifest = tmp_path / "family.yaml"
    manifest.write_text("models: [a, b]\n", encoding="utf-8")
    digest = read_family(tmp_path).digest  # type: ignore[union-attr]
    for model, declared in (("a", digest), ("b", digest)):
        path = write(tmp_path, model, "lift", [True, False] * 10)
        values = json.loads(path.read_text(encoding="utf-8")) | {"settings": {"family": declared}}
        path.write_text(json.dumps(values), encoding="utf-8")

    def warnings() -> list[str]:
        text = Page(write_report(ReportParams(results=str(tmp_path)))).text
        return [line for line in text.splitlines() if "WARNING" in line]

    assert warnings() == []
    manifest.write_text("models: [b, a]\nalpha: 0.2\n", encoding="utf-8")
    assert [line for line in warnings() if "changed after rollouts of a, b had begun" in line]
    manifest.unlink()
    assert [line for line in warnings() if "removed after rollouts of a, b had begun" in line]
    manifest.write_text("models: [a, b]\n", encoding="utf-8")
    path.write_text(path.read_text(encoding="utf-8").replace(digest, "").replace('""', "null"), encoding="utf-8")
    assert [line for line in warnings() if "changed after rollouts of b had begun" in line]
