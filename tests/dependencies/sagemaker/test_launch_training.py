"""sagemaker/launch_training.py: what is checked, what is sent to AWS, and that it trains."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.dependencies.sagemaker.conftest import ROOT, SECRETS, Aws, Host
from vla_foundry.run_folder import find_checkpoint

MARKERS = (*SECRETS.values(), "marker-env-0001")


@pytest.fixture
def image(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module sagemaker/image.py."""
    monkeypatch.syspath_prepend(str(ROOT / "sagemaker"))
    return importlib.import_module("image")


@pytest.fixture
def main(image: ModuleType, aws: Aws, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """The function behind sagemaker/launch_training.py, in this process."""
    monkeypatch.chdir(aws.folder)
    return importlib.import_module("launch_training").main


def put_image(aws: Aws, uri: str) -> None:
    """Let the registry have an image already, so that Docker is not needed."""
    repository, _, tag = uri.partition("/")[2].partition(":")
    ecr = aws.session.client("ecr")
    ecr.create_repository(repositoryName=repository)
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    manifest = {"schemaVersion": 2, "mediaType": kind, "config": {"digest": "sha256:0"}, "layers": []}
    ecr.put_image(repositoryName=repository, imageManifest=json.dumps(manifest), imageTag=tag)


def dry_run(aws: Aws, *words: str) -> tuple[dict[str, Any], str]:
    """Return the job and the config that a launch would send."""
    done = aws.launch(*words, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert aws.names() == []
    job, _, config = done.stdout.partition("\n\n# config.yaml\n")
    return json.loads(job), config


def find_markers(folder: Path, objects: dict[str, bytes]) -> list[str]:
    """Return the secrets that stand in a file of a folder, or in an object."""
    written = [path for path in folder.rglob("*") if path.is_file() and path.name != "secrets.env"]
    contents = [*objects.values(), *(path.read_bytes() for path in written)]
    return [marker for marker in MARKERS if any(marker.encode() in content for content in contents)]


@pytest.mark.slow
def test_a_machine_is_taken_back_and_two_without_a_shared_disk_go_on(
    aws: Aws, image: ModuleType, hosts: list[Host], tmp_path: Path
) -> None:
    budget = ("--name", "llm", "--total_train_samples", "640", "--num_checkpoints", "20", "--distributed.fsdp", "true")
    job, config = dry_run(aws, *budget, "--sagemaker.instance_count", "2", "--sagemaker.spot")
    secret = job["Environment"]["VLA_FOUNDRY_SECRET"]
    aws.session.client("secretsmanager").create_secret(Name=secret, SecretString=json.dumps(SECRETS))
    source = image.pack(image.list_source([]), SECRETS)
    assert job["AlgorithmSpecification"]["TrainingImage"].endswith(f":{image.tag_of(source)}")

    def start(names: list[str]) -> list[Host]:
        folders = {name: tmp_path / f"{len(names)}-{name}" for name in names}
        here = [Host(folder, job, source, config.encode(), names, name) for name, folder in folders.items()]
        hosts.extend(here)
        return here

    [alone] = start(["localhost"])
    alone.wait_for(lambda: any(name.endswith("/COMPLETE") for name in aws.names()))
    assert alone.interrupt()
    assert "Stopped by SIGTERM after step" in alone.read_log()
    both = start(["localhost", "algo-2"])
    assert [host.process.wait(120) for host in both] == [0, 0], both[0].read_log()
    step = re.search(r"continues from \S+/step_(\d+) after", both[0].read_log())
    assert step is not None
    assert 0 < int(step[1]) < 40
    # its hashes hold, and moments of both machines are in it
    checkpoint = find_checkpoint(both[0].base / "experiments/llm")
    assert [path.name for path in (checkpoint / "training_state").iterdir()] == ["moments.safetensors"]
    objects = aws.objects()
    assert "runs/llm/checkpoints/step_00000040/COMPLETE" in objects
    lines = [json.loads(line) for line in objects["runs/llm/metrics.jsonl"].decode().splitlines()]
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == sorted(set(steps))
    assert steps[-1] == 40
    assert find_markers(tmp_path, objects) == []


def test_a_launch_uploads_the_config_and_the_secrets_and_starts_the_job(
    main: Callable[[list[str]], None],
    aws: Aws,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("sagemaker.core", reason="uv sync --group sagemaker")
    monkeypatch.setenv("FROM_ENVIRONMENT", "marker-env-0001")
    network = ("--sagemaker.subnets", "subnet-1", "--sagemaker.security_groups", "sg-1")
    words = aws.words("--name", "llm", "--sagemaker.spot", *network)
    job, config = dry_run(aws, "--name", "llm", "--sagemaker.spot", *network)
    put_image(aws, job["AlgorithmSpecification"]["TrainingImage"])
    main(words)
    printed = capfd.readouterr()
    name = re.search(r"job (your-user-name-llm-\S+) started", printed.out)
    assert name is not None
    started = aws.session.client("sagemaker").describe_training_job(TrainingJobName=name[1])
    expected = json.loads(json.dumps(job).replace(job["TrainingJobName"], name[1]))
    # what the server keeps of a request
    started["AlgorithmSpecification"].pop("MetricDefinitions")
    kept = expected.keys() - {"Environment", "RetryStrategy", "Tags"}
    assert {key: started[key] for key in kept} == {key: expected[key] for key in kept}
    objects = aws.objects()
    assert objects == {f"runs/.sagemaker/{name[1]}/config.yaml": config.encode()}
    secret = aws.session.client("secretsmanager").get_secret_value(SecretId="vla_foundry/your-user-name")
    assert json.loads(secret["SecretString"]) == SECRETS | {"FROM_ENVIRONMENT": "marker-env-0001"}
    said = {"output": (printed.out + printed.err + str(started)).encode()}
    assert find_markers(tmp_path, objects | said) == []
    monkeypatch.setenv("AWS_ENDPOINT_URL_ECR", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(ValueError, match=r"^AWS does not start the job: Could not connect"):
        main(words)


def test_the_local_mode_runs_the_entry_script(aws: Aws, tmp_path: Path) -> None:
    done = aws.launch("--sagemaker.local", "--name", "llm", "--total_train_samples", "32", "--num_checkpoints", "1")
    assert done.returncode == 0, done.stderr
    assert "runs/llm/checkpoints/step_00000002/COMPLETE" in aws.names()
    assert find_markers(tmp_path, aws.objects()) == []


FAULTS: list[tuple[tuple[str, ...], str]] = [
    (("--hparams.lr", "-1"), r"hparams\.lr"),
    (
        ("--hparams.global_batch_size", "17", "--sagemaker.instance_count", "2"),
        r"\(17\) must be a multiple of num_ranks \(2\)",
    ),
    (("--data.dataset_manifest", "near/manifest.jsonl"), "is on this machine only. Copy it to s3://"),
    (("--data.dataset_manifest", "s3://nowhere/manifest.jsonl"), "nowhere"),
    (("--sagemaker.instance_type", "p4dx", "--sagemaker.gpus_per_instance", "null"), "is not one of p4d, p4de"),
    (("--sagemaker.role", "me"), r"sagemaker\.role 'me' must be an ARN"),
    (("--sagemaker.secrets_file", "none.env"), "none.env is not a file"),
    (("--sagemaker.include", "near"), "near/token.txt holds the value of the secret HF_TOKEN"),
    (("--sagemaker.include", "."), r"brings secrets\.env\. Files of secrets stay here"),
    (("--sagemaker.secrets_file", "quoted.txt"), r"quoted\.txt:1 is not KEY=VALUE\. Write .* without quotes"),
    (("--sagemaker.include", "../x"), r"\.\./x"),
    (("--wandb_entity", SECRETS["HF_TOKEN"]), "The config holds the value of the secret HF_TOKEN"),
    (("--remote_sync", "copies"), "remote_sync is not an s3:// folder"),
    (("--resume", "null", "--sagemaker.user", "..."), "needs a letter"),
]


def test_what_is_wrong_is_one_line_before_anything_is_sent(main: Callable[[list[str]], None], aws: Aws) -> None:
    (aws.folder / "near").mkdir()
    (aws.folder / "near/manifest.jsonl").write_text('{"shard": "a", "num_sequences": 10000}\n', encoding="utf-8")
    (aws.folder / "near/token.txt").write_text(SECRETS["HF_TOKEN"], encoding="utf-8")
    (aws.folder / "quoted.txt").write_text('A="b"\n', encoding="utf-8")
    for words, message in FAULTS:
        with pytest.raises((ValueError, OSError), match=message) as caught:
            main(aws.words(*words))
        assert not any(marker in str(caught.value) for marker in MARKERS)
    assert aws.names() == []


def test_another_environment_is_one_line() -> None:
    words = [sys.executable, "-S", str(ROOT / "sagemaker/launch_training.py")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: There is no module boto3 here. Run it from the checkout: uv run --group")


def test_an_image_is_named_by_the_content_of_its_files(image: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plugin.py").write_text("A = 1\n", encoding="utf-8")
    files = image.list_source(["plugin.py"])
    assert {
        "vla_foundry/main.py",
        "sagemaker/entry.py",
        "sagemaker/Dockerfile",
        "requirements.lock",
        "plugin.py",
    } <= set(files)
    assert not [name for name in files if "secrets.env" in name or "__pycache__" in name]
    tag = image.tag_of(image.pack(files, {}))
    (tmp_path / "plugin.py").touch()
    assert image.tag_of(image.pack(image.list_source(["plugin.py"]), {})) == tag
    (tmp_path / "plugin.py").write_text("A = 2\n", encoding="utf-8")
    assert image.tag_of(image.pack(image.list_source(["plugin.py"]), {})) != tag


def test_an_image_that_the_registry_lacks_needs_docker(
    image: ModuleType, aws: Aws, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    uri = "123456789012.dkr.ecr.us-east-1.amazonaws.com/new-repository:0123456789abcdef"
    for _ in range(2):  # without and with its repository
        with pytest.raises(ValueError, match=r"^Docker is not installed, and the image must be built"):
            image.ensure_image(aws.session, uri, b"")
