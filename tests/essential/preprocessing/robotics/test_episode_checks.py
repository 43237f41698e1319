"""Whatever is wrong with an episode is named, before anything of it is written."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from vla_foundry.preprocessing.robotics.converters.converter import ArrayFrames, Episode, create_converter
from vla_foundry.preprocessing.robotics.episode_checks import Left, check_episode
from vla_foundry.preprocessing.robotics.recipe import create_recipe
from vla_foundry.robotics.episode_blocks import InstructionSpan

LENGTH = 12
XYZ, ROTATION = "robot__actual__poses__arm::hand__xyz", "robot__actual__poses__arm::hand__rot_6d"


@pytest.fixture
def check(rig, tmp_path, write_episodes):
    """A function that reads an episode, has it changed, and checks it."""
    write_episodes(tmp_path, [LENGTH])

    def run(change: Callable[[Episode], Episode | None], **options) -> None:
        params = rig.RigParams(source_episodes=[str(tmp_path)], output_dir="out", **options)
        converter = create_converter(params)
        episode = converter.read_episode(converter.discover_episodes()[0])
        check_episode(change(episode) or episode, create_recipe(params, converter))

    return run


def set_field(name: str, values: Callable[[np.ndarray], np.ndarray]) -> Callable[[Episode], None]:
    def change(episode: Episode) -> None:
        episode.fields[name] = values(episode.fields[name].copy())

    return change


def at(frame: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[frame] = value
        return values

    return change


def set_times(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Episode], Episode]:
    return lambda episode: replace(episode, timestamps=change(episode.timestamps.copy()))


def remove_camera(episode: Episode) -> None:
    del episode.cameras["Front"]


FAULTS = {
    "no frames": (lambda e: replace(e, timestamps=np.zeros(0)), "it has no frames"),
    "a missing field": (lambda e: e.fields.pop(XYZ) is None or None, f"field '{XYZ}' is missing"),
    "an unknown field": (lambda e: e.fields.update(state=np.zeros(3)), "field 'state' is unknown"),
    "a wrong type": (set_field(XYZ, lambda v: v.astype(np.int64)), "is int64"),
    "a wrong width": (set_field(XYZ, lambda v: v[:, :2]), r"is float64 \(12, 2\), expected float64 \(12, 3\)"),
    "a short field": (set_field(XYZ, lambda v: v[:-1]), r"is float64 \(11, 3\)"),
    "NaN": (set_field(XYZ, at(4, np.nan)), "holds nan at frame 4, column 0"),
    "infinity": (set_field(XYZ, at(4, -np.inf)), "holds -inf at frame 4, column 0"),
    "no rotation": (set_field(ROTATION, at(4, 0.0)), "at index 4 is not a rotation"),
    "a repeated timestamp": (set_times(at(5, 0.4)), r"timestamp of frame 5 \(0.4 s\) repeats that of"),
    "time going back": (set_times(lambda t: t[::-1].copy()), "timestamp of frame 1 .* lies before the frame"),
    "a timestamp of NaN": (set_times(at(5, np.nan)), "timestamp of frame 5 is not finite"),
    "a gap": (set_times(lambda t: np.where(t >= 0.5, t + 0.1, t)), "frame 5 comes 2.00 frames after"),
    "jitter": (set_times(lambda t: t + 0.06 * (np.arange(LENGTH) == 5)), "frames after the one before it at 10 fps"),
    "a wrong rate": (lambda e: replace(e, fps=11.0), "timestamps are at 10 frames per second, but it says 11"),
    "no rate": (lambda e: replace(e, fps=0.0), "fps .0. must be above 0"),
    "whole numbers as times": (set_times(lambda t: (t * 1e9).astype(np.int64)), "timestamps must be float64"),
    "a missing camera": (remove_camera, "camera 'Front' is missing .it has depth, wrist.left."),
    "a short video": (
        lambda e: e.cameras.update(Front=ArrayFrames(np.zeros((7, 4, 4, 3), np.uint8))),
        "camera 'Front' has 7 frames, the episode 12",
    ),
    "intrinsics of another shape": (lambda e: e.intrinsics.update(Front=np.eye(4)), "intrinsics of camera 'Front'"),
    "extrinsics of NaN": (lambda e: e.extrinsics.update(Front=np.full((4, 4), np.nan)), "extrinsics of camera 'Front'"),
    "an instruction beyond the end": (
        lambda e: e.instructions.append(InstructionSpan(start=5, end=13, texts={})),
        "instruction spans frames 5 to 13 of 12",
    ),
    "an instruction that is no list": (
        lambda e: e.instructions[0].texts.update(original="pick it"),  # pyright: ignore
        "'original' instructions are not a list of texts",
    ),
    "metadata of NaN": (lambda e: e.metadata.update(score=np.nan), "metadata are not JSON"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named(name, check):
    change, message = FAULTS[name]
    with pytest.raises(ValueError, match=message) as caught:
        check(lambda episode: result if isinstance(result := change(episode), Episode) else None)
    assert "\n" not in str(caught.value)


def test_a_whole_episode_passes(check):
    check(lambda episode: None)


def test_uneven_times_pass_where_they_are_resampled_or_allowed(check):
    jitter = set_times(lambda times: times + 0.06 * (np.arange(LENGTH) == 5))
    check(jitter, target_fps=10.0)
    check(jitter, timestamp_tolerance=0.7)


def test_episodes_are_left_out_as_the_params_say(check):
    with pytest.raises(Left, match="missing camera"):
        check(remove_camera, skip_episodes_missing_cameras=True)
    with pytest.raises(Left, match="not finite"):
        check(set_field(XYZ, at(4, np.nan)), fail_on_nan=False)
