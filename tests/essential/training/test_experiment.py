"""Whole runs with real data and a real model: what they write, resume and refuse. Kills: test_faults.py."""

import gzip
import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from vla_foundry.params.data.text import TextDataParams
from vla_foundry.params.ema import EMAParams
from vla_foundry.params.experiment import TrainExperimentParams, load_experiment_params_from_yaml, load_params_from_yaml
from vla_foundry.params.models.roles import ModelParams
from vla_foundry.run_folder import COMPLETE_NAME, find_checkpoint, list_step_folders
from vla_foundry.storage.local import IncompleteDownload
from vla_foundry.tensors import write_tensors
from vla_foundry.text.tokenizers import read_vocabulary
from vla_foundry.training import start
from vla_foundry.training.experiment import train
from vla_foundry.training.optimization.schedules import learning_rates
from vla_foundry.training.start import fetch_checkpoint, fetch_to_other_disks, find_start, write_configs
from vla_foundry.world import World


@pytest.fixture
def params(create_params: Callable[[str, Path], TrainExperimentParams], tmp_path: Path) -> TrainExperimentParams:
    """Six steps of 8 samples, three checkpoints."""
    return create_params("run", tmp_path / "runs")


def read_lines(run_folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]


def read_losses(run_folder: Path, kind: str = "train") -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_lines(run_folder, kind)]


def hash_tensors(step_folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a checkpoint: weights, average and moments."""
    hashes = {}
    for path in sorted(step_folder.rglob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                hashes[f"{path.name}:{name}"] = hashlib.sha256(file.get_tensor(name).tobytes()).hexdigest()
    return hashes


def test_the_saved_model_config_names_no_checkpoint_to_start_from(
    params: TrainExperimentParams, tmp_path: Path
) -> None:
    start: dict[str, Any] = {"resume_from_checkpoint": "s3://someone/run", "resume_weights_only": True}
    started = replace(params, model=replace(params.model, **start))
    write_configs(started, tmp_path)
    assert load_params_from_yaml(ModelParams, str(tmp_path / "config_model.yaml")) == params.model
    assert load_experiment_params_from_yaml(str(tmp_path / "config.yaml")) == started


def test_a_run_whose_first_step_fails_leaves_no_folder(
    params: TrainExperimentParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(params.save_path) / "run"

    def fail(*arguments: Any, **options: Any) -> None:
        assert not folder.exists()
        raise ValueError("this step fails")

    monkeypatch.setattr("vla_foundry.training.loop.train_step", fail)
    with pytest.raises(ValueError, match="this step fails"):
        train(replace(params, tensorboard=True), World())
    assert not folder.exists()


def test_a_run_folder_holds_all_that_a_run_is(params: TrainExperimentParams, manifest: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(manifest.parent, tmp_path / "data"))
    (data / "tokenizer").mkdir()
    tokenizer = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "!"}]}
    (data / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    params = replace(params, data=replace(params.data, dataset_manifest=[str(data / manifest.name)]))
    train(params, World())
    folder = Path(params.save_path) / "run"
    assert load_experiment_params_from_yaml(str(folder / "config.yaml")) == params
    assert load_params_from_yaml(ModelParams, str(folder / "config_model.yaml")) == params.model
    record = json.loads((folder / "experiment.json").read_text(encoding="utf-8"))
    assert record["starts"][0]["packages"]["torch"]
    # a checkpoint knows its tokenizer wherever it is copied
    state = json.loads((list_step_folders(folder)[0] / "state.json").read_text(encoding="utf-8"))
    kept = read_vocabulary(data / "tokenizer").to_record()
    assert state["inputs"] == record["starts"][0]["inputs"] == {"tokenizer": kept}
    assert str(Path.home()) not in json.dumps(record["starts"][0]["command"])
    assert [step.name for step in list_step_folders(folder)] == [f"step_{n:08d}" for n in (6, 4, 2)]
    assert [step for step, _ in read_losses(folder)] == [1, 2, 3, 4, 5, 6]
    # its tokenizer comes from the data again if its file is damaged
    (folder / "tokenizer" / "tokenizer.json").write_text("", encoding="utf-8")
    train(replace(params, resume="auto"), World())
    assert read_vocabulary(folder / "tokenizer").to_record() == kept
    record = json.loads((folder / "experiment.json").read_text(encoding="utf-8"))
    assert ([start["first_step"] for start in record["starts"]], record["end"]["step"]) == ([0, 6], 6)
    line = read_lines(folder)[-1]
    for key in ("lr", "grad_norm", "tokens_per_second", "samples_per_sec_per_gpu", "data_wait_share", "memory_gb"):
        assert line[key] >= 0
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".yaml", ".json", ".jsonl", ".safetensors", ""}
    for path in files:
        assert path.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"PK"), f"{path} is a pickle"


def test_faulty_samples_are_listed_once_over_a_resume_and_counted_at_the_end(
    params: TrainExperimentParams, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(manifest.parent, tmp_path / "data"))
    with tarfile.open(data / "shard_000001.tar") as tar:
        (tokens,) = (member for member in tar.getmembers() if member.name.endswith("tokens.u16"))
    with (data / "shard_000001.tar").open("r+b") as file:
        for record in (3, 20, 40):  # a token that the model does not have
            file.seek(tokens.offset_data + 2 * 33 * record)
            file.write(b"\xff\xff")
    lines = [json.loads(line) for line in (data / manifest.name).read_text(encoding="utf-8").splitlines()]
    counts = [{key: line[key] for key in ("shard", "num_sequences")} for line in lines]
    (data / manifest.name).write_text("".join(json.dumps(line) + "\n" for line in counts), encoding="utf-8")
    changed = {"dataset_manifest": [str(data / manifest.name)], "vocab_size": 64, "allow_multiple_epochs": True}
    whole = replace(params, data=replace(params.data, **changed))
    train(replace(whole, name="whole", total_train_samples=96), World())
    path = Path(params.save_path) / "whole" / "data_faults.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    assert f"{len(lines)} faulty samples were replaced; see {path}\n" in capsys.readouterr().out
    assert sorted(json.loads(line)["member"] for line in lines) == ["record 20", "record 3", "record 40"]
    assert {json.loads(line)["reason"] for line in lines} == {"unknown token"}
    train(whole, World())
    train(replace(whole, total_train_samples=96, resume="auto"), World())
    resumed = Path(params.save_path) / "run" / "data_faults.jsonl"
    assert resumed.read_text(encoding="utf-8").splitlines() == lines


def test_a_run_folder_is_never_overwritten(params: TrainExperimentParams) -> None:
    train(params, World())
    config = Path(params.save_path) / "run" / "config.yaml"
    before = config.read_bytes()
    longer = replace(params, total_train_samples=80)
    with pytest.raises(ValueError, match=r"has checkpoints\. Continue it with --resume auto"):
        train(longer, World())
    assert config.read_bytes() == before


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def test_an_attempt_without_a_checkpoint_leaves_its_name_free_and_nothing_of_its_data(
    params: TrainExperimentParams, tmp_path: Path
) -> None:
    folder, notices = tmp_path / "run", []
    for resume, kept in ((None, {"checkpoints", "experiment.json"}), ("auto", {"checkpoints", "metrics.jsonl"})):
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("tokenizer", "checkpoints"):
            (folder / name).mkdir(parents=True)
        for name in ("config.yaml", "config_model.yaml", "stats.json", "metrics.jsonl", "experiment.json"):
            (folder / name).touch()
        assert find_start(replace(params, resume=resume), folder, notices.append) is None
        left = {path.name for path in folder.iterdir()}
        assert "tokenizer" not in left
        assert "stats.json" not in left
        assert ("metrics.jsonl" in left) == ("metrics.jsonl" in kept)
    assert len(notices) == 2
    assert "attempt without a checkpoint" in notices[0]


@pytest.mark.parametrize("stranger", ["thesis.tex", "checkpoints/checkpoint_5.pt"])
def test_a_folder_of_something_else_is_neither_used_nor_cleared(
    stranger: str, params: TrainExperimentParams, tmp_path: Path
) -> None:
    for name in ("config.yaml", "stats.json", stranger):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"holds {stranger}, which is not part of a run\. Choose another --name"):
        find_start(replace(params, resume=None), tmp_path, print)
    find_start(replace(params, resume="auto"), tmp_path, print)
    assert (tmp_path / "stats.json").exists()


def test_a_machine_without_the_checkpoint_fetches_it_or_says_what_is_missing(
    create_params: Callable[[str, Path], TrainExperimentParams], tmp_path: Path
) -> None:
    params = create_params("run", tmp_path)
    lost = tmp_path / "run/checkpoints/step_00000002"
    with pytest.raises(ValueError, match=r"Not every machine has the checkpoint .*step_00000002.*--remote_sync"):
        fetch_to_other_disks(params, World(), tmp_path / "run", lost)
    lost.mkdir(parents=True)
    fetch_to_other_disks(params, World(), tmp_path / "run", lost)


@pytest.mark.parametrize("damage", [cut_off, flip_a_byte])
@pytest.mark.parametrize("pattern", ["model.safetensors", "training_state/*.safetensors", "state.json", COMPLETE_NAME])
def test_a_damaged_newest_checkpoint_is_skipped(
    params: TrainExperimentParams, damage: Callable[[Path], None], pattern: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train(params, World())
    folder = Path(params.save_path) / "run"
    newest = list_step_folders(folder)[0]
    expected = (hash_tensors(newest), read_losses(folder))
    target = next(newest.glob(pattern))
    damage(target)
    capsys.readouterr()
    train(replace(params, resume="auto"), World())
    notices = [line for line in capsys.readouterr().out.splitlines() if "is skipped" in line]
    assert len(notices) == 1
    assert str(target) in notices[0]
    assert (hash_tensors(list_step_folders(folder)[0]), read_losses(folder)) == expected


def test_changed_data_is_refused_with_what_changed_or_accepted(
    params: TrainExperimentParams, capsys: pytest.CaptureFixture[str]
) -> None:
    train(params, World())
    changed = replace(params, resume="auto", total_train_samples=64, data=replace(params.data, seed=4))
    with pytest.raises(ValueError, match=r"data\.seed was 3, is 4"):
        train(changed, World())
    capsys.readouterr()
    train(replace(changed, data=replace(changed.data, accept_changed_data=True)), World())
    out = capsys.readouterr().out
    assert "data.seed was 3, is 4" in out
    assert "note: total_train_samples was 48, is 64" in out
    assert [step for step, _ in read_losses(Path(params.save_path) / "run")] == list(range(1, 9))


def test_another_run_goes_on_from_a_checkpoint_or_from_its_weights_alone(params: TrainExperimentParams) -> None:
    train(params, World())
    first = Path(params.save_path) / "run"
    step_folder = list_step_folders(first)[1]
    model = replace(params.model, resume_from_checkpoint=str(step_folder))
    train(replace(params, name="more", model=model), World())
    assert read_losses(first.with_name("more")) == read_losses(first)[4:]
    fresh = replace(params, name="fresh", model=replace(model, resume_weights_only=True))
    train(fresh, World())
    losses = read_losses(first.with_name("fresh"))
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    assert losses[0][1] < read_losses(first)[0][1]
    weights = replace(model, resume_from_checkpoint=str(step_folder / "model.safetensors"))
    other = replace(params, name="other", model=weights)
    with pytest.raises(ValueError, match="holds only weights"):
        train(other, World())


def test_old_checkpoints_are_deleted_beyond_the_limit_once_a_newer_one_verifies(
    params: TrainExperimentParams, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limited = replace(params, num_checkpoints=6, max_checkpoint_limit=2, checkpoint_async=True)
    train(limited, World())
    folder = Path(params.save_path) / "run"
    assert [path.name for path in list_step_folders(folder)] == ["step_00000006", "step_00000005"]

    def write_badly(path: Path, *rest: Any, **options: Any) -> tuple[int, str]:
        size, digest = write_tensors(path, *rest, **options)
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"?")
        return size, digest

    monkeypatch.setattr("vla_foundry.training.checkpoint_writer.write_tensors", write_badly)
    train(replace(limited, resume="auto", total_train_samples=56, num_checkpoints=7), World())
    assert len(list_step_folders(folder)) == 3
    assert "step_00000007 is damaged, so older checkpoints are kept" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("is_linked", [False, True])
def test_a_limit_keeps_the_checkpoint_just_saved_where_damaged_ones_are_of_later_steps(
    params: TrainExperimentParams, capsys: pytest.CaptureFixture[str], is_linked: bool
) -> None:
    train(params, World())
    folders = list_step_folders(Path(params.save_path) / "run")
    for folder in folders[:2]:
        (folder / "model.safetensors").write_bytes(b"")
    if is_linked:  # a folder that cannot be deleted
        folders[2].rename(folders[2].with_name("elsewhere"))
        folders[2].symlink_to(folders[2].with_name("elsewhere"))
    train(replace(params, resume="auto", total_train_samples=24, num_checkpoints=1, max_checkpoint_limit=1), World())
    assert find_checkpoint(folders[0].parent.parent).name == "step_00000003"
    assert folders[2].exists() is is_linked
    output = " ".join(capsys.readouterr().out.split())
    assert (f"warning: {folders[2].name} is beyond the limit, but stays: " in output) is is_linked


def test_a_checkpoint_is_saved_when_some_minutes_have_passed(params: TrainExperimentParams) -> None:
    folder = Path(params.save_path) / "run"
    train(replace(params, num_checkpoints=1, checkpoint_every_minutes=1e-6), World())
    assert len(list_step_folders(folder)) == 6
    assert read_losses(folder, "train")[-1][0] == 6
    train(replace(params, name="slow", num_checkpoints=1, checkpoint_every_minutes=10.0), World())
    assert len(list_step_folders(folder.with_name("slow"))) == 1


def test_the_run_is_copied_away_and_goes_on_from_the_copy(params: TrainExperimentParams, tmp_path: Path) -> None:
    copied = replace(params, remote_sync=str(tmp_path / "remote"), ema=EMAParams(enabled=True))
    train(replace(copied, total_train_samples=32), World())
    local, remote = Path(params.save_path) / "run", tmp_path / "remote" / "run"
    assert hash_tensors(list_step_folders(remote)[0]) == hash_tensors(list_step_folders(local)[0])
    assert (remote / "metrics.jsonl").read_bytes() == (local / "metrics.jsonl").read_bytes()
    shutil.rmtree(local)
    train(replace(copied, resume="auto"), World())
    assert [step for step, _ in read_losses(local)] == [1, 2, 3, 4, 5, 6]
    assert (remote / "metrics.jsonl").read_bytes() == (local / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("fault", [None, IncompleteDownload("cut off"), FileNotFoundError("gone")])
def test_a_damaged_copy_is_skipped_for_an_older_one(
    params: TrainExperimentParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception | None
) -> None:
    copied = replace(params, remote_sync=str(tmp_path / "remote"), num_checkpoints=6)
    train(copied, World())
    newest, second = list_step_folders(tmp_path / "remote" / "run")[:2]
    weights = newest / "model.safetensors"
    download = start.download

    def download_badly(source: str, target: str) -> None:
        if fault is not None and source == str(weights):
            raise fault
        download(source, target)

    monkeypatch.setattr(start, "download", download_badly)
    if fault is None:
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    fetched = tmp_path / "fetched"
    notes: list[str] = []
    found = fetch_checkpoint(str(tmp_path / "remote" / "run"), fetched, notify=notes.append)
    assert found is not None
    assert found.name == second.name
    assert hash_tensors(found) == hash_tensors(second)
    assert len(notes) == 1
    assert f"{newest.name} is not usable" in notes[0]
    assert not [path for path in fetched.rglob("*") if path.name.startswith(".writing")]


def test_a_copy_that_fails_is_said_and_fails_the_run_at_its_end(
    params: TrainExperimentParams, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "remote").write_text("a file where a folder should be", encoding="utf-8")
    copied = replace(params, remote_sync=str(tmp_path / "remote"))
    with pytest.raises(ValueError, match=r"The run is done, but .* lacks part of it"):
        train(copied, World())
    assert "it will be tried again" in capsys.readouterr().out
    assert list_step_folders(Path(params.save_path) / "run")[0].name == "step_00000006"


def test_two_ranks_of_the_command_line_train_as_one_process(launch, params, tmp_path: Path) -> None:
    """The real entry point under torchrun, with a real model and data, sharded, against one process."""
    alone = replace(params, hparams=replace(params.hparams, precision="fp64", per_gpu_batch_size=2))
    train(alone, World())
    config = Path(params.save_path) / "run" / "config.yaml"
    main = Path(__file__).parents[3] / "vla_foundry" / "main.py"
    done = launch(2, str(main), "--config_path", str(config), "--name", "two", "--distributed.fsdp", "true")
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (read_losses(Path(params.save_path) / name) for name in ("run", "two"))
    assert [step for step, _ in two] == [step for step, _ in one]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-9)


def test_ranks_train_on_uneven_tars_without_a_manifest_and_the_run_continues(
    launch, params: TrainExperimentParams, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ranks under torchrun, one of which has far fewer samples; then one process."""
    for number, count in enumerate((3, 40)):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for row in range(count):
                content = gzip.compress(json.dumps([(row + place) % 64 for place in range(33)]).encode())
                member = tarfile.TarInfo(f"{row:06d}.json.gz")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    data = TextDataParams(
        sequential_shards=[str(tmp_path / "*.tar")], seq_len=32, allow_multiple_epochs=True, num_workers=0
    )
    sequential = replace(
        params,
        data=data,
        total_train_samples=32,
        num_checkpoints=1,
        hparams=replace(params.hparams, per_gpu_batch_size=2),
    )
    write_configs(sequential, tmp_path / "config")
    main = Path(__file__).parents[3] / "vla_foundry" / "main.py"
    done = launch(2, str(main), "--config_path", str(tmp_path / "config" / "config.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    train(replace(sequential, total_train_samples=48, resume="auto"), World())
    assert "data.sequential_shards do not resume exactly. They continue in pass " in capsys.readouterr().out
    losses = read_losses(Path(params.save_path) / "run")
    assert [step for step, _ in losses] == list(range(1, 7))
    assert losses[-1][1] < losses[0][1]


def test_training_needs_none_of_the_optional_packages(params: TrainExperimentParams) -> None:
    """A process in which they can not be imported trains; nothing that it imports is one of them."""
    words = ("--config_path", str(Path(params.save_path) / "run" / "config.yaml"), "--name", "bare", "--wandb", "null")
    train(params, World())
    script = (
        "import sys\n"
        "for name in ('ray', 'boto3', 'wandb', 'tensorboard', 'pyarrow', 'av', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "from vla_foundry.main import main\n"
        f"main({list(words)!r})\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read_losses(Path(params.save_path) / "bare") == read_losses(Path(params.save_path) / "run")


@pytest.mark.parametrize("content", [b"", b"\x00\x00", b"\xff{: ["])
def test_a_damaged_side_file_is_rebuilt_and_said(
    params: TrainExperimentParams, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(params, total_train_samples=32), World())
    folder = Path(params.save_path) / "run"
    losses = read_losses(folder)
    names = ("config.yaml", "config_model.yaml", "experiment.json")
    for name in names:
        (folder / name).write_bytes(content)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(content + b"\n")
    capsys.readouterr()
    train(replace(params, resume="auto"), World())
    out = capsys.readouterr().out
    for said in (f"{folder / name} is rewritten" for name in (names[0], names[2])):
        assert said in out
    assert "1 damaged lines" in out
    assert read_losses(folder)[:4] == losses[:4]
    assert [step for step, _ in read_losses(folder)] == [1, 2, 3, 4, 5, 6]
    assert load_experiment_params_from_yaml(str(folder / "config.yaml")).total_train_samples == 48
    assert load_params_from_yaml(ModelParams, str(folder / "config_model.yaml")) == params.model
    assert json.loads((folder / "experiment.json").read_text(encoding="utf-8"))["starts"][0]["first_step"] == 4


def test_files_of_a_run_folder_are_never_written_in_place(params: TrainExperimentParams) -> None:
    """A reader of the first start's file still reads it whole, as the second start replaces it."""
    train(replace(params, total_train_samples=32), World())
    folder = Path(params.save_path) / "run"
    names = ("config.yaml", "config_model.yaml", "experiment.json", "metrics.jsonl")
    opened = {name: (folder / name).open("rb") for name in names}
    before = {name: (folder / name).read_bytes() for name in names}
    train(replace(params, resume="auto"), World())
    for name, file in opened.items():
        with file:
            assert file.read() == before[name]
        assert (folder / name).read_bytes() != before[name] or name == "config_model.yaml"


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Writing past `num_bytes` fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("limit", "name", "is_async"),
    [
        (100_000, "model.safetensors", False),
        (350_000, "training_state", False),
        (350_000, "training_state", True),
        (1_000, "", False),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line_and_the_run_resumes(
    params: TrainExperimentParams, limit: int, name: str, is_async: bool
) -> None:
    """The weights take 249 kB, and the optimizer's moments twice that."""
    message = rf"step_00000004/{name}\S*: .*A checkpoint needs \d\.\d MB, and [\d,.]+ MB are free"
    folder = Path(params.save_path) / "run"
    train(replace(params, total_train_samples=16, num_checkpoints=1), World())
    resumed = replace(params, resume="auto", checkpoint_async=is_async)
    with file_size_limit(limit), pytest.raises((ValueError, OSError), match=message if name else "yaml"):
        train(resumed, World())
    assert [step.name for step in list_step_folders(folder)] == ["step_00000002"]
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]
    train(resumed, World())
    assert [step for step, _ in read_losses(folder)] == [1, 2, 3, 4, 5, 6]


def test_a_longer_budget_says_how_the_learning_rate_jumps(
    params: TrainExperimentParams, capsys: pytest.CaptureFixture[str]
) -> None:
    train(params, World())
    capsys.readouterr()
    longer = replace(params, total_train_samples=96, data=replace(params.data, allow_multiple_epochs=True))
    train(replace(longer, resume="auto"), World())
    line = (
        "the learning rate jumps from 0 at step 6 to {:.3g} at step 7, because its schedule now covers 12 steps, not 6."
    )
    assert f"note: {line.format(learning_rates(params.hparams, 12)[6])}" in capsys.readouterr().out
