"""The writers of recordings.py, the datasets they write, and a way to read one as the job does."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

WRITERS = Path(__file__).with_name("recordings.py")


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
        from vla_foundry.preprocessing.robotics.converters.converter import create_converter
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
                episode.metadata["images"] = {name: np.stack(list(frames)) for name, frames in episode.cameras.items()}
                found[ref.episode_id] = episode
            except ValueError as error:
                found[ref.episode_id] = ValueError(f"{ref.source}: {error}")
        return found

    return read


@pytest.fixture(scope="session")
def preprocess_with() -> Callable[[Any], None]:
    """A function that runs the job in this process."""

    def run(params: Any) -> None:
        from vla_foundry.preprocessing.robotics.robotics_job import preprocess_robotics

        preprocess_robotics(params)

    return run
