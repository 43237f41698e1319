"""Set up one training run from its params, run it, and leave its folder complete."""

import logging
import math
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla_foundry.data import DataLoader, MixtureLoader, create_dataloader
from vla_foundry.data.faults import FaultLog
from vla_foundry.data.indexing import user_cache_folder
from vla_foundry.data.kept import describe_inputs
from vla_foundry.models import create_batch_handler, create_model
from vla_foundry.models.registry import MODELS, save_model_files
from vla_foundry.models.weights import describe_base, digest_tensors, list_frozen
from vla_foundry.params.data.mixture import MixtureDataParams
from vla_foundry.params.experiment import TrainExperimentParams, accumulation_steps, total_steps
from vla_foundry.params.hparams import HyperParams
from vla_foundry.record import record_end, record_start
from vla_foundry.registry import summarize_names
from vla_foundry.run_folder import MODEL_FILES_FOLDER, list_step_folders, lock_folder, read_step
from vla_foundry.storage.local import replace_folder
from vla_foundry.training import loop
from vla_foundry.training.checkpoint import load_checkpoint
from vla_foundry.training.deferred import NO_VALUES, Recording
from vla_foundry.training.distributed import (
    broadcast_object,
    leave_process,
    local_rows,
    local_shard,
    main_rank_first,
    named_parameters,
    naming_compile_faults,
    parallelize,
    start_process_group,
    stop_process_group,
    strip_wrapper_names,
)
from vla_foundry.training.lost_ranks import naming_lost_ranks
from vla_foundry.training.metrics import MetricLog, create_metric_log, open_sinks, truncate_metrics
from vla_foundry.training.optimization.optimizer import describe_groups, freeze_weights
from vla_foundry.training.optimization.schedules import learning_rates
from vla_foundry.training.remote_sync import RemoteSync
from vla_foundry.training.start import (
    check_same_config,
    copy_tokenizer,
    fetch_to_other_disks,
    find_start,
    pin_starts,
    remove_unfinished,
    write_configs,
)
from vla_foundry.training.state import TrainState, create_train_state
from vla_foundry.world import World

_COMPILED_KEY = "TORCHINDUCTOR_CACHE_DIR"


def train(params: TrainExperimentParams, world: World, origins: Mapping[str, str] | None = None) -> None:
    """Collective: call on every rank. Train with resolved params into <save_path>/<name>.

    With several ranks this does not return: each process exits at the end of the run.

    Args:
        origins: config path of each given or derived value -> where it comes from, for the record.

    Raises:
        ValueError: the user can fix the problem; the message is one line.
        SystemExit: code 128 + number after SIGTERM, SIGINT or SIGHUP; a checkpoint was saved.
    """
    logging.getLogger("vla_foundry").setLevel(params.log_level.upper() if world.is_main else logging.ERROR)
    # fail early if the schedule does not fit into the run
    learning_rates(params.hparams, total_steps(params))
    start_process_group(params.distributed, world)
    check_same_config(params, world)
    folder = find_run_folder(params)
    with ExitStack() as stack, naming_lost_ranks(world), naming_compile_faults():
        run = create_run(params, world, folder, stack, origins or {})
        stopped_by = loop.train(run)
        if world.is_main:
            samples = run.state.step * params.hparams.global_batch_size
            record_end(folder, step=run.state.step, samples=samples, stopped_by=stopped_by)
        for line in describe_faults(folder) if world.is_main else []:
            run.log.say(line)
        # the other ranks need not wait for the copies to remote storage that end this block
        stop_process_group()
    code = 128 + stopped_by if stopped_by else 0
    if world.world_size > 1:
        leave_process(code)
    if code:
        raise SystemExit(code)


def describe_faults(folder: Path) -> list[str]:
    """Say how many faulty samples a run has met, and where they are named."""
    log = FaultLog(folder)
    count = log.count()
    what = "1 faulty sample was" if count == 1 else f"{count} faulty samples were"
    return [f"{what} replaced; see {log.path}"] if count else []


def find_run_folder(params: TrainExperimentParams) -> Path:
    """Collective: call on every rank. Return the run's folder; an unset name is built from time and params."""
    name = params.name or broadcast_object(
        f"{time.strftime('%Y_%m_%d-%H_%M_%S')}-model_{params.model.type}-lr_{params.hparams.lr:g}"
        f"-bsz_{params.hparams.global_batch_size}"
    )
    return Path(params.save_path) / name


def create_run(
    params: TrainExperimentParams, world: World, folder: Path, stack: ExitStack, origins: Mapping[str, str]
) -> loop.Run:
    """Collective: call on every rank. Create everything the loop needs, restored if the run continues.

    Args:
        stack: receives everything that must be closed, also after an error.
        origins: see `train`.
    """
    started = time.perf_counter()
    notices: list[str] = []
    if params.model.lora is not None:
        params = replace(params, model=pin_starts(params.model))
    # errors in a new model's registrations come before anything is made
    handler = create_batch_handler(params)
    MODELS.get(params.model.type)
    main_rank_first(world, lambda: stack.enter_context(lock_folder(folder, what="run folder", flag="--name")))
    main_rank_first(world, lambda: remove_unfinished(folder))
    checkpoint: Path | None = main_rank_first(world, lambda: find_start(params, folder, notices.append))
    if checkpoint is not None:
        fetch_to_other_disks(params, world, folder, checkpoint)
    loader, validation_loader = loaders = create_loaders(params, world, stack)
    loader.start(0 if checkpoint is None else read_step(checkpoint))  # it loads while the model is made
    state = create_state(params, world, is_restored=checkpoint is not None)
    saved: dict[str, Any] = {}
    if checkpoint is not None:
        saved = load_checkpoint(checkpoint, state)
        notices += [f"continues from {checkpoint} after step {state.step}.", *saved["notices"]]
        notices += describe_jump(state, saved)
        notices += check_data(params, loader, saved["data"])
    log = create_metric_log(
        params, folder, is_main=world.is_main, total_steps=total_steps(params), first_step=state.step
    )
    parts = (params, world, folder, state, loaders, log)
    prepare = cache(partial(prepare_folder, *parts, first_step=state.step, origins=origins))
    if main_rank_first(world, lambda: bool(list_step_folders(folder))):
        # what its files contradict is an error before a step
        prepare()
    sync = None
    if params.remote_sync and world.is_main:
        sync = stack.enter_context(RemoteSync(folder, params.remote_sync, log.say))
    # before the copies end, so that they hold all that the log writes
    stack.callback(log.close)
    for line in [*(f"note: {notice}" for notice in notices), *describe_run(params, world, state)]:
        log.say(line)
    log.say(f"Run folder {folder}; ready after {time.perf_counter() - started:.1f} s")
    return loop.Run(
        params=params,
        world=world,
        folder=folder,
        total_steps=total_steps(params),
        state=state,
        handler=handler,
        loader=loader,
        validation_loader=validation_loader,
        log=log,
        is_validation_owed=saved.get("is_validation_owed", False),
        sync=sync,
        prepare=prepare,
    )


def create_loaders(
    params: TrainExperimentParams, world: World, stack: ExitStack
) -> tuple[DataLoader | MixtureLoader, DataLoader | MixtureLoader | None]:
    """Create the training loader and, if the params ask for it, the validation loader."""
    hparams = params.hparams
    create = partial(
        create_dataloader,
        params.data,
        world,
        global_batch_size=hparams.global_batch_size,
        per_gpu_batch_size=hparams.per_gpu_batch_size,
        seed=hparams.seed if params.data.seed is None else params.data.seed,
    )
    loader = create()
    stack.callback(loader.close)
    if params.total_val_samples is None:
        return loader, None
    validation_loader = create(split="validation", total_samples=params.total_val_samples)
    stack.callback(validation_loader.close)
    return loader, validation_loader


def create_state(params: TrainExperimentParams, world: World, *, is_restored: bool) -> TrainState:
    """Collective: call on every rank. Create model, wrappers and optimizer at step 0; weights are equal on all ranks.

    Args:
        is_restored: a checkpoint will overwrite all weights, so do not load pretrained ones.
    """
    hparams = params.hparams
    has_base = params.model.lora is not None
    loads = has_base or not is_restored
    other: dict[str, str] = {}
    if has_base and not is_restored:
        create_other = partial(create_deferred, params, world, seed=hparams.seed + 1, load_pretrained=True)
        other = main_rank_first(world, lambda: digest_frozen(*create_other()))
    model, recording = create_deferred(params, world, seed=hparams.seed, load_pretrained=loads)
    base = describe_base(model, params.model, digest_frozen(model, recording) if has_base else None)
    if other:
        main_rank_first(world, lambda: check_base_is_kept(digest_frozen(model, recording), other))
    with recording or nullcontext():
        cast_parameters(model, hparams.precision)
    freeze_weights(model, hparams)
    model.train()
    if compiles_blocks(hparams, world):
        keep_compiled_code()
    tensors = list_tensors(model)
    forward = parallelize(
        model,
        params.distributed,
        world=world,
        grad_checkpointing=hparams.grad_checkpointing,
        compile_blocks=compiles_blocks(hparams, world),
        precision=hparams.precision,
        fp8=hparams.fp8,
        flash_attention_3=hparams.flash_attention_3,
        activation_budget=hparams.activation_budget,
        is_mixture=isinstance(params.data, MixtureDataParams),
    )
    if recording is not None:
        model.to_empty(device=world.device)
        own = list_tensors(model)
        # a checkpoint overwrites all but tables that it does not hold, and the base of adapters
        kept = own if loads else {name: own[name] for name in own.keys() - named_parameters(model).keys()}
        rows = {name: local_rows(own[name]) for name in kept}
        wanted = {name: tensors[name] for name in tensors if name in kept}
        for name, value in recording.play(wanted, rows, draws=loads):
            local_shard(own[name]).copy_(value)
    return create_train_state(
        model, forward, hparams=hparams, ema=params.ema, total_steps=total_steps(params), base=base
    )


def create_deferred(
    params: TrainExperimentParams, world: World, *, seed: int, load_pretrained: bool
) -> tuple[nn.Module, Recording | None]:
    """Create a run's model; if it is going to be sharded, without memory, and with the recording that makes its parts.

    A model whose code looks at values of weights is made whole, and so is one that needs its weights before it is
    sharded.
    """
    torch.manual_seed(seed)
    is_offloaded = params.distributed.fsdp_cpu_offload and world.device.startswith("cuda")
    if params.distributed.fsdp and not is_offloaded and params.hparams.fp8 is None:
        recording = Recording()
        try:
            with recording:
                model = create_model(params.model, load_pretrained=load_pretrained)
            if unset := recording.find_unset(dict(model.named_parameters())):
                raise NotImplementedError(f"{unset[0]} gets no value")
            return model, recording
        except NO_VALUES as error:
            reason = str(error).partition("\n")[0]
            logging.getLogger(__name__).warning("each rank makes the whole model before it is sharded: %s", reason)
            torch.manual_seed(seed)
    return create_model(params.model, load_pretrained=load_pretrained), None


def digest_frozen(model: nn.Module, recording: Recording | None) -> dict[str, str]:
    """Return the SHA-256 of each weight that is not trained; one at a time is in memory if they are recorded."""
    frozen = list_frozen(model)
    found = digest_tensors(frozen.items() if recording is None else recording.play(frozen))
    return {name: found[name] for name in frozen}


def list_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return weights and buffers by name without wrapper prefixes; a tied weight appears once."""
    buffers = {strip_wrapper_names(name): buffer for name, buffer in model.named_buffers()}
    return {**named_parameters(model), **buffers}


def check_base_is_kept(digests: dict[str, str], other: dict[str, str]) -> None:
    """Check that all weights that adapters leave as they are come from a start: checkpoints do not hold them.

    Args:
        digests: of these weights.
        other: of the same, made with another seed.

    Raises:
        ValueError: some are new, so that no other seed gives them.
    """
    new = [name for name, digest in digests.items() if other[name] != digest]
    if new:
        raise ValueError(
            f"model.lora would freeze new weights, which no checkpoint holds: {summarize_names(new)}. Name them in "
            "model.lora.train, or start from a checkpoint that holds them."
        )


def compiles_blocks(hparams: HyperParams, world: World) -> bool:
    """Return whether a run compiles blocks.

    Raises:
        ValueError: it does not, but only compiled blocks have a budget.
    """
    has_compiler = world.device.startswith("cuda") and any(map(shutil.which, ("cc", "gcc", "clang")))
    is_compiled = has_compiler if hparams.torchcompile is None else hparams.torchcompile
    if hparams.activation_budget < 1 and not is_compiled:
        raise ValueError(
            f"hparams.activation_budget ({hparams.activation_budget:g}) is for compiled blocks, but this run compiles "
            "none. Set --hparams.torchcompile true, or the budget to 1."
        )
    return is_compiled


def keep_compiled_code() -> None:
    """Let torch.compile keep its code in the user's cache folder, where a restart finds it, not in a temporary one."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder = Path(user_cache_folder(), "compiled")
    with suppress(OSError):  # torch's own folder will do
        folder.mkdir(parents=True, exist_ok=True)
        # torch may have set the variable to its own folder already
        if os.access(folder, os.W_OK) and os.environ.get(_COMPILED_KEY) in (None, default_cache_dir()):
            os.environ[_COMPILED_KEY] = str(folder)


def cast_parameters(model: nn.Module, precision: str) -> None:
    """Cast parameters to their storage precision in place: fp32, except for pure_bf16 and fp64.

    Buffers keep theirs (rotary frequency tables need fp32), except for fp64, which casts them too.
    """
    if precision == "fp64":
        model.double()
    elif precision == "pure_bf16":
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)
    else:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()


def describe_jump(state: TrainState, saved: dict[str, Any]) -> list[str]:
    """Describe how the learning rate jumps if the budget changed: its schedule always covers the whole budget.

    Args:
        saved: the contents of state.json.
    """
    before, total_steps, num_updates = saved.get("lr"), len(state.schedule), int(state.counters.updates)
    if before is None or saved["total_steps"] == total_steps or num_updates >= total_steps:
        return []
    after = float(state.schedule[num_updates])
    if math.isclose(before, after, rel_tol=0.01):
        return []
    return [
        f"the learning rate jumps from {before:.3g} at step {state.step} to {after:.3g} at step {state.step + 1}, "
        f"because its schedule now covers {total_steps} steps, not {saved['total_steps']}."
    ]


def check_data(params: TrainExperimentParams, loader: DataLoader | MixtureLoader, saved: dict[str, Any]) -> list[str]:
    """Check that the data still comes in the order recorded in the checkpoint.

    Returns:
        Lines for the user.

    Raises:
        ValueError: the order changed and data.accept_changed_data is false.
    """
    try:
        return loader.check_plan(saved)
    except ValueError as error:
        if not params.data.accept_changed_data:
            raise
        return [f"data.accept_changed_data: {error}"]


def prepare_folder(
    params: TrainExperimentParams,
    world: World,
    folder: Path,
    state: TrainState,
    loaders: tuple[DataLoader | MixtureLoader, DataLoader | MixtureLoader | None],
    log: MetricLog,
    *,
    first_step: int,
    origins: Mapping[str, str],
) -> dict[str, Any]:
    """Collective: call on every rank. Write all of a run folder but the checkpoints, and open its metrics.

    A new run calls it once its first step has run, so that a run that cannot start leaves nothing.

    Args:
        first_step: the step that the run starts after.
        origins: see `train`.

    Returns:
        What checkpoints keep about tokenizer, images and statistics; see `describe_inputs`.
    """

    def write() -> dict[str, Any]:
        notices = write_configs(params, folder)
        notices += copy_tokenizer(params.data.main(), folder)
        loaders[0].save_files(folder)
        with replace_folder(folder / MODEL_FILES_FOLDER) as aside:
            save_model_files(state.model, aside)
        inputs = describe_inputs(str(folder))
        notices += record_start(folder, params, world, first_step, inputs=inputs, origins=origins)
        notices += truncate_metrics(folder, first_step)
        log.add(open_sinks(params, folder, first_step=first_step))
        for notice in notices:
            log.say(f"note: {notice}")
        return inputs

    inputs = main_rank_first(world, write)
    for loader in loaders:
        if loader is not None:
            loader.keep_faults(FaultLog(folder))
    return inputs


def describe_run(params: TrainExperimentParams, world: World, state: TrainState) -> list[str]:
    """Describe what is about to be trained: in one line, and its groups of weights."""
    num_weights = sum(parameter.numel() for parameter in state.parameters.values())
    num_trained = sum(parameter.numel() for parameter in state.parameters.values() if parameter.requires_grad)
    share = "" if num_trained == num_weights else f" ({num_trained / num_weights:.2%})"
    hparams = params.hparams
    spread = "FSDP2" if params.distributed.fsdp else "DDP" if world.world_size > 1 else "one process"
    compiled = ", blocks compiled" if compiles_blocks(hparams, world) else ""
    line = (
        f"{params.model.type}: {num_weights:,} parameters, {num_trained:,} of them trained{share}; "
        f"{hparams.precision} on {world.world_size} x {world.device.partition(':')[0]} ({spread}{compiled}); "
        f"batch {hparams.global_batch_size} = {world.world_size} x {hparams.per_gpu_batch_size} x "
        f"{accumulation_steps(params, world.world_size)}; steps {state.step} to {total_steps(params)}"
    )
    return [line, *describe_groups(state.optimizer, state.parameters, params.hparams.lr)]
