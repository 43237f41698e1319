"""Params of the commands that judge a model: `evaluate`, `action-error` and `report`."""

import re
import shlex
from dataclasses import dataclass, field
from typing import Annotated, Literal

from vla_foundry.config.schema import (
    BaseParams,
    Bounds,
    Count,
    Fraction,
    Location,
    Name,
    NonNegative,
    NonNegativeInt,
    NumThreads,
    Size,
)
from vla_foundry.params.commands.datagen import ImageSize, SimulatorParams
from vla_foundry.params.commands.runs import InferenceParams

# demonstrations use seeds from here on, so that no policy is evaluated on a start it has seen
FIRST_DEMO_SEED = 1_000_000


def _check_name(name: str | None) -> None:
    """Refuse a name of results that would leave their folder, or be hidden in it."""
    if name is not None and not re.fullmatch(r"[^/\\.][^/\\]{0,99}", name):
        raise ValueError(f"name must be the name of a folder or file, without '/' and a dot before it, got '{name}'.")


@dataclass(frozen=True, kw_only=True)
class LBMParams(BaseParams):
    """How to run the LBM simulator."""

    # its Docker image
    image: str = "toyotaresearch/lbm-eval-oss:vla-foundry"
    # the script in the image that runs a task
    launcher: str = "/opt/lbm_eval/launch_sim.sh"
    # command of an installed lbm_eval, in place of the image; null: the image
    command: str | None = None
    # GPU that renders
    gpu: NonNegativeInt = 0
    # port of our gRPC server
    port: Annotated[int, Bounds(least=1, most=65535)] = 50051
    # processes of the simulator
    num_processes: Size = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            is_empty = self.command is not None and not shlex.split(self.command)
        except ValueError as error:
            raise ValueError(f"command '{self.command}' cannot be read: {error}.") from None
        if is_empty:
            raise ValueError("command is empty. Leave it out to run the Docker image.")


@dataclass(frozen=True, kw_only=True)
class EvaluateParams(InferenceParams, SimulatorParams):
    """Run a policy in a simulator and count its successes. A killed run resumes when started again."""

    # local folder; results go to <output>/<name>/<task>/rollouts/<time>/results.json
    output: Location
    # run folder (its newest checkpoint) or step folder; not with another policy
    checkpoint: Location | None = None
    # HOST:PORT of `vla-foundry serve`, in place of a checkpoint
    policy_server: str | None = None
    # the server's token and certificate (files), if it asks for them
    server_token_file: Location | None = None
    server_certificate: Location | None = None
    # deadline of each call to the server, seconds
    server_timeout_s: Annotated[float, Bounds(above=0, most=86_400)] = 60.0
    # checkpoint: the trained policy; null: zero actions; random: uniform actions; expert: the simulator's own
    policy: Literal["checkpoint", "null", "random", "expert"] = "checkpoint"
    # simulator lbm: its image or command
    lbm: LBMParams = field(default_factory=LBMParams)
    # simulator lbm: print the commands that would run it
    dry_run: bool = False
    # name of the policy in the results; null: the run's name, or the value of `policy`
    name: Name | None = None
    # seeds of the starts, first:end; demonstrations use seeds from 1,000,000 on
    episodes: str = "0:50"
    # planned rollouts per task, written to the results before the first; null: as in `episodes`
    max_sample_size: Count | None = None
    # stop a task's rollouts when a sequential test tells the policy and this baseline apart: a folder with the results
    # of one policy, or the name of a published one, such as CS/Foundry-Qwen3VLA-2.1B; null: run all
    until_decided: Location | None = None
    # probability that until_decided finds a difference on a task where there is none; a family.yaml in the output
    # folder replaces it
    alpha: Annotated[float, Bounds(above=0, most=0.5)] = 0.05
    # control steps after which an episode fails; null: the simulator's limit
    max_steps: Count | None = None
    # executed actions per predicted chunk; null: half of them
    open_loop_steps: Count | None = None
    # sampling steps from noise to actions; null: as in the model's params
    num_inference_steps: Size | None = None
    # simulated time of a prediction in milliseconds: the simulator moves on while the policy thinks; null: it waits
    simulated_latency_ms: NonNegative | None = None
    # what the robot does meanwhile. blocking: it holds still; async: it goes on with the last chunk; realtime: so it
    # does, and each chunk goes on where the last one is (real-time chunking)
    execution: Literal["blocking", "async", "realtime"] = "blocking"
    # average the chunks that have an action for a step, with weights exp(-ensemble_decay i), i = 0 for the oldest;
    # null: the newest chunk decides
    ensemble_decay: NonNegative | None = None
    # seed of the policy's noise, besides the seed of the episode
    seed: NonNegativeInt = 0
    # instructions that replace a task's own, by task: {drawer-open-v3: close the drawer}
    instructions: dict[str, str] = field(default_factory=dict)
    # images the policy sees: its own episode's or, to test whether it uses them, those of the next seed's start, where
    # the same actions are applied
    images: Literal["own", "other_episode"] = "own"
    # robots in each prediction, always as many (some may be repeated): it affects the last bits of their numbers. 1 is
    # exact: equal to a server's batching 'exact'; more are faster where the policy is slower than the simulators, with
    # num_workers above it
    batch_size: Size = 1
    # simulator processes, one episode each at a time; they do not affect outcomes; null: one per core
    num_workers: NumThreads | None = None
    # seconds in which a simulator must answer; then it is killed, and its episode runs once more
    simulator_timeout_s: Annotated[float, Bounds(above=0, most=86_400)] = 600.0
    # mp4 of every step: of episodes that fail, or of the first ones; none renders no more than the policy needs
    save_videos: Literal["none", "failures", "all"] = "none"
    # most videos of a task
    max_videos: Count = 10
    # Ray cluster to run simulators and the checkpoint's policy on ("auto", host:port); null: this machine
    cluster: Name | None = None
    # policies on the cluster; they do not affect outcomes
    num_policies: Size = 1
    # fraction of a GPU that each of them takes, 0 for CPUs; null: 1, or 0 on a cluster without GPUs
    gpus_per_policy: Fraction | None = None
    # number of first episodes per task whose pictures go to the contact sheet
    num_pictured: NonNegativeInt = 2
    # camera of these pictures, for policies without images; null: the simulator's default
    camera: Name | None = None
    # width and height of these pictures in pixels, for policies without images
    image_size: ImageSize = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_names()
        given = [name for name in ("checkpoint", "policy_server") if getattr(self, name) is not None]
        if len(given) != (self.policy == "checkpoint"):
            raise ValueError(
                f"policy '{self.policy}' takes no {given[0]}. Leave one of them out."
                if given and self.policy != "checkpoint"
                else "Give either a checkpoint (a run folder) or a policy_server, or --policy null, random or expert."
            )
        if self.policy_server is not None and (self.open_loop_steps or self.num_inference_steps):
            raise ValueError("open_loop_steps and num_inference_steps belong to the server: give them to `serve`.")
        self._check_time()
        self._check_cluster()
        if self.dry_run and self.simulator != "lbm":
            raise ValueError("dry_run is for simulator 'lbm', whose commands it prints. Leave it out.")
        if self.save_videos != "none" and self.simulator == "lbm":
            raise ValueError("save_videos is not for simulator 'lbm', which makes recordings of its own. Leave it out.")
        if self.lbm.command is not None and self.seeds.start:
            raise ValueError(f"episodes ('{self.episodes}') must start at 0 for lbm.command, which counts from there.")
        num_seeds = len(self.seeds)
        if self.max_sample_size is not None and self.max_sample_size < num_seeds:
            raise ValueError(
                f"max_sample_size ({self.max_sample_size}) must be at least the {num_seeds} of episodes "
                f"'{self.episodes}': a budget is fixed before the first rollout."
            )

    def _check_names(self) -> None:
        if not self.output or "://" in self.output:
            raise ValueError(f"output must be a local folder, got '{self.output}'.")
        _check_name(self.name)
        for task in self.instructions:
            if self.tasks and task not in self.tasks:
                raise ValueError(f"instructions has '{task}', which is none of tasks: {', '.join(self.tasks)}.")

    def _check_time(self) -> None:
        if self.execution != "blocking" and self.simulated_latency_ms is None:
            raise ValueError(
                f"execution '{self.execution}' needs simulated_latency_ms: without it the simulator waits."
            )
        if self.policy != "checkpoint" and self.simulated_latency_ms is not None:
            raise ValueError("simulated_latency_ms needs a checkpoint or a policy_server.")
        if self.checkpoint is None and self.ensemble_decay is not None:
            raise ValueError("ensemble_decay needs a checkpoint.")

    def _check_cluster(self) -> None:
        for name in ("num_policies", "gpus_per_policy"):
            if getattr(self, name) not in (1, None) and (self.cluster is None or self.checkpoint is None):
                raise ValueError(f"{name} needs a cluster and a checkpoint. Leave it out.")
        if self.cluster is not None and self.simulator == "lbm":
            raise ValueError("simulator 'lbm' does not run on a cluster. Leave out cluster.")
        if self.cluster is not None and self.device.startswith("cuda:"):
            raise ValueError(f"device '{self.device}' is a GPU of this machine. Use cuda: the cluster chooses GPUs.")
        if self.device == "cpu" and self.gpus_per_policy:
            raise ValueError(f"gpus_per_policy ({self.gpus_per_policy:g}) must be 0 for device cpu.")
        if self.device == "cuda" and self.gpus_per_policy == 0:
            raise ValueError("gpus_per_policy must be above 0 for device cuda.")

    @property
    def seeds(self) -> range:
        """Return the seeds of the starts."""
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", self.episodes)
        if match is None or int(match[1]) >= int(match[2]):
            raise ValueError(f"episodes must be first:end, such as 0:50, got '{self.episodes[:40]}'.")
        if int(match[2]) > FIRST_DEMO_SEED:
            raise ValueError(f"episodes ('{self.episodes}') must end at {FIRST_DEMO_SEED}: then come demonstrations.")
        return range(int(match[1]), int(match[2]))


@dataclass(frozen=True, kw_only=True)
class HarnessParams(InferenceParams):
    """Run a policy in the benchmarks of the vla-eval harness and count its successes."""

    # run folder (its newest checkpoint) or step folder
    checkpoint: Location
    # the harness's YAML file: benchmarks, tasks, episodes
    benchmark_config: Location
    # local folder; results go to <output>/<name>/<task>/rollouts/<time>/results.json
    output: Location
    # what the benchmark calls the policy's cameras and fields (docs/serving.md); null: their own names
    client_map: Location | None = None
    # the harness's command, in an environment of its own
    harness_command: str = "vla-eval"
    # run the benchmark in its Docker image; false: in the harness's environment
    docker: bool = True
    # name of the policy in the results; null: the run's name
    name: Name | None = None
    # executed actions per predicted chunk; null: half of them
    open_loop_steps: Count | None = None
    # sampling steps from noise to actions; null: as in the model's params
    num_inference_steps: Count | None = None
    # the robot's dataset: its name in a mixture, or its index where their image options differ
    dataset: Name | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name(self.name)


@dataclass(frozen=True, kw_only=True)
class ActionErrorParams(InferenceParams):
    """Predict the actions of a run's held-out samples and measure the error."""

    # run folder (its newest checkpoint) or step folder of a policy
    checkpoint: Location
    # JSON file for the mean squared errors of each field at each step; null: none
    output: Location | None = None
    # the robot's dataset: its name in a mixture, or its index where their image options differ
    dataset: Name | None = None
    # manifests of held-out data; empty: the validation data of the run
    val_dataset_manifest: list[Location] = field(default_factory=list)
    # held-out samples; null: all
    num_samples: Count | None = None
    # batch size
    batch_size: Size = 64
    # sampling steps from noise to actions; null: as in the model's params
    num_inference_steps: Size | None = None
    # seed of the order of samples
    seed: NonNegativeInt = 0


@dataclass(frozen=True, kw_only=True)
class CaptionScoreParams(InferenceParams):
    """Score captions of images against those of people: BLEU-1 to 4, ROUGE-L, CIDEr-D."""

    # COCO annotation file: what people say of each image
    annotations: Location
    # COCO result file; with a checkpoint, the run's captions are written to it
    results: Location | None = None
    # run folder (its newest checkpoint) or step folder of a vision-language model that captions the images
    checkpoint: Location | None = None
    # folder of the images that the annotation file names; needed with a checkpoint
    images: Location | None = None
    # caption only the first so many images; null: all
    num_images: Count | None = None
    # score only the images that the result file has
    allow_missing: bool = False
    # JSON file for the metrics; with a checkpoint they also go to <run>/evaluation/<name>.json
    output: Location | None = None
    # name of the result
    name: Name = "captions"
    # question; null: the run's first prompt
    prompt: str | None = None
    # longest caption, tokens
    max_new_tokens: Size = 64
    # images at a time
    batch_size: Size = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name(self.name)
        if self.checkpoint is None and self.results is None:
            raise ValueError("Give --results FILE, or --checkpoint RUN and --images FOLDER.")
        if self.checkpoint is not None and self.images is None:
            raise ValueError("images is missing: the folder of the images that the run is to caption.")
        if self.checkpoint is None and (self.images, self.num_images) != (None, None):
            raise ValueError("images and num_images need a checkpoint, which captions them. Give --checkpoint RUN.")


@dataclass(frozen=True, kw_only=True)
class TextBenchmarkParams(InferenceParams):
    """Evaluate a language model on tasks of the lm-evaluation-harness."""

    # run folder (its newest checkpoint) or step folder of a language model; local, s3:// or hf://
    checkpoint: Location
    # names of tasks, or `paper`: the eight tasks of the paper
    tasks: list[str] = field(default_factory=lambda: ["paper"])
    # folder with task files of your own (YAML)
    include_path: Location | None = None
    # solved examples before each question; null: as each task says
    num_fewshot: NonNegativeInt | None = None
    # only the first so many questions of each task; null: all
    limit: Count | None = None
    # questions at a time
    batch_size: Size = 16
    # tokenizer (name or folder); null: the one in the run folder
    tokenizer: Location | None = None
    # JSON file for the metrics, which also go to <run>/evaluation/<name>.json
    output: Location | None = None
    # name of the result
    name: Name = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name(self.name)
        if not self.tasks or not all(self.tasks):
            raise ValueError("tasks is empty. Name some: --tasks hellaswag,piqa, or --tasks paper.")


@dataclass(frozen=True, kw_only=True)
class ComparisonParams(BaseParams):
    """Shared by the commands that compare the policies of a folder."""

    # folder with the results of any number of policies
    results: Location
    # for what the error holds: each column, or all columns together; null: as family.yaml says, else each column
    family: Literal["column", "all"] | None = None
    # name of a published policy to compare all models with too, such as CS/Foundry-Qwen3VLA-2.1B
    against: str | None = None
    # which of several runs of an episode counts; error: it is one
    duplicates: Literal["error", "latest", "first"] = "error"


@dataclass(frozen=True, kw_only=True)
class ReportParams(ComparisonParams):
    """Compare the policies of a folder: one HTML page, and its tables and figures as files."""

    # folder for the report; null: `report` in the folder with the results
    output: Location | None = None
    # models to show; empty: all. Letters do not depend on it: family.yaml says which models are compared
    models: list[str] = field(default_factory=list)
    # tasks to show, or groups of tasks; empty: all
    tasks: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class DashboardParams(ComparisonParams):
    """Show a folder's report live in the browser, and queue, watch and stop evaluations that write to it."""

    # address to listen on; others than loopback need a password
    host: Name = "127.0.0.1"
    # port; 0: any free one, which is printed
    port: Annotated[int, Bounds(least=0, most=65535)] = 7860
    # file with the password that browsers must give, under any user name; the variable VLA_FOUNDRY_PASSWORD may hold it
    # instead. A word of the command line could be read by every user of the machine
    password_file: Location | None = None
    # certificate and key (PEM files) for https; without them a password can be read on the way
    tls_certificate: Location | None = None
    tls_key: Location | None = None
    # folders whose checkpoints may be evaluated
    checkpoints: list[Location] = field(default_factory=lambda: ["experiments"])
    # evaluations at a time
    parallel: Size = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together: give both or none.")
