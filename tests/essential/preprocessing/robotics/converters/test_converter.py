"""The converter that the docstring of converters/converter.py shows runs, named by --plugins, as it says."""

import importlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import yaml

from vla_foundry.preprocessing.command import main
from vla_foundry.preprocessing.robotics.converters import converter

WORDS = ["robotics", "--plugins", "npz_folder", "--type", "npz_folder", "--num_workers", "0"]


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The folder of the example's module, which can be imported from there."""
    assert converter.__doc__ is not None
    _, _, rest = converter.__doc__.partition("has to change:\n\n")
    code, _, command = rest.partition("    vla-foundry preprocess robotics")
    assert "--plugins npz_folder --type npz_folder" in command
    assert len([line for line in code.splitlines() if line.strip()]) <= 42
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "npz_folder.py").write_text(textwrap.dedent(code), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        importlib.invalidate_caches()
        yield folder


def test_the_example_of_a_converter_runs(tmp_path, example, read_tars):
    generator = np.random.default_rng(0)
    state, action = generator.normal(size=(2, 20, 7)).astype(np.float32)
    front = generator.integers(0, 256, (20, 24, 32, 3), dtype=np.uint8)
    (tmp_path / "raw").mkdir()
    np.savez(tmp_path / "raw" / "a.npz", fps=10.0, task="pick it", front=front, state=state, action=action)
    (tmp_path / "cameras.yaml").write_text("- front\n", encoding="utf-8")
    cameras = ["--camera_names", f"include {tmp_path / 'cameras.yaml'}"]
    words = [*WORDS, "--image_indices", "-1", "0", "--unit", "m", *cameras]
    main([*words, "--source_episodes", str(tmp_path / "raw"), "--output_dir", str(tmp_path / "out")])
    config = yaml.safe_load((tmp_path / "out" / "preprocessing_config.yaml").read_text(encoding="utf-8"))
    assert (config["image_indices"], config["camera_names"], config["unit"]) == ([-1, 0], ["front"], "m")
    members = read_tars(tmp_path / "out")["a"]
    np.testing.assert_array_equal(members["lowdim.npz"]["state"], state)
    assert members["episode.json"]["instructions"][0]["texts"] == {"original": ["pick it"]}
    assert "front.000019.jpg" in members


@pytest.mark.parametrize(
    "name", ["robotics_preprocessing_params_1past_14future", "robotics_preprocessing_params_5past_20future_lbmsize"]
)
def test_the_presets_run(name, tmp_path, example, read_tars):
    numbers, front = np.linspace(0, 9, 280).reshape(40, 7), np.zeros((40, 24, 32, 3), np.uint8)
    (tmp_path / "raw").mkdir()
    np.savez(tmp_path / "raw" / "a.npz", fps=10.0, task="", front=front, state=numbers, action=numbers)
    words = [*WORDS, "--config_path", f"data/{name}.yaml"]
    main([*words, "--source_episodes", str(tmp_path / "raw"), "--output_dir", str(tmp_path / "out")])
    camera = read_tars(tmp_path / "out")["a"]["episode.json"]["cameras"]["front"]
    assert camera["size"] == ([342, 256] if "lbmsize" in name else [384, 384])


def test_the_help_lists_the_kinds_of_recordings_with_their_own_flags(example, capsys):
    with pytest.raises(SystemExit):
        main(["robotics", "--plugins", "npz_folder", "--help"])
    text = capsys.readouterr().out
    # other tests may have registered kinds of their own
    kinds = next(line for line in text.splitlines() if line.strip().startswith("--type "))
    assert {"hdf5", "lerobot", "npz_folder"} <= set(kinds.split())
    assert "--type npz_folder: Folders of .npz files." in text
    assert "unit of the state and of the action (rad)" in text


def test_the_interface_needs_no_torch() -> None:
    # processes that record demonstrations import it
    code = (
        "import sys, vla_foundry.preprocessing.robotics, vla_foundry.datagen.demos; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
