"""A Hugging Face hub of a test: the endpoints that huggingface_hub needs to create, fill, list and read repositories.

/api/repos/create, /api/validate-yaml; /api/{models,datasets}/ID with /revision/R, /tree/R, /paths-info/R, /preupload/R
and /commit/R; ID.git/info/lfs/objects/batch, /lfs/SHA256; ID/resolve/R/PATH, with ranges.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "testing" * 5
_API = re.compile(r"/api/(model|dataset)s/([\w.-]+/[\w.-]+)(?:/([\w-]+)/([^/]+)(?:/(.*))?)?")
_FILE = re.compile(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")
_BATCH = re.compile(r"/(datasets/)?([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch")


@dataclass
class Entry:
    """A file of a commit; large ones have a SHA-256."""

    content: bytes
    sha256: str | None

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def describe(self, path: str) -> dict[str, Any]:
        size = len(self.content)
        lfs = {"lfs": {"oid": self.sha256, "size": size, "pointerSize": 134}} if self.sha256 else {}
        return {"type": "file", "path": path, "size": size, "oid": self.oid, **lfs}


@dataclass
class Hub:
    """What the hub holds, and how it is to fail."""

    # (kind, ID) -> [(commit, files)], the newest last
    repositories: dict[tuple[str, str], list[tuple[str, dict[str, Entry]]]] = field(default_factory=dict)
    # SHA-256 -> content of large files that have arrived
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""
    # files of at least this many bytes are large
    large_from: int = 2000
    # seconds that each large file takes to arrive
    upload_s: float = 0.0
    # seconds before a large file is sent
    download_s: float = 0.0
    # path -> what is sent in its place
    replaced: dict[str, bytes] = field(default_factory=dict)
    # path -> bytes after which the connection breaks, once
    cut: dict[str, int] = field(default_factory=dict)

    def files(self, name: str, kind: str = "model") -> dict[str, bytes]:
        """The files of a repository's newest commit."""
        return {path: entry.content for path, entry in self.repositories[kind, name][-1][1].items()}

    def commit(self, kind: str, name: str, lines: list[dict[str, Any]]) -> str:
        commits = self.repositories[kind, name]
        files = dict(commits[-1][1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Entry(base64.b64decode(value["content"]), None)
            elif line["key"] == "lfsFile":
                files[value["path"]] = Entry(self.large[value["oid"]], value["oid"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()
        commits.append((oid, files))
        return oid

    def find(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, Entry]]:
        """The commit of a revision; LookupError names what is missing, as the hub does."""
        if (kind, name) not in self.repositories:
            raise LookupError("RepoNotFound")
        commits = self.repositories[kind, name]
        if revision == "main":
            return commits[-1]
        found = next((commit for commit in commits if commit[0] == revision), None)
        if found is None:
            raise LookupError("RevisionNotFound")
        return found


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None: ...

    def answer(self, content: Any = None, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command in ("POST", "PUT") and not path.startswith("/lfs/"):
            is_reading = "/paths-info/" in path
            if not is_reading and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.answer({"error": "no token"}, 401)
                return
        try:
            self.route(path, body)
        except LookupError as error:
            self.answer({"error": "not found"}, 404, X_Error_Code=str(error.args[0]))

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def route(self, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            given = json.loads(body)
            kind, name = given.get("type") or "model", f"{given['organization']}/{given['name']}"
            exists = (kind, name) in self.hub.repositories
            first = hashlib.sha1(name.encode()).hexdigest()
            self.hub.repositories.setdefault((kind, name), [(first, {".gitattributes": Entry(b"", None)})])
            self.answer({"url": f"{self.hub.url}/{name}"}, 409 if exists else 200)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path.startswith("/lfs/"):
            time.sleep(self.hub.upload_s)
            oid = path.removeprefix("/lfs/")
            if hashlib.sha256(body).hexdigest() != oid:
                self.answer({"error": "wrong content"}, 400)
                return
            self.hub.large[oid] = body
            self.answer({})
        elif match := _BATCH.fullmatch(path):
            objects = json.loads(body)["objects"]
            for item in objects:
                if item["oid"] not in self.hub.large:
                    item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            self.answer({"transfer": "basic", "objects": objects})
        elif match := _API.fullmatch(path):
            self.answer_api(match, body)
        elif match := _FILE.fullmatch(path):
            kind = "dataset" if match[1] else "model"
            self.send_file(match[4], *self.hub.find(kind, match[2], match[3]))
        else:
            self.answer({"error": path}, 404)

    def answer_api(self, match: re.Match[str], body: bytes) -> None:
        kind, name, what, revision, rest = match.groups()
        commit, files = self.hub.find(kind, name, revision or "main")
        if what in (None, "revision"):
            siblings = [{"rfilename": path} for path in files]
            self.answer({"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []})
        elif what == "tree":
            below = f"{rest}/" if rest else ""
            if below and not any(path.startswith(below) for path in files):
                raise LookupError("EntryNotFound")
            is_deep = "recursive=true" in self.path.lower()
            found = {path: entry for path, entry in files.items() if path.startswith(below)}
            folders = {
                f"{below}{'/'.join(path.removeprefix(below).split('/')[:depth])}"
                for path in found
                for depth in range(1, path.removeprefix(below).count("/") + 1)
                if is_deep or depth == 1
            }
            self.answer(
                [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
                + [
                    entry.describe(path)
                    for path, entry in found.items()
                    if is_deep or "/" not in path.removeprefix(below)
                ]
            )
        elif what == "paths-info":
            given = json.loads(body) if body[:1] == b"{" else None
            paths = given["paths"] if given else re.findall(r"paths=([^&]*)", unquote(body.decode()))
            found = [files[path].describe(path) for path in paths if path in files]
            found += [
                {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
                for path in paths
                if any(other.startswith(f"{path}/") for other in files)
            ]
            self.answer(found)
        elif what == "preupload":
            modes = {True: "lfs", False: "regular"}
            self.answer({
                "files": [
                    {
                        "path": item["path"],
                        "uploadMode": modes[item["size"] >= self.hub.large_from],
                        "shouldIgnore": False,
                        "oid": files[item["path"]].oid if item["path"] in files else None,
                    }
                    for item in json.loads(body)["files"]
                ]
            })  # fmt: skip
        elif what == "commit":
            oid = self.hub.commit(kind, name, [json.loads(line) for line in body.splitlines()])
            self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})
        else:
            self.answer({"error": what}, 404)

    def send_file(self, path: str, commit: str, files: dict[str, Entry]) -> None:
        if path not in files:
            raise LookupError("EntryNotFound")
        entry = files[path]
        content = self.hub.replaced.get(path, entry.content)
        etag = entry.sha256 or entry.oid
        if self.command == "GET" and entry.sha256:
            time.sleep(self.hub.download_s)
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if entry.sha256:
            headers |= {"X_Linked_Etag": f'"{etag}"', "X_Linked_Size": str(len(content))}
        given = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if given:
            first, last = int(given[1]), int(given[2] or len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            self.answer(content[first : last + 1], status=206, **headers)
        elif self.command == "GET" and path in self.hub.cut:
            self.send_response(200)
            for name, value in {"Content_Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(content[: self.hub.cut.pop(path)])
            self.close_connection = True
        else:
            self.answer(content, status=200, **headers)


def serve(hub: Hub) -> ThreadingHTTPServer:
    """Serve a hub on a free port; `shutdown` ends it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
