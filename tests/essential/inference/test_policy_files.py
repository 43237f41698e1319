"""Policies that write their actions as tokens, from the command that makes their tokenizer to the robot."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_foundry.config.command_line import parse
from vla_foundry.config.resolve import resolve
from vla_foundry.data import action_tokenizer
from vla_foundry.data.facts import read_facts
from vla_foundry.inference import Policy
from vla_foundry.params import TrainExperimentParams
from vla_foundry.robotics.action_tokens import read_fast_tokenizer
from vla_foundry.training.experiment import train
from vla_foundry.world import World

TOKENIZER = ["--vocab_size", "600", "--scale", "5"]


def resolve_words(arm: Any, *words: str) -> TrainExperimentParams:
    params = parse(TrainExperimentParams, ["--config_path", f"{arm.run}/config.yaml", *words], prog="train").params
    return resolve(params, read_facts(params, 1))


@pytest.fixture(scope="module")
def tokenizer(arm: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of a tokenizer of the arm's actions."""
    path = str(tmp_path_factory.mktemp("tokenizer") / "fast.json")
    action_tokenizer.main(["--config_path", f"{arm.run}/config.yaml", "--output", path, *TOKENIZER])
    return path


def test_the_command_reads_chunks_as_training_gets_them(arm: Any, tokenizer: str, capsys) -> None:
    params = parse(
        action_tokenizer.ActionTokenizerParams, ["--config_path", f"{arm.run}/config.yaml", *TOKENIZER], prog="data"
    ).params
    chunks, main = action_tokenizer.read_chunks(params)
    assert list(main.action_fields) == list(read_fast_tokenizer(tokenizer).fields)
    assert chunks.shape[1:] == (6, 10)
    # normalised by their own statistics
    assert np.abs(chunks.mean(axis=(0, 1))).max() < 1.0
    assert 0.3 < chunks.std(axis=(0, 1)).mean() < 2.0
    line = action_tokenizer.describe_tokenizer(read_fast_tokenizer(tokenizer), chunks)
    assert "a chunk of 6 x 10 = 60 values takes" in line
    with pytest.raises(IsADirectoryError, match=r"^output .* is a folder\. Name a file\.$"):
        action_tokenizer.main(["--config_path", f"{arm.run}/config.yaml", "--output", str(Path(tokenizer).parent)])


def test_the_command_writes_to_object_storage(arm: Any, s3_bucket: str) -> None:
    path = f"{s3_bucket}/fast.json"
    action_tokenizer.main(["--config_path", f"{arm.run}/config.yaml", "--output", path, *TOKENIZER])
    assert read_fast_tokenizer(path).num_steps == 6


def test_a_policy_of_fast_tokens_needs_only_its_run(arm: Any, tokenizer: str, tmp_path: Path) -> None:
    gone = tmp_path / "fast.json"
    gone.write_text(Path(tokenizer).read_text(encoding="utf-8"), encoding="utf-8")
    words = ["--model.action_head", f"{{type: fast_tokens, tokenizer: {gone}}}", "--name", "fast"]
    train(resolve_words(arm, *words, "--save_path", str(tmp_path)), World())
    gone.unlink()
    policy = Policy.from_run(str(tmp_path / "fast"))
    observation = policy._files.imagine_observation()
    policy.reset(0)
    first = policy.act(observation)
    assert all(np.isfinite(value).all() for value in first.values())
    policy.reset(1)
    # the likeliest tokens do not depend on the seed
    again = policy.act(observation)
    assert all(np.array_equal(again[name], value) for name, value in first.items())


def test_a_tokenizer_for_other_chunks_is_refused(arm: Any, tokenizer: str, tmp_path: Path) -> None:
    head = ["--model.action_head", f"{{type: fast_tokens, tokenizer: {tokenizer}}}"]
    with pytest.raises(ValueError, match=r"tokenizer is for 6 steps of 10 values .*, and the data has 4 of 10 "):
        resolve_words(arm, *head, "--data.lowdim_future_timesteps", "3", "--data.normalization.enabled", "false")
    with pytest.raises(ValueError, match=r"normalized by std, global, centered, and data\.normalization is nothing\."):
        resolve_words(arm, *head, "--data.normalization.enabled", "false")
    with pytest.raises(ValueError, match=r"^model\.action_tokens goes with a head that .* unlike fast_tokens"):
        resolve_words(arm, *head, "--model.action_tokens.tokenizer", tokenizer)
    with pytest.raises(FileNotFoundError, match=r"^model\.action_head\.tokenizer: there is no file .*none\.json"):
        resolve_words(arm, "--model.action_head", "{type: fast_tokens, tokenizer: none.json}")
    (tmp_path / "bad.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^model\.action_head\.tokenizer: .*bad\.json is not a FAST tokenizer"):
        resolve_words(arm, "--model.action_head", f"{{type: fast_tokens, tokenizer: {tmp_path}/bad.json}}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.action_head.type", "fast_tokens"], r"model\.action_head\.tokenizer"),
        (["--model.action_head", "{type: discrete_bins}"], r"action_head\.limits \(\[-1\.0, 1\.0\]\) cut off many"),
        (
            ["--model.action_head", "{type: discrete_bins, limits: [-5, 5], num_steps: 3}"],
            r"num_steps \(3\) must be data\.lowdim_future_timesteps \+ 1 \(6\)",
        ),
        (
            [
                *("--model.action_head", "{type: discrete_bins, limits: [-5, 5]}", "--data.seq_len", "60"),
                *("--model.vision_language_backbone.vlm.transformer.max_seq_len", "60"),
            ],
            r"6 steps of 10 values as 60 tokens, but .*max_seq_len has room for 59 with images and text\. Lower data",
        ),
        (["--model.insulate_backbone", "true"], r"insulate_backbone is true, so nothing trains the backbone"),
        (
            ["--model.insulate_backbone", "true", "--model.action_head", "{type: discrete_bins, limits: [-5, 5]}"],
            r"discrete_bins acts with the backbone itself",
        ),
        (["--model.action_head.conditioning", "joint_attention"], r"Use --model\.vision_language_backbone\.condit"),
        (["--model.action_tokens.tokenizer", "none.json"], r"model\.action_tokens\.tokenizer: there is no file"),
    ],
)
def test_settings_that_cannot_work_are_one_line(words: list[str], message: str, arm: Any) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        resolve_words(arm, *words)
    assert "\n" not in str(error.value)


def test_an_insulated_policy_is_loaded_from_its_run(arm: Any, tokenizer: str, tmp_path: Path) -> None:
    words = ["--model.insulate_backbone", "true", "--model.action_tokens.tokenizer", tokenizer, "--name", "insulated"]
    params = resolve_words(arm, *words, "--save_path", str(tmp_path))
    train(replace(params, total_train_samples=4), World())
    policy = Policy.from_run(str(tmp_path / "insulated"))
    policy.reset(0)
    actions = policy.act(policy._files.imagine_observation())
    assert all(np.isfinite(value).all() for value in actions.values())
