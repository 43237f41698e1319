# %% [markdown]
# # A converter for recordings of your own
#
# Under a minute on two CPU cores. LeRobot, HDF5 and Spartan recordings need no code
# (`vla-foundry preprocess robotics --help`). For anything else, write a class with four methods.

# %%
import os
import tempfile

os.chdir(tempfile.mkdtemp())

# %% [markdown]
# Recordings as your robot may write them: a `.npz` file per episode.

# %%
import numpy as np

os.mkdir("episodes")
for number in range(6):
    rng = np.random.default_rng(number)
    joints = rng.normal(size=(31, 3)).cumsum(axis=0).astype(np.float32) / 10
    images = np.broadcast_to(np.arange(30, dtype=np.uint8)[:, None, None, None] * 8, (30, 64, 64, 3))
    task = "wave to the left" if number % 2 else "wave to the right"
    np.savez(f"episodes/{number:03d}.npz", joints=joints[:-1], command=joints[1:], front=images, fps=10, task=task)

# %% [markdown]
# The converter says which episodes and cameras there are, what the numbers mean, and reads one episode at a time. The job does the
# rest: checks, windows, statistics, shards, resumption, a Ray cluster.

# %%
# %%writefile wave_converter.py
"""Folders of .npz files: joints (L, 3), command (L, 3), front (L, H, W, 3), fps, task."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_foundry.params.commands.preprocessing_robotics import RoboticsPreprocessParams, register_converter_params
from vla_foundry.preprocessing.robotics import (
    ArrayFrames,
    BaseRoboticsConverter,
    Episode,
    EpisodeRef,
    register_converter,
)
from vla_foundry.robotics.spec import FieldDescription


@register_converter_params("wave")
@dataclass(frozen=True, kw_only=True)
class WaveParams(RoboticsPreprocessParams):
    """Folders of .npz files."""

    # unit of the joints and of their commands
    unit: str = "rad"


@register_converter("wave")
class WaveConverter(BaseRoboticsConverter):
    """Reads folders of .npz files."""

    def discover_episodes(self):
        """Find the episodes of all sources."""
        paths = [path for source in self.params.source_episodes for path in sorted(Path(source).glob("*.npz"))]
        return [EpisodeRef(episode_id=path.stem, source=str(path)) for path in paths]

    def discover_cameras(self):
        """Name the cameras."""
        return ["front"]

    def describe_fields(self):
        """Say what the numbers mean."""
        joints = {"shape": (3,), "unit": self.params.unit, "names": ("base", "elbow", "wrist")}
        return {"observation.joints": FieldDescription(**joints), "action": FieldDescription(**joints, role="action")}

    def read_episode(self, ref):
        """Read an episode."""
        with np.load(ref.source, allow_pickle=False) as file:
            arrays = dict(file)
        fps, num_frames = float(arrays["fps"]), len(arrays["joints"])
        return Episode(
            ref=ref,
            fps=fps,
            timestamps=np.arange(num_frames) / fps,
            fields={"observation.joints": arrays["joints"], "action": arrays["command"]},
            cameras={"front": ArrayFrames(arrays["front"])},
            instructions=Episode.one_instruction(str(arrays["task"]), num_frames),
        )


# %% [markdown]
# `--plugins` imports the module before flags are parsed, so `--type wave` and `--unit` exist.

# %% magic_args="-e" language="bash"
# vla-foundry preprocess robotics --plugins wave_converter --type wave --unit rad --source_episodes episodes \
#     --output_dir shards --past_lowdim_steps 0 --future_lowdim_steps 7 --image_indices "[0]" --num_workers 0
# vla-foundry manifest verify shards

# %% [markdown]
# What training will know of it, and one sample as it reads it:

# %%
import json
from pathlib import Path

json.loads(Path("shards/robotics.json").read_text())["fields"]

# %% magic_args="-e" language="bash"
# vla-foundry data inspect shards --sample 40 --output sample.png

# %%
from IPython.display import Image

Image("sample.png", width=700)

# %% [markdown]
# An episode that is broken is left out whole, and named in `shards/report.json`; more than `--max_failed_fraction` of them stop the
# job before anything is published. Try it: save an episode whose `command` is one row shorter.
