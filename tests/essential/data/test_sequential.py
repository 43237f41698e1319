"""Tars without a manifest, read in sequence by webdataset."""

import gzip
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vla_foundry.data import DataLoader, create_dataloader
from vla_foundry.data.faults import FaultLog
from vla_foundry.data.pipelines.stages import create_pipeline
from vla_foundry.params.data.mixture import MixtureDataParams
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.data.text import TextDataParams, TextUntokenizedDataParams
from vla_foundry.storage.uri import download, read_range, write_text
from vla_foundry.world import World


@pytest.fixture
def folder(tmp_path: Path, write_samples: Callable, json_tokens: Callable) -> Path:
    """40 samples in four tars; sample n begins with token n. A folder that a system left is no data."""
    rows = [[json_tokens(range(n, n + 9)) for n in range(s, s + 10)] for s in (0, 10, 20, 30)]
    write_samples(tmp_path / "d", rows).unlink()
    (tmp_path / "d" / "._shard_000000.tar").write_bytes(b"\0")
    return tmp_path / "d"


def create(*shards: str | Path, world: World | None = None, pipeline: Any = None, **changes: Any) -> DataLoader:
    values = {"num_workers": 0, "allow_multiple_epochs": True, "seq_len": 8, **changes}
    params = TextDataParams(sequential_shards=[str(each) for each in shards], **values)
    loader = create_dataloader(params, world, per_gpu_batch_size=4, seed=3, pipeline=pipeline)
    assert isinstance(loader, DataLoader)
    return loader


def read(loader: DataLoader, count: int, first: int = 0) -> list[int]:
    """Return the first tokens of the samples of `count` microbatches."""
    stream = loader.microbatches(first)
    found = [token for _ in range(count) for token in next(stream)["input_ids"][:, 0].tolist()]
    loader.close()
    return found


def faults_of(loader: DataLoader, folder: Path) -> list[str]:
    loader.keep_faults(FaultLog(folder))
    path = folder / "data_faults.jsonl"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def test_ranks_read_different_samples_and_each_once_a_pass(folder: Path) -> None:
    ranks = [read(create(folder, world=World(rank=rank, world_size=2)), 5) for rank in range(2)]
    assert sorted(ranks[0] + ranks[1]) == list(range(40))
    assert ranks[0] == read(create(folder / "*.tar", world=World(rank=0, world_size=2)), 5), "the seed decides"
    names = folder / "shard_00000{0..3}.tar"
    two_passes = read(create(names), 20)
    assert sorted(two_passes[:40]) == sorted(two_passes[40:]) == list(range(40))
    assert two_passes[:40] != two_passes[40:], "passes are shuffled differently"
    assert read(create(names, shuffle=False), 10) == list(range(40))
    assert sorted(read(create(folder, num_workers=1), 10)) == list(range(40))


def test_a_tar_is_divided_between_ranks_and_an_empty_one_stops_none(folder: Path) -> None:
    tar = folder / "shard_000000.tar"
    ranks = [read(create(tar, world=World(rank=rank, world_size=5), shuffle=False), 1) for rank in range(5)]
    assert sorted(token for tokens in ranks for token in tokens[:2]) == list(range(10))
    tarfile.open(folder / "empty.tar", "w").close()
    for rank in range(2):
        assert set(read(create(tar, folder / "empty.tar", world=World(rank=rank, world_size=2)), 9)) <= set(range(10))
    with pytest.raises(ValueError, match=r"sequential_shards: loader process 0 finds no samples in any tar"):
        read(create(folder / "empty.tar"), 1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_run_continues_at_an_approximate_place(folder: Path, num_workers: int) -> None:
    loader = create(folder, shuffle=False, num_workers=num_workers)
    read(loader, 16)
    saved = loader.describe()
    assert saved == {"sequential": {"epochs": 1.5}}
    assert loader.progress(16) == {"epochs": 1.5}
    resumed = create(folder, shuffle=False, num_workers=num_workers)
    resumed.start(16)
    (line,) = resumed.check_plan(saved)
    assert "do not resume exactly. They continue in pass 2 over the tars, after 50.0% of them" in line
    assert read(resumed, 3, first=16) == list(range(20, 32))
    with pytest.raises(ValueError, match=r"data\.sequential_shards was not set"):
        create(folder).check_plan({"plan_version": 1})


def test_stages_drop_and_multiply_samples(folder: Path) -> None:
    params = TextDataParams(sequential_shards=[str(folder)], seq_len=8)
    pipeline = create_pipeline("text", params)
    pipeline.stages = pipeline.stages.insert("even", _keep_even, after="require_tokens")
    pipeline.stages = pipeline.stages.insert("copies", _copy, after="even", samples=2)
    tokens = read(create(folder, pipeline=pipeline), 10)
    assert sorted(tokens) == sorted(n + 1000 * copy for n in range(0, 40, 2) for copy in range(2))


def _keep_even(sample: dict[str, Any]) -> dict[str, Any] | None:
    return sample if sample["input_ids"][0] % 2 == 0 else None


def _copy(sample: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**sample, "input_ids": sample["input_ids"] + 1000 * copy} for copy in range(2)]


def test_compressed_and_joined_tars_are_read_whole(folder: Path) -> None:
    tars = [(folder / f"shard_00000{number}.tar").read_bytes() for number in range(4)]
    (folder / "joined.tar").write_bytes(tars[0] + tars[1])
    (folder / "packed.tar.gz").write_bytes(gzip.compress(tars[2]))
    assert read(create(folder / "joined.tar", folder / "packed.tar.gz", shuffle=False), 7) == list(range(28))


@pytest.mark.parametrize(
    ("damage", "detail"),
    [
        (lambda whole: whole[:1800], "unexpected end of data"),
        (lambda whole: whole[:4096] + b"\xff" * 512 + whole[4608:], "the header at byte 4096: "),
        (lambda whole: b"", "empty file"),
        (lambda whole: b"no tar" * 999, "the header at byte 0: "),
        (lambda whole: gzip.compress(whole)[:-300], ""),
    ],
)
def test_the_rest_of_a_damaged_tar_is_one_fault(folder: Path, damage: Callable, detail: str) -> None:
    tar = folder / "shard_000001.tar"
    tar.write_bytes(damage(tar.read_bytes()))
    loader = create(folder, shuffle=False)
    assert set(read(loader, 9)) >= {*range(10), *range(20, 30)}
    (line,) = faults_of(loader, folder)
    assert "shard_000001.tar" in line
    assert f"damaged shard: {detail}" in line


def test_repeated_keys_and_bad_samples_are_faults_and_pickles_are_not_loaded(
    folder: Path, write_samples: Callable, json_tokens: Callable
) -> None:
    code = b'cbuiltins\nexec\n(S\'open("harm", "w")\'\ntR.'
    samples = [{**json_tokens(range(9)), "pkl": code}, {"pkl": code}, {"json.gz": b"x"}]
    write_samples(folder / "e", [samples])
    tar = folder / "e" / "shard_000000.tar"
    (folder / "e" / "twice.tar").write_bytes(tar.read_bytes() * 2)
    loader = create(folder / "e" / "twice.tar", shuffle=False, max_bad_fraction=1.0)
    assert read(loader, 2) == [0] * 8
    assert [fault.reason for fault in loader._faults[:3]] == [
        "require_tokens: ValueError",
        "decode_json_tokens: BadGzipFile",
        "repeated key",
    ]
    assert not Path("harm").exists()
    with pytest.raises(ValueError, match=r"samples cannot be used, more than data\.max_bad_fraction"):
        read(create(folder / "e" / "twice.tar", shuffle=False), 99)


def test_what_cannot_be_read_is_one_line(folder: Path) -> None:
    for name, error in {
        "x_*.tar": r"data\.sequential_shards: there is no tar at \S+x_\*\.tar",
        "shard_00000{3,9}.tar": r"shard_000009\.tar",
        "{a": "Unbalanced braces",
    }.items():
        with pytest.raises((FileNotFoundError, ValueError), match=error):
            create(folder / name)
    with pytest.raises(ValueError, match="is a shell command"):
        create("pipe:touch harm")
    with pytest.raises(ValueError, match="has an empty name"):
        create("")
    loader = create(folder)
    for tar in folder.glob("*.tar"):
        tar.unlink()
    with pytest.raises(ValueError, match=r"shard_00000\d\.tar: is not a file"):
        read(loader, 1)


def test_params_that_do_not_go_with_sequential_shards_are_named() -> None:
    with pytest.raises(ValueError, match="sequential_shards and dataset_manifest are both given"):
        TextDataParams(sequential_shards=["a"], dataset_manifest=["m"])
    with pytest.raises(
        ValueError, match=r"datasets\.a\.sequential_shards cannot be part of a mixture\. Give dataset_m"
    ):
        MixtureDataParams(datasets={"a": TextDataParams(sequential_shards=["a"])})
    with pytest.raises(ValueError, match=r"sequential_shards cannot be part of type 'robotics'"):
        RoboticsDataParams(sequential_shards=["a"])
    with pytest.raises(ValueError, match=r"hparams\.global_batch_size \(6\) must be a multiple"):
        create_dataloader(TextUntokenizedDataParams(sequential_shards=["a"]), global_batch_size=6, per_gpu_batch_size=4)


class _Server(ThreadingHTTPServer):
    """Serves a folder, with ranges or without; breaks off the first answers in the middle."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.has_ranges, self.num_broken, self.status = folder, True, 0, 200
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        server, path = self.server, self.server.folder / self.path.partition("?")[0].strip("/")
        if server.status != 200 or not path.is_file():
            self.send_error(404 if server.status == 200 else server.status)
            return
        whole = body = path.read_bytes()
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        is_part = server.has_ranges and "Range" in self.headers
        if is_part:
            body = whole[int(first) : int(last) + 1 if last else None]
        self.send_response(206 if is_part else 200)
        if is_part:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(body) - 1}/{len(whole)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", "a")
        self.end_headers()
        server.num_broken -= 1
        self.wfile.write(body[: len(body) // 2] if server.num_broken >= 0 else body)


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("vla_foundry.storage.http._FIRST_WAIT_SECONDS", 0.001)
    server = _Server(folder)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("has_ranges", [True, False])
def test_tars_of_a_web_server_are_read_though_it_breaks_off(server: _Server, has_ranges: bool, tmp_path: Path) -> None:
    server.has_ranges = has_ranges
    address = f"http://127.0.0.1:{server.server_port}/shard_00000"
    loader = create(f"{address}{{0..3}}.tar?signature=x", shuffle=False)
    server.num_broken = 4
    assert read(loader, 10) == list(range(40))
    whole = (server.folder / "shard_000001.tar").read_bytes()
    assert read_range(f"{address}1.tar", 100, 50) == whole[100:150]
    assert read_range(f"{address}1.tar", len(whole), 50) == b""
    download(f"{address}1.tar", str(tmp_path / "x"))
    assert (tmp_path / "x").read_bytes() == whole
    with pytest.raises(ValueError, match=r"0\.tar is on a web server, where nothing can be written"):
        write_text(f"{address}0.tar", "x")


def test_what_a_web_server_refuses_is_one_line(server: _Server) -> None:
    address = f"http://127.0.0.1:{server.server_port}"
    with pytest.raises(FileNotFoundError, match=r"http://\S+/x\.tar does not exist"):
        create(f"{address}/x.tar")
    with pytest.raises(FileNotFoundError, match=r"does not exist|Name each: a web server lists none"):
        create(f"{address}/")
    with pytest.raises(ValueError, match=r"shard_000000\.tar changed while it was being read"):
        read_range(f"{address}/shard_000000.tar", 0, 9, "another")
    for status, line in ((403, r"403: Forbidden \(1 attempts\)"), (503, r"503: .* \(5 attempts\)")):
        server.status = 200
        loader = create(f"{address}/shard_000000.tar")
        server.status = status
        with pytest.raises(ValueError, match=rf"shard_000000\.tar: HTTP Error {line}"):
            read(loader, 1)


def test_tars_of_a_bucket_are_read(folder: Path, s3_folder: str, put_folder: Callable[[Path, str], None]) -> None:
    put_folder(folder, s3_folder)
    assert read(create(s3_folder, shuffle=False), 10) == list(range(40))
    assert read(create(f"{s3_folder}/*1.tar", f"{s3_folder}/shard_000000.tar", shuffle=False), 1) == [10, 11, 12, 13]
    with pytest.raises(FileNotFoundError, match=r"s3://\S+/x\.tar does not exist"):
        create(f"{s3_folder}/x.tar")
