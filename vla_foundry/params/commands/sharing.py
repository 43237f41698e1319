"""Params of commands that share, repeat and plan runs: `hub push`, `hub pull`, `reproduce`, `verify-resume`, `plan`."""

import re
from dataclasses import dataclass, field
from typing import Annotated

from vla_foundry.config.schema import BaseParams, Bounds, Count, Location, Name, NonNegative, Size
from vla_foundry.params.experiment import TrainExperimentParams

_REPOSITORY = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}")
_PULLED = re.compile(r"(hf://)?(datasets/)?(?P<name>[^@]+)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, kw_only=True)
class HubPushParams(BaseParams):
    """Publish a run or a dataset on the Hugging Face hub, in one commit. A killed upload continues when repeated."""

    # run folder (its newest checkpoint), step folder, folder of shards with its manifest, or LeRobot dataset
    source: Location
    # where to: ORG/NAME; it is created if it does not exist
    repo: Name
    # branch of the repository
    revision: Name = "main"
    # create it private
    private: bool = True
    # licence for the card, as the hub names it: apache-2.0, mit, cc-by-4.0, ...; null: the card says there is none
    license: Name | None = None
    # what the model or dataset is meant for, for the card; null: research
    intended_use: Name | None = None
    # datasets on the hub that a run was trained on (ORG/NAME), for the card; null: those that its config names
    datasets: list[Name] | None = None
    # published model that a run started from (ORG/NAME), for the card; null: those that its config names
    base_model: Name | None = None
    # more tags for the card
    tags: list[Name] = field(default_factory=list)
    # files of weights larger than this many GB are divided
    max_shard_gb: Annotated[float, Bounds(above=0, most=50)] = 5.0
    # message of the commit; null: what is pushed
    message: Name | None = None
    # print the files and the card, and send nothing
    dry_run: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _REPOSITORY.fullmatch(self.repo):
            raise ValueError(f"repo '{self.repo}' must be ORG/NAME, of letters, digits, '-', '_' and '.'.")


@dataclass(frozen=True, kw_only=True)
class HubPullParams(BaseParams):
    """Download a run or a dataset from the Hugging Face hub, and check it; repeated, a killed download goes on."""

    # hf://ORG/NAME or hf://datasets/ORG/NAME, with @REVISION for a branch, tag or commit; hf:// may be left out
    source: Name
    # folder to create; it must not exist; null: NAME
    output: Location | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        match = _PULLED.fullmatch(self.source)
        if match is None or not _REPOSITORY.fullmatch(match["name"]):
            raise ValueError(
                f"source '{self.source}' must be hf://ORG/NAME or hf://datasets/ORG/NAME, with @REVISION if need be."
            )

    @property
    def repository(self) -> tuple[str, str, str]:
        """Type, name and revision of the repository."""
        match = _PULLED.fullmatch(self.source)
        assert match is not None
        return "dataset" if match[2] else "model", match["name"], match["revision"] or "main"


@dataclass(frozen=True, kw_only=True)
class ReproduceParams(BaseParams):
    """Run the experiment of an experiment.json again, and compare losses, data and environment with the record."""

    # experiment.json, or the folder of its run; local, s3:// or hf://
    record: Location
    # folder for the new run folder, which has the name of the recorded run
    output: Location = "reproduced"
    # largest relative difference of losses that counts as equal; 0: they must be the same numbers
    tolerance: NonNegative = 0.0
    # processes to train with; null: as many as the record's run had
    num_processes: Count | None = None
    # folder that holds the datasets, if they are not where they were: <data_folder>/<last folder of the old path>
    data_folder: Location | None = None
    # print what differs from the record already, and do not train
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class VerifyResumeParams(TrainExperimentParams):
    """Prove that a killed run of a training config, resumed, is the run that was never killed, bit by bit."""

    # steps to the checkpoint; as many are trained after it, in one of which the run is killed
    steps: Annotated[int, Bounds(least=1, most=100_000)] = 5
    # processes to train with, on this machine
    num_processes: Size = 1
    # new folder for the two runs
    output: Location = "verify_resume"


@dataclass(frozen=True, kw_only=True)
class PlanParams(TrainExperimentParams):
    """Predict the memory of a training config on each rank, and say what fits; needs neither a GPU nor the data."""

    # ranks, one on each GPU
    gpus: Size = 1
    # memory of a GPU, GiB
    gpu_memory: Annotated[float, Bounds(above=0, most=100_000)] = 80.0
    # share of it to leave free: for CUDA, NCCL, and what an allocator cannot use
    headroom: Annotated[float, Bounds(least=0, below=1)] = 0.1
    # print JSON
    json: bool = False
