"""Params of commands on runs: `generate`, `caption`, `import-checkpoint`, `merge`, `export`, `inspect`, `view`,
`explore`, `doctor`, `new-policy`, `quickstart`."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from vla_foundry.config.schema import FPS, BaseParams, Bounds, Location, Name, NonNegativeInt, Size
from vla_foundry.params.experiment import TrainExperimentParams

_Temperature = Annotated[float, Bounds(least=0, most=1000, fix="0 takes the likeliest token.")]
_Probability = Annotated[float, Bounds(above=0, most=1, fix="1 draws among all tokens.")]


@dataclass(frozen=True, kw_only=True)
class InferenceParams(BaseParams):
    """Shared by the commands that run a trained model."""

    # seed of everything random
    seed: NonNegativeInt = 0
    # cpu, cuda or cuda:N; auto: a GPU if available
    device: Name = "auto"
    # use the averaged weights; null: if the checkpoint has them
    use_ema: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", self.device):
            raise ValueError(f"device '{self.device}' is unknown. Use auto, cpu, cuda or cuda:N.")


@dataclass(frozen=True, kw_only=True)
class SamplingParams(InferenceParams):
    """Shared by `generate` and `caption`: how tokens are drawn. Draws for one input do not depend on the others."""

    # run folder (its newest checkpoint) or step folder; local, s3:// or hf://
    checkpoint: Location
    # longest answer, tokens
    max_new_tokens: Size
    # sampling temperature; 0: always the likeliest token; 1: the model's distribution; higher: more varied
    temperature: _Temperature
    # draw among the k likeliest tokens; 0: among all
    top_k: Annotated[int, Bounds(least=0, fix="0 draws among all tokens.")] = 0
    # draw among the likeliest tokens that together have this probability; 1: among all
    top_p: _Probability


@dataclass(frozen=True, kw_only=True)
class GenerateParams(SamplingParams):
    """Continue prompts with a trained language model."""

    # text to continue; give the flag several times for several prompts
    prompt: list[str] = field(default_factory=list)
    max_new_tokens: Size = 64
    temperature: _Temperature = 0.8
    top_p: _Probability = 0.95
    # tokenizer (name or folder); null: the one in the run folder
    tokenizer: Location | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt or not all(self.prompt):
            raise ValueError('prompt is empty. Give one: --prompt "Once upon a time".')


@dataclass(frozen=True, kw_only=True)
class CaptionParams(SamplingParams):
    """Caption images with a trained vision-language model."""

    # image files (JPEG, PNG, WebP, GIF, ...), local, s3:// or hf://; each is captioned by itself
    image: list[Location] = field(default_factory=list)
    # show all images together and answer once
    together: bool = False
    # question, or text that goes on, for a model of documents; <image> marks where images go, otherwise they come
    # first; null: the run's first prompt, or no text
    prompt: str | None = None
    max_new_tokens: Size = 128
    temperature: _Temperature = 0.0
    top_p: _Probability = 1.0
    # images at a time
    batch_size: Size = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.image or not all(self.image):
            raise ValueError("image is empty. Give one: --image photo.jpg.")


@dataclass(frozen=True, kw_only=True)
class ImportParams(BaseParams):
    """Convert a run of the earlier implementation to a run folder."""

    # its folder: config.yaml or config_model.yaml, and checkpoints/checkpoint_N.pt; local, s3:// or hf://
    source: Location
    # run folder to create; it must not exist
    output: Location
    # which checkpoint_N.pt; null: the one with the highest N
    checkpoint: NonNegativeInt | None = None
    # a policy's vision-language model: its folder or config_model.yaml; null: what the policy's config says
    vlm_source: Location | None = None
    # tokenizer (name or folder) to keep with the run; null: the one its config names
    tokenizer: Location | None = None
    # processor (name or folder) to keep with the run; null: the one its config names
    processor: Location | None = None
    # control rate of a policy, frames per second; null: unknown (the earlier files do not store it)
    fps: FPS | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.source or not self.output:
            name = "output" if self.source else "source"
            raise ValueError(f"{name} is empty. Name a folder.")
        if self.tokenizer is not None and self.processor is not None:
            raise ValueError("tokenizer and processor are both given. A processor has its own tokenizer: give one.")


@dataclass(frozen=True, kw_only=True)
class MergeParams(BaseParams):
    """Make a run folder with whole weights of a run that trained adapters (model.lora), or was sharded (FSDP)."""

    # run folder (its newest checkpoint) or step folder; local, s3:// or hf://
    checkpoint: Location
    # run folder to create; it must not exist
    output: Location

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.checkpoint or not self.output:
            raise ValueError(f"{'output' if self.checkpoint else 'checkpoint'} is empty. Name a folder.")


@dataclass(frozen=True, kw_only=True)
class ExportParams(BaseParams):
    """Export a policy as two graphs, the observation's encoding and one denoising step, and check them."""

    # run folder (its newest checkpoint) or step folder of a policy; local, s3:// or hf://
    run: Location
    # torch_export: files for torch.export.load; onnx: files for ONNX Runtime
    format: Literal["torch_export", "onnx"] = "torch_export"
    # folder to create; it must not exist
    output: Location
    # use the averaged weights; null: if the checkpoint has them
    use_ema: bool | None = None
    # longest row of images and instruction, tokens; each observation costs as much as the longest; null: as in training
    max_tokens: Size | None = None
    # largest error at random inputs, relative to the largest value (or to 1, if that is larger)
    tolerance: Annotated[float, Bounds(above=0, most=1)] = 1e-4
    # the robot's dataset: its name in a mixture, or its index where their image options differ
    dataset: Name | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.run or not self.output:
            raise ValueError(f"{'output' if self.run else 'run'} is empty. Name a folder.")


@dataclass(frozen=True, kw_only=True)
class InspectParams(BaseParams):
    """Draw a sample of a dataset, or of what a run trains on, just as the training pipeline makes it."""

    # folder of shards, or their manifest, local or s3://: all that it holds is drawn, in the order of the manifest
    dataset: Location | None = None
    # run folder or training config instead: what that run is trained on is drawn, cropped, augmented and in its order
    training: Location | None = None
    # which sample, counted from 0
    sample: NonNegativeInt = 0
    # PNG to write
    output: Location = "sample.png"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.dataset is None) == (self.training is None):
            raise ValueError("Give either a dataset (vla-foundry data inspect FOLDER) or --training RUN.")
        _check_png(self.output)


@dataclass(frozen=True, kw_only=True)
class ViewParams(BaseParams):
    """Write episodes, training batches or rollouts as a recording for the rerun viewer."""

    # a dataset of episodes; a training config or run, whose samples are shown as training reads them; a folder of
    # evaluations with videos
    what: Location
    # number of the first episode, sample or video
    first: NonNegativeInt = 0
    # how many of them
    count: Size = 3
    # recording to write
    output: Location = "view.rrd"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.output.endswith(".rrd"):
            raise ValueError(f"output '{self.output}' must be a .rrd file.")


@dataclass(frozen=True, kw_only=True)
class ExploreParams(BaseParams):
    """Show a robot dataset in the browser: episodes, windows, statistics, instructions."""

    # folder of shards, or their manifest, local or s3://
    dataset: Location
    # port on this machine (127.0.0.1); 0: any
    port: Annotated[int, Bounds(least=0, most=65535)] = 7861


@dataclass(frozen=True, kw_only=True)
class InspectConfigParams(TrainExperimentParams):
    """Measure the data of a training config: mix, token lengths, padding, times of stages, bad samples and pictures."""

    # samples to read, in training order; rounded up to whole microbatches
    num_samples: Size = 256
    # PNG for the contact sheet; it is written if the data has pictures
    output: Location = "contact_sheet.png"
    # print JSON
    json: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_png(self.output)


@dataclass(frozen=True, kw_only=True)
class DoctorParams(TrainExperimentParams):
    """Look for faults in a training config and its data; exit code 2 after an error, 3 after a warning."""

    # samples to draw, in training order
    num_samples: Size = 256
    # print JSON
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class ActionTokenizerParams(TrainExperimentParams):
    """Train a FAST tokenizer on the actions of a training config, normalized as that config says."""

    # JSON file to write; model.action_head.tokenizer or model.action_tokens.tokenizer names it
    output: Location = "fast_tokenizer.json"
    # number of tokens; must be above the number of different coefficients
    vocab_size: Annotated[int, Bounds(least=2, most=1_000_000)] = 1024
    # coefficients are multiplied by this before they are rounded: more is finer, and takes more tokens
    scale: Annotated[float, Bounds(least=1e-3, most=1e5)] = 10.0
    # windows to train on, in training order, of each robot
    num_samples: Size = 20_000


def _check_png(output: str) -> None:
    if not output.endswith(".png"):
        raise ValueError(f"output '{output}' must be a .png file.")


@dataclass(frozen=True, kw_only=True)
class NewPolicyParams(BaseParams):
    """Write complete, commented configs that train a policy on a LeRobot dataset."""

    # LeRobot dataset: a folder, s3:// or hf://datasets/
    dataset: Location
    # small: ours, of about 29 M parameters, from nothing; hf:NAME: a Hugging Face image-text model or CLIP, by name or
    # folder; else a run of type vlm
    backbone: Location = "small"
    # folder to create
    output: Location

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dataset or not self.output:
            raise ValueError(f"{'output' if self.dataset else 'dataset'} is empty. Name a folder.")


STAGES = ("llm", "vlm", "vla")


@dataclass(frozen=True, kw_only=True)
class QuickstartParams(BaseParams):
    """From raw data to a language model, a vision-language model and a robot policy, on this machine."""

    # stages to run, in order
    stages: list[Name] = field(default_factory=lambda: list(STAGES))
    # output folder; a second run resumes from its contents
    output_dir: Location = "quickstart_output"
    # train on more data for longer: 50 demonstrations of each task instead of 20, 45,000 samples instead of 30,000
    full: bool = False
    # also evaluate the policy with pictures of other episodes, with the wrong instruction, and trained from scratch
    ablations: bool = False
    # install the simulator's rendering library (libosmesa6, with apt-get) if missing
    install_system_packages: bool = False
    # run every stage again
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
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
