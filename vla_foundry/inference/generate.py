"""`vla-foundry generate`: continue prompts with a run's language model."""

import hashlib
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vla_foundry.config.command_line import parse_command
from vla_foundry.data.kept import check_kept_inputs
from vla_foundry.inference.loading import choose_device, find_end_tokens, find_run_folder, load_run_model
from vla_foundry.params.commands.runs import GenerateParams
from vla_foundry.params.experiment import load_params_from_yaml
from vla_foundry.params.models.roles import LanguageModelParams, ModelParams
from vla_foundry.run_folder import MODEL_CONFIG_NAME, TOKENIZER_FOLDER
from vla_foundry.storage.uri import exists, join_uri

if TYPE_CHECKING:
    from torch import nn


def load_language_model(params: GenerateParams) -> "tuple[nn.Module, Any, list[int]]":
    """Load a run's model on the requested device, its tokenizer, and the tokens that end a text.

    Raises:
        FileNotFoundError: the run does not exist or has no tokenizer.
        ValueError: it is not a language model, or does not match its checkpoint.
    """
    run_folder = find_run_folder(params.checkpoint)
    model_params = load_params_from_yaml(ModelParams, join_uri(run_folder, MODEL_CONFIG_NAME))
    if not isinstance(model_params, LanguageModelParams):
        raise ValueError(
            f"checkpoint {params.checkpoint} holds a model of type '{model_params.type}', not a language model."
        )
    tokenizer_name = params.tokenizer
    if tokenizer_name is None:
        tokenizer_name = join_uri(run_folder, TOKENIZER_FOLDER)
        if not exists(tokenizer_name):
            raise FileNotFoundError(f"{run_folder} has no tokenizer. Name one with --tokenizer.")
        check_kept_inputs(run_folder, params.checkpoint)

    # import torch last, so that the errors above appear within a second
    from vla_foundry.text.tokenizers import load_tokenizer, read_end_token_ids

    device = choose_device(params.device)
    tokenizer = load_tokenizer(tokenizer_name)
    model = load_run_model(model_params, run_folder, params.checkpoint, params.use_ema, device)
    # the run's documents may end with another token than the tokenizer's own, whichever tokenizer is named
    recorded = read_end_token_ids(join_uri(run_folder, TOKENIZER_FOLDER))
    return model, tokenizer, [*find_end_tokens(model, tokenizer), *recorded]


def generate_text(
    model: "nn.Module", tokenizer: Any, params: GenerateParams, *, end_token_ids: Sequence[int]
) -> list[str]:
    """Return the continuation of each prompt; note on standard error which ones reached the model's max_seq_len."""
    import torch

    from vla_foundry.inference.decoding import generate
    from vla_foundry.text.tokenizers import decode_continuation, pad_token_id_of

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
        end_token_ids=end_token_ids,
        seeds=[_row_seed(params, row) for row in range(len(prompts))],
    )
    for number, continuation in enumerate(continuations, 1):
        if continuation.stopped_by == "max_seq_len":
            limit = getattr(model, "max_seq_len", None)
            sys.stderr.write(
                f"Prompt {number} stopped after {len(continuation.tokens)} tokens, at model.max_seq_len ({limit}).\n"
            )
    return [
        decode_continuation(tokenizer, prompt, continuation.tokens)
        for prompt, continuation in zip(prompts, continuations, strict=True)
    ]


def _row_seed(params: GenerateParams, row: int) -> int:
    """Return a seed that depends only on params.seed, the prompt and how often it occurred before."""
    prompt = params.prompt[row]
    text = f"{params.seed}\0{params.prompt[:row].count(prompt)}\0{prompt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _gather_prompts(argv: list[str]) -> list[str]:
    """Merge all --prompt flags into one list; prompts are taken literally, not parsed as config values."""
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
    model, tokenizer, end_token_ids = load_language_model(params)
    if not callable(getattr(model, "decode", None)):
        raise ValueError(
            f"The model of {params.checkpoint} ({type(model).__name__}) has no `decode`, so it cannot generate."
        )
    texts = generate_text(model, tokenizer, params, end_token_ids=end_token_ids)
    for prompt, text in zip(params.prompt, texts, strict=True):
        sys.stdout.write(f"{prompt}{text}\n\n")
