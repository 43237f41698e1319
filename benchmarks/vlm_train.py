"""Measure samples per second of a VLM preset's optimizer step: captions packed into rows, against padded rows.

Both sides run in this process on the same samples (64 image tokens and captions of 60 +- 20 words), one after the other
in each round, in alternating order. Prints one JSON object: medians over rounds, the share of padding, and the median
of the ratios within a round.

    uv run python benchmarks/vlm_train.py --steps 2 --rounds 5
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from caption_data import write_caption_data

from vla_foundry.batch import Batch
from vla_foundry.data import create_dataloader
from vla_foundry.models import create_batch_handler, create_model
from vla_foundry.params import HyperParams, ModelParams, TrainExperimentParams, load_params_from_yaml
from vla_foundry.params.data.image_caption import ImageCaptionDataParams
from vla_foundry.params.models.vlm import VLMParams
from vla_foundry.training.loop import train_step
from vla_foundry.training.state import create_train_state
from vla_foundry.world import World

IMAGE_TOKEN_ID = 4096


def create_batch(folder: Path, *, pack: bool, seq_len: int, num_samples: int, model: VLMParams) -> Batch:
    """Return the first batch of the data, packed or padded."""
    images = model.image_inputs()
    params = ImageCaptionDataParams(
        dataset_manifest=[str(folder / "train" / "manifest.jsonl")],
        tokenizer=str(folder / "tokenizer"),
        image_size=images.image_size,
        img_num_tokens=images.img_num_tokens,
        pack=pack,
        seq_len=seq_len,
        num_workers=0,
    )
    loader = create_dataloader(params, World(), global_batch_size=num_samples, per_gpu_batch_size=num_samples, seed=0)
    with closing(loader):
        return next(loader.microbatches(0))


def create_step(params: VLMParams, hparams: HyperParams, batch: Batch) -> Callable[[], None]:
    """Return the step of the training loop, as the trainer calls it."""
    data = ImageCaptionDataParams(tokenizer="none", dataset_manifest=["none"])
    root = TrainExperimentParams(model=params, data=data, hparams=hparams, total_train_samples=80_000)
    model = create_model(params)
    state = create_train_state(model, model, hparams=hparams, ema=root.ema, total_steps=10_000)
    handler, world = create_batch_handler(root), World()
    return lambda: (train_step(state, [batch], handler=handler, hparams=hparams, world=world), None)[1]


def padding_share(batch: Batch) -> float:
    """Return the share of a batch's tokens that is padding."""
    documents = batch["documents"]
    return float(documents.lengths[documents.is_padding].sum() / documents.lengths.sum())


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="config_presets/models/vlm_11m.yaml")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--precision", default="amp_bfloat16")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    params = load_params_from_yaml(ModelParams, arguments.preset)
    assert isinstance(params, VLMParams)
    params = replace(params, image_token_id=IMAGE_TOKEN_ID, vocab_size=IMAGE_TOKEN_ID + 1)
    hparams = HyperParams(precision=arguments.precision, global_batch_size=arguments.batch)
    size = params.image_inputs().image_size
    assert size is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_caption_data(folder, num_samples=arguments.batch, image_size=size)
        options = {"seq_len": arguments.seq_len, "num_samples": arguments.batch, "model": params}
        batches = {
            side: create_batch(folder, pack=side == "packed", **options) for side in ("packed", "padded to the longest")
        }
    steps = {side: create_step(params, hparams, batch) for side, batch in batches.items()}
    speeds: dict[str, list[float]] = {side: [] for side in steps}
    for step in steps.values():
        step()
    for round_number in range(arguments.rounds):
        for side in list(steps)[:: 1 if round_number % 2 == 0 else -1]:
            start = time.perf_counter()
            for _ in range(arguments.steps):
                steps[side]()
            speeds[side].append(arguments.steps * arguments.batch / (time.perf_counter() - start))
    packed, padded = speeds.values()
    result = {
        "preset": arguments.preset,
        "batch": arguments.batch,
        "samples_per_second": {side: round(statistics.median(values), 2) for side, values in speeds.items()},
        "padding": {side: round(padding_share(batch), 3) for side, batch in batches.items()},
        "ratio_of_packed_to_padded": round(statistics.median(a / b for a, b in zip(packed, padded, strict=True)), 3),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
