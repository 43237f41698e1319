"""Real robot data end to end, by the public command line: demonstrations -> shards -> statistics -> a drawn sample."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

pytest.importorskip("metaworld", reason="needs vla-foundry[simulators]")

from vla_foundry.cli import main

pytestmark = pytest.mark.slow

TASKS = ("drawer-open-v3", "button-press-topdown-v3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("robot_data")
    words = ["demos", "--tasks", f"[{', '.join(TASKS)}]", "--episodes", "1", "--image_size", "64"]
    main([*words, "--output_dir", str(folder / "demos"), "--num_workers", "2"])
    for layout in ("episodes", "samples"):
        words = ["preprocess", "robotics", "--type", "lerobot", "--source_episodes", str(folder / "demos")]
        words += ["--field_map", "field_maps/metaworld.yaml", "--layout", layout, "--num_workers", "0"]
        main([*words, "--output_dir", str(folder / layout)])
    return folder


def recorded_actions(folder: Path) -> dict[int, np.ndarray]:
    """{number of the episode: actions (L, 4)}, read from the parquet files alone."""
    tables = [pq.read_table(path) for path in sorted((folder / "demos" / "data").rglob("*.parquet"))]
    rows = [row for table in tables for row in table.select(["episode_index", "action"]).to_pylist()]
    return {
        number: np.array([row["action"] for row in rows if row["episode_index"] == number])
        for number in sorted({row["episode_index"] for row in rows})
    }


def test_statistics_are_those_of_the_recorded_actions(folder):
    main(["stats", str(folder / "episodes"), "--overwrite", "--num_workers", "0"])
    statistics = json.loads((folder / "episodes" / "stats.json").read_text(encoding="utf-8"))
    # the window of preprocessing: a sample needs at most 1 step of padding before it and 7 after it
    windows = [
        actions[anchor : anchor + 1, :3]
        for actions in recorded_actions(folder).values()
        for anchor in range(len(actions))
        if anchor + 14 - (len(actions) - 1) <= 7
    ]
    expected = np.concatenate(windows).astype(np.float64)
    assert statistics["action.displacement"]["count"][1] == len(expected)
    mean, std = (statistics["action.displacement"][f"{name}_per_timestep"][1] for name in ("mean", "std"))
    np.testing.assert_allclose(mean, expected.mean(axis=0), atol=1e-9)
    np.testing.assert_allclose(std, expected.std(axis=0, ddof=1), atol=1e-9)


def test_both_layouts_have_the_same_statistics(folder):
    main(["stats", str(folder / "samples"), "--output", str(folder / "samples.json"), "--num_workers", "0"])
    texts = [
        (folder / "episodes" / "stats.json").read_text(encoding="utf-8"),
        (folder / "samples.json").read_text(encoding="utf-8"),
    ]
    of_episodes, of_samples = (json.loads(text)["action.displacement"] for text in texts)
    assert of_episodes["count"] == of_samples["count"]
    np.testing.assert_allclose(of_episodes["std"], of_samples["std"], atol=1e-10)
    np.testing.assert_allclose(of_episodes["percentile_99"], of_samples["percentile_99"], atol=1e-9)


@pytest.mark.parametrize("layout", ["episodes", "samples"])
def test_a_sample_is_drawn_from_either_layout(layout, folder, capsys):
    output = folder / f"{layout}.png"
    main(["data", "inspect", str(folder / layout), "--sample", "7", "--output", str(output)])
    printed = capsys.readouterr().out
    assert f"{output}: 2 images, 16 steps, 2 action and 2 proprioception fields" in printed
    instruction = next(line for line in printed.splitlines() if line.startswith("instruction: "))
    known = json.loads((folder / "demos" / "meta" / "instructions.json").read_text(encoding="utf-8"))
    assert instruction.removeprefix("instruction: ") in {text for texts in known["variants"].values() for text in texts}
    with Image.open(output) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] == 1200
    assert pixels.std() > 10
