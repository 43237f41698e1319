"""A LeRobot dataset to a trained policy by the commands that `new-policy` prints, and what the doctor says of it."""

import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import CLIPConfig, LlamaConfig

from vla_foundry.cli import main
from vla_foundry.params.commands.runs import NewPolicyParams
from vla_foundry.parsing import parse_yaml
from vla_foundry.preprocessing.robotics.lerobot_recording import EpisodeRecorder, LeRobotFeatures
from vla_foundry.preprocessing.robotics.lerobot_writer import LeRobotWriter
from vla_foundry.quickstart import new_policy
from vla_foundry.quickstart.doctor import format_findings
from vla_foundry.quickstart.new_policy import create_policy_config
from vla_foundry.quickstart.samples import Finding
from vla_foundry.run_folder import lock_folder

JOINTS = ("shoulder", "elbow", "wrist_flex", "wrist_roll", "gripper")
FEATURES = LeRobotFeatures(
    fps=10,
    robot_type="arm",
    vectors={"observation.state": JOINTS, "action": JOINTS},
    cameras={f"observation.images.{name}": (48, 64) for name in ("top", "wrist")},
    video=False,
)
NUM_EPISODES, LENGTH = 12, 40


def record(
    folder: Path,
    change: Callable[[np.ndarray], np.ndarray] = lambda actions: actions,
    cameras: Sequence[str] = tuple(FEATURES.cameras),
) -> Path:
    """Record an arm that follows its commands a frame later; the first of the cameras sees another scene."""
    writer = LeRobotWriter(folder, FEATURES)
    for number in range(NUM_EPISODES):
        rng = np.random.default_rng(number)
        angles = (rng.normal(size=(LENGTH + 1, len(JOINTS))).cumsum(axis=0) / 10).astype(np.float32)
        part = folder.parent / f"{folder.name}-{number}"
        with EpisodeRecorder(part, FEATURES) as recorder:
            for time in range(LENGTH):
                vectors = {"observation.state": angles[time], "action": change(angles[time + 1].copy())}
                image = np.full((48, 64, 3), 20 + 5 * time, np.uint8)
                recorder.add(vectors, dict(zip(cameras, (image, 255 - image), strict=True)))
            recorder.finish(("pick the cup", "put it down")[number % 2])
        writer.add_episode(part)
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("data") / "arm")


def run(command: str, *more: str) -> int:
    """Run a printed command in this process; return its exit code."""
    program, *words = shlex.split(command)
    assert program == "vla-foundry"
    try:
        main([*words, *more])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_what_is_printed_trains_a_policy(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = create_policy_config(NewPolicyParams(dataset=str(recordings), output="mine"))
    preprocess, train, serve, doctor = (line.strip() for line in page.splitlines() if line.startswith("  vla-foundry "))
    encoder = Tokenizer.from_file("mine/tokenizer/tokenizer.json")
    assert encoder.decode(encoder.encode("pick the blåhaj").ids) == "pick the blåhaj"

    assert run(preprocess, "--num_workers", "0") == 0
    capsys.readouterr()
    assert run(doctor, "--json", "true") == 0
    findings = json.loads(capsys.readouterr().out)
    assert {finding["severity"] for finding in findings} == {"info"}
    assert any("a chunk of 10 actions lasts 1 s" in finding["text"] for finding in findings)

    short = {"total_train_samples": 8, "hparams.global_batch_size": 4, "hparams.per_gpu_batch_size": 4}
    short |= {"data.num_workers": 0, "num_checkpoints": 1, "hparams.precision": "fp32", "total_val_samples": 4}
    assert run(train, *(word for name, value in short.items() for word in (f"--{name}", str(value)))) == 0
    run_folder = Path(shlex.split(serve)[-1])
    config = json.loads((run_folder / "robotics.json").read_text(encoding="utf-8"))
    assert [*config["cameras"]] == ["observation.images.top", "observation.images.wrist"]
    assert [*config["fields"]] == ["action", "observation.state"]
    assert (run_folder / "checkpoints" / "step_00000002" / "model.safetensors").exists()


def test_odd_names_stay_data(recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dataset, output = 'the "arm\'s" {data} # é: x', "my 'policy' $HOME"
    shutil.copytree(recordings, dataset)
    path = Path(dataset, "meta", "info.json")
    info = json.loads(path.read_text(encoding="utf-8"))
    action = "action: {x} #\x7f"
    info["features"][action] = info["features"].pop("action") | {"names": ["a\nplugins: [b]", "\x85", "é", "[", '"']}
    path.write_text(json.dumps(info), encoding="utf-8")
    page = create_policy_config(NewPolicyParams(dataset=dataset, output=output))
    preprocess, train = (
        parse_yaml(Path(output, name).read_text(encoding="utf-8"), name) for name in ("preprocess.yaml", "train.yaml")
    )
    assert preprocess["source_episodes"] == [dataset]
    assert "plugins" not in preprocess
    assert preprocess["action_keys"] == train["data"]["action_fields"] == [action]
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("  vla-foundry ")]
    assert [words[-1] for words in commands] == [
        f"{output}/{name}" for name in ("preprocess.yaml", "train.yaml", "runs/policy", "train.yaml")
    ]


def test_an_output_is_created_once_on_this_machine(recordings: Path, tmp_path: Path) -> None:
    params = NewPolicyParams(dataset=str(recordings), output=str(tmp_path / "out"))
    (tmp_path / ".importing_out" / "left").mkdir(parents=True)  # by a process that was killed
    with (
        lock_folder(tmp_path / "out", what="output", flag="--output"),
        pytest.raises(ValueError, match="is in use by process"),
    ):
        create_policy_config(params)
    assert (tmp_path / ".importing_out" / "left").exists()
    create_policy_config(params)
    assert not (tmp_path / ".importing_out").exists()
    assert not (tmp_path / "out" / "left").exists()
    with pytest.raises(ValueError, match="must be a folder of this machine"):
        create_policy_config(replace(params, output="s3://bucket/out"))


@pytest.mark.parametrize(
    ("backbone", "memory", "microbatches", "train"),
    [
        ("small", (1, 12.0, "half of this machine's memory"), "have 64 samples, for 12 GiB", "vla-foundry train"),
        ("small", (1, 0.05, "half"), "have 1 sample, and do not fit: without activations", "vla-foundry train"),
        ("small", (6, 80.0, "GPU"), "have 16 samples, for 80 GiB (GPU)", "torchrun --standalone --nproc_per_node 4 -m"),
        ("small", (8, 0.5, "GPU"), "have 8 samples, for 0.5 GiB", "--distributed.fsdp true"),
        ("clip", (1, 12.0, "half"), "have 8 samples, a guess: without activations", "vla-foundry train"),
    ],
)
def test_microbatches_fit_into_the_memory_of_this_machine(
    recordings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backbone: str,
    memory: tuple[int, float, str],
    microbatches: str,
    train: str,
) -> None:
    monkeypatch.setattr(new_policy, "read_memory", lambda: memory)
    if backbone == "clip":
        CLIPConfig().save_pretrained(tmp_path / "clip")
        backbone = f"hf:{tmp_path / 'clip'}"
    page = create_policy_config(
        NewPolicyParams(dataset=str(recordings), backbone=backbone, output=str(tmp_path / "policy"))
    )
    line = next(line for line in page.splitlines() if line.startswith("microbatches "))
    assert line.startswith(f"microbatches {microbatches}")
    command = next(line for line in page.splitlines() if "train.yaml" in line and line.startswith("  "))
    assert train in command
    assert ("fsdp" in command) == ("fsdp" in train)


def test_published_backbones_and_runs_are_told_apart(recordings: Path, tmp_path: Path) -> None:
    CLIPConfig().save_pretrained(tmp_path / "clip")
    LlamaConfig().save_pretrained(tmp_path / "llama")
    params = NewPolicyParams(dataset=str(recordings), output=str(tmp_path / "out"))
    create_policy_config(replace(params, backbone=f"hf:{tmp_path / 'clip'}"))
    config = (tmp_path / "out" / "train.yaml").read_text(encoding="utf-8")
    assert "type: clip_backbone" in config
    assert not (tmp_path / "out" / "tokenizer").exists()
    for backbone, message in (
        (f"hf:{tmp_path / 'llama'}", "is of model_type 'llama', which is not an image-text model"),
        (str(tmp_path / "clip"), "is not a run"),
    ):
        with pytest.raises(ValueError, match=message):
            create_policy_config(replace(params, backbone=backbone, output=str(tmp_path / "other")))
    with pytest.raises(ValueError, match=r"out exists\. Choose another name"):
        create_policy_config(params)
    with pytest.raises(ValueError, match="is not a LeRobot dataset"):
        create_policy_config(replace(params, dataset=str(tmp_path), output=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


def test_the_doctor_finds_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(actions: np.ndarray) -> np.ndarray:
        actions[0] *= -1
        actions[1] *= 180 / np.pi
        actions[4] = 0.5
        return actions

    monkeypatch.chdir(tmp_path)
    record(tmp_path / "arm", spoil)
    create_policy_config(NewPolicyParams(dataset="arm", output="mine"))
    assert run("vla-foundry preprocess robotics --config_path mine/preprocess.yaml --num_workers 0") == 0
    statistics = Path("mine/shards/train/stats.json")
    values = json.loads(statistics.read_text(encoding="utf-8"))
    for name in values:
        values[name]["count"] = [count - 1 for count in values[name]["count"]]
    statistics.write_text(json.dumps(values), encoding="utf-8")
    doctor = "vla-foundry doctor --config_path mine/train.yaml --json true"
    flags = ["--data.normalization.method", "std", "--data.normalization.clip", "null"]
    flags += ["--data.lowdim_future_timesteps", "39", "--model.vision_language_backbone.vlm.vit.img_size", "192"]
    capsys.readouterr()
    code = run(doctor, *flags)
    findings: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    text = "\n".join(finding["text"] for finding in findings)
    assert code == 3, text
    for expected in (
        r"is of 439 samples, but mine/shards/train/manifest.jsonl has 440",
        "action[4 gripper] hardly varies",
        "column 0 of action moves against column 0 of observation.state",
        "column 1 of action follows column 1 of observation.state, but is 5",
        "images are enlarged",
        "of the predicted steps lie beyond the end of their episode",
    ):
        assert expected in text, text
    assert "validation samples drawn, 0 of them left out" in text, text
    # cameras that were swapped in another dataset
    record(tmp_path / "other", spoil, tuple(FEATURES.cameras)[::-1])
    preprocess = "vla-foundry preprocess robotics --config_path mine/preprocess.yaml --num_workers 0"
    assert run(f"{preprocess} --source_episodes other --output_dir other_shards") == 0
    both = "mine/shards/train/manifest.jsonl,other_shards/train/manifest.jsonl"
    capsys.readouterr()
    assert run(doctor, *flags, "--data.dataset_manifest", both, "--total_val_samples", "null") == 3
    assert "are they swapped?" in capsys.readouterr().out
    # validation data that cannot be read
    shard = next(Path("mine/shards/validation").glob("*.tar"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    assert run(doctor, *flags) == 2
    assert '"text": "validation: ' in capsys.readouterr().out
    shard.write_bytes(content)
    # statistics that are damaged, samples that cannot be used, and a config that does not resolve, are findings too
    assert run(doctor, "--data.seq_len", "12") == 2
    assert "do not fit into 12" in capsys.readouterr().out
    assert run(doctor, "--hparams.per_gpu_batch_size", "7") == 2
    assert "hparams.global_batch_size (64) must be a multiple" in json.loads(capsys.readouterr().out)[0]["text"]
    statistics.write_text("{", encoding="utf-8")
    assert run(doctor) == 2
    assert "stats.json" in json.loads(capsys.readouterr().out)[0]["text"]


def test_the_worst_comes_first() -> None:
    findings = [
        Finding(severity="info", text="fine"),
        Finding(severity="warning", text="odd", fix="--flag 1", dataset="left"),
        Finding(severity="error", text="wrong"),
    ]
    assert format_findings(findings) == [
        "error   wrong",
        "warning left: odd",
        "        fix: --flag 1",
        "info    fine",
        "1 errors, 1 warnings",
    ]
