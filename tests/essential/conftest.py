"""Settings that hold for every test: no hub, no telemetry, and published data only where it is named."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of published data; the test is skipped where there is none."""
    folder = os.environ.get("VLA_FOUNDRY_SHARED_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("VLA_FOUNDRY_SHARED_DATA names no folder of published data")
    return Path(folder)
