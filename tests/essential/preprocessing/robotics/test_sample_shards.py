"""What the job writes is what training reads: both layouts give the same samples, to the last bit."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_foundry.batch import Batch
from vla_foundry.data import create_dataloader
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.world import World


def read_samples(folder: Path, **values: Any) -> dict[tuple[str, int], dict[str, Any]]:
    """All samples of a dataset by episode and anchor."""
    params = RoboticsDataParams(
        dataset_manifest=[str(folder / "manifest.jsonl")], image_size=24, num_workers=0, **values
    )
    loader = create_dataloader(params, World(), global_batch_size=1, per_gpu_batch_size=1, seed=0)
    batches: list[Batch] = list(islice(loader.microbatches(0), loader.num_samples))
    loader.close()
    assert not any(batch["dropped"] for batch in batches)
    return {(batch["episode_ids"][0], int(batch["anchors"][0])): batch for batch in batches}


@pytest.mark.parametrize("padding", ["copy", "zero", "reflect"])
def test_both_layouts_load_to_the_same_bits(
    tmp_path: Path,
    write_episodes: Callable[..., Any],
    preprocess: Callable[..., Path],
    rig: Any,
    padding: str,
) -> None:
    write_episodes(tmp_path / "recordings", [9, 12])
    options = {"padding_strategy": padding, "max_padding_left": 2, "max_padding_right": 4, "image_indices": [-2, 0]}
    options |= {"resize_images_size": [24, 24]}
    found = []
    for layout in ("episodes", "samples"):
        folder = preprocess(tmp_path / "recordings", tmp_path / layout, layout=layout, **options)
        values: dict[str, Any] = {
            "action_fields": [f"{rig.ACTION_XYZ}_relative", f"{rig.ACTION_ROTATION}_relative", rig.GRIPPER],
            "proprioception_fields": [rig.ACTUAL_XYZ, rig.ACTUAL_ROTATION],
            "intrinsics_fields": ["intrinsics.Front"],
            "extrinsics_fields": ["extrinsics.Front"],
            "depth_cameras": {"depth": (0.5, 8.0)},
        }
        found.append(read_samples(folder, **values))
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) >= 9
    for key, one in found[0].items():
        other = found[1][key]
        assert one.keys() == other.keys()
        for name in one.keys() - {"shards", "positions"}:
            if hasattr(one[name], "numpy"):
                assert np.array_equal(one[name].numpy(), other[name].numpy()), name
        # Front, wrist.left and depth at two times
        assert one["pixel_values"].shape[0] == 6
