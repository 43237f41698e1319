"""Hyper-parameters of the optimization: batch sizes, learning rate, optimizer, precision."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from vla_foundry.config.schema import BaseParams, Bounds, Count, Derived, Epsilon, Int

_WARMUP_STEPS = 1000
# a learning rate or weight; more than this is a typing error
_Rate = Annotated[float, Bounds(least=0, most=1000)]
_PeakRate = Annotated[float, Bounds(above=0, most=1000, fix="To keep weights unchanged, freeze them.")]
_Multiplier = Annotated[float, Bounds(above=0, most=1000, fix="To keep a part unchanged, freeze it.")]
_StepsOrFraction = Annotated[float, Bounds(least=0, most=10**12)]
# the plan of the data counts in 30 bits
_Batch = Annotated[int, Bounds(least=1, below=2**30)]
_Beta = Annotated[float, Bounds(least=0, below=1)]


@dataclass(frozen=True, kw_only=True)
class ParameterGroup(BaseParams):
    """Weights, by patterns of their names, that are trained in their own way, or not at all."""

    # names as in the table before training, with * for any characters: ["*.vit.*", "*.embeddings.weight"]
    patterns: list[str] = field(default_factory=list)
    # peak learning rate; null: hparams.lr times hparams.lr_multipliers
    lr: _PeakRate | None = None
    # weight decay of its matrices; null: hparams.wd
    wd: _Rate | None = None
    # do not train these weights
    freeze: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.patterns:
            raise ValueError('patterns is empty. Name weights, for example ["*.vit.*"].')
        if self.freeze and (self.lr is not None or self.wd is not None):
            raise ValueError("freeze is true, so lr and wd have no effect. Remove them, or set freeze to false.")


@dataclass(frozen=True, kw_only=True)
class HyperParams(BaseParams):
    """`--hparams.` Batch sizes, learning rate, optimizer, precision."""

    # arithmetic: fp32; amp_bfloat16 (fp32 master weights, bf16 compute); pure_bf16 (no masters); fp64 (numerics tests)
    precision: Literal["fp32", "amp_bfloat16", "pure_bf16", "fp64"] = "amp_bfloat16"
    # matrix products of blocks in 8-bit floats, scaled by each tensor's largest value; null: in the precision above.
    # Needs `uv pip install 'vla-foundry[fp8]'`, and on GPUs compute capability 8.9 or newer
    fp8: Literal["tensorwise"] | None = None
    # attention in FlashAttention 3, which needs its package (flash_attn_interface) and a GPU of compute capability 9;
    # false: what torch chooses, cuDNN or FlashAttention 2
    flash_attention_3: bool = False
    # samples per optimizer step over all ranks
    global_batch_size: _Batch = 512
    # samples per forward pass on one rank; gradient accumulation fills the global batch
    per_gpu_batch_size: _Batch = 8
    # seed of weights, data order and noise
    seed: Int = 42
    # peak learning rate
    lr: Annotated[float, Bounds(above=0, most=1000)] = 1e-4
    # learning-rate factors by prefix of weight names: {vit: 0.1}
    lr_multipliers: dict[str, _Multiplier] = field(default_factory=dict)
    # weights with their own learning rate, weight decay or freezing, by group; the last group that matches counts
    parameter_groups: dict[str, ParameterGroup] = field(default_factory=dict)
    # shape of the learning rate over steps
    lr_scheduler: Literal["cosine", "constant", "linear", "warmup_constant_decay"] = "cosine"
    # warm-up: steps, or a fraction of all steps if below 1; null: 1000 steps, but at most a tenth of the run
    warmup: _StepsOrFraction | None = None
    # final decay of warmup_constant_decay: steps, or a fraction of all steps if below 1
    decay: _StepsOrFraction = 0.3
    # learning rate at the end of the schedule
    lr_cooldown_end: _Rate = 0.0
    # lower bound of the cosine schedule
    force_min_lr: _Rate = 0.0
    # adamw; muon: Muon for matrices in blocks, at AdamW's learning rate and weight decay, and AdamW for all else
    optimizer: Literal["adamw", "muon"] = "adamw"
    # decoupled weight decay, on matrices only
    wd: _Rate = 0.01
    # AdamW beta 1
    beta1: _Beta = 0.9
    # AdamW beta 2
    beta2: _Beta = 0.95
    # AdamW epsilon
    eps: Epsilon = 1e-8
    # share of Muon's momentum that stays after a step
    muon_momentum: _Beta = 0.95
    # weight of mean(logsumexp(logits)^2) in a language model's loss
    z_loss_coefficient: _Rate = 0.0
    # largest global gradient norm; null: not clipped
    grad_clip_norm: Annotated[float, Bounds(above=0, fix="null does not clip.")] | None = None
    # recompute each block's activations in the backward pass
    grad_checkpointing: bool = False
    # torch.compile each block; null: on a GPU, if there is a C compiler
    torchcompile: bool | None = None
    # share of a compiled block's activations to keep for the backward pass; below 1, the cheapest are computed again:
    # at 0.7 elementwise operations, at 0 nearly all
    activation_budget: Annotated[float, Bounds(least=0, most=1)] = 1.0
    # stop the run after this many consecutive steps with a non-finite loss or gradient
    max_skipped_steps: Count = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr_cooldown_end", "force_min_lr"):
            if getattr(self, name) > self.lr:
                raise ValueError(f"{name} ({getattr(self, name)}) must not be above lr ({self.lr}).")
        for name in ("fp8", "flash_attention_3"):
            if getattr(self, name) and self.precision not in ("amp_bfloat16", "pure_bf16"):
                raise ValueError(
                    f"{name} is for precision amp_bfloat16 or pure_bf16, not {self.precision}. Change one of them."
                )
        if self.activation_budget < 1 and self.grad_checkpointing:
            raise ValueError("activation_budget and grad_checkpointing both save activations. Use one of them.")
        if self.activation_budget < 1 and self.torchcompile is False:
            raise ValueError(
                f"activation_budget ({self.activation_budget:g}) is for compiled blocks, but torchcompile is false. "
                "Set it to true, or the budget to 1."
            )
        shares = (self.warmup or 0.0, self.decay)
        if self.lr_scheduler == "warmup_constant_decay" and max(shares) < 1 and round(sum(shares), 9) > 1:
            raise ValueError(
                f"decay ({self.decay:g}) and warmup ({self.warmup:g}) are fractions of the run, and must be at most 1 "
                "together. Lower one of them."
            )

    def derive(self, root: Any, facts: Any) -> dict[str, Derived]:
        """Derive a warm-up that fits into the run."""
        if self.warmup is not None:
            return {}
        budget = {"total_train_samples": Derived(root.total_train_samples, "")} | root.derive(root, facts)
        samples = budget["total_train_samples"].value
        if not isinstance(samples, int):
            return {"warmup": Derived(samples, "")}
        total_steps = samples // self.global_batch_size
        steps = count_warmup_steps(self, total_steps)
        source = f"the smaller of {_WARMUP_STEPS} steps and a tenth of the run's {total_steps}"
        notice = f"hparams.warmup is {steps} steps, a tenth of the run." if steps < _WARMUP_STEPS else ""
        return {"warmup": Derived(float(steps), source, notice)}


def count_steps(value: float, total_steps: int) -> int:
    """Convert `hparams.warmup` or `hparams.decay` to steps; a value below 1 is a fraction of all steps."""
    return int(value * total_steps) if value < 1 else int(value)


def count_warmup_steps(params: HyperParams, total_steps: int) -> int:
    """Return the number of steps over which the learning rate rises."""
    if params.warmup is None:
        return min(_WARMUP_STEPS, total_steps // 10)
    return count_steps(params.warmup, total_steps)


def count_decay_steps(params: HyperParams, total_steps: int) -> int:
    """Return the number of steps at the end of the run over which the learning rate decays.

    Raises:
        ValueError: warm-up and decay do not fit into the run.
    """
    warmup_steps = count_warmup_steps(params, total_steps)
    if warmup_steps > total_steps:
        raise ValueError(
            f"hparams.warmup ({params.warmup:g}) is {warmup_steps} steps, more than the run's {total_steps}. "
            f"Use fewer steps, or a fraction of the run such as --hparams.warmup 0.05."
        )
    if params.lr_scheduler == "constant":
        return 0
    if params.lr_scheduler != "warmup_constant_decay":
        return total_steps - warmup_steps
    decay_steps = count_steps(params.decay, total_steps)
    if warmup_steps + decay_steps > total_steps:
        raise ValueError(
            f"hparams.warmup ({warmup_steps} steps) and hparams.decay ({decay_steps} steps) must fit into the run's "
            f"{total_steps} steps. Lower one of them."
        )
    return decay_steps
