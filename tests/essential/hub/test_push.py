"""A run goes to the hub in one commit, without secrets and paths of this machine, and works from there."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.essential.hub_server import TOKEN, Hub
from vla_foundry.hub.command import main
from vla_foundry.hub.content import collect
from vla_foundry.hub.push import push
from vla_foundry.hub.shards import read_header
from vla_foundry.importing.merge import merge
from vla_foundry.inference.generate import main as generate
from vla_foundry.models import create_model, load_model_checkpoint
from vla_foundry.params import ModelParams, load_experiment_params_from_yaml, load_params_from_yaml
from vla_foundry.params.commands.runs import MergeParams
from vla_foundry.params.commands.sharing import HubPushParams
from vla_foundry.record import record_evaluation
from vla_foundry.run_folder import find_checkpoint
from vla_foundry.storage.local import size_and_sha256
from vla_foundry.tensors import Part, write_tensors

# of huggingface_hub's own client
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
PROMPT = ("--prompt", "the cat", "--max_new_tokens", "6", "--temperature", "0", "--device", "cpu")


def send(source: Path, **options: Any) -> str:
    return push(HubPushParams(source=str(source), **{"repo": "org/tiny"} | options))


def test_a_pushed_run_generates_the_same_text_from_the_hub_and_from_a_copy(
    trained: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["push", str(trained), "--repo", "org/tiny", "--license", "mit", "--max_shard_gb", "0.00002"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("hf://org/tiny@")
    assert len(hub.repositories["model", "org/tiny"]) == 2  # one commit after the first, empty one
    names = set(hub.files("org/tiny"))
    assert {
        "README.md",
        "passport.json",
        "config.yaml",
        "config_model.yaml",
        "experiment.json",
        "metrics.jsonl",
    } < names
    assert not [name for name in names if "training_state" in name]
    assert len([name for name in names if "/model-0" in name]) > 2
    texts = []
    main(["pull", "hf://org/tiny", "--output", str(tmp_path / "copy")])
    capsys.readouterr()
    for place in (str(trained), "hf://org/tiny", str(tmp_path / "copy")):
        generate(["--checkpoint", place, *PROMPT])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    before = load_experiment_params_from_yaml(str(trained / "config.yaml"))
    after = load_experiment_params_from_yaml("hf://org/tiny/config.yaml")
    assert (after.model, after.hparams) == (before.model, before.hparams)
    assert (after.save_path, after.data.dataset_manifest) == ("experiments", ["corpus/manifest.jsonl"])
    # another run can start from it
    model = create_model(load_params_from_yaml(ModelParams, "hf://org/tiny/config_model.yaml"))
    load_model_checkpoint(model, "hf://org/tiny", use_ema=True)


def test_no_secret_and_no_local_path_is_in_any_file(
    copy_run: Callable[[], Path], hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = copy_run()
    monkeypatch.setenv("WANDB_API_KEY", "marker-of-a-secret-key")
    (run / "wandb_id.txt").write_text("marker-of-a-secret-key", encoding="utf-8")  # not a file that is published
    send(run)
    for name, content in hub.files("org/tiny").items():
        for mark in (str(tmp_path), str(tmp_path.parents[1]), str(Path.home()) + "/", "marker-of-a-secret", TOKEN):
            assert mark.encode() not in content, (name, mark)
    # and the record says as much as before
    record = json.loads(hub.files("org/tiny")["experiment.json"])
    assert record["config"]["data"]["dataset_manifest"] == ["corpus/manifest.jsonl"]
    assert record["origins"]["hparams.lr"].endswith("job.yaml:1")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", "marker-of-a-secret-key", "the value of a secret in this environment"),
        ("tokenizer/notes.txt", "hf_" + "a1B2" * 8, "what looks like a Hugging Face token"),
        ("processor/chat_template.jinja", "AKIA" + "ABCD" * 4, "what looks like an AWS key"),
        ("evaluation/x.jsonl", "s3://me:word@store", "what looks like a password in a URL"),
        ("evaluation/x.log", "see /home/somebody/notes", "a local path"),
        ("evaluation/secrets.env", "KEY=x", "secrets, by its name"),
    ],
)
def test_a_secret_stops_a_push_before_anything_is_sent(
    copy_run: Callable[[], Path], hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str, text: str, message: str
) -> None:
    run = copy_run()
    monkeypatch.setenv("SERVICE_TOKEN", "marker-of-a-secret-key")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name} holds {message}") as error:
        send(run)
    assert text not in str(error.value)
    assert hub.requests == []


def test_a_killed_push_goes_on_where_it_was(trained: Path, hub: Hub) -> None:
    hub.upload_s = 0.5
    words = ["push", str(trained), "--repo", "org/tiny", "--max_shard_gb", "0.00001"]
    command = [sys.executable, "-c", f"from vla_foundry.cli import main; main(['hub', *{words!r}])"]
    started = subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(hub.large) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    started.kill()
    started.wait()
    time.sleep(0.6)  # what the server has received of it
    assert len(hub.large) >= 2
    assert list(hub.files("org/tiny")) == [".gitattributes"]
    there, hub.requests, hub.upload_s = set(hub.large), [], 0.0
    main(words)
    sent = {request.rpartition("/")[2] for request in hub.requests if request.startswith("PUT")}
    assert sent
    assert not sent & there


def test_a_second_push_sends_what_changed_and_takes_away_what_is_gone(copy_run: Callable[[], Path], hub: Hub) -> None:
    run = copy_run()
    (run / "evaluation").mkdir()
    (run / "evaluation" / "old.json").write_text("{}", encoding="utf-8")
    send(run)
    hub.commit("model", "org/tiny", [{"key": "file", "value": {"path": "notes.md", "content": "aGk="}}])
    (run / "evaluation" / "old.json").unlink()
    hub.requests.clear()
    send(run)
    assert "evaluation/old.json" not in hub.files("org/tiny")
    assert "notes.md" in hub.files("org/tiny")
    assert not [request for request in hub.requests if request.startswith("PUT")]


def test_the_card_tells_what_the_run_is(copy_run: Callable[[], Path], hub: Hub) -> None:
    run = copy_run()
    metrics = {"drawer-open": {"value": 0.75, "interval": [0.6, 0.87], "n": 40}}
    record_evaluation(run, {"name": "metaworld", "metrics": metrics, "settings": {"open_loop_steps": 8}})
    send(run, license="apache-2.0", datasets=["org/corpus"], base_model="org/base", tags=["small"])
    card = hub.files("org/tiny")["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "license": "apache-2.0",
        "library_name": "vla_foundry",
        "pipeline_tag": "text-generation",
        "tags": ["vla_foundry", "transformer", "small"],
        "datasets": ["org/corpus"],
        "base_model": ["org/base"],
    }
    for text in ("| drawer-open | 0.75 | 0.6 to 0.87 | 40 |", "48 samples in 6 steps", "/corpus` (text)"):
        assert text in card
    assert "vla-foundry generate --checkpoint hf://org/tiny" in card
    assert "evaluation/metaworld.json" in hub.files("org/tiny")


def test_shards_are_published_and_trained_on_from_the_hub(dataset: Path, hub: Hub, tmp_path: Path) -> None:
    from vla_foundry.data import create_dataloader
    from vla_foundry.params.data.text import TextDataParams

    push(HubPushParams(source=str(dataset), repo="org/corpus"))
    files = hub.files("org/corpus", "dataset")
    assert files["shard_000000.tar"] == (dataset / "shard_000000.tar").read_bytes()
    assert "| `manifest.jsonl` | 64 | 2 |" in files["README.md"].decode()
    data = TextDataParams(dataset_manifest=["hf://datasets/org/corpus/manifest.jsonl"], seq_len=16, num_workers=0)
    loader = create_dataloader(data, global_batch_size=4, per_gpu_batch_size=4, seed=1)
    try:
        assert next(loader.microbatches(0))["input_ids"].shape == (4, 17)
    finally:
        loader.close()
    main(["pull", "datasets/org/corpus", "--output", str(tmp_path / "copy")])
    assert (tmp_path / "copy" / "manifest.jsonl").read_bytes() == (dataset / "manifest.jsonl").read_bytes()


def test_a_lerobot_dataset_goes_as_it_is(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for name, text in {
        "meta/info.json": '{"codebase_version": "v3.0", "robot_type": "arm", "fps": 20, "total_episodes": 3}',
        "data/chunk-000/file-000.parquet": "PAR1",
        ".cache/x": "no",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    assert push(HubPushParams(source=str(folder), repo="org/set")).startswith("hf://datasets/org/set@")
    files = hub.files("org/set", "dataset")
    assert set(files) == {
        ".gitattributes", "README.md", "passport.json", "meta/info.json", "data/chunk-000/file-000.parquet",
    }  # fmt: skip
    assert "- robot_type: arm" in files["README.md"].decode()
    # what was pulled is published anew, and arrives again
    for number in range(2):
        main(["pull", "datasets/org/set", "--output", str(tmp_path / f"copy{number}")])
        send(tmp_path / f"copy{number}", repo="org/set")
    assert (tmp_path / "copy1/meta/info.json").read_bytes() == (folder / "meta/info.json").read_bytes()


def test_what_cannot_be_published_is_said_in_one_line(
    trained: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="neither a run"):
        send(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        send(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"is a file\. Give the folder of a run"):
        send(trained / "config.yaml")
    (tmp_path / "x.safetensors").write_bytes((13).to_bytes(8, "little") + b'{"a": [1, 2]}')
    with pytest.raises(ValueError, match="its header is wrong about 'a'"):
        read_header(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="org/tiny has no revision 'nope', so nothing was published"):
        send(trained, revision="nope")
    assert hub.repositories == {}
    (tmp_path / "manifest.jsonl").write_text('{"shard": "a", "num_sequences": 1}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"lists a\.tar, which is missing"):
        send(tmp_path)
    (tmp_path / "a.tar").symlink_to(trained / "config.yaml")
    with pytest.raises(ValueError, match="is a link to a file elsewhere"):
        send(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match=r"^hf://org/tiny: .*401 Unauthorized"):
        send(trained)
    with pytest.raises(ValueError, match="repo 'tiny' must be ORG/NAME"):
        HubPushParams(source="x", repo="tiny")


def test_sharded_weights_are_published_and_merged_as_whole_tensors(copy_run, tmp_path: Path) -> None:
    run = copy_run()
    step_folder = find_checkpoint(run)
    (tmp_path / "scratch").mkdir()
    before = {name: load_file(step_folder / name) for name in ("model.safetensors", "ema.safetensors")}
    files = json.loads((step_folder / "COMPLETE").read_text(encoding="utf-8"))
    for name, tensors in before.items():
        stem = name.removesuffix(".safetensors")
        names = [f"{stem}-{number:05d}-of-00002.safetensors" for number in (1, 2)]
        for number, part in enumerate(names):
            halves = {key: value.tensor_split(2) for key, value in tensors.items()}
            parts = {
                key: Part(half[number].shape, half[number].dtype, half[number].detach, number * len(half[0]))
                for key, half in halves.items()
            }
            files[part] = write_tensors(step_folder / part, parts, marks_parts=True)
        (step_folder / f"{name}.index.json").write_text(json.dumps({"files": names}), encoding="utf-8")
        files[f"{name}.index.json"] = size_and_sha256(step_folder / f"{name}.index.json")
        (step_folder / name).unlink()
        del files[name]
    (step_folder / "COMPLETE").write_text(json.dumps(files), encoding="utf-8")
    content = collect(str(run), tmp_path / "scratch", max_shard_gb=5.0)
    merged = merge(MergeParams(checkpoint=str(run), output=str(tmp_path / "merged")))
    for name, tensors in before.items():
        published = content.files[f"checkpoints/{step_folder.name}/{name}"]
        for path in (published, merged / name):
            found = load_file(path)
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[key], value) for key, value in tensors.items())
    with pytest.raises(ValueError, match="nothing to merge"):
        merge(MergeParams(checkpoint=str(tmp_path / "merged"), output=str(tmp_path / "again")))
