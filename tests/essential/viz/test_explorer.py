import os
import subprocess
import sys
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from playwright.sync_api import expect

from tests.essential.browser import browse, needs_browser
from vla_foundry.cli import main
from vla_foundry.viz.explorer import Explorer


def test_tables_say_what_the_dataset_holds(robot_data) -> None:
    explorer = Explorer(str(robot_data.folder))
    assert explorer.list_episodes() == [
        [0, "episode_0", "", 8, 0.8, "move thing 0"],
        [1, "episode_1", "", 8, 0.8, "move thing 1"],
    ]
    assert explorer.list_instructions() == [["move thing 0", "original", 1], ["move thing 1", "original", 1]]
    rows = {(row[0], row[1]): row[2:] for row in explorer.list_statistics()}
    mean, std, least, *_ = rows["state", "0 (elbow)"]
    stored = np.concatenate([fields["state"] for fields in robot_data.fields.values()])
    assert stored[:, 0].min() - 1e-4 <= least <= mean - std / 2
    assert explorer.show_frame(1, 3).count("<figure>") == 2
    # as high as the figure of `data inspect`, with three axes and their curves
    assert explorer.draw_window(1, 3).shape[1:] == (1200, 3)
    assert [len(axis.lines[0].get_xdata()) for axis in explorer.draw_fields(0, 2).axes] == [8, 8]


def test_other_data_is_refused_with_what_to_do(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.jsonl").write_text('{"shard": "a", "num_sequences": 1}\n', encoding="utf-8")
    for folder, message in ((tmp_path, "is no robot dataset"), (tmp_path / "none", "does not exist")):
        with pytest.raises(SystemExit) as end:
            main(["data", "explore", str(folder)])
        assert end.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
@needs_browser
def test_the_page_in_a_browser(robot_data) -> None:
    command = [sys.executable, "-m", "vla_foundry.cli", "data", "explore", str(robot_data.folder), "--port", "0"]
    faults: list[str] = []
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as server,
        browse(faults) as open_page,
    ):
        assert server.stdout is not None
        address = server.stdout.readline().rpartition(" ")[2].strip()
        try:
            page = open_page(address)
            expect(page.locator("#about")).to_have_text("episode_0: move thing 0", timeout=120_000)
            page.get_by_label("Episode (0 to 1)").fill("1")
            page.get_by_label("Episode (0 to 1)").press("Tab")
            expect(page.locator("#about")).to_have_text("episode_1: move thing 1", timeout=120_000)
            expect(page.locator("#cameras img")).to_have_count(2, timeout=60_000)
            page.get_by_role("tab", name="Windows").click()
            page.locator("#draw").click()
            page.wait_for_selector("#window img")
            page.get_by_role("tab", name="Statistics").click()
            expect(page.get_by_role("gridcell", name="1 (wrist)").first).to_be_visible(timeout=60_000)
            # a site that lets its name point here; another site's page
            for strange in ({"Host": "example.org"}, {"Origin": "http://example.org"}):
                with pytest.raises(HTTPError, match="403"):
                    urlopen(Request(f"{address}config", headers=strange))
        finally:
            server.kill()
    assert faults == []
