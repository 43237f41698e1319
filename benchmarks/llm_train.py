"""Measure tokens per second of an LLM preset's optimizer step, against plain PyTorch and Hugging Face's Llama.

All sides run in this process, with the same sizes, dtype, threads, batch and fused AdamW, one after the other in each
round; the order of the sides alternates. Prints one JSON object: medians over rounds, and the medians of the ratios
within a round, which a busy machine disturbs less than the speeds.

    uv run python benchmarks/llm_train.py --steps 4 --rounds 5
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from plain_transformer import PlainTransformer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from vla_foundry.models import create_batch_handler, create_model
from vla_foundry.models.layers import SwiGLU
from vla_foundry.params import DataParams, HyperParams, ModelParams, TrainExperimentParams, load_params_from_yaml
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.distributed import DistributedParams
from vla_foundry.params.models.transformer import TransformerParams
from vla_foundry.training.distributed import parallelize
from vla_foundry.training.loop import train_step
from vla_foundry.training.state import create_train_state
from vla_foundry.world import World

Step = Callable[[], None]


def create_our_step(params: TransformerParams, hparams: HyperParams, data: DataParams, tokens: Tensor) -> Step:
    """Return the step of the training loop, as the trainer calls it."""
    model = create_model(params)
    parallelize(model, DistributedParams(), world=World(), precision=hparams.precision)
    state = create_train_state(model, model, hparams=hparams, ema=root(params, hparams, data).ema, total_steps=10_000)
    handler = create_batch_handler(root(params, hparams, data))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    batch = {"modality": "text", "positions": torch.arange(len(tokens)), "input_ids": tokens, "target_mask": mask}
    world = World()
    return lambda: (train_step(state, [batch], handler=handler, hparams=hparams, world=world), None)[1]


def root(params: TransformerParams, hparams: HyperParams, data: DataParams) -> TrainExperimentParams:
    """Return the config tree around the sections that matter here."""
    return TrainExperimentParams(model=params, data=data, hparams=hparams, total_train_samples=80_000)


def create_other_step(
    model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], hparams: HyperParams, tokens: Tensor
) -> Step:
    """Return a plain step: forward, backward, fused AdamW."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=hparams.lr, betas=(hparams.beta1, hparams.beta2), weight_decay=hparams.wd, fused=True
    )
    inputs, targets = tokens[:, :-1].long(), tokens[:, 1:].long()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=hparams.precision == "amp_bfloat16"):
            loss = loss_of(inputs, targets)
        loss.backward()
        optimizer.step()

    return step


def create_plain_step(params: TransformerParams, hparams: HyperParams, tokens: Tensor) -> Step:
    """Return a step of torch.nn modules and dense cross-entropy."""
    model = PlainTransformer(
        vocab_size=params.vocab_size,
        width=params.hidden_dim,
        num_layers=params.n_layers,
        num_heads=params.n_heads,
        hidden=SwiGLU(params.hidden_dim).w3.in_features,
        max_len=params.max_seq_len,
    )
    return create_other_step(model, model, hparams, tokens)


def create_llama_step(params: TransformerParams, hparams: HyperParams, tokens: Tensor) -> Step:
    """Return a step of Hugging Face's Llama of the same sizes, with its own loss."""
    config = LlamaConfig(
        vocab_size=params.vocab_size,
        hidden_size=params.hidden_dim,
        intermediate_size=SwiGLU(params.hidden_dim).w3.in_features,
        num_hidden_layers=params.n_layers,
        num_attention_heads=params.n_heads,
        max_position_embeddings=params.max_seq_len,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return model(input_ids=inputs, labels=inputs, shift_labels=targets).loss

    return create_other_step(model, loss_of, hparams, tokens)


def measure(steps: dict[str, Step], tokens_per_step: int, *, num_steps: int, num_rounds: int) -> dict[str, object]:
    """Time the sides in turn and return their medians."""
    for step in steps.values():
        step()
    speeds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(num_rounds):
        for name in list(steps)[:: 1 if round_number % 2 == 0 else -1]:
            start = time.perf_counter()
            for _ in range(num_steps):
                steps[name]()
            speeds[name].append(num_steps * tokens_per_step / (time.perf_counter() - start))
    ours = speeds["vla_foundry"]
    return {
        "tokens_per_second": {name: round(statistics.median(values)) for name, values in speeds.items()},
        "ratio_of_ours_to": {
            name: round(statistics.median(a / b for a, b in zip(ours, values, strict=True)), 3)
            for name, values in speeds.items()
            if name != "vla_foundry"
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="config_presets/models/transformer_11m.yaml")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "amp_bfloat16"])
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    params = load_params_from_yaml(ModelParams, arguments.preset)
    assert isinstance(params, TransformerParams)
    results = []
    for precision in arguments.precisions:
        hparams = HyperParams(precision=precision, global_batch_size=arguments.batch)
        for length in arguments.lengths:
            tokens = torch.randint(params.vocab_size, (arguments.batch, length + 1), dtype=torch.int32)
            data = TextDataParams(dataset_manifest=["none"], seq_len=length)
            steps = {
                "vla_foundry": create_our_step(params, hparams, data, tokens),
                "plain_pytorch": create_plain_step(params, hparams, tokens),
                "hugging_face_llama": create_llama_step(params, hparams, tokens),
            }
            found = measure(steps, arguments.batch * length, num_steps=arguments.steps, num_rounds=arguments.rounds)
            results.append({"precision": precision, "batch": arguments.batch, "seq_len": length, **found})
    print(json.dumps({"preset": arguments.preset, "threads": arguments.threads, "results": results}, indent=2))


if __name__ == "__main__":
    main()
