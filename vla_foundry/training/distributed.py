"""Distribute a single-device model over processes; no other file handles wrappers, meshes or process groups.

The order is fp8, activation checkpointing, per-block compile, then FSDP2 or DDP. Parameters keep their precision (fp32
masters). With amp_bfloat16, blocks compute with bf16 copies of their weights, made once a step (`lower_blocks`) or by
FSDP2, and what they add up is bf16; autocast lowers the rest. So results do not depend on the wrapper.
"""

import errno
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import Store
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vla_foundry.models.registry import list_blocks
from vla_foundry.params.distributed import DistributedParams
from vla_foundry.training.kernels import use_flash_attention_3, use_float8_products
from vla_foundry.training.rendezvous import join_session, meeting_other_ranks
from vla_foundry.world import World

# prefixes that wrappers add to parameter names
_WRAPPER_NAMES = ("_checkpoint_wrapped_module.", "_orig_mod.")
# packages of blocks that compute with bf16 weights; others may keep theirs elsewhere, as nn.GRU does
_LOWERED_PACKAGES = ("vla_foundry", "transformers")
# DDP need not broadcast buffers in every forward; newer versions of torch renamed the option
_WITHOUT_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers": False
}


def start_process_group(params: DistributedParams, world: World) -> None:
    """Collective: call on every rank. Join the process group if the run needs one.

    CPU tensors always use gloo, so that hosts can agree without touching the accelerator.

    Raises:
        ValueError: NCCL without a GPU, or the other ranks cannot be reached.
    """
    on_gpu = world.device.startswith("cuda")
    if params.dist_backend == "nccl" and not on_gpu:
        raise ValueError(
            f"distributed.dist_backend 'nccl' needs a GPU, but this process runs on '{world.device}'. "
            "Use --distributed.dist_backend auto."
        )
    if world.world_size == 1 and not params.fsdp:
        return
    if on_gpu:
        torch.cuda.set_device(world.device)
    limit = timedelta(seconds=params.timeout_s)
    with ExitStack() as stack:
        # a single process needs no rendezvous
        store: Store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        if world.world_size > 1:
            stack.enter_context(meeting_other_ranks(params, world))
            store, *_ = next(rendezvous(params.dist_url, world.rank, world.world_size, timeout=limit))
            store = join_session(store, world, params.timeout_s)
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if on_gpu and params.dist_backend != "gloo" else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.world_size,
            timeout=limit,
        )
        # ranks that were told other numbers of ranks find each other, but no more
        barrier()


def stop_process_group() -> None:
    """Collective: call on every rank. Leave the process group after a successful run.

    Do not call it after an error: other ranks may wait in a collective, and the launcher ends them.
    """
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def leave_process(code: int) -> NoReturn:
    """Exit this process immediately; close everything first.

    After sharding, torch's threads sometimes abort the interpreter's shutdown, which the launcher would report as a
    failure.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def parallelize(
    model: nn.Module,
    params: DistributedParams,
    *,
    world: World,
    grad_checkpointing: bool = False,
    compile_blocks: bool = False,
    is_mixture: bool = False,
    precision: str = "fp32",
    fp8: str | None = None,
    flash_attention_3: bool = False,
    activation_budget: float = 1.0,
) -> nn.Module:
    """Collective: call on every rank. Distribute `model` over the processes in place, and move it to its device.

    Args:
        model: on the CPU, the same on every rank; `list_blocks` names the units to wrap.
        is_mixture: microbatches use different parts of the model, the same ones on every rank. DDP expects all parts,
            so `reduce_unsharded_gradients` takes its place.
        precision, fp8, flash_attention_3, activation_budget: see `hparams`.

    Returns:
        The module that a training step calls: the model itself, or its DDP wrapper.
    """
    blocks = list_blocks(model)
    if grad_checkpointing and not blocks:
        raise ValueError("hparams.grad_checkpointing needs blocks, but the model has no list of modules. Turn it off.")
    # transformers decides on the host in some blocks
    are_native = [_is_of(block, "vla_foundry") for block in blocks]
    if flash_attention_3:
        use_flash_attention_3(world.device)
    if fp8 is not None:
        # others keep fp32 weights (find_lowered)
        use_float8_products([block for block in blocks if _is_of(block, *_LOWERED_PACKAGES)], world.device)
    if grad_checkpointing:
        blocks = _checkpoint_activations(model, blocks)
    lowered = find_lowered(model, precision)
    for block in lowered:
        block.register_forward_pre_hook(_lower_tokens)
    if compile_blocks:
        # sizes, documents or not, training or not: more than 8 variants of a block, which a whole graph may not exceed
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        functorch_config.activation_memory_budget = activation_budget
        for block, is_native in zip(blocks, are_native, strict=True):
            # without its hooks, which cast and gather
            block.forward = torch.compile(block.forward, fullgraph=is_native)
        parts: list[Any] = [part for part in model.modules() if hasattr(part, "compiles_loss")]
        for part in parts:
            part.compiles_loss = True
    if params.fsdp:
        return _shard(model, blocks, params, world, lowered)
    model.to(world.device)
    if world.world_size == 1 or is_mixture:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **_WITHOUT_BUFFER_SYNC)


@contextmanager
def naming_compile_faults() -> Iterator[None]:
    """Raise a ValueError in place of torch.compile's error where the machine lacks something, not the code.

    Raises:
        ValueError: there is no C++ compiler, or the cache of compiled code cannot be written.
    """
    try:
        yield
    except RuntimeError as error:
        cause = getattr(error, "inner_exception", None)  # of torch's BackendCompilerFailed
        line, full = " ".join(str(cause).split()), os.strerror(errno.ENOSPC)
        if not (full in line or isinstance(cause, OSError) or type(cause).__name__ == "InvalidCxxCompiler"):
            raise
        reason = (
            f"{full} (TORCHINDUCTOR_CACHE_DIR names another folder for its cache)"
            if full in line
            else line[:300].rstrip(".")
        )
        raise ValueError(f"torch.compile: {reason}. Mend it, or set hparams.torchcompile to false.") from error


def _checkpoint_activations(model: nn.Module, blocks: list[nn.Module]) -> list[nn.Module]:
    """Make each block recompute its activations in the backward pass."""
    wrapped: dict[nn.Module, nn.Module] = {
        block: checkpoint_wrapper(block, checkpoint_impl=CheckpointImpl.NO_REENTRANT) for block in blocks
    }
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in wrapped:
                parent.register_module(name, wrapped[child])
    return [wrapped[block] for block in blocks]


def _is_of(block: nn.Module, *packages: str) -> bool:
    inner: Any = getattr(block, "_checkpoint_wrapped_module", block)
    return type(inner).__module__.partition(".")[0] in packages


def find_lowered(model: nn.Module, precision: str) -> list[nn.Module]:
    """Return the blocks that compute with bf16 copies of their weights."""
    blocks = list_blocks(model) if precision == "amp_bfloat16" else []
    return [block for block in blocks if _is_of(block, *_LOWERED_PACKAGES)]


def _lower_tokens(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Make the tokens that enter a block bf16; tables of angles among the other arguments keep their precision."""
    return tuple(x.bfloat16() if i == 0 and isinstance(x, Tensor) else x for i, x in enumerate(args))


@contextmanager
def lower_blocks(model: nn.Module, precision: str) -> Iterator[None]:
    """Let blocks compute with bf16 copies of their weights, if the precision asks for it; FSDP2 makes its own.

    Gradients pass through the copies and add up in the weights' precision.
    """
    blocks = [] if isinstance(model, FSDPModule) else find_lowered(model, precision)
    places = [
        (module.__dict__, name, parameter)
        for module in dict.fromkeys(module for block in blocks for module in block.modules())
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point()
    ]
    for attributes, name, parameter in places:
        # an attribute hides a parameter of the same name, which stays where it is
        attributes[name] = parameter.bfloat16()
    try:
        yield
    finally:
        for attributes, name, _ in places:
            del attributes[name]


def _shard(
    model: nn.Module, blocks: list[nn.Module], params: DistributedParams, world: World, lowered: list[nn.Module]
) -> nn.Module:
    # FSDP2 cannot shard scalars; they are few, and reduce_unsharded_gradients averages their gradients
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for scalar in scalars:
        if not scalar.is_meta:
            scalar.data = scalar.data.to(world.device)
    # only memory that a GPU copies from can be pinned; without one, the host is where parameters are anyway
    offload = CPUOffloadPolicy(pin_memory=world.device.startswith("cuda"))
    sizes, names = (world.world_size,), ("shard",)
    if params.replicate_size > 1:
        sizes = (params.replicate_size, world.world_size // params.replicate_size)
        names = ("replicate", "shard")
    options: dict[str, Any] = {
        "mesh": init_device_mesh(torch.device(world.device).type, sizes, mesh_dim_names=names),
        "reshard_after_forward": params.fsdp_reshard_after_forward,
        "offload_policy": offload if params.fsdp_cpu_offload else OffloadPolicy(),
        "ignored_params": scalars,
    }
    # blocks return views (keys and values to read again), which nothing changes in place
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)
    low = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mp_policy=low if block in lowered else MixedPrecisionPolicy(), **options)
    fully_shard(model, **options)
    return model


@contextmanager
def gradient_sync(module: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Reduce gradients over ranks in the backward passes of this context, or defer that to a later one."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(module, DistributedDataParallel) and not enabled:
        with module.no_sync():
            yield
    else:
        yield


def reduce_unsharded_gradients(forward: nn.Module) -> None:
    """Collective: call on every rank. Average the gradients that no wrapper reduces: FSDP's scalars; in a mixture, all.

    Args:
        forward: what `parallelize` returned.
    """
    if isinstance(forward, DistributedDataParallel) or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for parameter in forward.parameters():
        if not isinstance(parameter, DTensor) and parameter.grad is not None:
            all_reduce(parameter.grad)
            parameter.grad.div_(dist.get_world_size())


def reshard(module: nn.Module) -> None:
    """Free gathered parameters, so that the next forward pass sees values written to the shards."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by name without wrapper prefixes; a tied one appears once."""
    return {strip_wrapper_names(name): parameter for name, parameter in model.named_parameters()}


def named_persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that belong in a checkpoint, by name without wrapper prefixes."""
    buffers = {}
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix=path, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                buffers[strip_wrapper_names(name)] = buffer
    return buffers


def strip_wrapper_names(name: str) -> str:
    """Return the parameter's name without wrapper prefixes."""
    for part in _WRAPPER_NAMES:
        name = name.replace(part, "")
    return name


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor (all of it if unsharded), detached, sharing its memory."""
    # faster than to detach the sharded tensor
    with torch.no_grad():
        return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def is_sharded(tensor: Tensor) -> bool:
    """Return True if ranks hold different parts of a tensor."""
    if not isinstance(tensor, DTensor):
        return False
    return any(place.is_shard() and tensor.device_mesh.size(axis) > 1 for axis, place in enumerate(tensor.placements))


def local_rows(tensor: Tensor) -> slice:
    """Return which rows of the whole tensor this rank holds; slice(None) if it holds all, or a scalar."""
    if not isinstance(tensor, DTensor) or not is_sharded(tensor):
        return slice(None)
    axis = next(axis for axis, place in enumerate(tensor.placements) if place.is_shard())
    assert tensor.placements[axis].is_shard(0), "FSDP2 divides the first dimension"
    # as torch.chunk divides it: the last ranks may have fewer rows, or none
    size = -(-tensor.shape[0] // tensor.device_mesh.size(axis))
    first = min(size * tensor.device_mesh.get_local_rank(axis), tensor.shape[0])
    return slice(first, first + local_shard(tensor).shape[0])


def is_writer(tensor: Tensor, index: int, world: World) -> bool:
    """Return True on one of the ranks that hold the same part of a tensor; they take turns with `index`."""
    if not isinstance(tensor, DTensor):
        return index % world.world_size == world.rank
    mesh = tensor.device_mesh
    copies = [axis for axis, place in enumerate(tensor.placements) if place.is_replicate()]
    return all(mesh.get_local_rank(axis) == index % mesh.size(axis) for axis in copies)


def shard_like(local: Tensor, parameter: Tensor) -> Tensor:
    """View a rank's part as the sharded tensor it belongs to, laid out like `parameter`."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def gather(tensor: Tensor) -> Tensor:
    """Collective: call on every rank. Return the whole tensor."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def all_reduce(tensor: Tensor) -> Tensor:
    """Collective: call on every rank. Sum a tensor over ranks, in place; the host does not wait."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def create_host_group(params: DistributedParams) -> dist.ProcessGroup | None:
    """Collective: call on every rank. Return a group of all ranks for another thread's messages; None for one rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=params.timeout_s))
    return group


def broadcast_object(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Collective: call on every rank. Return rank 0's value."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group, device=torch.device("cpu"))
    return values[0]


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Collective: call on every rank. Return the values of all ranks, in order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def barrier() -> None:
    """Collective: call on every rank. Make the host wait for all ranks."""
    all_reduce(torch.zeros(1))


def main_rank_first(world: World, action: Callable[[], Any], group: dist.ProcessGroup | None = None) -> Any:
    """Collective: call on every rank. Run `action` on rank 0 and return its result everywhere.

    Rank 0 raises its error; the other ranks exit with code 2, so that no rank waits and the error appears once.
    """
    result: Any = None
    error: Exception | None = None
    if world.is_main:
        try:
            result = action()
        except (ValueError, OSError) as caught:
            error = caught
    result, is_failed = broadcast_object((result, error is not None), group)
    if error is not None:
        raise error
    if is_failed:
        raise SystemExit(2)
    return result
