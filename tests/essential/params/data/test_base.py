"""Lists of datasets: what is left out is completed, and what does not match is named."""

import re
from pathlib import Path
from typing import Any

import pytest

from vla_foundry.config.command_line import parse
from vla_foundry.config.loading import dump_params
from vla_foundry.config.resolve import resolve_known
from vla_foundry.params import TrainExperimentParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.facts import Facts
from vla_foundry.params.models.transformer import TransformerParams


@pytest.mark.parametrize("way", ["null on the command line", "null in the file", "left out"])
def test_a_dataset_is_added_to_a_saved_config_by_its_manifest_alone(way: str, tmp_path: Path) -> None:
    data: Any = TextDataParams(
        dataset_manifest=["a"], dataset_modality=["text"], dataset_weighting=[1.0], val_dataset_modality=[]
    )
    saved = dump_params(TrainExperimentParams(data=data, model=TransformerParams(), total_train_samples=1024))
    names = ("dataset_modality", "dataset_weighting")
    words = ["--data.dataset_manifest", "[a,b]", "--hparams.warmup", "0.1"]
    if way == "null on the command line":
        words += [word for name in names for word in (f"--data.{name}", "null")]
    for name in names:
        old = re.search(rf"^  {name}:(\n  - .*)+\n", saved, re.MULTILINE)
        assert old is not None
        saved = saved.replace(old[0], f"  {name}: null\n" if "file" in way else "" if way == "left out" else old[0])
    (tmp_path / "config.yaml").write_text(saved, encoding="utf-8")
    params = parse(TrainExperimentParams, ["--config_path", str(tmp_path / "config.yaml"), *words], prog="train").params
    assert (params.data.dataset_modality, params.data.dataset_weighting) == ([], [])
    resolved = resolve_known(params, Facts()).params
    assert resolved.data.dataset_modality == ["text", "text"]
    assert resolved.data.dataset_weighting == [1.0, 1.0]


def test_a_dataset_without_its_modality_says_how_to_add_it() -> None:
    words = ["--data.type", "text", "--model.type", "transformer", "--data.dataset_modality", "[text]"]
    with pytest.raises(ValueError, match=r"Give one for each manifest, or leave dataset_modality out \(null\)\."):
        parse(TrainExperimentParams, [*words, "--data.dataset_manifest", "[a,b]"], prog="train")
