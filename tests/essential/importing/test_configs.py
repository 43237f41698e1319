"""A policy of the earlier implementation becomes a run that acts: config, normalizer, spec and processor."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from vla_foundry.data.robotics import load_normalizer, load_spec
from vla_foundry.importing.command import import_checkpoint
from vla_foundry.importing.configs import match_field_config
from vla_foundry.inference.loading import load_run_model
from vla_foundry.inference.observations import RobotObservation
from vla_foundry.inference.policy import Policy
from vla_foundry.models import create_model
from vla_foundry.models.action_heads.action_head import ActionWindow
from vla_foundry.models.backbones.backbone import Conditioning
from vla_foundry.models.weights import load_model_checkpoint
from vla_foundry.params import ModelParams, load_experiment_params_from_yaml, load_params_from_yaml
from vla_foundry.params.commands.runs import ImportParams
from vla_foundry.params.data.robotics import RoboticsDataParams

XYZ = "robot__action__poses__left::panda__xyz_relative"
SPEED = "speed"
DEVICE = torch.device("cpu")


@pytest.fixture
def run(policy_source: Path, tokenizer: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """The imported run, and what was said of it."""
    output = tmp_path / "runs" / "vla"
    params = ImportParams(source=str(policy_source), output=str(output), tokenizer=str(tokenizer), fps=10.0)
    return output, import_checkpoint(params)


def read_data(folder: Path) -> RoboticsDataParams:
    params = load_experiment_params_from_yaml(str(folder / "config.yaml"))
    assert isinstance(params.data, RoboticsDataParams)
    return params.data


def test_the_config_is_the_same_in_our_terms(run: tuple[Path, list[str]]) -> None:
    folder, lines = run
    params: Any = load_experiment_params_from_yaml(str(folder / "config.yaml"))
    assert (params.name, params.save_path, params.remote_sync) == ("vla", str(folder.parent), None)
    assert (params.hparams.lr, params.hparams.warmup, params.hparams.global_batch_size) == (5e-5, 1000, 1024)
    assert params.distributed.fsdp
    assert params.data.augmentation.image.crop.shape == (56, 56)
    assert params.data.image_names == [f"{camera}_t{t}" for t in (-1, 0) for camera in params.data.camera_names]
    assert (params.data.window.past, params.data.window.future) == (1, 14)
    assert (params.data.use_language, params.data.image_size, params.data.img_num_tokens) == (True, 56, 4)
    assert params.model.action_head.transformer.rope_bf16_frequencies
    assert params.model.vision_language_backbone.vlm.transformer.rope_bf16_frequencies
    for line in (
        "data.augmentation.image.random_crop is called data.augmentation.image.crop now.",
        "hparams.loss_function is left out: the model's batch handler decides the loss.",
        "data.normalization.field_configs.gripper is left out: each field has an entry of its own.",
        "remote_sync (s3://someone/models) is left out: the imported run is a copy.",
    ):
        assert line in lines
    kept = yaml.safe_load((folder / "imported" / "config.yaml").read_text(encoding="utf-8"))
    assert kept["hparams"]["loss_function"] == "mse"


@torch.no_grad()
def test_the_loading_snippet_gives_the_numbers_of_the_import(
    run: tuple[Path, list[str]], policy_source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params: Any = load_params_from_yaml(ModelParams, str(policy_source / "config.yaml"))
    model: Any = create_model(params, load_pretrained=False)
    load_model_checkpoint(model, str(policy_source / "checkpoints" / "checkpoint_1.pt"))
    assert "rope_bf16_frequencies is true" in capsys.readouterr().err
    imported: Any = load_run_model(
        load_params_from_yaml(ModelParams, str(run[0] / "config_model.yaml")), str(run[0]), str(run[0]), None, DEVICE
    )
    transformers = [params.action_head.transformer, params.vision_language_backbone.vlm.transformer]
    assert all(transformer.rope_bf16_frequencies for transformer in transformers)
    mine, theirs = model.state_dict(), imported.state_dict()
    assert mine.keys() == theirs.keys()
    tables = [dict(found.named_buffers()) for found in (model, imported)]
    assert sum(name.endswith(".cos") for name in tables[0]) >= 2
    for name, table in tables[0].items():
        torch.testing.assert_close(table, tables[1][name], rtol=0, atol=0)
    # a config of ours, or one that is not that of a run, says nothing of earlier code
    text = (policy_source / "config.yaml").read_text(encoding="utf-8")
    for old, new in (("precision: amp_bfloat16", "precision: fp32"), ("world_size: 8", "")):
        assert old in text
        changed = policy_source / "changed.yaml"
        changed.write_text(text.replace(old, new), encoding="utf-8")
        params = load_params_from_yaml(ModelParams, str(changed))
        assert not params.action_head.transformer.rope_bf16_frequencies


def test_numbers_are_normalized_as_they_were(run: tuple[Path, list[str]], policy_source: Path) -> None:
    statistics = json.loads((policy_source / "stats.json").read_text(encoding="utf-8"))[XYZ]
    low, high = (np.array(statistics[f"percentile_{number}_per_timestep"]) for number in (1, 99))
    # the statistics have 2 steps before the anchor, the policy 1; the range goes to [-1, 1]
    values = np.random.default_rng(3).normal(size=(16, 3))
    center, scale = ((low + high) / 2)[1:17], np.maximum((high - low) / 2, 0.01)[1:17]
    normalized = load_normalizer(run[0]).normalize(values, XYZ, anchor=1)
    np.testing.assert_allclose(normalized, (values - center) / scale, rtol=1e-12)


def test_the_spec_says_what_its_files_say(run: tuple[Path, list[str]]) -> None:
    spec = load_spec(run[0])
    assert spec.fps == 10
    assert {name: camera.size for name, camera in spec.cameras.items()} == dict.fromkeys(
        ["scene_right_0", "wrist_left_plus"], (56, 56)
    )
    assert spec.fields[XYZ].representation == "relative"
    assert spec.fields[XYZ].width == 3
    assert [group.name for group in spec.pose_groups] == ["left_action"]


def test_the_policy_acts(run: tuple[Path, list[str]]) -> None:
    policy = Policy.from_run(str(run[0]), device="cpu", open_loop_steps=2)
    policy.reset(seed=1)
    stem = "robot__actual__poses__left::panda"
    fields = {f"{stem}__xyz": np.zeros(3), f"{stem}__rot_6d": np.eye(3)[:2].ravel(), SPEED: np.zeros(1)}
    fields |= {"robot__actual__grippers__left::panda_hand": np.zeros(1)}
    pictures = {name: np.full((56, 56, 3), 90, np.uint8) for name in read_data(run[0]).camera_names or []}
    observation = RobotObservation(
        images=pictures, fields={name: value.astype(np.float32) for name, value in fields.items()}, instruction="w5 w7"
    )
    first, second = policy.act(observation), policy.act(observation)
    assert first.keys() == {f"robot__action__poses__left::panda__{name}" for name in ("xyz", "rot_6d")} | {
        "robot__action__grippers__left::panda_hand"
    }
    assert all(np.isfinite(value).all() for value in first.values())
    assert any((first[name] != second[name]).any() for name in first)


@torch.no_grad()
def test_a_ddpm_policy_noises_and_predicts_as_it_was_trained(
    policy_source: Path, tmp_path: Path, tokenizer: Path
) -> None:
    models: list[Any] = []
    for uses_flow in (True, False):
        changes = {"use_flow_matching_scheduler": uses_flow}
        change_config(policy_source, lambda config, changes=changes: config["model"].update(changes))
        output = tmp_path / f"run_{uses_flow}"
        lines = import_checkpoint(ImportParams(source=str(policy_source), output=str(output), tokenizer=str(tokenizer)))
        params = load_params_from_yaml(ModelParams, str(output / "config_model.yaml"))
        models.append(load_run_model(params, str(output), str(output), None, torch.device("cpu")))
    assert "parity: model.action_head.noise.target is velocity" in lines
    flow, ddpm = (model.action_head for model in models)
    steps = torch.tensor([0, 1, 18, 19])
    actions, noise = torch.randn(2, 4, 16, 10, generator=torch.Generator().manual_seed(1))
    # as it was noised: the product of 1 - beta up to and including the step's, for 20 steps
    levels = torch.linspace(1e-4, 0.02, 20).neg().add(1).cumprod(0)[steps, None, None]
    expected = levels.sqrt() * actions + (1 - levels).sqrt() * noise
    noised = ddpm.process.add_noise(actions, noise, (steps + 1) / 20)
    torch.testing.assert_close(noised, expected, rtol=1e-5, atol=1e-5)
    # flow matching looks up row k of the same table at time k / 20
    conditioning = Conditioning(torch.randn(4, 1, 32, generator=torch.Generator().manual_seed(2)))
    window = ActionWindow(
        actions, torch.zeros(4, 16).bool(), torch.ones(4, 16).bool(), None, torch.zeros(4, 2, 5), None
    )
    predicted = ddpm.predict(noised, (steps + 1) / 20, ddpm.embed_context(conditioning, window))
    same = flow.predict(noised, steps / 20, flow.embed_context(conditioning, window))
    torch.testing.assert_close(predicted, same, rtol=1e-5, atol=1e-5)
    assert torch.equal(ddpm.process.target(actions, noise), noise - actions)
    made = models[1].action_head.sample_from(noise, conditioning, window, 5)
    assert made.isfinite().all()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("stats.json", r"has no stats\.json\. Without it, the meaning of the policy's numbers is unknown"),
        ("preprocessing_config.yaml", r"has no preprocessing_config\.yaml, which describes the cameras and steps"),
    ],
)
def test_a_policy_without_a_file_it_needs_leaves_nothing(
    file: str, message: str, policy_source: Path, tokenizer: Path, tmp_path: Path
) -> None:
    (policy_source / file).unlink()
    output = tmp_path / "runs" / "vla"
    with pytest.raises(FileNotFoundError, match=message):
        import_checkpoint(ImportParams(source=str(policy_source), output=str(output), tokenizer=str(tokenizer)))
    assert [path.name for path in output.parent.iterdir()] == [".vla.lock"]


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    change(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"tactile_window": 3}}, r"config\.yaml: data\.tactile_window is unknown"),
        ({"data": {"processor": "debug"}}, r"config\.yaml: data\.processor 'debug' was part of the earlier"),
        ({"data": {"action_fields": [SPEED, "torque"]}}, r"torque"),
        (
            {"model": {"use_diffusers_scheduler": True}},
            r"use_diffusers_scheduler: such policies could never be trained",
        ),
    ],
)
def test_a_config_that_is_not_understood_is_refused(
    change: dict[str, Any], message: str, policy_source: Path, tmp_path: Path
) -> None:
    def apply(config: dict[str, Any]) -> None:
        for section, values in change.items():
            config[section] |= values

    change_config(policy_source, apply)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(ImportParams(source=str(policy_source), output=str(tmp_path / "vla")))
    assert not (tmp_path / "vla").exists()


def test_entries_for_fields_are_found_by_a_part_of_their_name() -> None:
    configs = {"poses": 1, "left::panda__xyz": 2, "robot__poses__left::panda__xyz": 3}
    assert match_field_config("robot__poses__left::panda__xyz", configs) == 3
    assert match_field_config("robot__poses__right::panda__xyz", configs) == 1
    assert match_field_config("a__left::panda__xyz", configs) == 2
    assert match_field_config("speed", configs) is None
    # these were never normalized
    assert match_field_config("is_valid", configs) == {"enabled": False}
