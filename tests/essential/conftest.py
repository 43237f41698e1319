"""Settings that hold for every test: no hub, no telemetry, and published data only where it is named."""

import json
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: threads that wait do not spin
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the test processes share the cores
os.environ["WANDB_MODE"] = "offline"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # before ray is imported: no `uv run` around each worker
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 15 otherwise: workers starve beside the other tests
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--bare`, for an environment with a part of the dependencies, such as a GPU machine's own."""
    parser.addoption("--bare", action="store_true", help="skip tests that need packages which are not installed")


class _BareModule(pytest.Module):
    def _getobj(self) -> Any:
        try:
            return super()._getobj()
        except self.CollectError as error:
            missing = re.search("No module named .*", str(error))
            if missing is None:
                raise
            pytest.skip(missing[0], allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> pytest.Module | None:
    """With --bare, skip a test file that imports a missing package."""
    return _BareModule.from_parent(parent, path=module_path) if parent.config.getoption("--bare") else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """With --bare, skip a test or fixture that imports a missing package."""
    if call.excinfo is not None and call.excinfo.errisinstance(ModuleNotFoundError) and item.config.getoption("--bare"):
        skipped = pytest.skip.Exception(str(call.excinfo.value)).with_traceback(call.excinfo.tb)
        call.excinfo = pytest.ExceptionInfo.from_exception(skipped)
    return (yield)


@pytest.fixture(autouse=True)
def forget_plugins() -> Iterator[None]:
    """Forget the plug-ins that a test names: processes of later tests would look for them."""
    name = "vla_foundry.config.command_line"
    before = [*sys.modules[name]._named] if name in sys.modules else []
    yield
    if name in sys.modules:
        sys.modules[name]._named[:] = before


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of published data; the test is skipped where there is none."""
    folder = os.environ.get("VLA_FOUNDRY_SHARED_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("VLA_FOUNDRY_SHARED_DATA names no folder of published data")
    return Path(folder)


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[dict[str, str]]:
    """Variables that lead boto3 to an object store of this session, which answers over HTTP."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server.stop()


@pytest.fixture
def s3_bucket(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The name, `s3://...`, of a new bucket; this process finds its store."""
    from boto3.session import Session

    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    Session().client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A Hugging Face hub of this test (hub_server.py); this process and its children find it, with an empty cache."""
    from huggingface_hub import HfFileSystem, constants

    from tests.essential.hub_server import TOKEN, Hub, serve

    hub = Hub()
    server = serve(hub)
    cache = tmp_path / "huggingface"
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    values = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    HfFileSystem.clear_instance_cache()
    yield hub
    HfFileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


@pytest.fixture
def manifest(tmp_path: Path) -> str:
    """The manifest of a dataset of 1000 samples; its shards are never read here."""
    path = tmp_path / "dataset" / "manifest.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({"shard": "shard_000000", "num_sequences": 1000}) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    """Writes a file below the test's folder and returns its path."""

    def write_file(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file


@pytest.fixture
def parse_train() -> Callable[..., Any]:
    """Parses the words of `vla-foundry train`, with a type for model and data."""

    def parse_words(*words: str, cls: Any = None) -> Any:
        from vla_foundry.config.command_line import parse
        from vla_foundry.params import TrainExperimentParams

        base = ["--model.type", "transformer", "--data.type", "text"] if cls is None else []
        return parse(cls or TrainExperimentParams, [*base, *words], prog="vla-foundry train")

    return parse_words
