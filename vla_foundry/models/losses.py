"""Losses as sums over valid targets; the language-model loss never holds the logits of all tokens at once."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from vla_foundry.batch import IGNORE_INDEX, LossOutput


def count_valid_targets(targets: Int[Tensor, "*shape"]) -> Int[Tensor, ""]:
    """Count the targets that are not IGNORE_INDEX; returns a scalar on their device."""
    return (targets != IGNORE_INDEX).sum()


# devices that the host never waits for
NEVER_WAITING = {"cpu"}
# Logits per chunk. On the CPU a chunk should stay in cache (32 MiB in fp32); on a GPU it should fill the device.
CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**27}


def language_model_loss(
    hidden: Float[Tensor, "B T D"],
    head: Float[Tensor, "V D"],
    targets: Int[Tensor, "B T"],
    *,
    z_loss_coefficient: float = 0.0,
    chunk_tokens: int | None = None,
    is_compiled: bool = False,
) -> LossOutput:
    """Cross-entropy of `hidden @ head.T` against `targets`, plus the z-loss, without building all logits.

    sum over valid targets of  logsumexp(logits) - logits[target] + z_loss_coefficient * logsumexp(logits)^2

    The forward pass computes the gradients chunk by chunk, so logits are neither stored nor recomputed. Beyond inputs
    and gradients, memory holds one chunk of logits, whatever V is. Under autocast, matrix products use its dtype;
    everything else, including the sum over chunks, is fp32.

    Args:
        targets: IGNORE_INDEX marks positions without a target; they add nothing to either loss.
        chunk_tokens: tokens per chunk; None: chosen from the device and V.
        is_compiled: compile what is computed from a chunk's logits, which is then one pass over them, or two.

    Returns:
        LossOutput with logs `cross_entropy` and `z_loss` (weighted by its coefficient); they add up to `sum`.
    """
    flat_hidden = hidden.flatten(0, 1)
    flat_targets = targets.flatten()
    if hidden.device.type in NEVER_WAITING:
        # drop positions without a target
        kept = (flat_targets != IGNORE_INDEX).nonzero().squeeze(1)
        if kept.numel() < flat_targets.numel():
            flat_hidden, flat_targets = flat_hidden.index_select(0, kept), flat_targets.index_select(0, kept)
    device_type = hidden.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else head.dtype
    if chunk_tokens is None:
        chunk_tokens = _choose_chunk_tokens(head.shape[0], device_type)
    total, z_loss = _ChunkedLinearCrossEntropy.apply(
        flat_hidden, head, flat_targets, z_loss_coefficient, chunk_tokens, dtype, torch.is_grad_enabled(), is_compiled
    )  # type: ignore[misc]
    z_loss = z_loss.detach()
    logs = {"cross_entropy": total.detach() - z_loss, "z_loss": z_loss}
    return LossOutput(sum=total, count=count_valid_targets(flat_targets), logs=logs)


def dense_language_model_loss(
    logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"], *, z_loss_coefficient: float = 0.0
) -> LossOutput:
    """Compute the same loss from full logits, for heads that are more than a matrix (scaled or capped logits)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    flat_targets = targets.flatten().long()
    cross_entropy = F.cross_entropy(logits, flat_targets, ignore_index=IGNORE_INDEX, reduction="sum")
    is_valid = flat_targets != IGNORE_INDEX
    z_loss = z_loss_coefficient * (logits.logsumexp(1).square() * is_valid).sum()
    logs = {"cross_entropy": cross_entropy.detach(), "z_loss": z_loss.detach()}
    return LossOutput(sum=cross_entropy + z_loss, count=is_valid.sum(), logs=logs)


def _choose_chunk_tokens(vocab_size: int, device_type: str) -> int:
    tokens = CHUNK_LOGITS.get(device_type, CHUNK_LOGITS["cuda"]) // max(1, vocab_size)
    # round down to whole tiles of the matrix multiplication
    return max(1, tokens // 32 * 32 if tokens >= 32 else tokens)


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """(hidden [N, D], head [V, D], targets [N]) -> (sum of losses, sum of its z-loss part), both scalars."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        z_loss_coefficient: float,
        chunk_tokens: int,
        dtype: torch.dtype,
        is_grad_enabled: bool,
        is_compiled: bool,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_head = ctx.needs_input_grad[:2] if is_grad_enabled else (False, False)  # type: ignore
        with torch.autocast(hidden.device.type, enabled=False):
            accumulator = torch.promote_types(dtype, torch.float32)
            weight = head.to(dtype)
            total = hidden.new_zeros((), dtype=accumulator)
            z_total = hidden.new_zeros((), dtype=accumulator)
            hidden_grad = torch.empty_like(hidden) if needs_hidden else None
            head_grad = torch.zeros_like(head, dtype=accumulator) if needs_head else None
            compute = _compile_losses() if is_compiled else _losses_and_gradient_
            for start in range(0, hidden.shape[0], chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                inputs = hidden[rows].to(dtype)
                loss, z_loss, gradient = compute(inputs @ weight.T, targets[rows], z_loss_coefficient)
                total += loss
                z_total += z_loss
                if hidden_grad is not None:
                    hidden_grad[rows] = gradient @ weight
                if head_grad is not None:
                    _add_product_(head_grad, gradient, inputs)
        ctx.save_for_backward(hidden_grad, head_grad)  # type: ignore
        ctx.head_dtype = head.dtype  # type: ignore
        ctx.mark_non_differentiable(z_total)  # type: ignore
        return total, z_total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx, total_grad: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        # scale in place: the head's gradient is as large as the head. Autograd refuses a second backward
        hidden_grad, head_grad = ctx.saved_tensors  # type: ignore
        if hidden_grad is not None:
            hidden_grad = hidden_grad.mul_(total_grad.to(hidden_grad.dtype))
        if head_grad is not None:
            head_grad = head_grad.mul_(total_grad).to(ctx.head_dtype)  # type: ignore
        return hidden_grad, head_grad, None, None, None, None, None, None


def _losses_and_gradient_(logits: Tensor, targets: Tensor, z_loss_coefficient: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss, its z-loss part and its gradient by `logits`, which are overwritten or no longer needed.

    All is computed in at least fp32; the gradient has the dtype of the logits.
    """
    dtype = logits.dtype
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    is_valid = (targets != IGNORE_INDEX).unsqueeze(1)
    columns = targets.long().clamp(min=0).unsqueeze(1)
    weight = is_valid.to(logits.dtype)
    target_logits = logits.gather(1, columns)
    largest = logits.amax(1, keepdim=True)
    normalizer = logits.sub_(largest).exp_().sum(1, keepdim=True)
    log_normalizer = normalizer.log() + largest
    z_losses = z_loss_coefficient * log_normalizer.square() * weight
    losses = (log_normalizer - target_logits) * weight + z_losses
    logits.mul_((1 + 2 * z_loss_coefficient * log_normalizer) * weight / normalizer)
    logits.scatter_add_(1, columns, -weight)
    return losses.sum(), z_losses.sum(), logits.to(dtype)


@functools.cache
def _compile_losses() -> Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_losses_and_gradient_, fullgraph=True)


def _add_product_(head_grad: Tensor, gradient: Tensor, inputs: Tensor) -> None:
    """head_grad += gradient.T @ inputs."""
    if head_grad.dtype == gradient.dtype:
        head_grad.addmm_(gradient.T, inputs)
    else:
        head_grad.add_(gradient.T @ inputs)
