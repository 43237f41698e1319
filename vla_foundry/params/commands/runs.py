"""Params of the commands on whole runs: `generate`, `caption`, `import-checkpoint`, `data inspect`, `quickstart`."""

import re
from dataclasses import dataclass, field

from vla_foundry.config.schema import BaseParams


@dataclass(frozen=True, kw_only=True)
class GenerateParams(BaseParams):
    """Continue prompts with a trained language model."""

    # run folder (its newest checkpoint) or step folder; local, s3:// or hf://
    checkpoint: str
    # text to continue; give the flag several times for several prompts
    prompt: list[str] = field(default_factory=list)
    # longest continuation, tokens
    max_new_tokens: int = 64
    # sampling temperature; 0: always the likeliest token; 1: the model's distribution; higher: more varied
    temperature: float = 0.8
    # draw among the k likeliest tokens; 0: among all
    top_k: int = 0
    # draw among the likeliest tokens that together have this probability
    top_p: float = 0.95
    # seed of the draws; a prompt's draws do not depend on the other prompts
    seed: int = 0
    # cpu, cuda or cuda:N; auto: a GPU if available
    device: str = "auto"
    # use the averaged weights; null: if the checkpoint has them
    use_ema: bool | None = None
    # tokenizer (name or folder); null: the one in the run folder
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        _check_device(self.device)
        if not self.prompt or not all(self.prompt):
            raise ValueError('prompt is empty. Give one: --prompt "Once upon a time".')
        _check_sampling(self.max_new_tokens, self.temperature, self.top_k, self.top_p)


@dataclass(frozen=True, kw_only=True)
class CaptionParams(BaseParams):
    """Caption images with a trained vision-language model."""

    # run folder (its newest checkpoint) or step folder; local, s3:// or hf://
    checkpoint: str
    # image files (JPEG, PNG, WebP), local, s3:// or hf://; each is captioned by itself
    image: list[str] = field(default_factory=list)
    # show all images together and answer once
    together: bool = False
    # question; <image> marks where images go, otherwise they come first; null: the run's first prompt
    prompt: str | None = None
    # longest answer, tokens
    max_new_tokens: int = 128
    # sampling temperature; 0: always the likeliest token; 1: the model's distribution; higher: more varied
    temperature: float = 0.0
    # draw among the k likeliest tokens; 0: among all
    top_k: int = 0
    # draw among the likeliest tokens that together have this probability
    top_p: float = 1.0
    # seed of the draws; an image's draws do not depend on the other images
    seed: int = 0
    # images at a time
    batch_size: int = 16
    # cpu, cuda or cuda:N; auto: a GPU if available
    device: str = "auto"
    # use the averaged weights; null: if the checkpoint has them
    use_ema: bool | None = None

    def __post_init__(self) -> None:
        _check_device(self.device)
        if not self.image or not all(self.image):
            raise ValueError("image is empty. Give one: --image photo.jpg.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size ({self.batch_size}) must be at least 1.")
        _check_sampling(self.max_new_tokens, self.temperature, self.top_k, self.top_p)


def _check_device(device: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"device '{device}' is unknown. Use auto, cpu, cuda or cuda:N.")


def _check_sampling(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must be at least 1.")
    if temperature < 0:
        raise ValueError(f"temperature ({temperature}) must not be negative. 0 takes the likeliest token.")
    if top_k < 0:
        raise ValueError(f"top_k ({top_k}) must not be negative. 0 draws among all tokens.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p ({top_p}) must be above 0 and at most 1. 1 draws among all tokens.")


@dataclass(frozen=True, kw_only=True)
class ImportParams(BaseParams):
    """Convert a run of the earlier implementation to a run folder."""

    # its folder: config.yaml or config_model.yaml, and checkpoints/checkpoint_N.pt; local, s3:// or hf://
    source: str
    # run folder to create; it must not exist
    output: str
    # which checkpoint_N.pt; null: the one with the highest N
    checkpoint: int | None = None
    # a policy's vision-language model: its folder or config_model.yaml; null: what the policy's config says
    vlm_source: str | None = None
    # tokenizer (name or folder) to keep with the run; null: the one its config names
    tokenizer: str | None = None
    # processor (name or folder) to keep with the run; null: the one its config names
    processor: str | None = None
    # control rate of a policy, frames per second; null: unknown (the earlier files do not store it)
    fps: float | None = None

    def __post_init__(self) -> None:
        if not self.source or not self.output:
            name = "output" if self.source else "source"
            raise ValueError(f"{name} is empty. Name a folder.")
        if self.checkpoint is not None and self.checkpoint < 0:
            raise ValueError(f"checkpoint ({self.checkpoint}) must be 0 or more: it is the N of checkpoint_N.pt.")
        if self.tokenizer is not None and self.processor is not None:
            raise ValueError("tokenizer and processor are both given. A processor has its own tokenizer: give one.")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps ({self.fps:g}) must be above 0.")


@dataclass(frozen=True, kw_only=True)
class InspectParams(BaseParams):
    """Draw a sample of a dataset, or of what a run trains on, just as the training pipeline makes it."""

    # folder of shards, or their manifest, local or s3://: all that it holds is drawn, in the order of the manifest
    dataset: str | None = None
    # run folder or training config instead: what that run is trained on is drawn, cropped, augmented and in its order
    training: str | None = None
    # which sample, counted from 0
    sample: int = 0
    # PNG to write
    output: str = "sample.png"

    def __post_init__(self) -> None:
        if (self.dataset is None) == (self.training is None):
            raise ValueError("Give either a dataset (vla-foundry data inspect FOLDER) or --training RUN.")
        if self.sample < 0:
            raise ValueError(f"sample ({self.sample}) must be at least 0.")
        if not self.output.endswith(".png"):
            raise ValueError(f"output '{self.output}' must be a .png file.")


STAGES = ("llm", "vlm", "vla")


@dataclass(frozen=True, kw_only=True)
class QuickstartParams(BaseParams):
    """From raw data to a language model, a vision-language model and a robot policy, on this machine."""

    # stages to run, in order
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    # output folder; a second run resumes from its contents
    output_dir: str = "quickstart_output"
    # also evaluate the policy with pictures of other episodes, with the wrong instruction, and trained from scratch
    ablations: bool = False
    # install the simulator's rendering library (libosmesa6, with apt-get) if missing
    install_system_packages: bool = False
    # run every stage again
    overwrite: bool = False

    def __post_init__(self) -> None:
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown:
            raise ValueError(f"stages '{unknown[0]}' is unknown. Choose from: {', '.join(STAGES)}.")
        if not self.stages:
            raise ValueError(f"stages is empty. Choose from: {', '.join(STAGES)}.")
        if self.stages != list(STAGES[: len(self.stages)]):
            given, right = ",".join(self.stages), ",".join(STAGES[: len(self.stages)])
            raise ValueError(
                f"stages [{given}] must begin [{right}]: each stage starts from what the one before it made. "
                "What is done already is kept and costs nothing."
            )
        if self.ablations and "vla" not in self.stages:
            raise ValueError("ablations is true, but stages has no vla. Add it, or leave ablations out.")
