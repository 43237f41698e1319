"""Exported graphs do what the policy does, at any batch size; what cannot be exported is one line."""

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import config

from tests.essential.inference.test_policy import COMMANDED, load, observe, roll
from vla_foundry.cli import main as run_cli
from vla_foundry.inference import Policy
from vla_foundry.inference.export import check_exportable, load_exported, main, read_observation, write_graphs
from vla_foundry.inference.policy_files import load_policy_files
from vla_foundry.models import create_model
from vla_foundry.params.commands.runs import ExportParams
from vla_foundry.params.models.action_heads import DiscreteBinsParams, RegressionParams
from vla_foundry.params.models.backbones import VLMBackboneParams
from vla_foundry.params.models.policy import RegressionPolicyParams


@pytest.fixture(autouse=True)
def trace_without_types() -> Iterator[None]:
    """Shapes that are symbols are no ints; and the tracer's own log, which pytest keeps, takes most of the time."""
    config.update("jaxtyping_disable", True)
    logging.disable(logging.DEBUG)
    yield
    logging.disable(logging.NOTSET)
    config.update("jaxtyping_disable", False)


def test_an_exported_policy_acts_as_the_policy(arm: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "graphs"
    run_cli(["export", str(arm.run), "--output", str(folder), "--max_tokens", "96"])
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:3]] == [
        "batch 1",
        "batch 2",
        "batch 5",
    ]
    description = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    assert list(description["parity"]) == ["1", "2", "5"]
    assert description["prefix"]["inputs"]["pixel_values"]["shape"] == ["batch", 4, 3, 16, 16]
    assert description["prefix"]["inputs"]["input_ids"]["shape"] == ["batch", 96]
    files, recording = load_policy_files(str(arm.run)), arm.recordings[0]
    exported, policy = Policy(load_exported(str(folder), files), files), Policy(load(arm).model, files)
    # at the start of an episode the window is padded, later it has observed actions
    for found, action in zip(roll(exported, recording, 14), roll(policy, recording, 14), strict=True):
        assert found is not None
        assert action is not None
        for name in COMMANDED:
            np.testing.assert_allclose(found[name], action[name], atol=1e-5)
    assert exported.num_predicted == policy.num_predicted
    assert not exported.can_be_guided
    exported.reset(seed=0)
    with pytest.raises(ValueError, match=r"An instruction needs 1[0-9][0-9] tokens, but the exported rows have 96"):
        exported.act(observe(recording, 0, instruction="lift " * 50))


def write_variant(subject: Any, folder: Path, change: Any, **options: Any) -> dict[str, Any]:
    """Export a policy whose weights are random, adaLN-Zero's too."""
    files = load_policy_files(str(subject.run))
    model = change(files.params.model)
    files = dataclasses.replace(files, params=dataclasses.replace(files.params, model=model))
    torch.manual_seed(0)
    module: Any = create_model(model)
    for parameter in module.action_head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    params = ExportParams(run="run", output=str(folder), **{"tolerance": 1e-5} | options)
    return write_graphs(Policy(module.eval(), files), files, folder, params)


def with_head(model: Any, **changes: Any) -> Any:
    return dataclasses.replace(model, action_head=dataclasses.replace(model.action_head, **changes))


def see_ahead(model: Any) -> Any:
    backbone = model.vision_language_backbone
    vlm = dataclasses.replace(backbone.vlm, image_attention="bidirectional")
    noise = dataclasses.replace(model.action_head.noise, solver="heun")
    backbone = dataclasses.replace(backbone, vlm=vlm, conditioning="prefix")
    head = {"conditioning": "cross_attention", "time_conditioning": "concat", "noise": noise}
    return with_head(dataclasses.replace(model, vision_language_backbone=backbone), **head)


def test_graphs_that_differ_are_not_kept(arm: Any, tmp_path: Path) -> None:
    # images that see ahead, and cross-attention: the graphs are right, but not to the last bit
    with pytest.raises(ValueError, match="The graphs differ from the policy by") as error:
        write_variant(arm, tmp_path, see_ahead, format="onnx", max_tokens=96, tolerance=1e-12)
    assert float(str(error.value).split("by ")[1].split(",")[0]) < 1e-5
    assert not (tmp_path / "export.json").exists()


def test_one_joint_sequence_on_image_patches_is_exported(silent_arm: Any, tmp_path: Path) -> None:
    description = write_variant(silent_arm, tmp_path, lambda model: with_head(model, time_conditioning="add"))
    assert set(description["prefix"]["inputs"]) == {"pixel_values", "step_mask"}


@pytest.mark.parametrize("kind", ["torch_export", "onnx"])
def test_a_regression_head_is_one_graph(arm: Any, tmp_path: Path, kind: Any) -> None:
    def regress(model: Any) -> Any:
        head = RegressionParams(transformer=dataclasses.replace(model.action_head.transformer, n_layers=1))
        shared = {field.name: getattr(model, field.name) for field in dataclasses.fields(RegressionPolicyParams)}
        return RegressionPolicyParams(**shared | {"action_head": head})

    description = write_variant(arm, tmp_path, regress, format=kind, max_tokens=96)
    assert {"actions", "past_mask"} < set(description["prefix"]["inputs"])
    assert not list(tmp_path.glob("step.*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_tokens", "1"], "but the exported rows have 1"),
        (["--dataset", "nope"], r"dataset \(nope\) names one of several, but the run has one"),
    ],
)
def test_an_export_that_fails_leaves_nothing(words: list[str], message: str, arm: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        main([str(arm.run), "--output", str(tmp_path / "graphs"), *words])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"action_head": DiscreteBinsParams()},
            "model.action_head.type 'discrete_bins' cannot be exported: it writes tokens",
        ),
        (
            {"vision_language_backbone": VLMBackboneParams(hf_pretrained="owner/name")},
            "model.vision_language_backbone.type 'vlm_backbone' cannot be exported, only vlm_foundry_backbone",
        ),
    ],
)
def test_what_cannot_be_exported_is_one_line(changes: dict[str, Any], message: str, arm: Any) -> None:
    files = load_policy_files(str(arm.run))
    params = dataclasses.replace(files.params, model=dataclasses.replace(files.params.model, **changes))
    with pytest.raises(ValueError, match=message):
        check_exportable(dataclasses.replace(files, params=params))


def test_all_images_are_needed() -> None:
    observation = {"pixel_values": torch.zeros(3, 3, 4, 4), "input_ids": torch.zeros(2, 8, dtype=torch.long)}
    with pytest.raises(ValueError, match="needs all 2 images"):
        read_observation(observation, 2, 8)
