"""A repository arrives whole and unchanged, or nothing appears."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.essential.hub_server import Entry, Hub
from vla_foundry.hub.command import main
from vla_foundry.hub.push import push
from vla_foundry.params.commands.sharing import HubPullParams, HubPushParams

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
WEIGHTS = "checkpoints/step_00000006/model.safetensors"


@pytest.fixture
def published(trained: Path, hub: Hub) -> Hub:
    """The hub, with the run."""
    push(HubPushParams(source=str(trained), repo="org/tiny"))
    hub.requests.clear()
    return hub


def fetch(output: Path, source: str = "org/tiny") -> None:
    main(["pull", source, "--output", str(output)])


def test_a_broken_download_goes_on_where_it_was(published: Hub, tmp_path: Path) -> None:
    published.cut[WEIGHTS] = 3000
    fetch(tmp_path / "copy")
    assert (tmp_path / "copy" / WEIGHTS).read_bytes() == published.files("org/tiny")[WEIGHTS]
    assert not (tmp_path / "copy" / ".cache").exists()
    with pytest.raises(ValueError, match=r"output .* exists"):
        fetch(tmp_path / "copy")


def test_a_killed_pull_goes_on_and_leaves_no_folder(published: Hub, tmp_path: Path) -> None:
    published.download_s = 1.5
    words = ["pull", "org/tiny", "--output", str(tmp_path / "copy")]
    command = [sys.executable, "-c", f"from vla_foundry.cli import main; main(['hub', *{words!r}])"]
    started = subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    # what is complete has notes
    notes = tmp_path / ".pulling_copy/.cache/huggingface/download"
    while time.monotonic() < deadline and not any(notes.glob("config*.metadata")):
        time.sleep(0.02)
    started.kill()
    started.wait()
    assert not (tmp_path / "copy").exists()
    done = {path.stem for path in notes.glob("*.metadata") if path.stat().st_size}
    published.requests, published.download_s = [], 0.0
    fetch(tmp_path / "copy")
    again = {
        request.rpartition("/")[2] for request in published.requests if request.startswith("GET /org/tiny/resolve")
    }
    assert done
    assert not done & again
    assert not (tmp_path / ".pulling_copy").exists()


@pytest.mark.parametrize("name", [WEIGHTS, "config.yaml"])
def test_a_file_that_arrives_damaged_is_refused_and_fetched_again(published: Hub, tmp_path: Path, name: str) -> None:
    content = bytearray(published.files("org/tiny")[name])
    content[-1] ^= 1
    published.replaced[name] = bytes(content)
    with pytest.raises(ValueError, match=f"{name} arrived damaged"):
        fetch(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    published.replaced.clear()
    fetch(tmp_path / "copy")


def test_a_file_that_was_replaced_on_the_hub_is_named(published: Hub, tmp_path: Path) -> None:
    commits = published.repositories["model", "org/tiny"]
    first = commits[-1][0]
    tokenizer = commits[-1][1]["tokenizer/tokenizer.json"].content.replace(b'"cat"', b'"cow"')
    changes = {"README.md": Entry(b"better words", None), "tokenizer/tokenizer.json": Entry(tokenizer, None)}
    commits.append(("f" * 40, commits[-1][1] | {"README.md": changes["README.md"]}))
    fetch(tmp_path / "card")  # only the card was changed
    commits.append(("e" * 40, commits[-1][1] | changes))
    with pytest.raises(
        ValueError, match=r"tokenizer/tokenizer\.json is not the file that was published with the others"
    ):
        fetch(tmp_path / "copy")
    commits.append(("d" * 40, {name: entry for name, entry in commits[0][1].items()} | {
        name: entry for name, entry in commits[1][1].items() if name != "config.yaml"
    }))  # fmt: skip
    with pytest.raises(ValueError, match=r"config\.yaml is missing"):
        fetch(tmp_path / "copy")
    fetch(tmp_path / "older", f"hf://org/tiny@{first}")
    assert (tmp_path / "older" / "config.yaml").is_file()


def test_a_run_with_another_tokenizer_does_not_load_from_the_hub(published: Hub, tmp_path: Path) -> None:
    from vla_foundry.inference.generate import main as generate

    commits = published.repositories["model", "org/tiny"]
    files = dict(commits[-1][1])
    tokenizer = files["tokenizer/tokenizer.json"].content.replace(b'"cat"', b'"cow"')
    commits.append(("e" * 40, files | {"tokenizer/tokenizer.json": Entry(tokenizer, None)}))
    with pytest.raises(ValueError, match="does not hold the files that hf://org/tiny was trained with"):
        generate(["--checkpoint", "hf://org/tiny", "--prompt", "the", "--device", "cpu"])
    weights = bytearray(files[WEIGHTS].content)
    weights[-1] ^= 1
    commits.append(("d" * 40, files | {WEIGHTS: Entry(bytes(weights), "c" * 64)}))
    with pytest.raises(ValueError, match=r"model\.safetensors does not have the SHA-256 it was written with"):
        generate(["--checkpoint", "hf://org/tiny", "--prompt", "the", "--device", "cpu", "--use_ema", "false"])


def test_what_cannot_be_pulled_is_said_in_one_line(published: Hub, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"hf://org/none@main does not exist, or is only visible with a token"):
        fetch(tmp_path / "copy", "org/none")
    with pytest.raises(FileNotFoundError, match=r"hf://org/tiny@v9 does not exist"):
        fetch(tmp_path / "copy", "hf://org/tiny@v9")
    for source in ("tiny", "s3://a/b", "org/tiny/x", "hf://spaces/a/b"):
        with pytest.raises(ValueError, match=f"source '{source}' must be hf://ORG/NAME"):
            HubPullParams(source=source)
    with pytest.raises(ValueError, match="push"):
        main(["psh"])
    assert {path.name for path in tmp_path.iterdir()} <= {"huggingface"}
