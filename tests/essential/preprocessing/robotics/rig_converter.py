"""A converter for the tests: folders of .npz files of a robot with an arm, two cameras and a depth camera."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_foundry.params.commands.preprocessing_robotics import RoboticsPreprocessParams, register_converter_params
from vla_foundry.preprocessing.robotics import BaseRoboticsConverter, register_converter
from vla_foundry.preprocessing.robotics.converters.converter import ArrayFrames, Episode, EpisodeRef
from vla_foundry.robotics.episode_blocks import InstructionSpan
from vla_foundry.robotics.fields import PoseGroup
from vla_foundry.robotics.spec import FieldDescription, GripperRange

ARM = "arm::hand"
ACTUAL_XYZ, ACTUAL_ROTATION = f"robot__actual__poses__{ARM}__xyz", f"robot__actual__poses__{ARM}__rot_6d"
ACTION_XYZ, ACTION_ROTATION = f"robot__action__poses__{ARM}__xyz", f"robot__action__poses__{ARM}__rot_6d"
GRIPPER = "robot__action__grippers__arm::hand"
FIELDS = {
    ACTUAL_XYZ: FieldDescription(shape=(3,), dtype="float64", unit="m", frame="world"),
    ACTUAL_ROTATION: FieldDescription(shape=(6,), dtype="float64", rotation="rot_6d_rows"),
    ACTION_XYZ: FieldDescription(shape=(3,), dtype="float64", unit="m", frame="world", role="action"),
    ACTION_ROTATION: FieldDescription(shape=(6,), dtype="float64", rotation="rot_6d_rows", role="action"),
    GRIPPER: FieldDescription(
        shape=(1,), unit="m", role="action", gripper=GripperRange(open=0.08, closed=0.0), is_discrete=True
    ),
}
CAMERAS = ("Front", "wrist.left", "depth")


@register_converter_params("rig")
@dataclass(frozen=True, kw_only=True)
class RigParams(RoboticsPreprocessParams):
    """Folders of .npz files."""

    # seconds that reading a frame takes at least: time to kill a job in
    seconds_per_frame: float = 0.0


class RigFrames(ArrayFrames):
    """Images in memory, which may break off."""

    def __init__(self, images: np.ndarray, params: RigParams, breaks_at: int) -> None:
        super().__init__(images)
        self._seconds, self._breaks_at = params.seconds_per_frame, breaks_at

    def __iter__(self) -> Iterator[np.ndarray | bytes]:
        for number, image in enumerate(super().__iter__()):
            time.sleep(self._seconds)
            if number == self._breaks_at:
                raise ValueError(f"video.mp4: frame {number} can not be decoded.")
            yield image


@register_converter("rig")
class RigConverter(BaseRoboticsConverter):
    """Reads folders of .npz files."""

    def discover_episodes(self) -> list[EpisodeRef]:
        paths = [path for source in self.params.source_episodes for path in sorted(Path(source).glob("*.npz"))]
        refs = []
        for path in paths:
            with np.load(path) as file:
                task, num_frames = str(file["task"]), len(file["timestamps"])
            refs.append(EpisodeRef(episode_id=path.stem, source=str(path), task=task, num_frames=num_frames))
        return refs

    def discover_cameras(self) -> list[str]:
        return list(CAMERAS)

    def describe_fields(self) -> dict[str, FieldDescription]:
        return dict(FIELDS)

    def pose_groups(self) -> tuple[PoseGroup, ...]:
        return (PoseGroup(name="arm", position_key=ACTION_XYZ, rotation_key=ACTION_ROTATION),)

    def read_episode(self, ref: EpisodeRef) -> Episode:
        with np.load(ref.source) as file:
            arrays = dict(file)
        num_frames = len(arrays["timestamps"])
        cameras = {}
        for name in CAMERAS:
            if f"images|{name}" in arrays:
                breaks_at = int(arrays["breaks_at"]) if name == CAMERAS[1] else -1
                cameras[name] = RigFrames(arrays[f"images|{name}"], self.params, breaks_at)
        return Episode(
            ref=ref,
            fps=float(arrays["fps"]),
            timestamps=arrays["timestamps"],
            fields={key.removeprefix("field|"): value for key, value in arrays.items() if key.startswith("field|")},
            cameras=cameras,
            instructions=[
                InstructionSpan(start=0, end=num_frames // 2, texts={"original": [f"{ref.task}: begin"]}),
                InstructionSpan(start=num_frames // 2, end=num_frames, texts={"original": [f"{ref.task}: end"]}),
            ],
            intrinsics={CAMERAS[0]: arrays["intrinsics"]},
            extrinsics={CAMERAS[0]: arrays["extrinsics"]},
            metadata={"operator": "A"},
        )


def run_job(options: dict) -> None:
    """Run the job; for tests that do so in a process of its own, to kill it."""
    from vla_foundry.preprocessing.robotics.robotics_job import preprocess_robotics

    preprocess_robotics(RigParams(**options))
