"""A user's own model, its params and its batch handler, from outside the package, trained by the ordinary command."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

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
