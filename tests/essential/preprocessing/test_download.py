"""Downloads arrive whole, go on where they ended, and notice what changed or is damaged."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from tests.essential import hub_server
from vla_foundry.cli import main as run_cli
from vla_foundry.params.commands.preprocessing import DownloadParams
from vla_foundry.preprocessing import download as module
from vla_foundry.preprocessing.download import LBM_TASKS, list_sources

LARGE = os.urandom(1 << 20)
FILES = {
    "data/a.bin": b"a" * 1000,
    "data/sub dir/ü.txt": "ü".encode(),
    "data/sub dir/large.bin": LARGE,
    "data/empty": b"",
    "other/secret": b"s",
}


class Handler(BaseHTTPRequestHandler):
    """Serves files with ranges, and folders as Apache lists them."""

    files: dict[str, bytes]
    requests: list[str]
    # path -> bytes of the file that are sent; then the connection breaks, each time
    cut: dict[str, int]
    # seconds before each 64 kB of a large file
    pause: float

    def log_message(self, format: str, *args: Any) -> None: ...

    def list_folder(self, folder: str) -> bytes:
        inside = sorted({name[len(folder) :].partition("/")[0:2] for name in self.files if name.startswith(folder)})
        links = "".join(f'<a href="{name.replace(" ", "%20")}{slash}">x</a>' for name, slash in inside)
        page = f'<a href="?C=N;O=D">Name</a> <a href="/other/">Parent</a> <a href="../">up</a>{links}'
        return f'<html>{page}<a href="https://elsewhere.example/x">e</a></html>'.encode()

    def do_GET(self) -> None:
        path = unquote(self.path).lstrip("/")
        type(self).requests.append(f"{path} {self.headers.get('Range', '')}".strip())
        is_folder = path.endswith("/")
        if not is_folder and path not in self.files:
            self.send_error(404)
            return
        content = self.list_folder(path) if is_folder else self.files[path]
        given = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        first = int(given[1]) if given else 0
        if given and first >= len(content):
            self.send_error(416)
            return
        body = content[first : int(given[2]) + 1 if given and given[2] else None]
        self.send_response(206 if given else 200)
        if given:
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(content)}")
        if not is_folder:  # listings come without a length
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        self.end_headers()
        body = body[: max(0, self.cut.get(path, len(content)) - first)]
        for start in range(0, len(body), 1 << 16):
            time.sleep(self.pause)
            self.wfile.write(body[start : start + (1 << 16)])
        self.close_connection = True


class Server:
    """A web server of a test."""

    def __init__(self) -> None:
        state: dict[str, Any] = {"files": dict(FILES), "requests": [], "cut": {}, "pause": 0.0}
        self.handler: Any = type("TestHandler", (Handler,), state)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("vla_foundry.storage.http._FIRST_WAIT_SECONDS", 0.01)
    server = Server()
    yield server
    server.stop()


def download(*words: str) -> None:
    run_cli(["data", "download", *words])


def read(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".download.jsonl"
    }


def below(prefix: str) -> dict[str, bytes]:
    return {name.removeprefix(prefix): content for name, content in FILES.items() if name.startswith(prefix)}


def test_a_listing_is_downloaded_with_its_folders_and_once(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    download(f"{server.url}data/", "--output", str(tmp_path / "out"))
    assert read(tmp_path / "out") == below("data/")
    assert "4 files, 1.05 MB; 4 to download, 1.05 MB" in capsys.readouterr().out
    server.handler.requests.clear()
    download(f"{server.url}data/", "--output", str(tmp_path / "out"))
    assert "4 files, 1.05 MB; 0 to download, 0 bytes" in capsys.readouterr().out
    server.handler.files["data/a.bin"] = b"b" * 1000
    (tmp_path / "out" / "empty").unlink()
    download(f"{server.url}data/", "--output", str(tmp_path / "out"), "--dry_run", "true")
    assert "; 2 to download, 1 kB" in capsys.readouterr().out
    download(f"{server.url}data/", "--output", str(tmp_path / "out"), "--pattern", "*.bin")
    found = read(tmp_path / "out")
    assert found["a.bin"] == b"b" * 1000
    assert "empty" not in found


def test_what_broke_off_goes_on_where_it_ended(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.handler.cut["data/sub dir/large.bin"] = 100_000
    words = [f"{server.url}data/sub%20dir/", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        download(*words)
    assert "large.bin" in capsys.readouterr().err.splitlines()[-1]
    (part,) = (tmp_path / "out").glob(".large.bin.*.part")
    size = part.stat().st_size
    assert size == 100_000
    server.handler.cut.clear()
    server.handler.requests.clear()
    download(*words)
    assert f"data/sub dir/large.bin bytes={size}-" in server.handler.requests
    assert read(tmp_path / "out") == below("data/sub dir/")


def test_a_killed_download_goes_on(server: Server, tmp_path: Path) -> None:
    server.handler.pause = 0.2
    words = [sys.executable, "-m", "vla_foundry.cli", "data", "download", f"{server.url}data/sub%20dir/large.bin"]
    words += ["--output", str(tmp_path / "out")]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    while not any(path.stat().st_size for path in tmp_path.glob("out/.large.bin.*.part")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "large.bin").exists()
    server.handler.pause = 0.0
    server.handler.requests.clear()
    download(*words[5:])
    assert any("bytes=" in request for request in server.handler.requests)
    assert read(tmp_path / "out") == {"large.bin": LARGE}


def test_a_file_that_changed_starts_anew(server: Server, tmp_path: Path) -> None:
    server.handler.cut["data/sub dir/large.bin"] = 100_000
    words = [f"{server.url}data/sub%20dir/large.bin", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        download(*words)
    server.handler.cut.clear()
    changed = bytes(reversed(LARGE))
    server.handler.files["data/sub dir/large.bin"] = changed
    download(*words)
    assert read(tmp_path / "out") == {"large.bin": changed}


def test_lists_of_urls_are_checked_by_hash(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = hashlib.sha256(FILES["data/a.bin"]).hexdigest()
    listed = tmp_path / "urls.txt"
    listed.write_text(
        f"# two files\n{server.url}data/a.bin {good.upper()}\n\n{server.url}data/empty\n", encoding="utf-8"
    )
    download("--url_list", str(listed), "--output", str(tmp_path / "out"))
    assert read(tmp_path / "out") == {"a.bin": FILES["data/a.bin"], "empty": b""}
    listed.write_text(f"{server.url}data/a.bin {'0' * 64}\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        download("--url_list", str(listed), "--output", str(tmp_path / "bad"))
    assert f"arrived damaged: its sha256 is {good}, not 0000" in capsys.readouterr().err
    assert read(tmp_path / "bad") == {}
    download("--url_list", str(listed), "--output", str(tmp_path / "bad"), "--verify", "false")
    assert read(tmp_path / "bad") == {"a.bin": FILES["data/a.bin"]}


def make_tar(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("x.txt")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def publish_shards(server: Server, folder: str) -> dict[str, bytes]:
    """Two shards with a manifest of which only the first line has a hash."""
    tars = {f"shard_{number:06d}.tar": make_tar(b"x" * (number + 1)) for number in range(2)}
    lines = [{"shard": name.removesuffix(".tar"), "num_sequences": 1} for name in tars]
    lines[0] |= {
        "num_bytes": len(tars["shard_000000.tar"]),
        "sha256": hashlib.sha256(tars["shard_000000.tar"]).hexdigest(),
    }
    manifest = "".join(json.dumps(line) + "\n" for line in lines).encode()
    files = {"manifest.jsonl": manifest, "stats.json": b"{}", **tars}
    server.handler.files |= {f"{folder}/{name}": content for name, content in files.items()}
    return files


def test_a_manifest_brings_its_shards_and_statistics(server: Server, tmp_path: Path) -> None:
    files = publish_shards(server, "set")
    download(f"{server.url}set/manifest.jsonl", "--output", str(tmp_path / "out"))
    assert read(tmp_path / "out") == files
    server.handler.files["set/shard_000000.tar"] = b"?" * len(files["shard_000000.tar"])
    with pytest.raises(SystemExit, match="2"):
        download(f"{server.url}set/manifest.jsonl", "--output", str(tmp_path / "other"))
    assert "shard_000000.tar" not in read(tmp_path / "other")


def test_the_earlier_downloaders_flags_are_accepted(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_LBM", f"{server.url}lbm")
    monkeypatch.setattr(module, "_LBM_RAW", f"{server.url}raw")
    files = publish_shards(server, "lbm/v0.1.0/PutMugOnSaucer/shards")
    publish_shards(server, "lbm/v0.2.0/PutMugOnSaucer/episodes")
    server.handler.files["raw/PushBox.tar"] = make_tar(b"raw")
    download("--task", "PutMugOnSaucer", "--local_path", str(tmp_path / "a"), "--num_workers", "2", "--force")
    assert read(tmp_path / "a") == {f"PutMugOnSaucer/shards/{name}": content for name, content in files.items()}
    words = ["--task", "PutMugOnSaucer", "--episodes", "--version", "v0.2.0", "--local_path", str(tmp_path / "b")]
    download(*words, "--list")
    assert "PutMugOnSaucer/episodes/shard_000001.tar" in capsys.readouterr().out
    download("--preset", "lbm-sim", "--task", "PushBox", "--raw", "--local_path", str(tmp_path / "b"))
    assert list(read(tmp_path / "b")) == ["PushBox.tar"]
    assert len(LBM_TASKS) == 19
    with pytest.raises(SystemExit, match="2"):
        download("--all", "--local_path", str(tmp_path / "c"))
    assert f"{LBM_TASKS[0]}/shards/manifest.jsonl does not exist" in capsys.readouterr().err


def test_an_s3_prefix_is_downloaded_and_checked(s3_bucket: str, tmp_path: Path) -> None:
    from vla_foundry.storage.uri import write_bytes

    for name, content in below("data/").items():
        write_bytes(f"{s3_bucket}/set/{name}", content)
    download("--s3_path", f"{s3_bucket}/set", "--output", str(tmp_path / "out"))
    assert read(tmp_path / "out") == below("data/")
    pattern = DownloadParams(source=[f"{s3_bucket}/set/sub*/*"], output="x")
    assert [file.path for file in list_sources(pattern)] == ["sub dir/large.bin", "sub dir/ü.txt"]
    params = DownloadParams(source=[f"{s3_bucket}/set"], output="x")
    digests = {file.path: file.digest for file in list_sources(params)}
    assert digests["a.bin"] == ("md5", hashlib.md5(b"a" * 1000).hexdigest())


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_repository_is_downloaded_at_one_commit(
    hub: hub_server.Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"README.md": hub_server.Entry(b"hello\n", None), "data/large.bin": hub_server.Entry(LARGE, None)}
    files["data/large.bin"] = hub_server.Entry(LARGE, hashlib.sha256(LARGE).hexdigest())
    hub.repositories["dataset", "owner/set"] = [("1" * 40, files), ("2" * 40, {"README.md": files["README.md"]})]
    old = "hf://datasets/owner/set@" + "1" * 40
    with pytest.raises(SystemExit, match="2"):
        download(old, "hf://datasets/owner/set/README.md", "--output", str(tmp_path / "out"))
    assert "would both become README.md" in capsys.readouterr().err
    download(old, "--output", str(tmp_path / "out"))
    assert read(tmp_path / "out") == {"README.md": b"hello\n", "data/large.bin": LARGE}
    assert f"is hf://datasets/owner/set@{'1' * 40}" in capsys.readouterr().out
    download("hf://datasets/owner/set", "--output", str(tmp_path / "new"))
    assert read(tmp_path / "new") == {"README.md": b"hello\n"}
    hub.replaced["README.md"] = b"hallo\n"
    with pytest.raises(SystemExit, match="2"):
        download("hf://datasets/owner/set", "--output", str(tmp_path / "damaged"))
    assert "arrived damaged: its git is" in capsys.readouterr().err
    assert read(tmp_path / "damaged") == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Give a source"),
        (["https://x.example/a"], "Give --output FOLDER"),
        (["--preset", "lbm-sim", "--output", "x"], "preset lbm-sim needs --task NAME"),
        (["--task", "../x", "--output", "x"], "task and version are names"),
        (["--raw", "--output", "x", "https://x.example/a"], "raw and episodes choose among the data of tasks"),
        (["--source", "nowhere", "--output", "x"], "nowhere is neither a file nor a folder"),
    ],
)
def test_wrong_flags_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        download(*words)
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["..", "a%5cb", "a%00b", ".download.jsonl"])
def test_names_that_lead_elsewhere_are_refused(
    name: str, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "urls.txt").write_text(f"{server.url}data/{name}\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        download("--url_list", str(tmp_path / "urls.txt"), "--output", str(tmp_path / "out"))
    assert "is not a path below the output" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_link_to_nothing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/x").symlink_to("gone")
    with pytest.raises(SystemExit, match="2"):
        download(str(tmp_path / "set"), "--output", str(tmp_path / "out"))
    assert f"{tmp_path / 'set/x'} is a link to nothing" in capsys.readouterr().err


def test_two_downloads_do_not_write_to_one_folder(server: Server, tmp_path: Path) -> None:
    from vla_foundry.run_folder import lock_folder

    with lock_folder(tmp_path / "out", what="download", flag="--output"), pytest.raises(SystemExit, match="2"):
        download(f"{server.url}data/a.bin", "--output", str(tmp_path / "out"))


def test_endless_listings_are_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server.handler, "list_folder", lambda self, folder: b'<a href="again/">x</a>')
    with pytest.raises(SystemExit, match="2"):
        download(f"{server.url}data/", "--output", str(tmp_path / "out"))
    assert "or some more than 32 levels deep" in capsys.readouterr().err
