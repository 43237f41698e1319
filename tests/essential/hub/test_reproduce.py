"""A recorded run is trained again, and compared with its record."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.essential.hub_server import Hub
from vla_foundry.cli import main as cli
from vla_foundry.hub.push import push
from vla_foundry.hub.reproduce import compare_losses, main
from vla_foundry.params.commands.sharing import HubPushParams
from vla_foundry.shards import sha256_of


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_record_holds_what_a_run_is_made_of(trained: Path, dataset: Path) -> None:
    record = read(trained / "experiment.json")
    assert record["config"]["hparams"]["lr"] == 0.01
    origins = record["origins"]
    assert (origins["total_train_samples"], origins["hparams.lr"].endswith("job.yaml:1")) == ("command line", True)
    assert origins["data.vocab_size"].startswith("resolved from")
    assert record["seeds"] == {"hparams.seed": 42, "data.seed": record["config"]["data"]["seed"]}
    assert record["packages"]["torch"] == record["starts"][0]["packages"]["torch"]
    with (dataset / "manifest.jsonl").open("rb") as file:
        assert record["data"]["data"][0]["manifest_sha256"] == sha256_of(file)
    assert record["end"] | {"time": None} == {"time": None, "step": 6, "samples": 48, "stopped_by": None}
    assert [step for step, _ in record["losses"]["train"]] == [1, 2, 3, 4, 5, 6]


def test_a_run_is_reproduced_to_the_last_bit(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main([str(trained), "--output", str(tmp_path / "again")])
    said = capfd.readouterr().out
    assert "train loss: 6 of 6 are the same numbers\n" in said
    assert said.splitlines()[-1] == f"reproduced: {tmp_path / 'again' / 'tiny'}"
    assert (
        read(tmp_path / "again" / "tiny" / "experiment.json")["losses"] == read(trained / "experiment.json")["losses"]
    )


def test_what_differs_is_named_before_anything_is_trained(
    trained: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = read(trained / "experiment.json")
    record["packages"] |= {"torch": "1.0", "gone": "2"}
    record["starts"][0] |= {"python": "3.0.0", "device": "abacus"}
    moved = shutil.copytree(dataset, tmp_path / "data" / "corpus")
    with (moved / "manifest.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n")
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    main([str(path), "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    assert "differs: package torch was 1.0, is" in " ".join(lines)
    assert "differs: package gone was 2, is absent" in lines
    assert any(line.startswith("differs: device was abacus, is ") for line in lines)
    with pytest.raises(ValueError, match=r"The data is not .*: the manifest of .* has another SHA-256"):
        main([str(path), "--data_folder", str(tmp_path / "data"), "--output", str(tmp_path / "again")])
    assert not (tmp_path / "again").exists()


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_published_record_finds_its_data_elsewhere(
    trained: Path, dataset: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    push(HubPushParams(source=str(trained), repo="org/tiny"))
    main(["hf://org/tiny", "--data_folder", str(dataset.parent), "--dry_run"])
    assert "manifest" not in capsys.readouterr().out
    main(["hf://org/tiny", "--dry_run"])
    assert "differs: the manifest of corpus/manifest.jsonl is missing" in capsys.readouterr().out


def test_losses_are_compared_within_a_tolerance(capsys: pytest.CaptureFixture[str]) -> None:
    before = [[1, 2.0], [2, 1.0], [3, None]]
    assert compare_losses("train", before, [[1, 2.0], [2, 1.0], [3, None]], 0.0) == []
    assert compare_losses("train", before, [[1, 2.0], [2, 1.001], [3, None]], 0.01) == []
    assert "1.001 is" in compare_losses("train", before, [[1, 2.0], [2, 1.001], [3, None]], 1e-4)[0]
    assert "step 3" in compare_losses("train", before, [[1, 2.0], [2, 1.0], [3, 4.0]], 1.0)[0]
    assert compare_losses("train", before, [[1, 2.0]], 1.0) == ["there is no train loss of step 2"]
    assert "largest relative difference is 0.001, at step 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"end": None}, "the run has not ended"),
        ({"end": {"stopped_by": "SIGTERM"}}, "the run was stopped by SIGTERM"),
        ({"name": "../../x"}, "a name, start, loss or dataset in it is strange"),
        ({"starts": []}, "is strange"),
        ({"starts": [3]}, "is strange"),
        ({"packages": 3}, "is strange"),
        ({"losses": {"train": [["1", 2]]}}, "is strange"),
        ({"losses": {"other": []}}, "is strange"),
        ({"data": {"data": [3]}}, "is strange"),
        ({"config": {"data": 3}}, "is strange"),
        ({"config": {"data": {"datasets": {"a": 3}}}}, "is strange"),
        ({"config": {"data": {"dataset_manifest": [3]}}}, "is strange"),
        ({"config": []}, "it has no 'config'"),
    ],
)
def test_a_record_of_no_whole_run_is_refused(
    trained: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps(read(trained / "experiment.json") | change), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        main([str(path)])


def test_a_record_runs_no_code(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "evil.py").write_text("open('ran', 'w')", encoding="utf-8")
    record = read(trained / "experiment.json")
    record["config"]["plugins"] = ["evil"]
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(SystemExit) as error:
        cli(["reproduce", str(path), "--output", str(tmp_path / "again")])
    assert error.value.code == 2
    assert "needs the plug-in evil, and a record runs no code by itself" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
