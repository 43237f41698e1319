"""Params of `sagemaker/launch_training.py`: those of training, and where it runs."""

import re
from dataclasses import dataclass, field
from typing import Annotated

from vla_foundry.config.schema import BaseParams, Bounds, Count, Location, Name, NonNegativeInt, Positive
from vla_foundry.params.experiment import TrainExperimentParams

ROLE_PATTERN, EXAMPLE_ROLE = r"arn:aws:iam::\d{12}:role/\S+", "arn:aws:iam::123456789012:role/training"
# short name -> instance, GPUs, GiB of each; all of them have EFA
_INSTANCES = {
    "p4d": ("ml.p4d.24xlarge", 8, 40),
    "p4de": ("ml.p4de.24xlarge", 8, 80),
    "p5": ("ml.p5.48xlarge", 8, 80),
    "p5e": ("ml.p5e.48xlarge", 8, 141),
    "p5en": ("ml.p5en.48xlarge", 8, 141),
    "p6-b200": ("ml.p6-b200.48xlarge", 8, 179),
    "g5": ("ml.g5.48xlarge", 8, 22),
    "g6": ("ml.g6.48xlarge", 8, 22),
    "g6e": ("ml.g6e.48xlarge", 8, 44),
}
_FULL_NAMES = {name: (name, gpus, memory) for name, gpus, memory in _INSTANCES.values()}


@dataclass(frozen=True, kw_only=True)
class SageMakerParams(BaseParams):
    """`--sagemaker.` Where and how the job runs."""

    # who launches it: part of the job's name and its tag `user`
    user: Name
    # machines
    instance_count: Annotated[int, Bounds(least=1, most=1024)] = 1
    # p4d, p4de, p5, p5e, p5en, p6-b200, g5, g6, g6e (8 GPUs each), or a full name such as ml.g6e.xlarge
    instance_type: Name = "p4de"
    # GPUs of an instance that is not in this list
    gpus_per_instance: NonNegativeInt | None = None
    # ARN of the IAM role that the job runs as; its account owns the image and the secret; null: SAGEMAKER_ROLE
    role: Name | None = None
    # AWS region; null: as AWS is set up on this machine
    region: Name | None = None
    # run on spot instances; an interrupted job goes on from its last checkpoint
    spot: bool = False
    # hours after which the job is stopped
    max_hours: Annotated[float, Bounds(above=0, most=672)] = 120.0
    # hours to wait for spot instances, beyond max_hours
    max_wait_hours: Positive = 24.0
    # disk of each machine in GB, for instances without disks of their own
    volume_gb: Count = 500
    # subnets and security groups of a VPC; empty: none
    subnets: list[Name] = field(default_factory=list)
    security_groups: list[Name] = field(default_factory=list)
    # KEY=VALUE lines that become the job's environment through Secrets Manager; null: secrets.env, if there is one
    secrets_file: Location | None = None
    # files and folders of this one for the image besides the package: plug-ins, a tokenizer
    include: list[Location] = field(default_factory=list)
    # ECR repository of the image
    repository: Name = "vla-foundry"
    # run the job's entry script on this machine, from the files that the image would get
    local: bool = False
    # with local: run it in the image, with Docker
    local_image: bool = False
    # print the job's log until it ends
    wait: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.search("[a-zA-Z0-9]", self.user):
            raise ValueError(f"user '{self.user}' needs a letter or a digit: jobs are named after it.")
        if self.instance_type not in _INSTANCES | _FULL_NAMES and self.gpus_per_instance is None:
            raise ValueError(
                f"instance_type '{self.instance_type}' is not one of {', '.join(_INSTANCES)}. For another one, "
                "give its full name and gpus_per_instance."
            )
        if self.gpus_per_instance is not None and not re.fullmatch(r"ml\.[a-z0-9-]+\.[a-z0-9-]+", self.full_type):
            raise ValueError(f"instance_type '{self.instance_type}' must be a full name, such as ml.g6e.xlarge.")
        if self.gpus_per_instance is not None and self.has_efa:
            raise ValueError(f"gpus_per_instance is known for {self.full_type}. Leave it out.")
        if self.role is not None and not re.fullmatch(ROLE_PATTERN, self.role):
            raise ValueError(f"role '{self.role}' must be an ARN such as {EXAMPLE_ROLE}.")
        if bool(self.subnets) != bool(self.security_groups):
            raise ValueError("subnets and security_groups belong together. Give both or none.")
        if self.local_image and not self.local:
            raise ValueError("local_image needs local. Add --sagemaker.local true.")
        if self.local and self.instance_count > 1:
            raise ValueError(f"instance_count ({self.instance_count}) must be 1 for local: it is this machine.")

    @property
    def full_type(self) -> str:
        """Return SageMaker's name of the instance type."""
        return _INSTANCES.get(self.instance_type, (self.instance_type,))[0]

    @property
    def has_efa(self) -> bool:
        """Return whether the instance is known to have EFA, AWS's network for several machines."""
        return self.full_type in _FULL_NAMES

    @property
    def num_gpus(self) -> int:
        """Return the GPUs of an instance."""
        return self.gpus_per_instance if self.gpus_per_instance is not None else _FULL_NAMES[self.full_type][1]

    @property
    def gpu_memory(self) -> int | None:
        """Return the memory of a GPU in bytes; None: unknown."""
        return _FULL_NAMES[self.full_type][2] << 30 if self.has_efa else None


@dataclass(frozen=True, kw_only=True)
class LaunchParams(TrainExperimentParams):
    """Train on Amazon SageMaker: the flags of `vla-foundry train`, and --sagemaker. ones."""

    # print the job, its config and its image's name, and stop; nothing is built, uploaded or asked of AWS
    dry_run: bool = False
    sagemaker: SageMakerParams

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sagemaker.local and not (self.remote_sync or "").startswith("s3://"):
            raise ValueError("remote_sync is not an s3:// folder: checkpoints go there, and a job resumes from there.")
        if self.resolve_configs:
            raise ValueError("resolve_configs belongs to training. Use dry_run, which prints the config too.")
        if self.resume not in (None, "auto"):
            raise ValueError(f"resume is '{self.resume}', but a job always has auto. Leave it out.")
