"""A user's own model, its params and its batch handler, from outside the package, trained by the ordinary command."""

import gzip
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from torch import nn

from vla_foundry.config.command_line import import_plugins, parse, run_command
from vla_foundry.models.registry import count_flops_per_token, list_blocks
from vla_foundry.params import TrainExperimentParams

ROOT = Path(__file__).resolve().parents[2]

PLUGIN = '''
"""A bigram model: what token follows what token."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vla_foundry.batch import LossOutput
from vla_foundry.models import register_batch_handler, register_model
from vla_foundry.params import ModelParams, register_model_params


@register_model_params("bigram")
@dataclass(frozen=True, kw_only=True)
class BigramParams(ModelParams):
    """Logits of the next token from a table."""

    # tokens there are
    num_tokens: int = 2


class Bigram(nn.Module):
    def __init__(self, params):
        super().__init__()
        self.table = nn.Embedding(params.num_tokens, params.num_tokens)
        self.init_weights()

    def init_weights(self):
        nn.init.zeros_(self.table.weight)

    def blocks(self):
        return [self.table]

    def num_flops_per_token(self, seq_len):
        return 2.0 * self.table.weight.numel()

    def forward(self, input_ids, targets):
        losses = F.cross_entropy(self.table(input_ids).flatten(0, 1), targets.flatten(), reduction="none")
        return LossOutput(losses.sum(), torch.tensor(losses.numel()), {})


@register_model("bigram")
def create_bigram(params, load_pretrained=True):
    return Bigram(params)


@register_batch_handler("bigram")
class BigramHandler:
    def __init__(self, params):
        pass

    def prepare(self, batch, device):
        tokens = batch["input_ids"].long().to(device)
        return {"input_ids": tokens[:, :-1], "targets": tokens[:, 1:]}

    def count_targets(self, inputs):
        return torch.tensor(inputs["targets"].numel())
'''


# params and a factory alone: of a model that is no kind of ours, and one whose factory forgets to return
UNFINISHED = """
from dataclasses import dataclass

from vla_foundry.models import register_model
from vla_foundry.params import ModelParams, register_model_params
from vla_foundry.params.models.roles import LanguageModelParams


@register_model_params("strange")
@dataclass(frozen=True, kw_only=True)
class StrangeParams(ModelParams):
    pass


@register_model_params("empty")
@dataclass(frozen=True, kw_only=True)
class EmptyParams(LanguageModelParams):
    pass


@register_model_params("missing")
@dataclass(frozen=True, kw_only=True)
class MissingParams(LanguageModelParams):
    pass


@register_model("strange")
@register_model("empty")
def create(params, load_pretrained=True):
    pass
"""


def write_counting_dataset(folder: Path, num_samples: int) -> str:
    """Write samples that count 0 1 2 3 0 1 ..., as gzipped lists in a tar; return the manifest's path."""
    folder.mkdir()
    with tarfile.open(folder / "shard_000000.tar", "w") as tar:
        for sample in range(num_samples):
            data = gzip.compress(json.dumps([(sample + place) % 4 for place in range(9)]).encode())
            member = tarfile.TarInfo(f"sample_{sample:04d}.json.gz")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    manifest = folder / "manifest.jsonl"
    manifest.write_text(json.dumps({"shard": "shard_000000", "num_sequences": num_samples}) + "\n", encoding="utf-8")
    return str(manifest)


def run_python(*words: str, cwd: Path, returncode: int = 0, **environment: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == returncode, done.stderr
    return done.stdout if returncode == 0 else done.stderr


def test_a_model_from_outside_the_package_trains_and_its_run_loads_again(tmp_path: Path) -> None:
    (tmp_path / "my_bigram.py").write_text(PLUGIN, encoding="utf-8")
    manifest = write_counting_dataset(tmp_path / "data", 64)
    words = {
        "plugins": "my_bigram",
        "model.type": "bigram",
        "model.num_tokens": "4",
        "data.type": "text",
        "data.dataset_manifest": manifest,
        "data.seq_len": "8",
        "data.num_workers": "0",
        "hparams.precision": "fp32",
        "hparams.global_batch_size": "8",
        "hparams.lr": "1",
        "hparams.lr_scheduler": "constant",
        "hparams.warmup": "0",
        "total_train_samples": "64",
        "num_checkpoints": "1",
        "log_every_n_steps": "1",
        "wandb": "false",
        "save_path": "runs",
        "name": "bigram",
    }
    flags = [word for name, value in words.items() for word in (f"--{name}", value)]
    run_python("-m", "vla_foundry.cli", "train", *flags, cwd=tmp_path)
    metrics = [
        json.loads(line)
        for line in (tmp_path / "runs" / "bigram" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    losses = [row["loss"] for row in metrics if row["kind"] == "train"]
    # it starts from knowing nothing of 4 tokens, and what follows is certain
    assert len(losses) == 8
    assert abs(losses[0] - 1.3863) < 1e-3
    assert losses[-1] < 0.1
    # another process, which knows only the run's folder
    code = "from vla_foundry.params import ModelParams, load_params_from_yaml as load\n"
    code += "whole, alone = [load(ModelParams, f'runs/bigram/{name}.yaml') for name in ('config', 'config_model')]\n"
    code += "print(whole == alone, whole)"
    for agreed in ({"VLA_FOUNDRY_PLUGINS": "my_bigram"}, {}):
        printed = run_python("-c", code if agreed else f"import my_bigram\n{code}", cwd=tmp_path, **agreed).strip()
        assert printed.startswith("True BigramParams(")
        assert printed.endswith("num_tokens=4)")
    # a run that someone else made names a module; in the folder where a user reads the run, it is not imported
    (tmp_path / "my_bigram.py").write_text("open('executed', 'w')", encoding="utf-8")
    generate = ("-m", "vla_foundry.cli", "generate", "--checkpoint", "runs/bigram", "--prompt", "a")
    error = run_python(*generate, cwd=tmp_path, returncode=2)
    assert error.startswith("error: ")
    assert "the plug-in my_bigram is code" in error
    assert "Add --plugins my_bigram" in error
    assert not (tmp_path / "executed").exists()


PARAMS_PLUGIN = """
from dataclasses import dataclass
from vla_foundry.params import ModelParams, register_model_params

@register_model_params("{name}")
@dataclass(frozen=True, kw_only=True)
class PluginParams(ModelParams):
    '''A model from outside.'''
    # how wide it is
    plugin_width: int = 3
"""


@pytest.mark.parametrize("way", ["flag", "flag=", "file"])
def test_a_plugin_is_imported_before_its_types_are_parsed(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"plugin_model_{way.replace('=', '_equals')}"
    (tmp_path / f"{name}.py").write_text(PARAMS_PLUGIN.format(name=name), encoding="utf-8")
    (tmp_path / "job.yaml").write_text(f"plugins: [{name}]\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = ["--model.type", name, "--model.plugin_width", "5", "--data.type", "text"]
    words += {"flag": ["--plugins", name], "flag=": [f"--plugins=[{name}]"], "file": ["--config_path", "job.yaml"]}[way]
    params = parse(TrainExperimentParams, words, prog="train").params
    assert (params.model.type, params.model.plugin_width, params.plugins) == (name, 5, [name])


def test_plugins_of_the_file_and_of_flags_are_all_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plugin_a", "plugin_b", "plugin_c"):
        (tmp_path / f"{name}.py").write_text("", encoding="utf-8")
    (tmp_path / "job.yaml").write_text(
        "plugins: plugin_a\nmodel: {type: transformer}\ndata: {type: text}\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = ["--plugins", "plugin_b", "--config_path", "job.yaml", "--plugins", "[plugin_c, plugin_a]"]
    params = parse(TrainExperimentParams, words, prog="train").params
    assert params.plugins == ["plugin_a", "plugin_b", "plugin_c"]


def test_an_installed_package_can_announce_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "announced_plugin.py").write_text(PARAMS_PLUGIN.format(name="announced_model"), encoding="utf-8")
    info = tmp_path / "announced-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: announced\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[vla_foundry.plugins]\nmodel = announced_plugin\n", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    words = ["--model.type", "announced_model", "--data.type", "text"]
    assert parse(TrainExperimentParams, words, prog="train").params.model.type == "announced_model"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "the plug-in broken_plugin was not found"),
        ("import not_there_at_all\n", "needs the module not_there_at_all, which is not installed"),
        ("def (\n", "cannot be imported: invalid syntax"),
        ("from vla_foundry import nothing_like_this\n", "cannot be imported: cannot import name"),
        ("\n1 / 0\n", r"cannot be imported: ZeroDivisionError: division by zero \(.*broken_plugin\.py, line 2\)\.$"),
        ("import sys\nsys.exit(3)\n", r"cannot be imported: SystemExit: 3 \(.*broken_plugin\.py, line 2\)\.$"),
        ("raise GeneratorExit\n", r"cannot be imported: GeneratorExit \(.*broken_plugin\.py, line 1\)\.$"),
        ("raise FileNotFoundError('x')\n", r"cannot be imported: FileNotFoundError: x \("),
        (
            "class E(ValueError):\n    def __str__(self):\n        raise OSError\nraise E\n",
            r"cannot be imported: E: <exception str\(\) failed> \(.*broken_plugin\.py, line 4\)\.$",
        ),
    ],
)
def test_a_broken_plugin_is_one_line(
    text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, os.getcwd()])
    monkeypatch.delitem(sys.modules, "broken_plugin", raising=False)
    if text is not None:
        (tmp_path / "broken_plugin.py").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        parse(TrainExperimentParams, ["--plugins", "broken_plugin"], prog="train")


@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        (
            "[].pop()",
            r"IndexError: pop .*\. It came through a plug-in PLACE; its traceback is kept in .*",
            1,
        ),
        ("sys.exit('no')", r"a plug-in PLACE ended the command: SystemExit: no\.", 1),
        ("sys.exit(3)", r"a plug-in PLACE ended the command: SystemExit: 3\.", 1),
        ("raise GeneratorExit", r"GeneratorExit\. It came through a plug-in PLACE; .*", 1),
        ("raise Mute", r"Mute: <exception str\(\) failed>\. It came through a plug-in PLACE; .*", 1),
        ("raise MuteValue", r"<exception str\(\) failed>", 2),
    ],
)
def test_a_fault_in_a_plugins_code_names_its_line(
    body: str,
    message: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, os.getcwd()])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delitem(sys.modules, "faulty_plugin", raising=False)
    mute = "class Mute{0}({1}):\n    def __str__(self): raise OSError\n"
    text = f"import sys\n{mute.format('', 'Exception')}{mute.format('Value', 'ValueError')}def fail(): {body}\n"
    (tmp_path / "faulty_plugin.py").write_text(text, encoding="utf-8")
    import_plugins(["faulty_plugin"], "--plugins")
    with pytest.raises(SystemExit) as stop:
        run_command(lambda words: sys.modules["faulty_plugin"].fail(), [])
    assert stop.value.code == code
    place = rf"\({tmp_path}/faulty_plugin\.py, line 6\)"
    assert re.fullmatch(f"error: {message.replace('PLACE', place)}\n", capsys.readouterr().err)


@pytest.mark.parametrize("mark", ["config_model.yaml", "checkpoints", "manifest.jsonl"])
@pytest.mark.parametrize("way", ["config_path", "included", "section"])
def test_plugins_of_a_config_that_came_with_data_are_imported_only_if_the_user_names_them(
    way: str, mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"data_plugin_{way}_{mark.partition('.')[0]}"
    (tmp_path / f"{name}.py").write_text("raise SystemExit('executed')", encoding="utf-8")
    (tmp_path / mark).touch()
    section = f"plugins: [{name}]\ntype: transformer\n"
    (tmp_path / "config.yaml").write_text(f"plugins: [{name}]\nmodel: {{type: transformer}}\n", encoding="utf-8")
    (tmp_path / "model.yaml").write_text(section, encoding="utf-8")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "job.yaml").write_text("include: ../config.yaml\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    words = {
        "config_path": ["--config_path", "config.yaml"],
        "included": ["--config_path", "job/job.yaml"],
        "section": ["--model", "include model.yaml"],
    }[way]
    with pytest.raises(ValueError, match=rf":1: the plug-in {name} is code, and is imported only if you name it too"):
        parse(TrainExperimentParams, [*words, "--data.type", "text"], prog="train")
    (tmp_path / f"{name}.py").write_text("", encoding="utf-8")
    params = parse(TrainExperimentParams, [*words, "--data.type", "text", "--plugins", name], prog="train").params
    assert params.plugins == [name]
    assert params.model.type == "transformer"


def read_command() -> list[str]:
    """The command of CONTRIBUTING.md that trains the example of a new model."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("\\\n", "")
    (line,) = [line for line in text.split("\n") if line.startswith("vla-foundry train --plugins examples.")]
    return shlex.split(line)[1:]


@pytest.mark.parametrize("extra", [(), ("--distributed.fsdp", "true")])
def test_a_model_of_params_and_a_factory_alone_trains(tmp_path: Path, extra: tuple[str, ...]) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    write_counting_dataset(tmp_path / "shards", 64)
    small = ("--data.seq_len", "8", "--hparams.lr", "0.1", "--hparams.warmup", "0", "--wandb", "false")
    flags = (*small, "--data.num_workers", "0", "--log_every_n_steps", "1", "--save_path", "runs", *extra)
    run_python("-m", "vla_foundry.cli", *read_command(), *flags, "--hparams.precision", "fp32", cwd=tmp_path)
    text = (tmp_path / "runs" / "gru" / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    # about log 4096 at first
    assert abs(losses[0] - 8.3) < 0.3
    assert losses[-1] < 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "strange",
            r"model\.type 'strange' has no batch handler, so it cannot be trained\. Register one with @register",
        ),
        ("missing", r"model\.type 'missing' is unknown\."),
        ("empty", r"model\.type 'empty': its factory returned NoneType, not a module\."),
    ],
)
def test_an_unfinished_model_is_one_line_and_leaves_no_run_folder(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "unfinished.py").write_text(UNFINISHED, encoding="utf-8")
    manifest = write_counting_dataset(tmp_path / "data", 64)
    words = f"train --plugins unfinished --model.type {name} --data.type text --data.dataset_manifest {manifest}"
    budget = "--data.seq_len 8 --data.num_workers 0 --total_train_samples 64 --hparams.global_batch_size 8 --name a"
    error = run_python("-m", "vla_foundry.cli", *words.split(), *budget.split(), cwd=tmp_path, returncode=2)
    assert re.search(f"^error: {message}", error, re.MULTILINE)
    assert not (tmp_path / "experiments" / "a").exists()


def test_blocks_and_flops_of_a_model_that_does_not_say_them() -> None:
    class Layered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = nn.Embedding(10, 4)
            # a usual name, which is no method here
            self.blocks = nn.ModuleList(nn.ModuleDict({"parts": nn.ModuleList([nn.Linear(4, 4)])}) for _ in range(3))
            self.shared = nn.ModuleList([self.blocks[0]])
            self.head = nn.Linear(4, 10)

    model = Layered()
    assert list_blocks(model) == [*model.blocks]
    assert count_flops_per_token(model, 8) == 6 * (3 * 16 + 40)
