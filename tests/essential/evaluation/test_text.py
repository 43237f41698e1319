"""A model scores and continues text as if each were alone; tasks of the harness get the accuracy that is known."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.essential.inference.test_generate import PARAMS, VOCAB_SIZE, create, create_tokenizer, write_run
from vla_foundry.cli import main as run_cli
from vla_foundry.evaluation.text import Scorer, read_metrics
from vla_foundry.models import create_model
from vla_foundry.params.models.transformer import TransformerParams
from vla_foundry.run_folder import MODEL_WEIGHTS_NAME

PAIRS = [("ab cd", " ef"), ("", "xyz"), ("q ", "a longer one"), ("ab cd", " ef gh"), ("z" * 60, "ab")]


@torch.no_grad()
def score_alone(model: Any, before: list[int], after: list[int]) -> tuple[float, bool]:
    """The definition: one forward over the row, without padding."""
    row = torch.tensor([[*before, *after]])[:, -41:]
    found = model(row[:, :-1]).logits[0, -len(after) :].log_softmax(-1)
    targets = torch.tensor(after)
    return float(found[range(len(after)), targets].sum()), bool((found.argmax(-1) == targets).all())


@pytest.mark.parametrize("name", ["native", "llama"])
def test_pairs_are_scored_as_if_they_were_alone(name: str) -> None:
    model, tokenizer = create(name), create_tokenizer()
    scorer = Scorer(model, tokenizer, [1], batch_size=3)

    def encode(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    expected = []
    for context, continuation in PAIRS:
        # the space before a word belongs to it
        bare = context.rstrip()
        rest = context[len(bare) :] + continuation
        expected.append(score_alone(model, encode(bare) or [1], encode(rest)))
    for (score, is_likeliest), (wanted, wanted_likeliest) in zip(scorer.score_pairs(PAIRS), expected, strict=True):
        assert score == pytest.approx(wanted, abs=1e-4)
        assert is_likeliest == wanted_likeliest


def test_long_texts_are_scored_in_windows_that_see_a_whole_row() -> None:
    model, tokenizer = create("native"), create_tokenizer()
    text = "the quick brown fox jumps over the lazy dog, again and again and again; 100 letters in all, no more"
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) > 80
    expected = score_alone(model, [1], tokens[:40])[0] + score_alone(model, tokens[39:40], tokens[40:80])[0]
    expected += score_alone(model, tokens[len(tokens) - 41 : 80], tokens[80:])[0]
    assert Scorer(model, tokenizer, [1], batch_size=2).score_texts([text, ""]) == [pytest.approx(expected, abs=1e-3), 0]


def create_letters() -> Any:
    """A model in which each letter is followed by the next: a table of pairs."""
    params = TransformerParams(hidden_dim=128, n_layers=1, n_heads=4, vocab_size=VOCAB_SIZE, max_seq_len=40)
    model: Any = create_model(params)
    tokenizer = create_tokenizer()
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.zero_()
        model.embeddings.weight.copy_(torch.eye(VOCAB_SIZE, 128))
        model.output.weight.zero_()
        for first, second in zip("abcdefg ", "bcdefg. ", strict=True):
            before, after = (tokenizer(letter)["input_ids"][0] for letter in (first, second))
            model.output.weight[after, before] = 1.0
    return params, model


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and task files beside it: a choice, a continuation and whole texts."""
    folder = tmp_path_factory.mktemp("letters")
    params, model = create_letters()
    write_run(folder / "run", params, {MODEL_WEIGHTS_NAME: model})
    # the model is right in three of four, and only 'd' is wrong: it says 'e'
    rows = [{"question": before, "choices": [*"bcde"], "label": "bcde".index(after)} for before, after in
            (("a", "b"), ("xb", "c"), ("c", "d"), ("d", "b"))]  # fmt: skip
    text = "\n".join(json.dumps({**row, "answer": row["question"][-1] + "?"}) for row in rows)
    (folder / "rows.jsonl").write_text(text + "\n", encoding="utf-8")
    shared = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/rows.jsonl"}}, cache_dir: "{folder}/cache"}}
test_split: test
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
"""
    choice = "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: label\n"
    choice += "metric_list: [{metric: acc, aggregation: mean}, {metric: acc_norm, aggregation: mean}]\n"
    gone = shared.replace("rows.jsonl", "gone.jsonl").replace("/cache", "/gone")
    (folder / "gone.yaml").write_text(f"task: letters_gone\n{gone}{choice}", encoding="utf-8")
    (folder / "choice.yaml").write_text(f"task: letters_choice\n{shared}{choice}", encoding="utf-8")
    spoken = 'output_type: generate_until\ndoc_to_target: "efg"\ngeneration_kwargs: {until: ["."], max_gen_toks: 8}\n'
    spoken += "metric_list: [{metric: exact_match, aggregation: mean}]\n"
    (folder / "spoken.yaml").write_text(f"task: letters_spoken\n{shared}{spoken}", encoding="utf-8")
    whole = 'output_type: loglikelihood_rolling\ndoc_to_target: "abc"\nmetric_list: [{metric: byte_perplexity}]\n'
    (folder / "whole.yaml").write_text(
        f"task: letters_whole\n{shared.replace('question', '')}".replace('"{{}}"', '""') + whole, encoding="utf-8"
    )
    return folder


def evaluate(letters: Path, *words: str) -> dict[str, Any]:
    run_cli(["evaluate", "text", "--checkpoint", str(letters / "run"), "--include_path", str(letters), *words])
    return json.loads((letters / "run" / "evaluation" / "text.json").read_text(encoding="utf-8"))


def test_tasks_have_the_accuracy_that_is_known(letters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(letters / "copy.json")
    table = evaluate(letters, "--tasks", "letters_choice,letters_spoken,letters_whole", "--output", output)
    metrics = table["metrics"]
    assert (metrics["letters_choice/acc"]["value"], metrics["letters_choice/acc"]["n"]) == (0.75, 4)
    low, high = metrics["letters_choice/acc"]["interval"]
    assert 0.3 < low < 0.31
    assert 0.95 < high < 0.96
    # "d" alone goes on with "efg."
    assert metrics["letters_spoken/exact_match"]["value"] == 0.25
    model, tokenizer = create_letters()[1], create_tokenizer()
    score = score_alone(model, [tokenizer.eos_token_id], tokenizer("abc")["input_ids"])[0]
    assert metrics["letters_whole/byte_perplexity"]["value"] == pytest.approx(math.exp(-score / 3), rel=1e-5)
    assert table["settings"]["tasks"] == ["letters_choice", "letters_spoken", "letters_whole"]
    assert json.loads(Path(output).read_text(encoding="utf-8")) == table
    assert "letters_choice/acc " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "letters_choice", "--include_path", "nowhere"], "include_path nowhere is not a folder"),
        (
            ["--tasks", "letters_choice", "--num_fewshot", "9"],
            "tasks letters_choice cannot be evaluated: Sample larger",
        ),
        # the paper's tasks are known
        (["--tasks", "paper,letters_choise"], "tasks 'letters_choise' is unknown. Did you mean 'letters_choice'?"),
        (["--tasks", "letters_choice", "--name", "../x"], "name must be the name of a folder or file, without '/'"),
        (["--tasks", "letters_choice", "--output", "."], "output . is a folder. Name another file."),
        (["--tasks", "letters_gone"], "the data of tasks letters_gone cannot be loaded"),
    ],
)
def test_what_a_task_lacks_is_one_line(
    words: list[str], message: str, letters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluate(letters, *words)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_group_counts_the_questions_of_its_parts() -> None:
    found = {
        "results": {
            "mmlu": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "mmlu"},
            "mmlu_stem": {"acc,none": 0.25},
            "physics": {"acc,none": 0.25, "alias": " - physics"},
            "history": {"acc,none": 0.75},
            "wiki": {"word_perplexity,none": 12.0, "word_perplexity_stderr,none": "N/A"},
            "gsm": {"exact_match,strict": 1.0, "f1,strict": 0.5, "f1_stderr,strict": 0.1},
        },
        "group_subtasks": {"mmlu": ["mmlu_stem", "history"], "mmlu_stem": ["physics"], "wiki": []},
        "n-samples": {name: {"effective": n} for name, n in (("physics", 4), ("history", 4), ("wiki", 2), ("gsm", 9))},
    }
    metrics = read_metrics(found)
    assert {name: metric["n"] for name, metric in metrics.items()} == {
        "mmlu/acc": 8,
        "wiki/word_perplexity": 2,
        "gsm/exact_match/strict": 9,
        "gsm/f1/strict": 9,
    }
    assert metrics["gsm/f1/strict"]["interval"] == pytest.approx([0.304, 0.696])
    assert "interval" not in metrics["wiki/word_perplexity"]


def test_prompts_with_other_options_are_continued_apart_and_in_order() -> None:
    _, model = create_letters()
    scorer = Scorer(model.eval(), create_tokenizer(), [1], batch_size=2)
    prompts: list[Any] = [("a", {"until": ["d"]}), ("b", {"until": [], "max_gen_toks": 2}), ("xa", {"until": ["d"]})]
    assert scorer.continue_prompts(prompts) == ["bc", "cd", "bc"]
    assert PARAMS.max_seq_len == 40
