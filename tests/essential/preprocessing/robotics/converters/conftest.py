"""The writers of recordings.py, the datasets they write, and a way to read one as the job does."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

WRITERS = Path(__file__).with_name("recordings.py")
EXAMPLE = Path(__file__).resolve().parents[5] / "examples" / "preprocess_robotics.sh"


@pytest.fixture(scope="session")
def recordings() -> ModuleType:
    """The module recordings.py."""
    if "recordings" not in sys.modules:
        spec = importlib.util.spec_from_file_location("recordings", WRITERS)
        assert spec is not None
        assert spec.loader is not None
        sys.modules["recordings"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["recordings"])
    return sys.modules["recordings"]


@pytest.fixture(scope="session")
def read_all() -> Callable[[Any], dict[str, Any]]:
    """A function that reads all episodes, with all their images, as the job does: {episode id: Episode or error}."""

    def read(params: Any) -> dict[str, Any]:
        from vla_foundry.preprocessing.robotics.converters.converter import create_converter, decode_frame
        from vla_foundry.preprocessing.robotics.episode_checks import check_episode
        from vla_foundry.preprocessing.robotics.recipe import check_refs, create_recipe

        converter = create_converter(params)
        refs = check_refs(converter.discover_episodes(), -1)
        recipe = create_recipe(params, converter)
        found: dict[str, Any] = {}
        for ref in refs:
            try:
                episode = recipe.converter_class(params).read_episode(ref)
                check_episode(episode, recipe)
                episode.metadata["images"] = {
                    name: np.stack([decode_frame(frames, number, image) for number, image in enumerate(frames)])
                    for name, frames in episode.cameras.items()
                }
                found[ref.episode_id] = episode
            except ValueError as error:
                found[ref.episode_id] = ValueError(f"{ref.source}: {error}")
        return found

    return read


@pytest.fixture(scope="session")
def add_hidden_files() -> Callable[[Path], None]:
    """A function that adds what macOS, Jupyter and zip tools leave in every folder below one."""

    def add(root: Path) -> None:
        for path in [path for path in root.rglob("*") if path.is_file()]:
            for folder in (".ipynb_checkpoints", "__MACOSX"):
                (path.parent / folder).mkdir(exist_ok=True)
                (path.parent / folder / path.name).write_bytes(path.read_bytes())
            path.with_name(f"._{path.name}").write_bytes(bytes.fromhex("0005160700020000") + bytes(400))
            path.with_name(".DS_Store").write_bytes(b"\0\0\0\1Bud1")

    return add


@pytest.fixture(scope="session")
def preprocess_with() -> Callable[[Any], None]:
    """A function that runs the job in this process."""

    def run(params: Any) -> None:
        from vla_foundry.preprocessing.robotics.robotics_job import preprocess_robotics

        preprocess_robotics(params)

    return run


@pytest.fixture(scope="session")
def run_example() -> Callable[..., None]:
    """Convert recordings as examples/preprocess_robotics.sh does."""

    def run(kind: str, source: Path, output: Path, *flags: object) -> None:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "NUM_WORKERS": "0", "PICTURES": str(output)}
        command = ["bash", str(EXAMPLE), kind, str(source), str(output), *map(str, flags)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (output / "validation.png").is_file()

    return run


@pytest.fixture(scope="session")
def check_inverse(read_all: Callable[[Any], dict[str, Any]]) -> Callable[..., None]:
    """A function that checks that the transforms of training and their inverses give a converter's fields back."""

    def check(params: Any) -> None:
        from vla_foundry.preprocessing.robotics.converters.converter import create_converter

        converter = create_converter(params)
        described, groups = converter.describe_fields(), tuple(converter.pose_groups())
        episodes = list(read_all(params).values())
        for scope in ("global", "per_timestep"):
            for method in ("std", "min_max", "percentile_5_95"):
                for used in (groups, ()):
                    _check_inverse(episodes, described, used, scope, method)

    return check


def _check_inverse(episodes: list[Any], described: Any, groups: Any, scope: Any, method: Any) -> None:
    from vla_foundry.robotics.accumulator import StatisticsAccumulator
    from vla_foundry.robotics.fields import Window, absolute_field
    from vla_foundry.robotics.normalization import NormalizationRule, RoboticsNormalizer
    from vla_foundry.robotics.rotations import rotation_to_matrix
    from vla_foundry.robotics.transforms import ActionTransform, FieldTransform, RelativePoses
    from vla_foundry.robotics.windows import iterate_windows

    window, made, accumulator = Window(2, 4), [], StatisticsAccumulator(2)
    for episode in episodes:
        fields, num_frames = {name: episode.fields[name] for name in described}, len(episode.timestamps)
        ((windows, values),) = iterate_windows(
            fields, np.arange(num_frames), num_frames, window, padding="copy", pose_groups=groups
        )
        accumulator.update(values)
        np.testing.assert_array_equal(windows.invert(values[next(iter(described))]), fields[next(iter(described))])
        made.append((fields, {name: values[name] for name in described}))
    # poses of groups as relative ones, all other fields as they are
    relative = {key: key + "_relative" for group in groups for key in (group.position_key, group.rotation_key)}
    names = [relative.get(name, name) for name in described]
    rule = NormalizationRule(scope=scope, method=method, epsilon=1e-3)
    transform = ActionTransform(
        poses=RelativePoses(groups, window.anchor),
        fields=FieldTransform.create(
            names, RoboticsNormalizer.create(accumulator.finish(), dict.fromkeys(names, rule)), anchor=window.anchor
        ),
        rotations={name: field.rotation for name, field in described.items() if field.rotation is not None},
    )
    for fields, values in made:
        actions, is_there = transform.apply(values)
        assert is_there.all()
        assert actions.dtype == np.float32
        found = transform.invert(actions, fields)
        assert list(found) == [absolute_field(name) for name in names] == list(described)
        for name, field in described.items():
            expected, back = values[name][:, window.anchor :], found[name]
            assert back.shape == expected.shape
            if field.rotation is not None:  # a rotation may be written in several ways
                expected, back = (rotation_to_matrix(each, field.rotation) for each in (expected, back))
            scale = max(1.0, float(np.abs(expected).max()))
            np.testing.assert_allclose(back, expected, atol=2e-5 * scale, err_msg=f"{name} {scope} {method}")
