"""Scenes: drawn by seed and index alone, resumed, refused in one line."""

import os
from pathlib import Path
from typing import Any

import pytest

from vla_foundry.datagen import scenes
from vla_foundry.datagen.processes import create_processes
from vla_foundry.datagen.scene_captions import describe_scene, parse_caption
from vla_foundry.datagen.scenes import generate_scenes
from vla_foundry.params.commands.datagen import ScenesParams
from vla_foundry.run_folder import lock_folder


def create_params(output: Path, **values: Any) -> ScenesParams:
    given: dict[str, Any] = {"tasks": ["drawer-open-v3"], "num_scenes": 2, "num_validation_scenes": 1}
    return ScenesParams(**given | {"image_size": 16, "num_processes": 1, "output": str(output)} | values)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_missing_scenes_are_drawn_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("metaworld", reason="needs vla-foundry[simulators]")
    # in this process, where the simulator is imported and compiled once
    monkeypatch.setattr(scenes, "create_processes", lambda _: create_processes(0))
    assert generate_scenes(create_params(tmp_path)) == {"train": 2, "validation": 1}
    made = contents(tmp_path)
    assert sorted(made)[:4] == ["scenes.json", "train/00000000.json", "train/00000000.png", "train/00000000.txt"]
    caption = made["train/00000000.txt"].decode()
    assert describe_scene(parse_caption(caption)) == caption
    # without its caption, which is written last, a scene is unfinished
    (tmp_path / "train" / "00000001.txt").unlink()
    (tmp_path / "train" / "00000001.png").write_bytes(b"half")
    assert generate_scenes(create_params(tmp_path)) == {"train": 1, "validation": 0}
    assert contents(tmp_path) == made
    with pytest.raises(ValueError, match=r"made with other settings \(seed 0 -> 1\)"):
        generate_scenes(create_params(tmp_path, seed=1))
    with pytest.raises(ValueError, match=r"holds 1 more scenes than the 1 requested"):
        generate_scenes(create_params(tmp_path, num_scenes=1))


def test_a_folder_that_another_process_fills_is_left_alone(tmp_path: Path) -> None:
    held = lock_folder(tmp_path / "scenes", what="folder of scenes", flag="--output")
    message = rf"folder of scenes .*scenes is in use by process {os.getpid()} on .*choose another --output"
    with held, pytest.raises(ValueError, match=message):
        generate_scenes(create_params(tmp_path / "scenes"))
    assert not (tmp_path / "scenes").exists()
