"""The dashboard in a real browser: figures, filters, the queue, files to save; nothing but this machine is asked."""

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from playwright.sync_api import Page, expect

from tests.essential.browser import browse, needs_browser
from vla_foundry.config.command_line import run_command
from vla_foundry.evaluation.dashboard.server import main

HOSTILE = "<img src=x onerror=alert(1)>${alert(2)}{{x}}%2e%2e"
WAIT_MS = 600_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    needs_browser,
]


def write(root: Path, model: str, task: str, num_successes: int) -> None:
    path = root / model / task / "rollouts" / "t" / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    episodes = [{"skill_type": task, "scenario_index": n, "is_success": n < num_successes} for n in range(50)]
    path.write_text(json.dumps({"max_sample_size_per_model": 50, "evaluations": episodes}), encoding="utf-8")


@contextmanager
def serve(root: Path, *words: str, password: str | None = None) -> Iterator[str]:
    """Run a dashboard of a folder, and yield its address."""
    variables = {"PYTHONPATH": str(Path(__file__).parents[1]), "VLA_FOUNDRY_PASSWORD": password}
    environment = os.environ | {name: text for name, text in variables.items() if text is not None}
    command = [sys.executable, "-m", "vla_foundry.cli", "dashboard", str(root), "--port", "0", *words]
    command += ["--plugins", "toy_simulator"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, encoding="utf-8") as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().rpartition(" ")[2].strip()
        finally:
            server.kill()


def pick(page: Page, field: str, value: str) -> None:
    page.locator(f"#{field} input").click()
    page.get_by_role("option", name=value, exact=True).click()
    page.keyboard.press("Escape")


def status_of(address: str, **headers: str) -> int:
    try:
        with urlopen(Request(address, headers=headers)) as answer:
            return answer.status
    except HTTPError as error:
        return error.code


def test_a_dashboard_in_two_browsers(tmp_path: Path) -> None:
    root = tmp_path / "results"
    for model, num in {"good": 48, "bad": 3, HOSTILE: 20}.items():
        for task in ("lift", "push"):
            write(root, model, task, num)
    (root / "good" / "clip #1.mp4").write_bytes(b"no video")
    (root / "good" / "away.mp4").symlink_to("/etc/passwd")
    faults: list[str] = []
    expect.set_options(timeout=WAIT_MS)
    with browse(faults, WAIT_MS) as open_page:
        with serve(root) as address:
            page, phone = open_page(address), open_page(address, 390)
            report = page.frame_locator("#report iframe")
            expect(report.get_by_role("heading", name="Heat map")).to_be_visible()
            letters = report.locator(".heat tr", has_text="good").locator("small").first.inner_text()
            assert HOSTILE in report.locator(".heat").inner_text()
            # what is picked changes no letter; the report is the report's own code
            pick(page, "models", "good")
            expect(report.locator(".heat tbody tr")).to_have_count(1)
            assert report.locator(".heat small").first.inner_text() == letters
            expect(report.get_by_text("1 of them are shown here, which changes no letter.")).to_be_visible()
            with page.expect_download() as saved:
                page.get_by_role("link", name="rates.csv").click()
            assert "bad" not in saved.value.path().read_text(encoding="utf-8")
            with page.expect_download() as saved:
                page.get_by_role("link", name="report.zip").click()
            names = set(zipfile.ZipFile(saved.value.path()).namelist())
            assert names >= {"report.html", "report.md", "rates.csv", "violins.svg", "heat_map.png"}
            # results arrive, and the other browser sees them by itself; a phone scrolls in one direction
            write(root, "newer", "lift", 25)
            expect(phone.frame_locator("#report iframe").locator(".heat")).to_contain_text("newer")
            assert phone.evaluate("document.documentElement.scrollWidth") <= 390
            # recordings play from this folder only
            page.get_by_role("tab", name="Recordings").click()
            pick(page, "recordings", "good/clip #1.mp4")
            expect(page.locator("#recording video")).to_have_attribute("src", "files/good/clip%20%231.mp4")
            queue_and_stop(page, phone)
            for place, status in {
                "files/good/clip%20%231.mp4": 200,
                "files/good/away.mp4": 404,
                "files/../../../../etc/passwd": 404,
                "files/%2e%2e/%2e%2e/x.mp4": 404,
                "files/good/lift/rollouts/t/results.json": 404,
                "files/report/none.csv": 404,
            }.items():
                assert status_of(address + "/" + place) == status, place
            # open pages would ask a dashboard that is gone, and report it
            page.close()
            phone.close()
        # a new dashboard finds the evaluation, which goes on where it was
        with serve(root) as address:
            page = open_page(address)
            page.get_by_role("tab", name="Experiments").click()
            expect(page.locator("#jobs")).to_contain_text("stopped")
            page.locator("#go_on").click()
            expect(page.locator("#jobs")).to_contain_text("running")
            page.locator("#stop").click()
            expect(page.locator("#jobs")).to_contain_text("stopped")
            page.locator("#remove").click()
            expect(page.locator("#jobs")).to_contain_text("Evaluations: 0")
            page.close()
    assert not faults
    assert list((root / "slow").glob("easy/rollouts/*/results.json"))


def queue_and_stop(page: Page, phone: Page) -> None:
    """Queue an evaluation in one browser, and stop it in the other one."""
    page.get_by_role("tab", name="Experiments").click()
    page.get_by_text("Queue an evaluation").click()
    page.locator("#form_tasks :is(input, textarea)").fill("easy")
    page.locator("#queue").click()
    expect(page.locator("#fault")).to_contain_text("Give either a checkpoint")
    pick(page, "form_policy", "null")
    for field, text in {"name": "slow", "simulator": "toy", "episodes": "0:10000"}.items():
        page.locator(f"#form_{field} :is(input, textarea)").fill(text)
    page.locator("#form_more :is(input, textarea)").fill("--batch_size 2 --num_workers 1 --output /tmp")
    page.locator("#queue").click()
    expect(page.locator("#fault")).to_contain_text("flag of the dashboard 'output' is unknown")
    page.locator("#form_more :is(input, textarea)").fill("--batch_size 2 --num_workers 1")
    page.locator("#queue").click()
    phone.get_by_role("tab", name="Experiments").click()
    expect(phone.locator("#jobs")).to_contain_text("slow")
    expect(phone.locator("#log textarea")).to_have_value(re.compile(r"^\$ vla-foundry evaluate "))
    expect(phone.locator("#jobs")).to_contain_text(re.compile(r"[1-9]\d* of 10000"))
    phone.locator("#stop").click()
    expect(page.locator("#jobs")).to_contain_text("stopped")


def test_who_may_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("VLA_FOUNDRY_PASSWORD", raising=False)
    write(tmp_path, "good", "lift", 9)
    (tmp_path / "empty").touch()
    for words, message in {
        f"{tmp_path} --host 0.0.0.0": "host '0.0.0.0' can be reached by others, who could start programs here",
        f"{tmp_path} --host 0.0.0.0 --password_file {tmp_path}/empty": "is empty. Write a long random password",
        f"{tmp_path}/none": "is not a folder. Create it",
        f"{tmp_path} --host 203.0.113.7 --port 1 --password_file {__file__}": "cannot be opened",
    }.items():
        with pytest.raises(SystemExit) as ended:
            run_command(main, words.split())
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    with serve(tmp_path) as address:
        port = address.rpartition(":")[2]
        assert status_of(address, Origin="https://example.org") == 403
        assert status_of(address, Origin="null") == 403
        assert status_of(address, Host=f"example.org:{port}") == 403
        assert status_of(address, Host=f"localhost:{port}", Origin=f"http://localhost:{port}") == 200
    with serve(tmp_path, "--host", "0.0.0.0", password="pass:word") as address:
        address = address.replace("0.0.0.0", "127.0.0.1")
        assert status_of(address) == status_of(f"{address}/files/report/report.html") == 401
        assert status_of(address, Authorization="Basic eDp3cm9uZw==") == 401
        assert status_of(address, Authorization="Basic eDpwYXNzOndvcmQ=") == 200
