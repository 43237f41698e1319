"""Captioned scenes: true, seeded, independent of processes, resumed without a trace."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("metaworld", reason="needs vla-foundry[simulators]")

from PIL import Image

from vla_foundry.datagen.scene_captions import GRID, describe_scene, parse_caption, score_captions
from vla_foundry.datagen.scenes import create_scene, generate_scenes, main
from vla_foundry.params.commands.datagen import ScenesParams
from vla_foundry.simulators import create_simulator


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ScenesParams, Path]:
    folder = tmp_path_factory.mktemp("scenes")
    tasks = ["drawer-open-v3", "button-press-v3", "stick-push-v3"]
    params = ScenesParams(output=str(folder), num_scenes=36, num_validation_scenes=6, num_processes=2, tasks=tasks)
    assert generate_scenes(params) == {"train": 36, "validation": 6}
    return params, folder


def test_every_scene_is_a_picture_a_caption_and_attributes_that_agree(made: tuple[ScenesParams, Path]) -> None:
    for split, number in (("train", 36), ("validation", 6)):
        for index in range(number):
            stem = made[1] / split / f"{index:08d}"
            caption = stem.with_suffix(".txt").read_text(encoding="utf-8")
            attributes = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
            assert describe_scene(attributes) == caption
            assert parse_caption(caption) == attributes
            with Image.open(stem.with_suffix(".png")) as image:
                assert (image.size, image.mode) == ((64, 64), "RGB")


def test_the_scenes_do_not_depend_on_processes_and_nothing_drawn_is_drawn_again(
    made: tuple[ScenesParams, Path], tmp_path: Path
) -> None:
    params, folder = made
    other = ScenesParams(
        output=str(tmp_path), num_scenes=12, num_validation_scenes=6, num_processes=1, tasks=params.tasks
    )
    generate_scenes(other)
    expected, again = contents(folder), contents(tmp_path)
    assert again == {name: expected[name] for name in again}
    # as if the run had been killed while it wrote scene 7: the rest stays, the leftover goes
    for suffix in ("txt", "json"):
        (tmp_path / "train" / f"00000007.{suffix}").unlink()
    (tmp_path / "train" / ".00000007.json.partial").write_text("{", encoding="utf-8")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "train").glob("*.txt")}
    assert generate_scenes(other) == {"train": 1, "validation": 0}
    assert contents(tmp_path) == again
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_objects_and_states_are_balanced_and_no_single_answer_is_good(made: tuple[ScenesParams, Path]) -> None:
    captions = [path.read_text(encoding="utf-8") for path in sorted((made[1] / "train").glob("*.txt"))]
    attributes = [parse_caption(caption) for caption in captions]
    assert Counter(one["object"] for one in attributes) == {"drawer": 12, "button": 12, "thermos": 12}
    states = Counter(one["state"] for one in attributes if "state" in one)
    assert states == {"closed": 4, "half open": 4, "open": 4, "released": 6, "pressed": 6}
    scores = score_captions(captions, captions)
    assert scores["object_position"].chance < 0.05
    assert scores["object_position"].constant < 0.4
    assert scores["caption"].constant < 0.1


def test_the_described_cell_holds_the_described_thing() -> None:
    """The button is the only thing of pure red: its pixels lie about the cell that is told."""
    with create_simulator("metaworld", "button-press-v3", cameras=("workspace",), image_size=64) as simulator:
        for index in range(12):
            scene = create_scene(simulator, "workspace", seed=1, split="train", index=index, state=0)
            red, green, blue = (scene.image[..., channel].astype(int) for channel in range(3))
            rows, columns = np.nonzero((red > 180) & (green < 40) & (blue < 40))
            if len(rows) < 4:
                continue
            found = (np.median(rows) + 0.5) * GRID / 64, (np.median(columns) + 0.5) * GRID / 64
            told = scene.attributes["object_row"], scene.attributes["object_column"]
            assert max(abs(a + 0.5 - int(b)) for a, b in zip(found, told, strict=True)) < 1.5


def test_a_scene_is_a_function_of_its_index_and_not_of_those_before() -> None:
    with create_simulator("metaworld", "window-open-v3", cameras=("workspace",), image_size=32) as simulator:
        scenes = [
            create_scene(simulator, "workspace", seed=0, split="train", index=index, state=1) for index in (4, 9, 4)
        ]
        held_out = create_scene(simulator, "workspace", seed=0, split="validation", index=4, state=1)
    assert scenes[0].caption == scenes[2].caption
    np.testing.assert_array_equal(scenes[0].image, scenes[2].image)
    assert (scenes[0].image != scenes[1].image).any()
    assert (scenes[0].image != held_out.image).any()


def test_a_folder_of_other_scenes_is_refused(
    made: tuple[ScenesParams, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    params, folder = made
    words = ["--output", str(folder), "--num_validation_scenes", "6", "--tasks", json.dumps(params.tasks)]
    main([*words, "--num_scenes", "36"])
    assert "36 scenes and 6 held out; 0 drawn now" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"made with other settings \(seed 0 -> 5\)"):
        main([*words, "--num_scenes", "36", "--seed", "5"])
    with pytest.raises(ValueError, match="holds 26 more scenes than the 10 requested"):
        main([*words, "--num_scenes", "10"])


def test_the_user_sees_why_a_drawing_process_failed(tmp_path: Path) -> None:
    params = ScenesParams(output=str(tmp_path), num_scenes=2, num_validation_scenes=0, tasks=["reach-v4"])
    with pytest.raises(ValueError, match="metaworld task 'reach-v4' is unknown"):
        generate_scenes(params)
