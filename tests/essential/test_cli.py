"""The command line as a whole: what is printed, the exit code, and how long it takes."""

import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vla_foundry import cli
from vla_foundry.params import load_experiment_params_from_yaml
from vla_foundry.provenance import hide_home
from vla_foundry.text.tokenizers import load_tokenizer
from vla_foundry.training.metrics import has_wandb_credentials

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[int, str, str]]

JOB = """model:
  type: transformer
  max_seq_len: 512
  vocab_size: 300
data:
  type: text
  seq_len: 512
hparams:
  lr: 0.001
  warmup: 0.1
  global_batch_size: 64
total_train_samples: 640
"""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process; returns its exit code and what it wrote to both streams."""

    def run_words(*words: str) -> tuple[int, str, str]:
        code = 0
        try:
            cli.main(list(words))
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_words


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a job, datasets of manifests only, and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(JOB, encoding="utf-8")
    for name, count in (("a", 1000), ("b", 500)):
        (tmp_path / name).mkdir()
        line = {"shard": "shard_000000", "num_sequences": count}
        (tmp_path / name / "manifest.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    tokenizer = {"model": {"type": "BPE", "vocab": {f"t{index}": index for index in range(400)}}, "added_tokens": []}
    (tmp_path / "large_tokenizer").mkdir()
    (tmp_path / "large_tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return tmp_path


TRAIN = ("train", "--config_path", "job.yaml", "--data.dataset_manifest", "a/manifest.jsonl")

# (words after TRAIN, the one line that is printed)
ERRORS = [
    # unknown keys
    (["--hparams.lrr", "1"], r"hparams\.lrr is unknown\. Did you mean hparams\.lr\?"),
    (["--lr", "1"], r"lr is unknown\. Did you mean hparams\.lr\?"),
    (
        ["--model.hiden_dim", "8"],
        r"model\.hiden_dim is unknown for model\.type 'transformer'\. Did you mean model\.hid",
    ),
    (["--config_path=typo.yaml"], r"--config_path is given twice"),
    # wrong types
    (["--hparams.lr", "fast"], r"hparams\.lr must be a number, got 'fast'\."),
    (["--hparams.lr"], r"hparams\.lr needs a value: float\."),
    (["--num_checkpoints", "2.5"], r"num_checkpoints must be a whole number, got '2\.5'\."),
    (["--wandb", "maybe"], r"wandb must be true or false or null, got 'maybe'\."),
    (["--data.dataset_weighting", "[a]"], r"data\.dataset_weighting\[0\] must be a number, got 'a'\."),
    (["--data", "text"], r"data must be a mapping of keys, got 'text'\."),
    # unknown choices
    (["--hparams.precision", "fp23"], r"hparams\.precision 'fp23' is unknown\. Did you mean 'fp32'\? Choose one of: "),
    (
        ["--model.type", "transforme"],
        r"model\.type 'transforme' is unknown\. Did you mean 'transformer'\? Registered: ",
    ),
    (["--data.type", "texts"], r"data\.type 'texts' is unknown\. Did you mean 'text'\? Registered: "),
    (["--data.dataset_modality", "robotics"], r"data\.dataset_modality 'robotics' does not go with type 'text'\."),
    # batch sizes
    (
        ["--hparams.per_gpu_batch_size", "24"],
        r"hparams\.global_batch_size \(64\) must be a multiple of num_ranks \(1\) x hparams\.per_gpu_batch_size \(24\) "
        r"= 24\. Use 48 or 72\.$",
    ),
    (["--hparams.per_gpu_batch_size", "0"], r"hparams\.per_gpu_batch_size \(0\) must be at least 1 and"),
    # lists of different lengths
    (
        ["--data.dataset_manifest", "a/manifest.jsonl,b/manifest.jsonl", "--data.dataset_weighting", "[1]"],
        r"data\.dataset_weighting has 1 entries and dataset_manifest has 2\. Give one for each manifest",
    ),
    (["--data.dataset_modality", "[text,text]"], r"data\.dataset_modality has 2 entries and dataset_manifest has 1"),
    # data that is not there, or not enough of it
    (
        ["--data.dataset_manifest", "c/manifest.jsonl"],
        r"data\.dataset_manifest: there is no manifest c/manifest\.jsonl",
    ),
    (["--data.dataset_manifest", "a"], r"data\.dataset_manifest: there is no manifest a\. Did you mean a/manifest\.js"),
    (["--data.dataset_manifest", "[]"], r"data\.dataset_manifest is empty\. Give --data\.dataset_manifest"),
    (["--data.val_dataset_manifest", "c/manifest.jsonl"], r"data\.val_dataset_manifest: there is no manifest c/"),
    (["--total_val_samples", "8"], r"total_val_samples \(8\) needs data\. Give --data\.val_dataset_manifest"),
    (["--total_train_samples", "6400"], r"total_train_samples \(6400\) is more than the 1000 samples of a/manifest"),
    # budgets
    (["--num_epochs", "2"], r"total_train_samples \(640\) and num_epochs \(2\) x 1000 samples = 2000 disagree\."),
    (["--total_train_samples", "null"], r"There is no budget\. Give --total_train_samples N or --num_epochs N\."),
    (["--total_train_samples", "9"], r"total_train_samples \(9\) is less than one global batch"),
    (["--hparams.warmup", "11"], r"hparams\.warmup \(11\) is 11 steps, more than the run's 10\. Use fewer steps, or "),
    (
        ["--hparams.lr_scheduler", "warmup_constant_decay", "--hparams.decay", "10"],
        r"hparams\.warmup \(1 steps\) and hparams\.decay \(10 steps\) must fit into the run's 10 steps",
    ),
    # lengths and vocabularies
    (
        ["--data.seq_len", "1024"],
        r"data\.seq_len \(1024\) is more than model\.max_seq_len \(512\)\. Use --data\.seq_len",
    ),
    (
        ["--data.tokenizer", "large_tokenizer"],
        r"model\.vocab_size \(300\) is less than the 400 tokens of data\.tokenizer large_tokenizer\. "
        r"Use --model\.vocab_size 400 or more\.",
    ),
    # what a section checks by itself
    (["--model.n_heads", "5"], r"model\.hidden_dim \(96\) must be a multiple of n_heads \(5\)\."),
    (["--hparams.lr_cooldown_end", "1"], r"hparams\.lr_cooldown_end \(1\.0\) must not be above lr \(0\.001\)\."),
    (["--name", "a/b"], r"name 'a/b' cannot be the name of a folder\."),
    # files and plug-ins
    (["--model", "include no.yaml"], r"--model: Config file 'no\.yaml' was not found"),
    (["--model.resume_from_checkpoint", "no/run"], r"model\.resume_from_checkpoint: no/run does not exist\."),
    (["--plugins", "no_such_plugin"], r"--plugins: the plug-in no_such_plugin was not found\."),
    # words that are no flags
    (["stray"], r"'stray' belongs to no flag\. Write --flag VALUE\."),
    (["-lr", "1"], r"'-lr' is not a flag: flags begin with two dashes, as --lr\."),
]


@pytest.mark.parametrize(("words", "message"), ERRORS, ids=[" ".join(words) for words, _ in ERRORS])
def test_what_a_user_can_fix_is_one_line_and_exit_code_2(
    run: Run, workplace: Path, words: list[str], message: str
) -> None:
    code, out, err = run(*TRAIN, *words)
    assert re.match(f"error: {message}", err), err
    assert (code, out, err.count("\n")) == (2, "", 1)


FILE_ERRORS = [
    ("hparams:\n  lrr: 1\n", r"bad\.yaml:2: hparams\.lrr is unknown\. Did you mean hparams\.lr\?"),
    ("hparams:\n  lr: fast\n", r"bad\.yaml:2: hparams\.lr must be a number, got 'fast'\."),
    ("a: [1\nb: 2\n", r"bad\.yaml:2: not valid YAML: "),
    ("model: !include bad.yaml\n", r"bad\.yaml includes itself: bad\.yaml -> bad\.yaml\."),
    ("model: !include no.yaml\n", r"bad\.yaml:1: Config file 'no\.yaml' was not found"),
    ("plugins: [no_such_plugin]\n", r"bad\.yaml:1: the plug-in no_such_plugin was not found\."),
    ("hparams: null\n", r"bad\.yaml:1: hparams must be a mapping of keys, got null\."),
    (
        "hparams: 3\nmodel: {type: transformer}\ndata: {type: text}\n",
        r"bad\.yaml:1: hparams must be a mapping of keys, got '3'",
    ),
    ("- a list\n", r"bad\.yaml holds no mapping of keys\."),
    ("data: {type: text}\nmodel: {hf_pretrained: 3, n_layers: 4}\n", r"bad\.yaml:2: model\.type is missing\."),
]


@pytest.mark.parametrize(("text", "message"), FILE_ERRORS)
def test_errors_of_a_file_begin_with_its_line(run: Run, workplace: Path, text: str, message: str) -> None:
    (workplace / "bad.yaml").write_text(text, encoding="utf-8")
    code, out, err = run("train", "--config_path", "bad.yaml")
    assert re.match(f"error: {message}", err), err
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_a_config_file_that_is_not_there_is_one_line(run: Run, workplace: Path) -> None:
    code, _, err = run("train", "--config_path", "nowhere.yaml")
    assert code == 2
    assert re.match(r"error: Config file 'nowhere\.yaml' was not found: there is no nowhere\.yaml nor \S+$", err)


def test_debug_shows_the_traceback(workplace: Path) -> None:
    with pytest.raises(ValueError, match=r"hparams\.lrr is unknown"):
        cli.main([*TRAIN, "--hparams.lrr", "1", "--debug"])


def test_an_unknown_command_names_the_nearest(run: Run) -> None:
    code, out, err = run("trian")
    assert (code, out) == (2, "")
    assert err.startswith("error: The command 'trian' is unknown. Did you mean 'train'? There are: train, preprocess,")
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_help_lists_every_command(run: Run, words: tuple[str, ...]) -> None:
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    for command in ("train", "preprocess", "manifest", "generate", "quickstart"):
        assert f"\n  {command} " in out


def test_resolve_configs_prints_origins_and_writes_a_config_that_reproduces_the_run(run: Run, workplace: Path) -> None:
    words = ["--hparams.lr", "3e-4", "--num_checkpoints", "2"]
    code, out, err = run(*TRAIN, *words, "--resolve_configs", "true", "--resolve_configs_path", "resolved")
    assert code == 0
    assert err == "note: written to resolved/resolved_config.yaml\n"
    assert re.search(r"^  lr: 0\.0003 +# command line$", out, re.MULTILINE)
    assert re.search(r"^  warmup: 0\.1 +# job\.yaml:10$", out, re.MULTILINE)
    assert re.search(r"^  seed: 42 +# resolved from hparams\.seed$", out, re.MULTILINE)
    assert re.search(r"^  beta1: 0\.9 +# default$", out, re.MULTILINE)
    first = load_experiment_params_from_yaml("resolved/resolved_config.yaml")
    assert (first.hparams.lr, first.hparams.warmup, first.data.seed) == (3e-4, 0.1, 42)
    assert (first.resolve_configs, first.resolve_configs_path) == (False, None)
    # the written file alone is the same run
    code, _, _ = run(
        "train",
        "--config_path",
        "resolved/resolved_config.yaml",
        "--resolve_configs",
        "--resolve_configs_path",
        "again",
    )
    assert code == 0
    assert load_experiment_params_from_yaml("again/resolved_config.yaml") == first


def test_resolve_configs_needs_no_network(run: Run, workplace: Path) -> None:
    remote = "s3://bucket/a/manifest.jsonl"
    words = ["--data.dataset_manifest", remote, "--total_train_samples", "null", "--num_epochs", "1"]
    code, out, _ = run(*TRAIN, *words, "--resolve_configs")
    assert code == 0
    assert re.search(rf"^total_train_samples: null +# unresolved \(needs {remote}\)$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "shown", "missing"),
    [
        (
            "--model.type transformer --model.n_layers 3",
            r"^  n_layers: '?3'? +# command line$",
            r"data\.type is missing\.",
        ),
        ("--data.type text --config_path part.yaml", r"^  lr: '?0\.1'? +# part\.yaml:2$", r"model\.type is missing\."),
        ("--data.type text --model.type vlm", r"^    patch_size: 16 +# default$", r"There is no budget\."),
        (
            "--data.type text --model.type transformer --total_train_samples 10000 --hparams.seed 3",
            r"^  seed: 3 +# resolved from hparams\.seed$",
            r"data\.dataset_manifest is empty\.",
        ),
    ],
)
def test_resolve_configs_prints_what_there_is_and_what_is_missing(
    run: Run, workplace: Path, words: str, shown: str, missing: str
) -> None:
    (workplace / "part.yaml").write_text("hparams:\n  lr: 0.1\n", encoding="utf-8")
    code, out, err = run("train", *words.split(), "--resolve_configs")
    assert (code, re.search(shown, out, re.MULTILINE) is not None) == (0, True), out
    assert re.search(f"^note: .*more is needed: {missing}", err, re.MULTILINE)
    assert run("train", *words.split())[0] == 2


def test_the_preset_folder_works_from_any_directory(run: Run, workplace: Path) -> None:
    words = [
        "--config_path",
        "config_presets/training_jobs/llm_tiny.yaml",
        "--data.dataset_manifest",
        "a/manifest.jsonl",
    ]
    code, out, _ = run("train", *words, "--resolve_configs")
    assert code == 0
    assert re.search(r"^  hidden_dim: 64 +# config_presets/models/transformer_tiny\.yaml:\d+$", out, re.MULTILINE)


def run_process(*words: str, cwd: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run Python in a process of its own; return its result and the CPU seconds it took, whatever else runs here."""
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime


def test_help_answers_in_half_a_second(tmp_path: Path) -> None:
    done = [run_process("-m", "vla_foundry.cli", "--help", cwd=tmp_path) for _ in range(5)]
    assert all(result.returncode == 0 for result, _ in done)
    assert statistics.median(seconds for _, seconds in done) < 0.5


def test_parsing_its_errors_and_its_print_need_no_torch(workplace: Path) -> None:
    code = "import sys; from vla_foundry import cli\ntry: cli.main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += (
        "sys.exit(' '.join(name for name in ('torch', 'numpy', 'transformers', 'ray', 'boto3') if name in sys.modules))"
    )
    for words in (["--resolve_configs"], ["--hparams.lrr", "1"], ["--hparams.per_gpu_batch_size", "24"], ["--help"]):
        result, seconds = run_process("-c", code, *TRAIN, *words, cwd=workplace)
        heavy = result.stderr.strip().rpartition("\n")[2]
        assert result.returncode == 1
        assert heavy == "" or heavy.startswith(("error: ", "note: ")), result.stderr
        assert seconds < 4


def test_main_runs_as_a_script_without_its_own_folder_on_the_path(workplace: Path) -> None:
    # no module of the package may hide one of the standard library
    script = str(ROOT / "vla_foundry" / "main.py")
    result, _ = run_process(script, *TRAIN[1:], "--resolve_configs", cwd=workplace, PYTHONPATH="")
    assert (result.returncode, result.stderr) == (0, "")
    assert "lr: 0.001" in result.stdout
    result, _ = run_process(script, *TRAIN[1:], "--hparams.lrr", "1", cwd=workplace, PYTHONPATH="")
    assert (result.returncode, result.stderr) == (2, "error: hparams.lrr is unknown. Did you mean hparams.lr?\n")


@pytest.mark.parametrize(
    "names",
    [
        ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    ],
    ids=["torchrun", "mpi", "slurm"],
)
def test_only_the_first_process_tells_of_an_error_and_all_exit_with_2(workplace: Path, names: tuple[str, ...]) -> None:
    for rank in ("0", "1"):
        environment = dict(zip(names, (rank, rank, "2"), strict=True))
        words = ["--hparams.per_gpu_batch_size", "64"]
        result, _ = run_process("-m", "vla_foundry.cli", *TRAIN, *words, cwd=workplace, **environment)
        assert result.returncode == 2
        assert result.stdout == ""
        expected = "error: hparams.global_batch_size (64) must be a multiple of num_ranks (2) x "
        assert result.stderr.startswith(expected) if rank == "0" else result.stderr == ""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_missing_wandb_credentials_are_one_line_before_anything_is_made(
    run: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    """The first rank says it, on its screen and in a file, since torchrun buries what is printed."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(workplace / "none"))
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("vla_foundry.training.experiment.train", lambda params, world, origins: None)
    words = [
        "--config_path",
        "job.yaml",
        "--data.dataset_manifest",
        "[a/manifest.jsonl]",
        "--hparams.per_gpu_batch_size",
        "8",
    ]
    code, _, err = run("train", *words, "--wandb", "true", "--save_path", "runs", "--name", "x")
    log = workplace / "runs" / ".failed" / "x.log"
    if rank == "1":
        assert (code, err, log.exists()) == (0, "", False)
        return
    assert code == 2
    assert re.fullmatch(r"error: wandb is true, but .*\n", err)
    assert err.removeprefix("error: ") in log.read_text(encoding="utf-8")
    assert [path.name for path in log.parent.parent.iterdir()] == [".failed"]


INTERRUPT = """
import os, signal, sys
from importlib.abc import MetaPathFinder

module = sys.argv.pop(1)

class Interrupt(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.parametrize("module", ["vla_foundry.config", "yaml", "torch"])
@pytest.mark.parametrize(
    "start",
    [
        "from vla_foundry.cli import main; main(['train', *sys.argv[1:]])",
        "import runpy; runpy.run_module('vla_foundry.main', run_name='__main__', alter_sys=True)",
    ],
)
def test_an_interrupt_while_modules_are_imported_prints_nothing(workplace: Path, start: str, module: str) -> None:
    words = ["--config_path", "job.yaml", "--data.dataset_manifest", "a/manifest.jsonl"]
    command = [sys.executable, "-c", INTERRUPT + start, module, *words]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=workplace,
        # a background shell may have told this process to ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_a_command_leaves_the_handler_of_interrupts_as_it_was(run: Run, before: object) -> None:
    original = signal.signal(signal.SIGINT, before)  # pyright: ignore[reportArgumentType]
    try:
        run("no-command")
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, original)


def test_a_user_without_a_home_is_no_traceback(run: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a user that no table names
    assert hide_home("~ /root/x") == "~ /root/x"
    assert not has_wandb_credentials({})
    assert run("train", "--config_path", "~nobody_has_this_name/job.yaml")[0] == 2
    with pytest.raises((FileNotFoundError, ValueError), match="nobody_has_this_name"):
        load_tokenizer("~nobody_has_this_name/tokenizer")


@pytest.mark.parametrize(
    "words", [(), *((name,) for name in cli.COMMANDS), ("evaluate", "text"), ("preprocess", "robotics")]
)
def test_help_ends_with_a_page_of_the_documentation(run: Run, words: tuple[str, ...]) -> None:
    code, out, _ = run(*words, "--help")
    page = out.rstrip().rpartition("/main/")[2]
    assert code == 0
    assert (ROOT / page).is_file()
    assert not words or f"vla-foundry {words[0]}" in (ROOT / page).read_text(encoding="utf-8")
