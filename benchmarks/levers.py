"""Measure what single levers of a training step are worth on a CPU: the same step with a lever and without it.

Both sides run in this process and take turns, and their processor time is measured, so that what else the machine does
hits both alike. Prints one JSON object: for each lever, milliseconds of both (medians) and the median of the ratios
within a round.

    uv run python benchmarks/levers.py --rounds 9
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from unittest.mock import patch

import numpy as np
import torch
from gpu_cases import arrange_documents, fill_rows
from torch import Tensor

from vla_foundry.batch import Batch
from vla_foundry.models import create_batch_handler, create_model
from vla_foundry.models.action_heads.action_head import ActionWindow, HeadWidths, create_action_head
from vla_foundry.models.action_heads.flow_transformer import FlowTransformer
from vla_foundry.models.backbones.backbone import Conditioning
from vla_foundry.params import HyperParams, TrainExperimentParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.distributed import DistributedParams
from vla_foundry.params.models.action_heads import FlowTransformerParams
from vla_foundry.params.models.transformer import TransformerParams
from vla_foundry.training import loop, state
from vla_foundry.training.distributed import parallelize
from vla_foundry.training.optimization.optimizer import step_optimizer
from vla_foundry.world import World

Run = Callable[[], object]
# a small language model with a vocabulary of its own size
MODEL = TransformerParams(hidden_dim=192, n_layers=4, n_heads=3, vocab_size=16_384, max_seq_len=256)


def create_step(batches: list[Batch], *, compiles_loss: bool = False, clip: float | None = None) -> Run:
    """Return a step of the training loop on these microbatches."""
    torch.manual_seed(0)
    model = create_model(MODEL)
    parallelize(model, DistributedParams(), world=World(), precision="amp_bfloat16")
    model.compiles_loss = compiles_loss
    data = TextDataParams(dataset_manifest=["none"], seq_len=MODEL.max_seq_len)
    root = TrainExperimentParams(model=MODEL, data=data, hparams=HyperParams(grad_clip_norm=clip))
    trained = state.create_train_state(model, model, hparams=root.hparams, ema=root.ema, total_steps=10_000)
    options = {"handler": create_batch_handler(root), "hparams": root.hparams, "world": World()}
    return lambda: loop.train_step(trained, batches, **options)


def create_rows(lengths: list[list[int]], num_tokens: int) -> Batch:
    """Return rows of documents of random tokens."""
    rng = np.random.default_rng(0)
    documents = arrange_documents(lengths, num_tokens + 1)
    mask = torch.from_numpy(~documents.padding_mask())
    mask[:, 0] = False
    ids = torch.from_numpy(rng.integers(1, MODEL.vocab_size, (len(lengths), num_tokens + 1), dtype=np.int32))
    positions = torch.arange(len(lengths))
    return {"modality": "text", "positions": positions, "input_ids": ids, "target_mask": mask, "documents": documents}


def within(context: Callable[[], AbstractContextManager[object]], run: Run) -> Run:
    """Return what runs within a context."""

    def run_within() -> None:
        with context():
            run()

    return run_within


def clip_apart(optimizer: torch.optim.AdamW, skip: Tensor, norm: Tensor, max_norm: float | None) -> None:
    """Clip in a pass over the gradients, then update."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    step_optimizer(optimizer, skip, norm, None)


def create_levers() -> dict[str, tuple[Run, Run]]:
    """Return for each lever the step with and without it."""
    whole = create_rows([[257]] * 4, 256)
    quarters = [create_rows([[257]], 256)] * 4
    lengths = [int(n) for n in np.random.default_rng(0).integers(20, 200, 12)]
    packed, padded = create_rows(fill_rows(lengths, 257), 256), create_rows([[n] for n in lengths], 256)
    without_copies = patch.object(loop, "lower_blocks", lambda model, precision: nullcontext())
    apart = patch.object(state, "step_optimizer", clip_apart)
    return {
        "what the loss computes from logits is compiled": (
            create_step([whole], compiles_loss=True),
            create_step([whole]),
        ),
        "gradients are clipped inside AdamW": (
            create_step([whole], clip=1e-3),
            within(lambda: apart, create_step([whole], clip=1e-3)),
        ),
        "bf16 copies of weights once a step, not in each of 4 microbatches": (
            create_step(quarters),
            within(lambda: without_copies, create_step(quarters)),
        ),
        "12 documents packed into rows, not each padded to 256 tokens": (create_step([packed]), create_step([padded])),
        "modulations of adaLN-Zero at once for 10 sampling steps": create_sampling(),
    }


def create_sampling() -> tuple[Run, Run]:
    """Return sampling with a head with adaLN-Zero, with and without modulations at once."""
    transformer = TransformerParams(hidden_dim=512, n_layers=8, n_heads=8)
    widths = HeadWidths(action_dim=10, proprioception_dim=10, conditioning_dim=512)
    head = create_action_head(FlowTransformerParams(transformer=transformer), widths).eval()
    steps = torch.ones(1, 16, dtype=torch.bool)
    window = ActionWindow(torch.zeros(1, 16, 10), ~steps, steps, None, torch.zeros(1, 2, 10), None)
    conditioning, noise = Conditioning(torch.randn(1, 1, 512)), torch.randn(1, 16, 10)

    def sample() -> None:
        head.sample_from(noise, conditioning, window, 10)

    at_once = FlowTransformer.cache_context
    one_by_one = patch.object(
        FlowTransformer, "cache_context", lambda head, seen, window, _: at_once(head, seen, window)
    )
    return sample, within(lambda: one_by_one, sample)


def measure(run: Run, other: Run, rounds: int) -> dict[str, float]:
    """Time both in turn."""
    times: list[tuple[float, float]] = []
    for number in range(-2, rounds):
        lap = {}
        for each in (run, other) if number % 2 else (other, run):
            start = time.process_time()
            each()
            lap[each] = time.process_time() - start
        if number >= 0:
            times.append((lap[run], lap[other]))
    return {
        "with_ms": round(1000 * statistics.median(a for a, _ in times), 1),
        "without_ms": round(1000 * statistics.median(b for _, b in times), 1),
        "ratio": round(statistics.median(b / a for a, b in times), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="levers with this in their name")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = {
        name: measure(*sides, arguments.rounds) for name, sides in create_levers().items() if arguments.only in name
    }
    print(json.dumps({"threads": arguments.threads, "rounds": arguments.rounds, "levers": found}, indent=2))


if __name__ == "__main__":
    main()
