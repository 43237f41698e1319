"""Train on Amazon SageMaker: `uv run --group sagemaker sagemaker/launch_training.py --sagemaker.user NAME ... FLAGS`.

FLAGS are those of `vla-foundry train`. docs/launching.md says what happens.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import fields, replace
from io import BytesIO
from pathlib import Path
from typing import Any

_ENVIRONMENT = "Run it from the checkout: uv run --group sagemaker sagemaker/launch_training.py ..."
try:
    from boto3.session import Session
    from image import build, ensure_image, list_source, pack, refuse_secrets, tag_of

    from vla_foundry.config.command_line import parse, print_notices, run_command
    from vla_foundry.config.loading import dump_params
    from vla_foundry.config.resolve import require_resolved, resolve_known
    from vla_foundry.config.schema import EXPANDED, annotated_types, map_annotated
    from vla_foundry.data.facts import read_facts
    from vla_foundry.params.commands.launching import EXAMPLE_ROLE, ROLE_PATTERN, LaunchParams, SageMakerParams
    from vla_foundry.params.experiment import TrainExperimentParams, find_lack_of_memory
    from vla_foundry.progress import say
    from vla_foundry.run_folder import lock_folder
    from vla_foundry.storage.uri import join_uri, read_text, write_text
    from vla_foundry.world import read_memory
except ModuleNotFoundError as error:
    sys.stderr.write(f"error: There is no module {error.name} here. {_ENVIRONMENT}\n")
    sys.exit(2)

# what a container sees instead of this machine's folders
_SAVE_PATH = "/opt/ml/experiments"
_MAX_JOB_NAME = 63
_SECRETS_FILE = "secrets.env"


def main(argv: list[str]) -> None:
    """Check the config, then print, run or launch the job.

    Raises:
        ValueError: an error that the user can fix; nothing was built, uploaded or started.
    """
    parsed = parse(LaunchParams, argv, prog="launch_training.py")
    params = parsed.params
    name = job_name(params)
    train = training_params(params, name)
    notices = check_training(train, params.sagemaker, offline=params.dry_run)
    secrets = read_secrets(params.sagemaker.secrets_file)
    source = pack(list_source(params.sagemaker.include), secrets)
    config = dump_params(train)
    refuse_secrets(config.encode(), secrets, "The config")
    print_notices(parsed.notices + notices)
    if params.sagemaker.local:
        base = Path(params.save_path).absolute() / "sagemaker"
        with lock_folder(base, what="folder of local jobs", flag="--save_path"):
            run_locally(base, params, source, config, secrets)
        return
    where = with_defaults(params.sagemaker, is_needed=not params.dry_run)
    job = describe_job(where, name, str(params.remote_sync), tag_of(source), has_secrets=bool(secrets))
    refuse_secrets(json.dumps(job).encode(), secrets, "The job")
    if params.dry_run:
        say(f"{json.dumps(job, indent=2)}\n\n# config.yaml\n{config}".removesuffix("\n"))
        return
    launch(where, job, source, config, secrets)


def job_name(params: LaunchParams) -> str:
    """Return the job's name: who, what, when; SageMaker takes letters, digits and dashes."""
    words = f"{params.sagemaker.user}-{params.name or params.model.type}"
    now = time.strftime("-%Y%m%d-%H%M%S")
    return re.sub(r"[^a-zA-Z0-9]+", "-", words)[: _MAX_JOB_NAME - len(now)].strip("-") + now


def training_params(params: LaunchParams, name: str) -> TrainExperimentParams:
    """Return the params of training: what a restarted container continues must have a name."""
    given: dict[str, Any] = {item.name: getattr(params, item.name) for item in fields(TrainExperimentParams)}
    fixed = {"name": params.name or name, "resume": "auto"}
    save_path = params.save_path if params.sagemaker.local else _SAVE_PATH
    return TrainExperimentParams(**given | fixed | {"save_path": save_path})


def check_training(params: TrainExperimentParams, where: SageMakerParams, *, offline: bool) -> list[str]:
    """Check a config as training does, for the processes and the GPUs of the job; return notices.

    Raises:
        ValueError: training would refuse it, or it names files that only this machine has.
    """
    world_size = 1 if where.local else where.instance_count * max(1, where.num_gpus)
    resolved = resolve_known(params, read_facts(params, world_size, offline=offline))
    if not offline:
        require_resolved(resolved)
    memory = read_memory(1) if where.local else where.gpu_memory
    if lack := find_lack_of_memory(resolved.params, world_size, memory):
        raise ValueError(lack)
    if not where.local or where.local_image:
        check_locations(replace(params, save_path="", remote_sync=None), where.include)
    return resolved.notices


def check_locations(section: Any, include: list[str], path: str = "") -> None:
    """Check that what a config names exists in the job too.

    Raises:
        ValueError: a file or folder is only on this machine.
    """

    def check(value: Any, annotation: Any, name: str) -> Any:
        is_included = any(Path(value).is_relative_to(item) for item in include) if isinstance(value, str) else True
        if annotation == EXPANDED and not is_included and os.path.exists(value):
            raise ValueError(
                f"{name} '{value}' is on this machine only. Copy it to s3:// and name it there, or add "
                f"--sagemaker.include {value}."
            )
        return value

    for item in fields(section):
        value = getattr(section, item.name)
        parts = value if isinstance(value, dict) else {"": value}
        for key, part in parts.items():
            full = ".".join(name for name in (path, item.name, str(key)) if name)
            if hasattr(part, "__dataclass_fields__"):
                check_locations(part, include, full)
    for name, hint in annotated_types(type(section)).items():
        map_annotated(hint, getattr(section, name), check, f"{path}.{name}".strip("."))


def read_secrets(given: str | None) -> dict[str, str]:
    """Read KEY=VALUE lines; a KEY alone is taken from this process's environment, an empty value left out.

    Raises:
        ValueError: a line is neither.
        FileNotFoundError: the file that was named does not exist.
    """
    path = Path(given or _SECRETS_FILE)
    if given is None and not path.exists():
        return {}
    secrets = {}
    for number, line in enumerate(read_text(str(path)).splitlines(), start=1):
        name, equals, value = (part.strip() for part in line.partition("="))
        if not name or name.startswith("#"):
            continue
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or value.startswith(('"', "'")):
            raise ValueError(f"{path}:{number} is not KEY=VALUE. Write a name, = and a value without quotes.")
        secrets[name] = value if equals else os.environ.get(name, "")
    return {name: value for name, value in secrets.items() if value}


def with_defaults(where: SageMakerParams, *, is_needed: bool) -> SageMakerParams:
    """Return the params with the role and the region that this machine is set up for.

    Raises:
        ValueError: there is no region; or no role, and it is needed.
    """
    role = where.role or os.environ.get("SAGEMAKER_ROLE") or (None if is_needed else EXAMPLE_ROLE)
    if role is None or not re.fullmatch(ROLE_PATTERN, role):
        raise ValueError("sagemaker.role is not given. Add --sagemaker.role ARN, or set SAGEMAKER_ROLE.")
    region = where.region or Session().region_name
    if region is None:
        raise ValueError("sagemaker.region is not given, and AWS has none on this machine. Add --sagemaker.region.")
    return replace(where, role=role, region=region)


def describe_job(where: SageMakerParams, name: str, remote: str, tag: str, *, has_secrets: bool) -> dict[str, Any]:
    """Return the request of SageMaker's CreateTrainingJob."""
    account, region = str(where.role).split(":")[4], where.region
    folder = join_uri(remote, ".sagemaker", name)
    seconds = round(where.max_hours * 3600)
    environment = {"AWS_DEFAULT_REGION": region}
    if where.has_efa and where.instance_count > 1:
        environment |= {"FI_PROVIDER": "efa", "NCCL_DEBUG": "WARN"}
        # GPUs that read each other's memory over EFA
        environment |= {"FI_EFA_USE_DEVICE_RDMA": "1"} if where.full_type.startswith("ml.p") else {}
    if has_secrets:
        environment["VLA_FOUNDRY_SECRET"] = secret_name(where)
    waiting = {"MaxWaitTimeInSeconds": seconds + round(where.max_wait_hours * 3600)} if where.spot else {}
    network = {"VpcConfig": {"Subnets": where.subnets, "SecurityGroupIds": where.security_groups}}
    return {
        "TrainingJobName": name,
        "RoleArn": where.role,
        "AlgorithmSpecification": {
            "TrainingImage": f"{account}.dkr.ecr.{region}.amazonaws.com/{where.repository}:{tag}",
            "TrainingInputMode": "File",
        },
        "ResourceConfig": {
            "InstanceType": where.full_type,
            "InstanceCount": where.instance_count,
            "VolumeSizeInGB": where.volume_gb,
        },
        "InputDataConfig": [
            {
                "ChannelName": "config",
                "DataSource": {
                    "S3DataSource": {
                        "S3DataType": "S3Prefix",
                        "S3Uri": folder,
                        "S3DataDistributionType": "FullyReplicated",
                    }
                },
            }
        ],
        "OutputDataConfig": {"S3OutputPath": join_uri(folder, "output")},
        "EnableManagedSpotTraining": where.spot,
        "StoppingCondition": {"MaxRuntimeInSeconds": seconds, **waiting},
        # a machine that fails is replaced, and training goes on from the last checkpoint
        "RetryStrategy": {"MaximumRetryAttempts": 5},
        "Environment": environment,
        "Tags": [{"Key": "user", "Value": where.user}],
        **(network if where.subnets else {}),
    }


def secret_name(where: SageMakerParams) -> str:
    """Return the name of a user's secret in Secrets Manager."""
    return f"vla_foundry/{re.sub(r'[^a-zA-Z0-9]+', '-', where.user)}"


def launch(where: SageMakerParams, job: dict[str, Any], source: bytes, config: str, secrets: dict[str, str]) -> None:
    """Make the image, the secret and the config, and start the job.

    Raises:
        ValueError: the SDK is missing, or AWS refuses something.
    """
    try:
        from botocore.exceptions import BotoCoreError, ClientError
        from sagemaker.core.resources import TrainingJob
        from sagemaker.core.utils.code_injection.codec import transform
    except ImportError:
        raise ValueError(f"The SageMaker SDK is not installed. {_ENVIRONMENT}") from None
    name, folder = job["TrainingJobName"], job["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"]
    logs = f"aws logs tail /aws/sagemaker/TrainingJobs --log-stream-name-prefix {name} --follow"
    try:
        session = Session(region_name=where.region)
        say(f"image {ensure_image(session, job['AlgorithmSpecification']['TrainingImage'], source)}")
        if secrets:
            store_secrets(session.client("secretsmanager"), secret_name(where), secrets)
        write_text(join_uri(folder, "config.yaml"), config)
        request = transform(job, "CreateTrainingJobRequest")
        started = TrainingJob.create(**request, session=session, region=where.region)
    except (BotoCoreError, ClientError) as error:
        raise ValueError(f"AWS does not start the job: {error}") from error
    say(f"job {name} started. Its log: {logs}")
    if where.wait and started is not None:
        started.wait(logs=True)


def store_secrets(client: Any, name: str, secrets: dict[str, str]) -> None:
    """Put secrets into Secrets Manager, where only the job's role and their owner read them."""
    text = json.dumps(secrets)
    try:
        client.create_secret(Name=name, SecretString=text)
    except client.exceptions.ResourceExistsException:
        client.put_secret_value(SecretId=name, SecretString=text)


def run_locally(base: Path, params: LaunchParams, source: bytes, config: str, secrets: dict[str, str]) -> None:
    """Run the entry script on this machine in a folder laid out as a container's /opt/ml.

    Raises:
        SystemExit: the entry script's exit code, unless it is 0.
    """
    for folder, name, text in (
        ("input/data/config", "config.yaml", config),
        ("input/config", "resourceconfig.json", json.dumps({"hosts": ["algo-1"], "current_host": "algo-1"})),
    ):
        (base / folder).mkdir(parents=True, exist_ok=True)
        (base / folder / name).write_text(text, encoding="utf-8")
    if params.sagemaker.local_image:
        uri = f"{params.sagemaker.repository}:{tag_of(source)}"
        build(uri, source)
        words = ["docker", "run", "--rm", "--ipc", "host", "--volume", f"{base}:/opt/ml"]
        words += ["--gpus", "all"] if os.path.exists("/dev/nvidiactl") else []
        words += [word for name in secrets for word in ("--env", name)] + [uri]
    else:
        shutil.rmtree(base / "source", ignore_errors=True)
        with tarfile.open(fileobj=BytesIO(source)) as tar:
            tar.extractall(base / "source", filter="data")
        words = [sys.executable, str(base / "source/sagemaker/entry.py")]
    done = subprocess.run(words, env={**os.environ, **secrets, "SAGEMAKER_BASE_DIR": str(base)}, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
