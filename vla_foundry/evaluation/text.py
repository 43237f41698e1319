"""`vla-foundry evaluate text`: run a language model on tasks of EleutherAI's lm-evaluation-harness (lm-eval)."""

import difflib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_foundry.config.command_line import parse_command
from vla_foundry.evaluation.results import check_output, publish_table, wilson_interval
from vla_foundry.inference.generate import load_language_model
from vla_foundry.params.commands.evaluation import TextBenchmarkParams
from vla_foundry.params.commands.runs import GenerateParams
from vla_foundry.registry import unknown_name_message
from vla_foundry.storage.hub import loading_published

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from torch import nn

# the eight tasks of the paper
PAPER_TASKS = ("hellaswag", "mmlu", "arc_easy", "arc_challenge", "piqa", "winogrande", "openbookqa", "boolq")
# shares of questions, with Wilson intervals
_RATES = ("acc", "acc_norm", "exact_match")
# longest rows of a model that states none
_MAX_TOKENS = 2048
_MAX_NEW_TOKENS = 256


class Scorer:
    """Computes what the harness asks of a model.

    Args:
        model: a language model with `decode`.
        end_token_ids: tokens that end a text; the first stands before a text without context.
        batch_size: rows at a time.
    """

    def __init__(self, model: "nn.Module", tokenizer: Any, end_token_ids: Sequence[int], *, batch_size: int) -> None:
        if not end_token_ids:
            raise ValueError("The tokenizer has no token that ends a text, which stands before a text without context.")
        self._model: Any = model
        self._tokenizer = tokenizer
        self._ends = list(end_token_ids)
        # a model that cannot ignore padding gets one row at a time
        self._batch_size = batch_size if getattr(model, "keeps_padding", True) else 1
        self._max_tokens: int = getattr(model, "max_seq_len", None) or _MAX_TOKENS

    def score_pairs(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) the continuation's log probability, and whether it is the likeliest.

        A context that is too long loses its beginning.
        """
        return self._score([self._encode_pair(*pair) for pair in pairs])

    def score_texts(self, texts: Iterable[str]) -> list[float]:
        """Return the log probability of each whole text, in windows of the model's length without overlap."""
        windows, size = [], self._max_tokens
        encoded = [self._encode(text) for text in texts]
        for number, tokens in enumerate(encoded):
            for first in range(0, len(tokens), size):
                part = tokens[first : first + size]
                before = tokens[max(0, first + len(part) - size - 1) : first] or self._ends[:1]
                windows.append((number, (before, part)))
        totals = [0.0] * len(encoded)
        for (number, _), (score, _) in zip(windows, self._score([pair for _, pair in windows]), strict=True):
            totals[number] += score
        return totals

    def continue_prompts(self, prompts: Iterable[tuple[str, dict[str, Any]]]) -> list[str]:
        """Return what follows each prompt, up to a stop text; options are those of the harness's tasks."""
        groups: dict[str, list[tuple[int, str, dict[str, Any]]]] = {}
        count = 0
        for count, (prompt, options) in enumerate(prompts, start=1):
            groups.setdefault(json.dumps(options, sort_keys=True), []).append((count - 1, prompt, options))
        texts = [""] * count
        for group in groups.values():
            for first in range(0, len(group), self._batch_size):
                part = group[first : first + self._batch_size]
                found = self._generate([place[:2] for place in part], part[0][2])
                for (number, *_), text in zip(part, found, strict=True):
                    texts[number] = text
        return texts

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        # spaces belong to the word after them
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        before = self._encode(bare)
        if not before:
            return self._ends[:1], self._encode(continuation)
        return before, self._encode(bare + continuation)[len(before) :]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        import torch

        rows = [([*before, *after][-self._max_tokens - 1 :], len(after)) for before, after in pairs]
        too_long = next((size for _, size in rows if size > self._max_tokens), None)
        if too_long is not None:
            raise ValueError(f"A continuation has {too_long} tokens, more than model.max_seq_len ({self._max_tokens}).")
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number][0]))
        scores = [(0.0, True)] * len(rows)
        device = next(self._model.parameters()).device
        for first in range(0, len(order), self._batch_size):
            part = order[first : first + self._batch_size]
            width = len(rows[part[0]][0]) - 1
            most = max(rows[number][1] for number in part)
            ids = torch.zeros(len(part), width, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for place, number in enumerate(part):
                row = rows[number][0][:-1]
                ids[place, width - len(row) :] = torch.tensor(row, dtype=torch.int64)
                mask[place, width - len(row) :] = 1
            with torch.inference_mode():
                output = self._model.decode(
                    ids.to(device), mask.to(device), use_cache=False, logits_to_keep=max(1, most)
                ).logits
            for place, number in enumerate(part):
                row, size = rows[number]
                if size:
                    targets = torch.tensor(row[-size:], device=device)
                    found = output[place, -size:].float().log_softmax(-1)
                    total = float(found.gather(1, targets[:, None]).sum())
                    scores[number] = (total, bool((found.argmax(-1) == targets).all()))
        return scores

    def _generate(self, group: Sequence[tuple[int, str]], options: dict[str, Any]) -> list[str]:
        import torch

        from vla_foundry.inference.decoding import generate
        from vla_foundry.text.tokenizers import decode_continuation

        most = min(int(options.get("max_gen_toks") or _MAX_NEW_TOKENS), self._max_tokens - 1)
        prompts = [(self._encode(text) or self._ends[:1])[-(self._max_tokens - most) :] for _, text in group]
        width = max(map(len, prompts))
        padded = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        device = next(self._model.parameters()).device
        draws = bool(options.get("do_sample"))
        found = generate(
            self._model,
            torch.tensor(padded, device=device),
            torch.tensor(mask, device=device),
            max_new_tokens=most,
            temperature=float(options.get("temperature", 1.0)) if draws else 0.0,
            top_k=int(options.get("top_k") or 0) if draws else 0,
            top_p=float(options.get("top_p") or 1.0) if draws else 1.0,
            end_token_ids=self._ends,
            seeds=[number for number, _ in group],
        )
        stops = options.get("until") or []
        texts = []
        for prompt, continuation in zip(prompts, found, strict=True):
            text = decode_continuation(self._tokenizer, prompt, continuation.tokens)
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.partition(stop)[0] if stop else text
            texts.append(text)
        return texts


def create_adapter(scorer: Scorer) -> "LM":
    """Return the scorer as a model of the harness."""
    from lm_eval.api.model import LM

    class Adapter(LM):
        """Passes the harness's requests on."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return scorer.score_pairs(request.args for request in requests)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return scorer.score_texts(request.args[0] for request in requests)

        def generate_until(self, requests: list[Any]) -> list[str]:
            return scorer.continue_prompts(request.args for request in requests)

    return Adapter()


def evaluate_text(params: TextBenchmarkParams) -> dict[str, Any]:
    """Run the tasks; the result is printed and goes to the run and to the output.

    Returns:
        {"name", "metrics", "settings"}; see docs/benchmarks.md. A metric is called <task>/<metric>.

    Raises:
        FileNotFoundError: the run does not exist or lacks a file.
        ValueError: it is no language model, or a task is unknown or its data cannot be had.
    """
    try:
        from lm_eval import __version__ as version
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError("evaluate text needs lm-eval: uv pip install 'vla-foundry[benchmarks]'") from None

    class Tasks(TaskManager):
        """Reports in one line what a task lacks."""

        def load(self, task_list: Any) -> Any:
            with loading_published(f"the data of tasks {', '.join(names)}"):
                return super().load(task_list)

    check_output("output", params.output)
    names: list[Any] = [name for given in params.tasks for name in (PAPER_TASKS if given == "paper" else (given,))]
    if params.include_path is not None and not Path(params.include_path).is_dir():
        raise FileNotFoundError(f"include_path {params.include_path} is not a folder. Give the one of your task files.")
    # lm-eval's own tasks are thousands of files, and a task of the user's own needs none of them
    manager = Tasks(include_path=params.include_path, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):
        manager = Tasks(include_path=params.include_path)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.3)
            raise ValueError(unknown_name_message("tasks", name, near, listed_as="Near it"))
    shared = {name: getattr(params, name) for name in ("checkpoint", "tokenizer", "device", "use_ema", "seed")}
    model, tokenizer, ends = load_language_model(GenerateParams(prompt=["-"], **shared))
    scorer = Scorer(model, tokenizer, ends, batch_size=params.batch_size)
    # the harness runs the templates of task files, which may raise anything
    with loading_published(f"tasks {', '.join(names)}", "cannot be evaluated"):
        found: Any = simple_evaluate(
            create_adapter(scorer),
            tasks=names,
            num_fewshot=params.num_fewshot,
            limit=params.limit,
            task_manager=manager,
            log_samples=False,
        )
    settings = {name: getattr(params, name) for name in ("tasks", "num_fewshot", "limit", "use_ema")}
    table = {"name": params.name, "metrics": read_metrics(found), "settings": {**settings, "lm_eval": version}}
    publish_table(table, checkpoint=params.checkpoint, output=params.output)
    return table


def read_metrics(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the metrics of the harness's results, of tasks and of groups without their parts."""
    members: dict[str, list[str]] = found.get("group_subtasks", {})
    parts = {part for group, names in members.items() for part in names if part != group}

    def count(name: str) -> int:
        counts = found["n-samples"].get(name)
        return counts["effective"] if counts else sum(count(part) for part in members[name])

    metrics: dict[str, dict[str, Any]] = {}
    for task, values in found["results"].items():
        if task in parts:
            continue
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            entry: dict[str, Any] = {"value": float(value), "n": count(task)}
            spread = values.get(f"{metric}_stderr,{kind}")
            if metric in _RATES:
                entry["interval"] = list(wilson_interval(round(value * entry["n"]), entry["n"]))
            elif isinstance(spread, int | float) and math.isfinite(spread):
                entry["interval"] = [value - 1.96 * spread, value + 1.96 * spread]
            metrics[f"{task}/{metric}" + ("" if kind == "none" else f"/{kind}")] = entry
    return metrics


def main(argv: list[str]) -> None:
    """Run `vla-foundry evaluate text`: print each metric."""
    evaluate_text(parse_command(TextBenchmarkParams, argv, prog="vla-foundry evaluate text"))
