"""`vla-foundry generate`: continue prompts with the language model of a run."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from vla_foundry.inference.sampling import choose_tokens
from vla_foundry.io.uri import exists, is_remote, join_uri, parent_uri
from vla_foundry.models import create_model
from vla_foundry.models.weights import has_ema, load_model_checkpoint
from vla_foundry.params.command_line import parse_command
from vla_foundry.params.inference import GenerateParams
from vla_foundry.params.loading import load_params_from_yaml
from vla_foundry.params.models.base import ModelParams
from vla_foundry.params.models.transformer import TransformerHFParams, TransformerParams
from vla_foundry.run_folder import MODEL_CONFIG_NAME, MODEL_FILES_FOLDER, TOKENIZER_FOLDER
from vla_foundry.text.tokenizers import load_tokenizer, pad_token_id_of

# a checkpoint lies at most this deep in its run (run/checkpoints/step_N/model.safetensors)
_DEPTH = 4

_Stop: TypeAlias = Literal["end", "max_new_tokens", "max_seq_len"]


@dataclass(frozen=True)
class Continuation:
    """What follows one prompt."""

    # the new tokens, without the one that ends a text
    tokens: list[int]
    # an end token came; max_new_tokens were made; or the model's max_seq_len is reached
    stopped_by: _Stop


@torch.inference_mode()
def generate(
    model: nn.Module,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Int[Tensor, "B T"] | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    end_token_ids: Sequence[int] = (),
    seeds: Sequence[int] | None = None,
    use_cache: bool = True,
    prompt_inputs: Mapping[str, Any] | None = None,
) -> list[Continuation]:
    """Continue each row, exactly as if it were alone in the batch.

    A row that has ended leaves the batch, so it neither waits for the others nor costs anything.

    Args:
        model: a language model; it is run in evaluation mode and left in the mode it was in.
        attention_mask: 1 for the tokens of a prompt, 0 for padding, wherever it is.
        seeds: one per row, for temperature > 0; 0, 1, ... if not given.
        use_cache: false: run whole rows again for each token, instead of keeping keys and values.
        prompt_inputs: further arguments of the model's first call, such as images.

    Raises:
        ValueError: a prompt is empty, or leaves no room for a token.
    """
    input_ids, mask = _pad_left(input_ids, attention_mask)
    limits = _token_limits(mask.sum(1).tolist(), getattr(model, "max_seq_len", None), max_new_tokens)
    alive = list(range(len(limits)))
    seeds = alive if seeds is None else seeds
    tokens: list[list[int]] = [[] for _ in alive]
    stops: list[_Stop] = ["end" for _ in alive]
    was_training, model = model.training, model.eval()
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask, **(prompt_inputs or {})}
    for step in range(max_new_tokens):
        output = model(**inputs, use_cache=use_cache, logits_to_keep=1)
        new = choose_tokens(
            output.logits[:, -1].float(),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seeds=[seeds[row] for row in alive],
            step=step,
        )
        kept = []
        for place, (row, token) in enumerate(zip(alive, new.tolist(), strict=True)):
            if token not in end_token_ids:
                tokens[row].append(token)
                if len(tokens[row]) < limits[row]:
                    kept.append(place)
                else:
                    stops[row] = "max_new_tokens" if limits[row] == max_new_tokens else "max_seq_len"
        if not kept:
            break
        inputs = _next_inputs(inputs, new, output.past_key_values if use_cache else None, kept)
        alive = [alive[place] for place in kept]
    model.train(was_training)
    return [Continuation(row, stop) for row, stop in zip(tokens, stops, strict=True)]


def _pad_left(input_ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Move padding to the front of each row, so that every row ends with its prompt, and drop what no row needs."""
    mask = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.dtype)
    order = mask.argsort(dim=1, stable=True)
    longest = max(1, int(mask.sum(1).max()))
    return input_ids.gather(1, order)[:, -longest:], mask.gather(1, order)[:, -longest:]


def _token_limits(lengths: list[int], max_seq_len: int | None, max_new_tokens: int) -> list[int]:
    for length in lengths:
        if length == 0:
            raise ValueError("A prompt has no tokens. Give it at least one.")
        if max_seq_len is not None and length >= max_seq_len:
            raise ValueError(
                f"A prompt of {length} tokens leaves no room in model.max_seq_len ({max_seq_len}). Shorten it."
            )
    return [max_new_tokens if max_seq_len is None else min(max_new_tokens, max_seq_len - n) for n in lengths]


def _next_inputs(inputs: dict[str, Any], new: Tensor, cache: Any, kept: list[int]) -> dict[str, Any]:
    """The next call's arguments, for the rows that go on."""
    mask, input_ids = inputs["attention_mask"], inputs["input_ids"]
    if len(kept) < len(new):
        rows = torch.tensor(kept, device=new.device)
        new, mask, input_ids = new[rows], mask[rows], input_ids[rows]
        if cache is not None:
            cache.batch_select_indices(rows)
    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    column = new.unsqueeze(1).to(input_ids.dtype)
    if cache is None:
        return {**inputs, "input_ids": torch.cat([input_ids, column], dim=1), "attention_mask": mask}
    return {"input_ids": column, "attention_mask": mask, "past_key_values": cache}


def load_language_model(params: GenerateParams) -> tuple[nn.Module, Any]:
    """Load the model and the tokenizer of a run, on the device asked for.

    Raises:
        FileNotFoundError: there is no such run, or it has no tokenizer.
        ValueError: it is no language model, or it does not fit its checkpoint.
    """
    run_folder = _find_run_folder(params.checkpoint)
    model_params = load_params_from_yaml(ModelParams, join_uri(run_folder, MODEL_CONFIG_NAME))
    if not isinstance(model_params, TransformerParams | TransformerHFParams):
        raise ValueError(
            f"checkpoint {params.checkpoint} holds a model of type '{model_params.type}', not a language model."
        )
    files = join_uri(run_folder, MODEL_FILES_FOLDER)
    if isinstance(model_params, TransformerHFParams) and not is_remote(files) and exists(files):
        # the architecture that was saved with the run: the published model need not be there any more
        model_params = dataclasses.replace(model_params, hf_pretrained=files)
    tokenizer_name = params.tokenizer or join_uri(run_folder, TOKENIZER_FOLDER)
    if params.tokenizer is None and not exists(tokenizer_name):
        raise FileNotFoundError(f"{run_folder} holds no tokenizer. Name one with --tokenizer.")
    tokenizer = load_tokenizer(tokenizer_name)
    use_ema = has_ema(params.checkpoint) if params.use_ema is None else params.use_ema
    model = create_model(model_params, load_pretrained=False)
    load_model_checkpoint(model, params.checkpoint, use_ema=use_ema)
    return model.to(_choose_device(params.device)).eval(), tokenizer


def _find_run_folder(checkpoint: str) -> str:
    if not is_remote(checkpoint) and not exists(checkpoint):
        raise FileNotFoundError(
            f"checkpoint {checkpoint} does not exist. Give a run folder or one of its step folders."
        )
    folder = checkpoint.rstrip("/")
    for _ in range(_DEPTH):
        if exists(join_uri(folder, MODEL_CONFIG_NAME)):
            return folder
        folder = parent_uri(folder)
    raise FileNotFoundError(f"checkpoint {checkpoint} lies in no run folder: there is no {MODEL_CONFIG_NAME} above it.")


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device '{name}' is not there: this machine has no GPU that torch can use. Use --device cpu.")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"device '{name}' is unknown. Use auto, cpu, cuda or cuda:N.") from None


def generate_text(model: nn.Module, tokenizer: Any, params: GenerateParams) -> list[str]:
    """Continue the prompts; returns what follows each. A notice goes to standard error where a model's room ends."""
    prompts = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in params.prompt]
    longest = max(len(prompt) for prompt in prompts)
    device = next(model.parameters()).device
    input_ids = np.full((len(prompts), longest), pad_token_id_of(tokenizer), dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, : len(prompt)] = prompt
        attention_mask[row, : len(prompt)] = 1
    continuations = generate(
        model,
        torch.from_numpy(input_ids).to(device),
        torch.from_numpy(attention_mask).to(device),
        max_new_tokens=params.max_new_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        end_token_ids=[] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id],
        seeds=[_row_seed(params, row) for row in range(len(prompts))],
    )
    for number, continuation in enumerate(continuations, 1):
        if continuation.stopped_by == "max_seq_len":
            limit = getattr(model, "max_seq_len", None)
            sys.stderr.write(
                f"Prompt {number} stopped after {len(continuation.tokens)} tokens, at model.max_seq_len ({limit}).\n"
            )
    return [tokenizer.decode(continuation.tokens) for continuation in continuations]


def _row_seed(params: GenerateParams, row: int) -> int:
    """The same for a prompt whatever the others are; another one where the same prompt comes again."""
    prompt = params.prompt[row]
    text = f"{params.seed}\0{params.prompt[:row].count(prompt)}\0{prompt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _gather_prompts(argv: list[str]) -> list[str]:
    """Make one list of all --prompt flags; a prompt is taken as it is, whatever a config value would mean by it."""
    words: list[str] = []
    prompts: list[str] = []
    index = 0
    while index < len(argv):
        word = argv[index]
        if word == "--prompt" and index + 1 < len(argv):
            index += 1
            prompts.append(argv[index])
        elif word.startswith("--prompt="):
            prompts.append(word.removeprefix("--prompt="))
        else:
            words.append(word)
        index += 1
    return [*words, f"--prompt={json.dumps(prompts, ensure_ascii=False)}"] if prompts else words


def main(argv: list[str]) -> None:
    """Run `vla-foundry generate`: print each prompt with its continuation."""
    params = parse_command(GenerateParams, _gather_prompts(argv), prog="vla-foundry generate")
    model, tokenizer = load_language_model(params)
    for prompt, text in zip(params.prompt, generate_text(model, tokenizer, params), strict=True):
        sys.stdout.write(f"{prompt}{text}\n\n")
