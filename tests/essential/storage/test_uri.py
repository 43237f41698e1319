"""Local files and objects of a real HTTP object store behave alike behind vla_foundry.storage.uri."""

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from vla_foundry.storage import uri


@pytest.fixture(params=["local", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder to write to, of each kind of storage."""
    if request.param == "local":
        return str(tmp_path / "store")
    return request.getfixturevalue("s3_bucket") + "/store"


def test_bytes_written_are_bytes_read(base: str):
    name = uri.join_uri(base, "a/b.bin")
    data = os.urandom(100_000)
    uri.write_bytes(name, data)
    assert uri.read_bytes(name) == data
    assert uri.size_of(name) == len(data)
    assert uri.read_range(name, 999, 5000) == data[999:5999]
    assert uri.read_range(name, 99_990, 100) == data[99_990:]
    assert uri.read_range(name, 200_000, 10) == b""
    uri.write_text(name, "new é")
    assert uri.read_text(name) == "new é"


def test_empty_file_is_a_file(base: str):
    name = uri.join_uri(base, "empty")
    uri.write_bytes(name, b"")
    assert uri.exists(name)
    assert uri.read_bytes(name) == b""
    assert uri.size_of(name) == 0


def test_hidden_files_below_a_folder_are_not_visible(base: str):
    names = [".cache/a.txt", "a.txt", "b/.DS_Store", "b/._c.txt", "b/c.txt", "b/.ipynb_checkpoints/c.txt"]
    hidden_base = uri.join_uri(base, ".home")
    for name in names:
        uri.write_bytes(uri.join_uri(hidden_base, name), b"x")

    def visible(place: str) -> list[str]:
        return [found.partition("/.home/")[2] for found in uri.list_visible(uri.join_uri(hidden_base, place))]

    assert visible("") == ["a.txt", "b/c.txt"]
    assert visible("b/*.txt") == ["b/c.txt"]
    assert visible("**/*.txt") == ["a.txt", "b/c.txt"]
    assert visible("b/._c.txt") == ["b/._c.txt"]


def test_a_path_that_exists_is_no_pattern(tmp_path):
    name = str(tmp_path / "[p]" / ".hidden*" / "a.txt")
    uri.write_bytes(name, b"x")
    assert list(uri.list_visible(name)) == list(uri.list_visible(uri.parent_uri(name))) == [name]


def test_missing_file_is_named(base: str):
    uri.write_bytes(uri.join_uri(base, "there"), b"x")
    name = uri.join_uri(base, "missing.bin")
    assert not uri.exists(name)
    for read in (uri.read_bytes, uri.size_of, uri.open_input, uri.list_files, lambda n: uri.read_range(n, 0, 1)):
        with pytest.raises(FileNotFoundError, match=r"missing\.bin"):
            read(name)


def test_open_input_seeks(base: str):
    name = uri.join_uri(base, "data.bin")
    data = os.urandom(300_000)
    uri.write_bytes(name, data)
    with uri.open_input(name) as file:
        assert file.read(10) == data[:10]
        assert file.seek(-5, io.SEEK_END) == len(data) - 5
        assert file.read() == data[-5:]
        assert file.seek(1000) == 1000
        assert file.read(100_000) == data[1000:101_000]
        assert file.tell() == 101_000


def test_tar_is_read_in_place(base: str):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("x.txt")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"hello"))
    uri.write_bytes(uri.join_uri(base, "x.tar"), buffer.getvalue())
    with uri.open_input(uri.join_uri(base, "x.tar")) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        member = tar.extractfile("x.txt")
        assert member is not None
        assert member.read() == b"hello"


def test_listing_is_sorted_and_holds_sizes(base: str):
    for name, size in (("b.txt", 2), ("a/c.txt", 3), ("a/d.json", 4), ("a/e/f.txt", 5)):
        uri.write_bytes(uri.join_uri(base, name), b"x" * size)
    uri.write_bytes(base + "_sibling/no.txt", b"")

    def names(pattern: str) -> list[str]:
        return [found[len(base) + 1 :] for found in uri.list_files(uri.join_uri(base, pattern))]

    assert [name[len(base) + 1 :] for name in uri.list_files(base)] == ["a/c.txt", "a/d.json", "a/e/f.txt", "b.txt"]
    assert list(uri.list_sizes(base).values()) == [3, 4, 5, 2]
    assert names("*.txt") == ["b.txt"]
    assert names("a/*.txt") == ["a/c.txt"]
    assert names("*/?.[jx]*") == ["a/d.json"]
    assert names("**/*.txt") == ["a/c.txt", "a/e/f.txt", "b.txt"]
    assert names("a/**") == ["a/c.txt", "a/d.json", "a/e/f.txt"]
    assert names("b.txt") == ["b.txt"]
    with pytest.raises(FileNotFoundError, match="nope"):
        names("nope*")


def test_a_file_that_is_edited_gets_another_version_though_its_size_stays(base: str):
    name = uri.join_uri(base, "folder", "a.csv")
    versions = []
    for content in (b"one", b"two"):
        uri.write_bytes(name, content)
        (listed,) = uri.list_visible(uri.join_uri(base, "folder")).values()
        assert uri.list_visible(name) == {name: listed}
        versions.append(listed.version)
    assert versions[0] != versions[1]


def test_large_file_goes_up_and_comes_down(base: str, tmp_path: Path):
    source = tmp_path / "source.bin"
    source.write_bytes(os.urandom(1 << 20) * 34)  # two multipart parts and a bit
    name = uri.join_uri(base, "large.bin")
    uri.upload(str(source), name)
    uri.download(name, str(tmp_path / "new" / "copy.bin"))
    assert (tmp_path / "new" / "copy.bin").read_bytes() == source.read_bytes()
    assert os.listdir(tmp_path / "new") == ["copy.bin"]


def test_delete_removes_a_file_once(base: str):
    name = uri.join_uri(base, "x")
    uri.write_bytes(name, b"x")
    uri.delete(name)
    uri.delete(name)
    assert not uri.exists(name)


def test_output_appears_only_when_whole(base: str):
    name = uri.join_uri(base, "x")
    uri.write_bytes(name, b"old")

    def write_half() -> None:
        with uri.open_output(name) as file:
            file.write(b"half")
            assert uri.read_bytes(name) == b"old"
            raise KeyError("stop")

    with pytest.raises(KeyError):
        write_half()
    assert uri.read_bytes(name) == b"old"
    assert len(uri.list_files(base)) == 1
    with uri.open_output(name) as file:
        file.write(b"whole")
    assert uri.read_bytes(name) == b"whole"


def test_object_that_changes_while_read_is_an_error(s3_bucket: str):
    name = s3_bucket + "/x"
    uri.write_bytes(name, b"a" * (9 << 20))
    with uri.open_input(name) as file:
        assert file.read(1) == b"a"
        uri.write_bytes(name, b"b" * (9 << 20))
        with pytest.raises(ValueError, match="changed while it was being read"):
            file.read()


def test_missing_credentials_are_said(s3_bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(ValueError, match="needs AWS credentials"):
        uri.read_bytes(s3_bucket + "/x")


def test_unreachable_store_is_one_line(s3_bucket: str, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(ValueError, match=r"^s3://\S+/x: [^\n]*connect[^\n]*$"):
        uri.read_bytes(s3_bucket + "/x")


@pytest.mark.parametrize("name", ["gs://bucket/x", "ftp://host/x"])
def test_unknown_scheme_is_refused(name: str):
    with pytest.raises(ValueError, match="unknown scheme"):
        uri.read_bytes(name)


def test_missing_boto3_says_how_to_install():
    code = (
        "import sys; sys.modules['boto3'] = None; sys.modules['botocore'] = None\n"
        "from vla_foundry.storage import uri\n"
        "try: uri.read_bytes('s3://b/x')\n"
        "except ValueError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "uv pip install 'vla-foundry[aws]'" in run.stdout


def test_local_paths_need_no_remote_package():
    code = (
        "import sys, vla_foundry.storage.uri as uri; uri.exists('.'); uri.is_remote('s3://x')\n"
        "print([name for name in ('boto3', 'huggingface_hub', 'fsspec', 'torch', 'numpy') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("parts", "joined"),
    [
        (("s3://b", "x.tar"), "s3://b/x.tar"),
        (("a/", "b", "c"), "a/b/c"),
        (("/", "b"), "/b"),
        (("", "b"), "b"),
        (("a", ""), "a"),
    ],
)
def test_join_uri(parts: tuple[str, ...], joined: str):
    assert uri.join_uri(*parts) == joined


@pytest.mark.parametrize("name", ["pipe:touch x", " Pipe : touch x", "{a.tar,pipe:touch x}", "a.tar::PIPE:touch x"])
@pytest.mark.parametrize("use", [uri.open_input, uri.exists, uri.is_remote, uri.absolute_uri, uri.list_files])
def test_shell_commands_are_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, use: Any):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is a shell command, which is never run"):
        use(name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["/etc", "s3://b/x"])
def test_join_uri_refuses_what_is_not_relative(part: str):
    with pytest.raises(ValueError, match="not a relative path"):
        uri.join_uri("a", part)


@pytest.mark.parametrize(
    ("child", "parent"),
    [
        ("s3://b/a/c", "s3://b/a"),
        ("s3://b/a", "s3://b"),
        ("s3://b", "s3://b"),
        ("/a/b", "/a"),
        ("/a", "/"),
        ("a", "."),
        ("a/b/", "a"),
        ("hf://datasets/o/r/x", "hf://datasets/o/r"),
    ],
)
def test_parent_uri(child: str, parent: str):
    assert uri.parent_uri(child) == parent


class _HubHandler(BaseHTTPRequestHandler):
    """The few answers of a hub that reading one dataset repository needs."""

    files = {"manifest.jsonl": b'{"shard": "s"}\n', "sub/data.bin": bytes(range(256)) * 40}
    commit = "1" * 40

    def log_message(self, *args: object) -> None:
        pass

    def _send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), "X-Repo-Commit": self.commit, **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, value: object, code: int = 200, **headers: str) -> None:
        self._send(code, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        paths = parse_qs(body.decode())["paths"] if body[:1] != b"{" else json.loads(body)["paths"]
        self._send_json([self._entry(path) for path in paths if path in self.files])

    def _entry(self, path: str) -> dict[str, object]:
        return {"type": "file", "path": path, "size": len(self.files[path]), "oid": "0" * 40}

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/owner/repo/tree/"):
            folder = "/".join(path.split("/")[7:])
            below = [name for name in self.files if not folder or name.startswith(folder + "/")]
            if below:
                self._send_json([self._entry(name) for name in below])
            else:
                self._send_json({"error": "not found"}, 404, **{"X-Error-Code": "EntryNotFound"})
        elif path.startswith("/api/datasets/owner/repo"):
            self._send_json({"id": "owner/repo", "sha": self.commit, "siblings": []})
        elif path.startswith("/datasets/owner/repo/resolve/") and path.split("/", 6)[6] in self.files:
            data = self.files[path.split("/", 6)[6]]
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last or len(data)) + 1]
            self._send(206 if "Range" in self.headers else 200, part, {"ETag": '"x"', "Accept-Ranges": "bytes"})
        else:
            code = "RepoNotFound" if "repo/" not in path else "EntryNotFound"
            self._send_json({"error": "not found"}, 404, **{"X-Error-Code": code})


def test_hub_files_are_listed_read_and_downloaded(tmp_path: Path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _HubHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "import sys; from vla_foundry.storage import uri\n"
        "base = 'hf://datasets/owner/repo'\n"
        "data = bytes(range(256)) * 40\n"
        "assert [n[len(base) + 1:] for n in uri.list_files(base)] == ['manifest.jsonl', 'sub/data.bin']\n"
        "assert uri.list_files(base + '/sub/*.bin') == [base + '/sub/data.bin']\n"
        "assert uri.read_text(base + '/manifest.jsonl').startswith('{')\n"
        "assert uri.read_range(base + '/sub/data.bin', 100, 300) == data[100:400]\n"
        "assert uri.size_of(base + '/sub/data.bin') == len(data)\n"
        "uri.download(base + '/sub/data.bin', sys.argv[1])\n"
        "assert open(sys.argv[1], 'rb').read() == data\n"
        "assert not uri.exists(base + '/missing')\n"
        "try: uri.read_bytes(base + '/missing')\n"
        "except FileNotFoundError as error: print(error)"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hub"),
    }
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "data.bin")], capture_output=True, text=True, env=environment
    )
    server.shutdown()
    server.server_close()
    assert run.returncode == 0, run.stderr
    assert "missing does not exist" in run.stdout


def test_hub_offline_is_said():
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        uri.read_bytes("hf://datasets/owner/repo/x.txt")


class _TruncatingHandler(BaseHTTPRequestHandler):
    """An object store whose first answers are cut: their length is that of the rest, or is not what follows."""

    content = os.urandom(5000)
    num_cut = 0
    says_whole_length = False

    def log_message(self, *args: object) -> None:
        pass

    def _send_head(self, size: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.send_header("ETag", '"1"')
        self.end_headers()

    def do_HEAD(self) -> None:
        self._send_head(len(self.content))

    def do_GET(self) -> None:
        cls = type(self)
        body = self.content[:1000] if cls.num_cut else self.content
        cls.num_cut = max(cls.num_cut - 1, 0)
        self._send_head(len(self.content) if cls.says_whole_length else len(body))
        self.wfile.write(body)
        self.close_connection = True


@pytest.mark.parametrize("operation", ["upload", "download", "list_files", "read_text", "write_text", "delete"])
def test_a_store_that_never_answers_is_given_up_in_one_line(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("boto3")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    calls = {"upload": (str(tmp_path / "file"), "s3://bucket/x"), "download": ("s3://bucket/x", str(tmp_path / "y"))}
    calls["write_text"] = ("s3://bucket/x", "x")
    with socket.create_server(("127.0.0.1", 0)) as server:  # the system accepts connections, nobody answers
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        for name, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_MAX_ATTEMPTS": "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("vla_foundry.storage.s3._READ_SECONDS", 0.1)
        with pytest.raises(ValueError, match=r"^s3://bucket/x: .*[Tt]imeout.*127\.0\.0\.1[^\n]*$"):
            getattr(uri, operation)(*calls.get(operation, ("s3://bucket/x",)))
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("says_whole_length", [False, True])
def test_a_truncated_download_is_tried_again_and_said_if_it_stays_so(
    says_whole_length: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("boto3")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _TruncatingHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setattr("vla_foundry.storage.s3._FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(_TruncatingHandler, "says_whole_length", says_whole_length)
    monkeypatch.setattr(_TruncatingHandler, "num_cut", 1)
    uri.download("s3://bucket/x", str(tmp_path / "x"))
    assert (tmp_path / "x").read_bytes() == _TruncatingHandler.content
    monkeypatch.setattr(_TruncatingHandler, "num_cut", 1000)
    with pytest.raises(ValueError, match=r"^s3://bucket/x\b[^\n]+$"):
        uri.download("s3://bucket/x", str(tmp_path / "y"))
    assert os.listdir(tmp_path) == ["x"]
    server.shutdown()
    server.server_close()


def test_a_folder_exists_without_a_list_of_all_that_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--checkpoint /` walked the whole disk."""
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    (tmp_path / "full" / "deep").mkdir(parents=True)
    (tmp_path / "full" / "deep" / "file").touch()
    (tmp_path / "[odd]").mkdir()
    (tmp_path / "[odd]" / "file").touch()
    assert not uri.exists(str(tmp_path / "empty"))
    assert uri.exists(str(tmp_path / "[odd]"))
    monkeypatch.setattr(uri, "list_sizes", None)
    assert uri.exists(str(tmp_path / "full"))
