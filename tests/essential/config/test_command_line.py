"""From words to params: precedence whatever the order, positional words, notices, help and plug-ins."""

import errno
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vla_foundry.config.command_line import Parsed, describe_error, parse, parse_command, run_command
from vla_foundry.config.schema import BaseParams, ChoiceParams, register_choice
from vla_foundry.storage.uri import read_text

Write = Callable[[str, str], str]
Parse = Callable[..., Parsed]


@dataclass(frozen=True, kw_only=True)
class HyperParams(BaseParams):
    """`--hparams.` Numbers of the optimizer."""

    # peak learning rate
    lr: float = 1e-4
    # warm-up, steps
    warmup: float = 1000.0
    # decay at the end
    decay: float = 0.3
    # weight decay
    wd: float = 0.01
    # beta 1
    beta1: float = 0.9
    # beta 2
    beta2: float = 0.95
    # epsilon
    eps: float = 1e-8
    # shape of the learning rate
    lr_scheduler: str = "cosine"
    # clipping
    grad_clip_norm: float | None = None

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr ({self.lr}) must be above 0.")


@dataclass(frozen=True, kw_only=True)
class ModelParams(ChoiceParams):
    """`--model.` The model."""

    _choice_registry = {}
    choice_path = "model.type"


@register_choice("transformer")
@dataclass(frozen=True, kw_only=True)
class TransformerParams(ModelParams):
    """Our own."""

    # width
    hidden_dim: int = 96
    # heads
    n_heads: int = 4
    # key and value heads
    n_kv_heads: int | None = None


@register_choice("transformer_hf")
@dataclass(frozen=True, kw_only=True)
class TransformerHFParams(ModelParams):
    """One from elsewhere."""

    # its name
    hf_pretrained: str


@dataclass(frozen=True, kw_only=True)
class CacheParams(BaseParams):
    """`--data.dataset_cache.` The cache."""

    # its size
    cache_size_gb: float = 100.0


@dataclass(frozen=True, kw_only=True)
class DataParams(ChoiceParams):
    """`--data.` The data."""

    _choice_registry = {}
    choice_path = "data.type"

    # length
    seq_len: int = 2048
    dataset_cache: CacheParams = field(default_factory=CacheParams)


@register_choice("text")
@dataclass(frozen=True, kw_only=True)
class TextDataParams(DataParams):
    """Text."""


@dataclass(frozen=True, kw_only=True)
class TrainParams(BaseParams):
    """A root with sections and choices."""

    # log to a server
    wandb: bool | None = None
    # write files
    tensorboard: bool = False
    # samples to train on
    total_train_samples: int | None = None
    data: DataParams
    model: ModelParams
    hparams: HyperParams = field(default_factory=HyperParams)


@pytest.fixture
def parse_train() -> Parse:
    """Parses words into the root of these tests, with a type for model and data."""
    return lambda *words: parse(
        TrainParams, ["--model.type", "transformer", "--data.type", "text", *words], prog="train"
    )


@dataclass(frozen=True, kw_only=True)
class CopyParams(BaseParams):
    """Copy things."""

    # what is copied
    source: str
    # where to
    targets: list[str] = field(default_factory=list)
    # replace what is there
    force: bool = False
    # ask first
    ask: bool | None = None
    # settings of the optimizer
    hparams: HyperParams = field(default_factory=HyperParams)
    # anything else
    extra: dict[str, int] = field(default_factory=dict)


def copy(*words: str, positional: tuple[str, ...] = ("source", "targets")) -> CopyParams:
    return parse_command(CopyParams, list(words), prog="copy", positional=positional)


def test_the_command_line_wins_over_what_it_includes_in_every_order(write: Write) -> None:
    preset = write("f.yaml", "type: transformer\nhidden_dim: 96\nn_heads: 2\n")
    words = (("--model", f"include {preset}"), ("--model.hidden_dim", "128"), ("--data.type", "text"))
    for order in itertools.permutations(words):
        params = parse(TrainParams, [word for pair in order for word in pair], prog="train").params
        assert (params.model.hidden_dim, params.model.n_heads) == (128, 2)


def test_command_line_over_file_over_include_over_default_leaf_by_leaf(write: Write, parse_train: Parse) -> None:
    write("base.yaml", "hparams: {lr: 1, wd: 1, beta1: 0.1, beta2: 0.1}\n")
    section = write("section.yaml", "beta1: 0.5\n")
    path = write("job.yaml", "include: base.yaml\nhparams: {lr: 2, wd: 2}\n")
    words = ["--hparams.lr", "3", "--config_path", path, "--hparams", f"include {section}"]
    hparams = parse_train(*words).params.hparams
    assert (hparams.lr, hparams.wd, hparams.beta1, hparams.beta2, hparams.eps) == (3.0, 2.0, 0.5, 0.1, 1e-8)


def test_a_mapping_on_the_command_line_changes_only_its_leaves(parse_train: Parse) -> None:
    for words in (
        ["--hparams", "{lr: 1, wd: 2}", "--hparams.lr", "3"],
        ["--hparams.lr", "3", "--hparams", "{lr: 1, wd: 2}"],
    ):
        hparams = parse_train(*words).params.hparams
        assert (hparams.lr, hparams.wd, hparams.beta1) == (3.0, 2.0, 0.9)


def test_of_two_equal_flags_the_later_one_wins(parse_train: Parse) -> None:
    assert parse_train("--hparams.lr", "1", "--hparams.lr=2").params.hparams.lr == 2.0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--wandb=False"], False),
        (["--wandb", "false"], False),
        (["--wandb"], True),
        (["--wandb", "--tensorboard"], True),
        (["--wandb", "null"], None),
        ([], None),
    ],
)
def test_wandb_is_true_false_or_unset(parse_train: Parse, words: list[str], expected: bool | None) -> None:
    assert parse_train(*words).params.wandb is expected


def test_negative_numbers_are_values_and_not_flags() -> None:
    assert copy("a", "--extra", "{x: -1}", "--extra.y", "-2").extra == {"x": -1, "y": -2}


def test_positional_words_fill_fields_in_order_and_a_last_list_takes_the_rest() -> None:
    params = copy("a", "b", "c", "--hparams.lr", "1")
    assert (params.source, params.targets) == ("a", ["b", "c"])
    assert copy("--source", "a", "b").targets == ["b"]


def test_a_switch_does_not_swallow_the_positional_word_behind_it() -> None:
    params = copy("--force", "a", "--ask", "null", "b")
    assert (params.force, params.ask, params.source, params.targets) == (True, None, "a", ["b"])
    assert copy("a", "--force", "false").force is False


def test_a_word_that_begins_with_include_is_text_where_text_is_due() -> None:
    assert copy("--source", "include all of it").source == "include all of it"


def test_what_follows_two_dashes_is_positional() -> None:
    assert copy("--", "--odd-name").source == "--odd-name"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "--hparams.lr", "1", "--hparams.lrr", "2"], r"^hparams\.lrr is unknown\. Did you mean hparams\.lr\?$"),
        ([], r"^source is missing \(what is copied\)\. Give it with --source TEXT\.$"),
        (["a", "--config_path"], r"^--config_path needs a value\.$"),
        (["a", "--.x", "1"], r"^'--\.x' is not a flag"),
        (["a", "-x"], r"^'-x' is not a flag: flags begin with two dashes, as --x\.$"),
        (["a", "--hparams", "3"], r"^hparams must be a mapping of keys, got '3'\.$"),
        (["a", "--hparams", "{lr: 1"], r"^--hparams '\{lr: 1': command line: not valid YAML"),
        (["a", "--hparams", "{lr: 1, lr: 2}"], r"the key 'lr' is given twice"),
        (["a", "--hparams.lrrr", "1"], r"^hparams\.lrrr is unknown\. Did you mean hparams\.lr\?$"),
        (["a", "--lr", "1"], r"^lr is unknown\. Did you mean hparams\.lr\?$"),
        (["a", "--learning_rate", "1"], r"Did you mean hparams\.lr\?$"),
        (["a", "--hparams.lr", "-1"], r"^hparams\.lr \(-1\.0\) must be above 0\.$"),
    ],
)
def test_errors_name_the_key_as_the_user_types_it(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        copy(*words)
    assert "\n" not in str(caught.value)


def test_too_many_positional_words_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"^'b' belongs to no flag after source\."):
        copy("a", "b", positional=("source",))


def test_two_config_files_are_an_error(write: Write) -> None:
    path = write("a.yaml", "")
    with pytest.raises(ValueError, match="is given twice"):
        copy("a", "--config_path", path, "--config_path", path)


def test_origins_say_where_each_leaf_was_written(write: Write, parse_train: Parse) -> None:
    path = write("job.yaml", "hparams:\n  lr: 2\ndata: {seq_len: 8}\n")
    origins = parse_train("--config_path", path, "--hparams.wd", "1").origins
    assert str(origins["hparams.lr"]) == f"{path}:2"
    assert str(origins["data.seq_len"]) == f"{path}:3"
    assert str(origins["hparams.wd"]) == "command line"
    assert "hparams.beta1" not in origins


def read_help(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_command(TrainParams, list(words), prog="vla-foundry train")
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_shows_flags_with_their_comments_and_sections_without_their_leaves(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = read_help(capsys, "--help")
    assert text.startswith("usage: vla-foundry train [--config_path FILE]")
    assert "--total_train_samples int | null" in text
    assert "samples to train on" in text
    assert "--model.type: " in text
    assert "--hparams.*" in text
    assert "hparams.lr" not in text


@pytest.mark.parametrize(
    ("topic", "there", "not_there"),
    [
        ("hparams", "--hparams.lr float", "--data."),
        ("hparams.lr", "peak learning rate (0.0001)", "warmup"),
        ("model.type=transformer", "--model.n_kv_heads int | null", "hf_pretrained"),
        ("model.type=transformer_hf", "(required)", "n_kv_heads"),
        ("model.type", "model.type=transformer_hf", "--model.hidden_dim"),
        ("data.dataset_cache", "--data.dataset_cache.cache_size_gb float", "--data.seq_len"),
    ],
)
def test_help_on_a_topic_shows_its_leaves(
    capsys: pytest.CaptureFixture[str], topic: str, there: str, not_there: str
) -> None:
    text = read_help(capsys, "--help", topic)
    assert text == read_help(capsys, f"--help={topic}")
    assert there in text
    assert not_there not in text


def test_help_on_an_unknown_topic_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"There is no help on 'hparms'\. Did you mean --help hparams\?"):
        parse_command(TrainParams, ["--help", "hparms"], prog="train")
    with pytest.raises(ValueError, match=r"^model\.type 'transforme' is unknown\. Did you mean 'transformer'\?"):
        parse_command(TrainParams, ["--help", "model.type=transforme"], prog="train")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG, errno.EIO])
def test_an_error_of_the_disk_is_one_line_that_names_the_file(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))

    def fail(words: list[str]) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "missing" / "file"))

    with pytest.raises(SystemExit) as stop:
        run_command(fail, [])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {tmp_path}/missing/file: {os.strerror(number)}.")
    assert ("MB are free" in lines[0]) == (number == errno.ENOSPC)
    # torchrun shows this file at the end of its own report
    assert json.loads(report.read_text(encoding="utf-8"))["message"] == lines[0]


def test_an_unexpected_error_is_one_line_and_its_traceback_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail(words: list[str]) -> None:
        raise RuntimeError(f"first line\nsecond line {words}")

    with pytest.raises(SystemExit) as stop:
        run_command(fail, ["a"])
    assert stop.value.code == 1
    (log,) = tmp_path.iterdir()
    assert capsys.readouterr().err == (
        "error: RuntimeError: first line second line ['a']. This is a bug. Please report it at "
        f"https://github.com/vla-foundry/vla_foundry/issues, with the command and the traceback kept in {log}.\n"
    )
    assert "in fail\n" in log.read_text(encoding="utf-8")
    with pytest.raises(RuntimeError, match="first line"):
        run_command(fail, ["a", "--debug"])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(SystemExit):
        run_command(fail, ["a"])
    assert capsys.readouterr().err.endswith("with the command and the traceback shown by --debug.\n")


def test_a_password_in_a_url_is_not_shown() -> None:
    assert describe_error(ValueError("https://me:secret@host/x@1: gone")) == "https://***@host/x@1: gone"


def test_lack_of_memory_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(words: list[str]) -> None:
        raise MemoryError("Unable to allocate 9 TiB")

    with pytest.raises(SystemExit) as stop:
        run_command(fail, [])
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: out of memory (MemoryError: Unable to allocate 9 TiB). Use a sm")


@pytest.mark.parametrize("debug", ["[]", "['--debug']"])
@pytest.mark.parametrize("body", ["print('x' * 10**6)", "print('x')", "open(1, 'wb', 0, closefd=False).write(b'x')"])
def test_output_that_nobody_reads_is_no_error(body: str, debug: str) -> None:
    code = f"from vla_foundry.config.command_line import run_command\nrun_command(lambda words: {body}, {debug})"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_broken_pipe_that_is_not_the_output_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(words: list[str]) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(SystemExit) as stop:
        run_command(fail, [])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: [Errno 32] Broken pipe\n"


def test_a_file_that_cannot_be_read_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_command(lambda words: print(read_text(words[0])), ["/proc/self/mem"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: /proc/self/mem: Input/output error.\n"
