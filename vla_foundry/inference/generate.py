"""`vla-foundry generate`: continue prompts with the language model of a run."""

import dataclasses
import hashlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from vla_foundry.io.uri import exists, is_remote, join_uri, parent_uri
from vla_foundry.params.command_line import parse_command
from vla_foundry.params.inference import GenerateParams
from vla_foundry.params.loading import load_params_from_yaml
from vla_foundry.params.models.base import LanguageModelParams, ModelParams
from vla_foundry.params.models.transformer import TransformerHFParams
from vla_foundry.run_folder import MODEL_CONFIG_NAME, MODEL_FILES_FOLDER, TOKENIZER_FOLDER

if TYPE_CHECKING:
    import torch
    from torch import nn

# a checkpoint lies at most this deep in its run (run/checkpoints/step_N/model.safetensors)
_DEPTH = 4


def load_language_model(params: GenerateParams) -> "tuple[nn.Module, Any]":
    """Load the model and the tokenizer of a run, on the device asked for.

    Raises:
        FileNotFoundError: there is no such run, or it has no tokenizer.
        ValueError: it is no language model, or it does not fit its checkpoint.
    """
    run_folder = _find_run_folder(params.checkpoint)
    model_params = load_params_from_yaml(ModelParams, join_uri(run_folder, MODEL_CONFIG_NAME))
    if not isinstance(model_params, LanguageModelParams):
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

    # torch comes last: what is wrong so far is said within a second
    from vla_foundry.models import create_model
    from vla_foundry.models.weights import has_ema, load_model_checkpoint
    from vla_foundry.text.tokenizers import load_tokenizer

    device = _choose_device(params.device)
    tokenizer = load_tokenizer(tokenizer_name)
    use_ema = has_ema(params.checkpoint) if params.use_ema is None else params.use_ema
    model = create_model(model_params, load_pretrained=False)
    load_model_checkpoint(model, params.checkpoint, use_ema=use_ema)
    return model.to(device).eval(), tokenizer


def _find_run_folder(checkpoint: str) -> str:
    if not is_remote(checkpoint) and not exists(checkpoint):
        raise FileNotFoundError(
            f"checkpoint {checkpoint} does not exist. Give a run folder or one of its step folders."
        )
    folder = checkpoint.rstrip("/") if is_remote(checkpoint) else os.path.abspath(checkpoint)
    for _ in range(_DEPTH):
        if exists(join_uri(folder, MODEL_CONFIG_NAME)):
            return folder
        folder = parent_uri(folder)
    raise FileNotFoundError(f"checkpoint {checkpoint} lies in no run folder: there is no {MODEL_CONFIG_NAME} above it.")


def _choose_device(name: str) -> "torch.device":
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device '{name}' is not there: torch sees {torch.cuda.device_count()} GPUs. Use --device cpu."
        )
    return device


def generate_text(model: "nn.Module", tokenizer: Any, params: GenerateParams) -> list[str]:
    """Continue the prompts; returns what follows each. A notice goes to standard error where a model's room ends."""
    import torch

    from vla_foundry.inference.decoding import generate
    from vla_foundry.text.tokenizers import pad_token_id_of

    prompts = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in params.prompt]
    longest = max(len(prompt) for prompt in prompts)
    device = next(model.parameters()).device
    padding = pad_token_id_of(tokenizer)
    input_ids = [prompt + [padding] * (longest - len(prompt)) for prompt in prompts]
    attention_mask = [[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts]
    continuations = generate(
        model,
        torch.tensor(input_ids, device=device),
        torch.tensor(attention_mask, device=device),
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
