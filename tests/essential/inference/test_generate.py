"""Every row is continued as if it were alone, and the command runs from nothing but a run folder."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from vla_foundry.inference.decoding import Continuation, generate
from vla_foundry.inference.generate import main
from vla_foundry.inference.loading import find_end_tokens
from vla_foundry.models import create_model
from vla_foundry.models.transformer_hf import TransformerHF
from vla_foundry.models.weights import find_tied_names
from vla_foundry.params import dump_params
from vla_foundry.params.models.roles import ModelParams
from vla_foundry.params.models.transformer import TransformerHFParams, TransformerParams
from vla_foundry.run_folder import COMPLETE_NAME, EMA_WEIGHTS_NAME, MODEL_WEIGHTS_NAME

VOCAB_SIZE = 97
PARAMS = TransformerParams(hidden_dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB_SIZE, max_seq_len=40)
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 40,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17], [18]]


def create(name: str) -> Any:
    torch.manual_seed(0)
    if name == "native":
        model: Any = create_model(PARAMS)
    elif name == "llama":
        model = TransformerHF(LlamaForCausalLM(LlamaConfig(**SIZES)))
    else:
        model = TransformerHF(Qwen3ForCausalLM(Qwen3Config(**SIZES)))
    # sharp distributions, so that rounding does not decide
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(1.5 if name == "native" else 8.0)
    return model.eval()


def pad(prompts: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), 3)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if side == "right" else slice(longest - len(prompt), longest)
        ids[row, place] = torch.tensor(prompt)
        mask[row, place] = 1
    return ids, mask


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["native", "llama", "qwen3"])
def test_each_row_is_continued_as_if_it_were_alone(name: str, side: str, temperature: float) -> None:
    model = create(name)
    ids, mask = pad(PROMPTS, side)
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": temperature}
    alone = [
        generate(model, torch.tensor([prompt]), seeds=[100 + row], use_cache=False, **options)[0]
        for row, prompt in enumerate(PROMPTS)
    ]
    # rows end at different steps: each has its own last token among those that end a text
    ends = [alone[row].tokens[3 * row + 1] for row in range(4)]
    expected = []
    for continuation in alone:
        stop = next(i for i, token in enumerate(continuation.tokens) if token in ends)
        expected.append(Continuation(continuation.tokens[:stop], "end"))
    together = generate(model, ids, mask, seeds=[100, 101, 102, 103], end_token_ids=ends, **options)
    assert together == expected


def test_generation_follows_the_likeliest_tokens_of_whole_rows() -> None:
    model, tokens = create("native"), list(PROMPTS[0])
    made = generate(model, torch.tensor([tokens]), max_new_tokens=5)[0].tokens
    for token in made:
        assert model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax() == token
        tokens.append(token)


def test_several_tokens_end_a_row_together() -> None:
    model, prompt = create("native"), torch.tensor([PROMPTS[0]])
    tokens = generate(model, prompt, max_new_tokens=8, temperature=1.0)[0].tokens
    made = generate(model, prompt, max_new_tokens=8, temperature=1.0, end_token_ids=[(96, 96), tuple(tokens[3:6])])
    assert made == [Continuation(tokens[:3], "end")]


def test_rows_stop_at_the_longest_sequence_each_at_its_own_time() -> None:
    model = create("native")
    ids, mask = pad([[5] * 36, [6] * 38], "left")
    made = generate(model, ids, mask, max_new_tokens=3)
    assert [len(row.tokens) for row in made] == [3, 2]
    assert [row.stopped_by for row in made] == ["max_new_tokens", "max_seq_len"]
    with pytest.raises(ValueError, match=r"40 tokens leaves no room in model\.max_seq_len \(40\)"):
        generate(model, torch.full((1, 40), 5), max_new_tokens=1)
    with pytest.raises(ValueError, match="no tokens"):
        generate(model, ids, torch.zeros_like(mask), max_new_tokens=1)


def test_generation_leaves_the_mode_and_no_graph() -> None:
    model = create("native").train()
    generate(model, torch.tensor([[5, 6]]), max_new_tokens=2)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def create_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {chr(33 + i): i for i in range(VOCAB_SIZE - 3)} | {"<end>": 94, "Ġ": 95, "Ċ": 96}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def write_run(run: Path, params: ModelParams, models_by_file: dict[str, Any]) -> Path:
    """A run folder as training writes it."""
    step = run / "checkpoints" / "step_00000007"
    step.mkdir(parents=True)
    (run / "config_model.yaml").write_text(dump_params(params), encoding="utf-8")
    create_tokenizer().save_pretrained(str(run / "tokenizer"))
    entries = {}
    for name, model in models_by_file.items():
        tied = find_tied_names(model)
        save_file({key: value for key, value in model.state_dict().items() if key not in tied}, step / name)
        content = (step / name).read_bytes()
        entries[name] = [len(content), hashlib.sha256(content).hexdigest()]
    (step / COMPLETE_NAME).write_text(json.dumps(entries), encoding="utf-8")
    return run


def expected_text(model: Any, prompt: str, num_tokens: int) -> str:
    tokenizer = create_tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    made = generate(model, ids, max_new_tokens=num_tokens, end_token_ids=[94])[0]
    return prompt + tokenizer.decode(made.tokens)


@pytest.mark.parametrize("name", ["native", "llama"])
def test_the_command_needs_only_the_run_folder(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = create(name)
    params: ModelParams = PARAMS
    if name == "llama":
        # the published model is gone: its architecture was kept with the run
        params = TransformerHFParams(hf_pretrained=str(tmp_path / "gone"))
        model.save_files(tmp_path / "run" / "model_files")
    run = write_run(tmp_path / "run", params, {MODEL_WEIGHTS_NAME: model})
    prompts = ["Once upon", "- [x]: yes", "Once upon"]
    flags = [word for prompt in prompts for word in ("--prompt", prompt)]
    for checkpoint in (run, run / "checkpoints" / "step_00000007"):
        main(["--checkpoint", str(checkpoint), *flags, "--max_new_tokens", "6", "--temperature", "0"])
        expected = "".join(f"{expected_text(model, prompt, 6)}\n\n" for prompt in prompts)
        assert capsys.readouterr().out == expected


def test_a_prompt_draws_the_same_beside_other_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, PARAMS, {MODEL_WEIGHTS_NAME: create("native")})
    words = ["--checkpoint", str(run), "--max_new_tokens", "8", "--temperature", "1.5", "--top_p", "1"]

    def run_command(*prompts: str, seed: int = 0) -> list[str]:
        main([*words, "--seed", str(seed), *(f"--prompt={prompt}" for prompt in prompts)])
        return capsys.readouterr().out.removesuffix("\n\n").split("\n\n")

    alone = run_command("ab")
    together = run_command("xyz", "ab", "ab")
    assert together[1] == alone[0]
    assert together[2] != alone[0]
    assert run_command("ab") == alone
    assert run_command("ab", seed=1) != alone


def test_averaged_weights_are_used_where_there_are_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(5)
    plain, average = create("native"), create_model(dataclasses.replace(PARAMS)).eval()
    run = write_run(tmp_path, PARAMS, {MODEL_WEIGHTS_NAME: plain, EMA_WEIGHTS_NAME: average})
    words = ["--checkpoint", str(run), "--prompt", "abc", "--max_new_tokens", "5", "--temperature", "0"]
    texts = {False: expected_text(plain, "abc", 5), True: expected_text(average, "abc", 5)}
    assert texts[True] != texts[False]
    for flags, is_average in ([], True), (["--use_ema", "false"], False), (["--use_ema"], True):
        main([*words, *flags])
        assert capsys.readouterr().out == f"{texts[is_average]}\n\n"


def test_generation_stops_at_the_tokens_that_end_the_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = create("native")
    run = write_run(tmp_path, PARAMS, {MODEL_WEIGHTS_NAME: model})
    tokens = generate(model, torch.tensor([create_tokenizer()("abc")["input_ids"]]), max_new_tokens=6)[0].tokens
    first = tokens.index(tokens[3])
    ends = {"eos_token_id": [tokens[3], 94]}
    (run / "tokenizer" / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    words = ["--checkpoint", str(run), "--prompt", "abc", "--max_new_tokens", "6", "--temperature", "0"]
    create_tokenizer().save_pretrained(str(tmp_path / "same"))
    for flags in ([], ["--tokenizer", str(tmp_path / "same")]):
        main([*words, *flags])
        assert capsys.readouterr().out == f"abc{create_tokenizer().decode(tokens[:first])}\n\n"


def test_a_published_models_end_tokens_count_if_they_are_special_tokens_here(tmp_path: Path) -> None:
    model = create("llama")
    model.model.generation_config.eos_token_id = [1, 95]
    model.save_files(tmp_path)
    loaded = create_model(TransformerHFParams(hf_pretrained=str(tmp_path)), load_pretrained=False)
    tokenizer = create_tokenizer()
    assert find_end_tokens(loaded, tokenizer) == [94]
    tokenizer.add_special_tokens({"additional_special_tokens": ["Ġ"]})
    assert find_end_tokens(loaded, tokenizer) == [94, 95]
    assert find_end_tokens(create("native"), tokenizer) == [94]


def test_a_notice_says_where_the_room_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, PARAMS, {MODEL_WEIGHTS_NAME: create("native")})
    main(["--checkpoint", str(run), "--prompt", "a" * 37, "--max_new_tokens", "50", "--temperature", "0"])
    assert capsys.readouterr().err == "Prompt 1 stopped after 3 tokens, at model.max_seq_len (40).\n"


def test_errors_are_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", PARAMS, {MODEL_WEIGHTS_NAME: create("native")})
    words = ["--prompt", "abc", "--checkpoint"]
    with pytest.raises(ValueError, match="prompt is empty"):
        main(["--checkpoint", str(run)])
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        main([*words, str(tmp_path / "nothing")])
    with pytest.raises(FileNotFoundError, match=r"no config_model\.yaml above it"):
        main([*words, str(tmp_path)])
    with pytest.raises(ValueError, match=r"ema\.enabled"):
        main([*words, str(run), "--use_ema", "true"])
    with pytest.raises(ValueError, match="device 'abc' is unknown"):
        main([*words, str(run), "--device", "abc"])
    with pytest.raises(ValueError, match=r"top_p \(1\.5\) must be above 0"):
        main([*words, str(run), "--top_p", "1.5"])
    with pytest.raises(ValueError, match=r"device 'cuda:99' does not exist"):
        main([*words, str(run), "--device", "cuda:99"])
    (run / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        main([*words, str(run)])


def test_what_is_wrong_with_the_command_is_said_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom vla_foundry.inference.generate import main\n"
        "try:\n    main(['--checkpoint', sys.argv[1], '--prompt', 'a'])\n"
        "except FileNotFoundError:\n    sys.exit('torch' in sys.modules)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "nothing")]
    assert subprocess.run(words, check=False).returncode == 0
