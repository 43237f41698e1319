"""Jobs launched against an AWS that answers over HTTP, and what SageMaker would do with them."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.essential.conftest import s3_bucket as s3_bucket
from tests.essential.conftest import s3_environment as s3_environment
from tests.essential.training.conftest import manifest as manifest

ROOT = Path(__file__).resolve().parents[3]
ROLE = "arn:aws:iam::123456789012:role/training"
SECRETS = {"WANDB_API_KEY": "marker-wandb-4711", "HF_TOKEN": "marker-hf-0815"}


class Aws:
    """AWS as the launcher sees it, a bucket in it, and a folder to launch from."""

    def __init__(self, folder: Path, bucket: str, manifest: Path) -> None:
        from boto3.session import Session

        self.folder, self.bucket, self.session = folder, bucket, Session()
        self.s3 = self.session.client("s3")
        for path in manifest.parent.iterdir():
            self.s3.upload_file(str(path), bucket.removeprefix("s3://"), f"shards/{path.name}")
        secrets = "".join(f"{name}={value}\n" for name, value in SECRETS.items())
        (folder / "secrets.env").write_text(f"# mine\n\n{secrets}EMPTY=\nFROM_ENVIRONMENT\n", encoding="utf-8")

    def words(self, *words: str) -> list[str]:
        """Return a command line of a tiny language model."""
        return [
            *("--config_path", str(ROOT / "config_presets/training_jobs/llm_tiny.yaml")),
            *("--data.dataset_manifest", f"{self.bucket}/shards/manifest.jsonl", "--data.seq_len", "32"),
            *("--model.vocab_size", "64", "--data.num_workers", "0", "--hparams.per_gpu_batch_size", "1"),
            *("--remote_sync", f"{self.bucket}/runs", "--sagemaker.user", "your.user.name"),
            *(
                "--sagemaker.role",
                ROLE,
                "--sagemaker.instance_type",
                "ml.m5.large",
                "--sagemaker.gpus_per_instance",
                "0",
            ),
            *words,
        ]

    def launch(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run launch_training.py."""
        command = [sys.executable, str(ROOT / "sagemaker/launch_training.py"), *self.words(*words)]
        environment = {**os.environ, "FROM_ENVIRONMENT": "marker-env-0001", "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)

    def names(self) -> list[str]:
        """Return the names of everything in the bucket that was not there before."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket.removeprefix("s3://"))
        names = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return [name for name in names if not name.startswith("shards/")]

    def objects(self) -> dict[str, bytes]:
        """Return what was put into the bucket."""
        bucket = self.bucket.removeprefix("s3://")
        return {name: self.s3.get_object(Bucket=bucket, Key=name)["Body"].read() for name in self.names()}


class Host:
    """A machine of a job: SageMaker's folder, the image's files, and the entry script."""

    def __init__(
        self, folder: Path, job: dict[str, Any], source: bytes, config: bytes, hosts: list[str], name: str
    ) -> None:
        self.base = folder / "opt_ml"
        (self.base / "input/data/config").mkdir(parents=True)
        (self.base / "input/data/config/config.yaml").write_bytes(config)
        with tarfile.open(fileobj=io.BytesIO(source)) as tar:
            tar.extractall(folder / "image", filter="data")
        resources = {"hosts": hosts, "current_host": name, "network_interface_name": "lo"}
        environment = {
            **os.environ,
            **job["Environment"],
            "SAGEMAKER_BASE_DIR": str(self.base),
            "SM_HOSTS": json.dumps(hosts),
            "SM_CURRENT_HOST": name,
            "SM_NUM_GPUS": "0",
            "SM_RESOURCE_CONFIG": json.dumps(resources),
            "MASTER_PORT": "29611",
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "disabled",
        }
        self.log = folder / "log.txt"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(folder / "image/sagemaker/entry.py"), "train"],
                cwd=folder / "image",
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self) -> None:
        """End what is left of it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def read_log(self) -> str:
        """Return what it printed."""
        return self.log.read_text(encoding="utf-8")

    def wait_for(self, is_there: Callable[[], bool]) -> None:
        """Wait until something is there while the host runs."""
        end = time.monotonic() + 60
        while not is_there():
            assert self.process.poll() is None, self.read_log()
            assert time.monotonic() < end, self.read_log()
            time.sleep(0.1)

    def interrupt(self) -> int:
        """Take the machine back as spot instances are: SIGTERM, and time to leave."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """The machines that a test starts; they end with it."""
    started: list[Host] = []
    yield started
    for host in started:
        host.stop()


@pytest.fixture
def aws(tmp_path: Path, s3_bucket: str, manifest: Path) -> Aws:
    """AWS with a dataset."""
    return Aws(tmp_path, s3_bucket, manifest)
