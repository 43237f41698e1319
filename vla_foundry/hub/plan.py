"""`vla-foundry plan`: predict the memory of a run on each rank, without a GPU and without its data, and say what fits.

state        weights, gradients, moments, average and buffers: exact, from the model on the meta device
wrapper      copies of weights and gradients that the wrapper makes in a step: estimated
activations  what a microbatch keeps for its backward pass: counted on fake tensors, of blocks that are not compiled
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from vla_foundry.config.command_line import parse, print_notices
from vla_foundry.config.resolve import Resolved, resolve_known
from vla_foundry.config.schema import MissingError
from vla_foundry.data.facts import read_facts
from vla_foundry.hub.example_batch import create_example_batch
from vla_foundry.hub.memory import count_activation_bytes
from vla_foundry.models import create_batch_handler, create_model
from vla_foundry.models.registry import list_blocks
from vla_foundry.params.commands.sharing import PlanParams
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.mixture import MixtureDataParams
from vla_foundry.params.distributed import DistributedParams
from vla_foundry.params.experiment import TrainExperimentParams, accumulation_steps, total_steps
from vla_foundry.params.models.backbones import VLMFoundryBackboneParams
from vla_foundry.params.models.policy import RobotPolicyParams
from vla_foundry.params.models.vlm import VLMParams
from vla_foundry.training.distributed import find_lowered, parallelize
from vla_foundry.training.experiment import cast_parameters
from vla_foundry.training.optimization.muon import is_for_muon
from vla_foundry.training.optimization.optimizer import decayed_parameters, freeze_weights
from vla_foundry.training.state import Counters
from vla_foundry.world import World

# bytes of a step count in fused AdamW, of a counter, and of the learning rate of a step (in single precision on a GPU)
_STEP_BYTES, _COUNTER_BYTES, _RATE_BYTES = 4, 8, 4
# what makes less memory do, in this order; on one GPU, sharding alone does not
_REMEDIES = (
    ("distributed", "fsdp"),
    ("hparams", "grad_checkpointing"),
    ("distributed", "fsdp_reshard_after_forward"),
    ("distributed", "fsdp_cpu_offload"),
)
_REMEDIES_ALONE = (_REMEDIES[1], _REMEDIES[0], *_REMEDIES[2:])
_LABELS = {
    "weights": "weights",
    "gradients": "gradients",
    "moments": "moments of the optimizer",
    "average": "average of the weights",
    "buffers": "buffers and schedule",
    "wrapper": "copies in a step (estimated)",
    "activations": "activations of {size} samples",
}


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes that a rank holds between steps, by what they are."""

    weights: int
    gradients: int
    moments: int
    average: int
    # buffers of the model, which are whole on every rank, and the run's schedule and counters
    buffers: int

    def sharded(self) -> dict[str, int]:
        """Return what FSDP shards, and may offload to the host."""
        return {name: num_bytes for name, num_bytes in asdict(self).items() if name != "buffers"}


def create_meta_model(params: TrainExperimentParams) -> nn.Module:
    """Create the model that a run trains, without its values: cast, frozen, and with its adapters.

    Raises:
        ValueError: a width is not known, or the params freeze everything.
    """
    with torch.device("meta"):
        model = create_model(params.model, load_pretrained=False)
    cast_parameters(model, params.hparams.precision)
    freeze_weights(model, params.hparams)
    return model.train()


def count_held(model: nn.Module, params: TrainExperimentParams, world_size: int, rank: int = 0) -> Held:
    """Return what a rank holds between two steps: with FSDP, rank 0 has the largest share.

    A trained weight that no sample reaches has neither gradient nor moments, and is counted all the same.

    Args:
        model: see `create_meta_model`.
    """
    hparams, distributed = params.hparams, params.distributed
    num_shards = world_size // distributed.replicate_size if distributed.fsdp else 1
    decayed = decayed_parameters(model) if hparams.optimizer == "muon" else set()
    weights = gradients = moments = average = 0
    for name, parameter in model.named_parameters():
        count = count_local(parameter, num_shards, rank)
        own = count * parameter.element_size()
        weights += own
        if not parameter.requires_grad:
            continue
        gradients += own
        has_one_moment = parameter in decayed and is_for_muon(name, parameter)
        moments += own * (1 if has_one_moment else 2) + _STEP_BYTES
        average += count * max(parameter.element_size(), 4) * params.ema.enabled
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if params.total_train_samples is not None:
        buffers += total_steps(params) * _RATE_BYTES
    buffers += len(fields(Counters)) * _COUNTER_BYTES
    return Held(weights=weights, gradients=gradients, moments=moments, average=average, buffers=buffers)


def count_local(parameter: nn.Parameter, num_shards: int, rank: int) -> int:
    """Return how many numbers of a parameter a rank holds; FSDP divides the first dimension, and scalars not at all."""
    if num_shards == 1 or parameter.ndim == 0:
        return parameter.numel()
    rows = -(-parameter.shape[0] // num_shards)
    own = min(rows, max(0, parameter.shape[0] - rows * (rank % num_shards)))
    return parameter.numel() // max(1, parameter.shape[0]) * own


def estimate_wrapper(model: nn.Module, params: TrainExperimentParams, *, accumulates: bool) -> int:
    """Return about how many bytes a rank needs in a step besides what it holds, and besides activations.

    Args:
        model: see `create_meta_model`.
        accumulates: a step has several microbatches.
    """
    lowered = find_lowered(model, params.hparams.precision)
    if not params.distributed.fsdp:
        # their bf16 copies, which last a step
        return 2 * sum(parameter.numel() for block in lowered for parameter in block.parameters())
    blocks = list_blocks(model)
    units = [(list(block.parameters()), 2 if block in lowered else 0) for block in blocks]
    inner = {parameter for parameters, _ in units for parameter in parameters}
    root = [parameter for parameter in model.parameters() if parameter not in inner]
    gathered = [_count_bytes(parameters, width) for parameters, width in units]
    largest = max(gathered, default=0)
    # the unit that is gathered now is in a flat buffer too
    needed = _count_bytes(root) + largest
    needed += min(sum(gathered), 2 * largest) if params.distributed.fsdp_reshard_after_forward else sum(gathered)
    trained = [[parameter for parameter in parameters if parameter.requires_grad] for parameters, _ in units]
    # gradients are reduced in fp32, while those of the next unit are computed
    needed += max((3 * _count_bytes(parameters, 4) for parameters in trained), default=0)
    # a mixture reduces the gradients of every microbatch
    whole = [root, *trained] if accumulates and not isinstance(params.data, MixtureDataParams) else [root]
    # whole until the last microbatch; those of the root's weights until the end of each backward pass
    needed += sum(_count_bytes([p for p in parameters if p.requires_grad]) for parameters in whole)
    return needed


def _count_bytes(parameters: Iterable[nn.Parameter], width: int = 0) -> int:
    return sum(parameter.numel() * (width or parameter.element_size()) for parameter in parameters)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes that a microbatch needs in its two passes, counted for one sample and for `several`."""

    several: int
    of_one: int
    of_several: int

    def of(self, num_samples: int) -> int:
        """Return the bytes of a microbatch of this many samples, on the line through what was counted."""
        slope = (self.of_several - self.of_one) / (self.several - 1)
        return self.of_one + round(slope * (num_samples - 1))


def count_activations(params: TrainExperimentParams) -> Activations:
    """Count what a microbatch keeps for its backward pass, and what is being computed where that is most.

    Raises:
        ValueError: it cannot be counted.
    """
    parts, several = params.data.parts().values(), max(2, params.hparams.per_gpu_batch_size)
    of_one, of_several = (max(_count_microbatch(params, data, count) for data in parts) for count in (1, several))
    return Activations(several=several, of_one=of_one, of_several=of_several)


def _count_microbatch(params: TrainExperimentParams, data: DataParams, num_samples: int) -> int:
    model, hparams = create_meta_model(params), params.hparams
    parallelize(
        model,
        DistributedParams(),
        world=World(device="meta"),
        grad_checkpointing=hparams.grad_checkpointing,
        precision=hparams.precision,
    )
    inputs = create_batch_handler(params).prepare(create_example_batch(data, params.model, num_samples), "cpu")
    return count_activation_bytes(model, inputs, precision=hparams.precision)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a rank needs with some settings, in bytes."""

    held: Held
    # in steps of one microbatch, and of several
    wrapper: tuple[int, int]
    # None: not known
    activations: Activations | None
    # FSDP keeps its shards on the host
    is_offloaded: bool
    # samples of a step on a rank
    samples_per_step: int

    def parts(self, num_samples: int) -> dict[str, int]:
        """Return what is on the GPU with microbatches of this many samples."""
        held = {} if self.is_offloaded else self.held.sharded()
        return {
            **held,
            "buffers": self.held.buffers,
            "wrapper": self.wrapper[num_samples < self.samples_per_step],
            "activations": 0 if self.activations is None else self.activations.of(num_samples),
        }

    def total(self, num_samples: int) -> int:
        """Return the bytes on the GPU with microbatches of this many samples."""
        return sum(self.parts(num_samples).values())

    def find_largest(self, limit: float) -> int | None:
        """Return the largest microbatch that fits, of those that divide a step; None: none does."""
        sizes = [size for size in range(1, self.samples_per_step + 1) if self.samples_per_step % size == 0]
        return max((size for size in sizes if self.total(size) <= limit), default=None)


def list_settings(params: TrainExperimentParams, gpus: int) -> Iterator[tuple[list[str], TrainExperimentParams]]:
    """Yield the params as they are, and with more and more flags that need less memory, the cheapest first."""
    flags: list[str] = []
    yield flags, params
    has_budget = params.hparams.activation_budget < 1
    for section, name in _REMEDIES if gpus > 1 else _REMEDIES_ALONE:
        part: Any = getattr(params, section)
        if not getattr(part, name):
            changes: dict[str, Any] = {name: True}
            flags = [*flags, f"--{section}.{name} true"]
            if name == "grad_checkpointing" and has_budget:  # one or the other
                changes["activation_budget"] = 1.0
                flags[-1] += " --hparams.activation_budget 1"
            params = replace(params, **{section: replace(part, **changes)})
            yield flags, params


def list_left_out(params: TrainExperimentParams) -> list[str]:
    """Return which settings the count of activations leaves out, for the user."""
    hparams = params.hparams
    left = ["that compiled blocks keep less (--hparams.torchcompile)"] if hparams.torchcompile is not False else []
    if hparams.activation_budget < 1:
        left.append(f"--hparams.activation_budget {hparams.activation_budget:g}, with which they keep less again")
    if hparams.fp8 is not None:
        left.append(f"--hparams.fp8 {hparams.fp8}")
    return left


def plan(params: TrainExperimentParams, *, gpus: int, gpu_memory: float, headroom: float) -> dict[str, Any]:
    """Predict the memory of a run on each rank, as its params are, and with flags that make it less until it fits.

    Args:
        params: resolved.
        gpus: number of ranks.
        gpu_memory: of a GPU, GiB.
        headroom: share of it to leave free.

    Returns:
        The plan, in plain JSON types; sizes in bytes.

    Raises:
        ValueError: the model cannot be made.
    """
    accumulation_steps(params, gpus)
    params = replace(params, model=_with_image_token(params.model))
    limit, size = gpu_memory * 2**30 * (1 - headroom), params.hparams.per_gpu_batch_size
    model = create_meta_model(params)
    counted: dict[bool, Activations | None] = {}
    found: dict[str, Any] = {}
    settings: list[dict[str, Any]] = []
    for flags, changed in list_settings(params, gpus):
        recomputes = changed.hparams.grad_checkpointing
        if recomputes not in counted:
            try:
                counted[recomputes] = count_activations(changed)
            except ValueError as error:
                counted[recomputes], found["uncounted"] = None, str(error)
        memory = Memory(
            held=count_held(model, changed, gpus),
            wrapper=(
                estimate_wrapper(model, changed, accumulates=False),
                estimate_wrapper(model, changed, accumulates=True),
            ),
            activations=counted[recomputes],
            is_offloaded=changed.distributed.fsdp_cpu_offload,
            samples_per_step=params.hparams.global_batch_size // gpus,
        )
        if not settings:
            found |= {"parts": memory.parts(size), "host": sum(memory.held.sharded().values()) * memory.is_offloaded}
        total = memory.total(size)
        largest = memory.find_largest(limit)
        settings.append({"flags": flags, "bytes": total, "fits": total <= limit, "largest_per_gpu_batch_size": largest})
        if total <= limit:
            break
    return {
        "num_weights": sum(parameter.numel() for parameter in model.parameters()),
        "num_trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "gpus": gpus,
        "per_gpu_batch_size": size,
        "limit": round(limit),
        **found,
        "left_out": list_left_out(params),
        "settings": settings,
    }


def _with_image_token(model: Any) -> Any:
    """Return a model's params with an image token, if only a tokenizer that is not here could say which it is."""
    if isinstance(model, VLMParams):
        return model if model.image_token_id is not None else replace(model, image_token_id=0)
    if isinstance(model, RobotPolicyParams) and isinstance(model.vision_language_backbone, VLMFoundryBackboneParams):
        backbone = model.vision_language_backbone
        vlm = None if backbone.vlm is None else _with_image_token(backbone.vlm)
        return replace(model, vision_language_backbone=replace(backbone, vlm=vlm))
    return model


def format_plan(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a plan for the user."""
    size, settings, parts = found["per_gpu_batch_size"], found["settings"], found["parts"]
    yield f"{found['num_weights']:,} weights, {found['num_trained']:,} of them trained; {found['gpus']} ranks"
    yield ""
    yield f"{'a rank holds, as configured':<34}{'GiB':>10}"
    for name, num_bytes in parts.items():
        is_unknown = name == "activations" and "uncounted" in found
        yield f"{_LABELS[name].format(size=size):<34}{'?' if is_unknown else _format_gib(num_bytes):>10}"
    yield f"{'together':<34}{_format_gib(sum(parts.values())):>10}"
    yield f"{'may be used':<34}{_format_gib(found['limit']):>10}"
    if found["host"]:
        yield f"{'and in host memory':<34}{_format_gib(found['host']):>10}"
    yield ""
    yield f"{'with these flags':<50}{'GiB':>10}   largest hparams.per_gpu_batch_size"
    for setting in settings:
        name = f"and {setting['flags'][-1]}" if setting["flags"] else "as configured"
        yield f"{name:<50}{_format_gib(setting['bytes']):>10}   {setting['largest_per_gpu_batch_size'] or 'none fits'}"
    yield ""
    yield advise(found)
    if "uncounted" in found:
        yield f"Activations are not counted, and come on top: {found['uncounted']}"
    elif found["left_out"]:
        yield f"Activations are counted without {'; '.join(found['left_out'])}."
    yield "Samples per second are not predicted: benchmarks/README.md has no figure for a GPU yet."


def advise(found: Mapping[str, Any]) -> str:
    """Return a line that says whether a plan fits, or what would make it fit."""
    size, settings = found["per_gpu_batch_size"], found["settings"]
    fitting = next((setting for setting in settings if setting["fits"]), None)
    if fitting is settings[0]:
        return f"It fits as configured{', without activations' if 'uncounted' in found else ''}."
    if fitting is not None:
        return f"It does not fit as configured. Add {' '.join(fitting['flags'])}."
    smaller = next((setting for setting in settings if setting["largest_per_gpu_batch_size"]), None)
    if smaller is None:
        return f"It does not fit on {found['gpus']} GPUs, whatever is set. Use more of them, or a smaller model."
    flags = [*smaller["flags"], f"--hparams.per_gpu_batch_size {smaller['largest_per_gpu_batch_size']}"]
    return f"It does not fit with a microbatch of {size} samples. Add {' '.join(flags)}."


def _format_gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f}"


def resolve_without_data(params: PlanParams) -> TrainExperimentParams:
    """Resolve params as far as their model needs; data and a budget may be missing.

    Raises:
        ValueError: a policy's widths are known neither from its data, which is not there yet, nor from its params.
    """
    facts = read_facts(params, params.gpus, offline=True)
    try:
        resolved: Resolved[Any] = resolve_known(params, facts)
    except MissingError as error:
        resolved = error.found
    for name in ("action_dim", "proprioception_dim"):
        needs = resolved.unresolved.get(f"data.{name}")
        if needs is not None and getattr(resolved.params.model, name, 0) is None:
            raise ValueError(f"data.{name} needs {needs}. Preprocess the data first, or give --data.{name} N.")
    return resolved.params


def main(argv: list[str]) -> None:
    """Run `vla-foundry plan`, and print tables or JSON."""
    parsed = parse(PlanParams, argv, prog="vla-foundry plan")
    params: PlanParams = parsed.params
    resolved = resolve_without_data(params)
    if not params.json:
        print_notices(parsed.notices)
    found = plan(resolved, gpus=params.gpus, gpu_memory=params.gpu_memory, headroom=params.headroom)
    sys.stdout.write(json.dumps(found) + "\n" if params.json else "\n".join(format_plan(found)) + "\n")
