"""The node's cache of remote shards, against a real object store."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vla_foundry.data import cache as cache_module
from vla_foundry.data.cache import LookAhead, RemoteShard, ShardCache
from vla_foundry.storage.uri import write_bytes


def put(uri: str, content: bytes, *, checksum: str | None = "") -> RemoteShard:
    """Store an object and return what a manifest would say of it."""
    write_bytes(uri, content)
    sha256 = hashlib.sha256(content).hexdigest() if checksum == "" else checksum
    return RemoteShard(uri=uri, num_bytes=len(content), sha256=sha256)


def read(cache: ShardCache, shard: RemoteShard) -> bytes:
    file, _ = cache.open(shard)
    with file:
        return file.read()


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the objects that were downloaded in this process."""
    names: list[str] = []
    real_download = cache_module.download

    def download(uri: str, path: str) -> None:
        names.append(uri)
        real_download(uri, path)

    monkeypatch.setattr(cache_module, "download", download)
    return names


def test_shard_is_downloaded_once(tmp_path: Path, s3_folder: str, downloads: list[str]) -> None:
    shard = put(f"{s3_folder}/a.tar", b"x" * 1000)
    for _ in range(3):
        assert read(ShardCache(str(tmp_path / "cache"), 10_000), shard) == b"x" * 1000
    assert downloads == [shard.uri]


def test_a_shard_that_is_written_again_is_downloaded_again(
    tmp_path: Path, s3_folder: str, downloads: list[str]
) -> None:
    """Its manifest may say nothing of it but its size."""
    for content in (b"x" * 1000, b"y" * 1000):
        shard = put(f"{s3_folder}/a.tar", content, checksum=None)
        for _ in range(2):
            assert read(ShardCache(str(tmp_path / "cache"), 10_000), shard) == content
    assert downloads == [f"{s3_folder}/a.tar"] * 2


def test_least_recently_used_shards_make_room(tmp_path: Path, s3_folder: str, downloads: list[str]) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 3500)
    shards = [put(f"{s3_folder}/{number}.tar", bytes([number]) * 1000) for number in range(5)]
    for number in (0, 1, 2, 0, 3):  # 3 takes the place of 1
        read(cache, shards[number])
        time.sleep(0.02)
        sizes = [path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")]
        assert sum(sizes) <= 3500
    assert [cache.holds(shard) for shard in shards] == [True, False, True, True, False]
    assert read(cache, shards[1]) == b"\1" * 1000
    assert len(downloads) == 5


def test_open_shard_stays_readable_when_it_is_evicted(tmp_path: Path, s3_folder: str) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 1500)
    first, second = (put(f"{s3_folder}/{name}.tar", name.encode() * 1000) for name in "ab")
    file, path = cache.open(first)
    read(cache, second)
    assert not os.path.exists(path)
    with file:
        assert file.read() == b"a" * 1000


def test_wrong_bytes_are_downloaded_again_and_then_refused(
    tmp_path: Path, s3_folder: str, downloads: list[str]
) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 10_000)
    wrong = put(f"{s3_folder}/a.tar", b"x" * 1000, checksum="0" * 64)
    with pytest.raises(ValueError, match=r"a.tar has SHA-256 .*, not 000000000000.*vla-foundry manifest build"):
        cache.open(wrong)
    assert downloads == [wrong.uri] * 2
    short = RemoteShard(uri=wrong.uri, num_bytes=999)
    with pytest.raises(ValueError, match=r"a.tar has 1000 bytes, not 999"):
        cache.open(short)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["locks"]


def test_damage_on_the_way_is_mended_by_a_second_download(
    tmp_path: Path, s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = put(f"{s3_folder}/a.tar", b"x" * 1000)
    real_download, calls = cache_module.download, []

    def damage_first(uri: str, path: str) -> None:
        real_download(uri, path)
        calls.append(uri)
        if len(calls) == 1:
            Path(path).write_bytes(b"y" * 1000)

    monkeypatch.setattr(cache_module, "download", damage_first)
    assert read(ShardCache(str(tmp_path / "cache"), 10_000), shard) == b"x" * 1000
    assert len(calls) == 2


@pytest.mark.parametrize("fault", [ValueError("a.tar: Max Retries Exceeded"), ConnectionResetError("reset"), None])
def test_a_download_that_breaks_off_is_tried_again(
    tmp_path: Path, s3_folder: str, monkeypatch: pytest.MonkeyPatch, fault: Exception | None
) -> None:
    shard = put(f"{s3_folder}/a.tar", b"x" * 1000, checksum=None)
    real_download, calls = cache_module.download, []

    def break_first(uri: str, path: str) -> None:
        calls.append(uri)
        real_download(uri, path)
        if len(calls) == 1:
            os.truncate(path, 400)
            if fault is not None:
                raise fault

    monkeypatch.setattr(cache_module, "download", break_first)
    assert read(ShardCache(str(tmp_path / "cache"), 10_000), shard) == b"x" * 1000
    assert len(calls) == 2


def test_retries_of_the_store_that_run_out_are_one_line() -> None:
    from boto3.exceptions import RetriesExceededError

    from vla_foundry.storage import s3

    with pytest.raises(ValueError, match=r"^s3://a/b: Max Retries Exceeded"), s3._named_errors("s3://a/b"):
        raise RetriesExceededError(OSError("cut off"), "Max Retries Exceeded")


def test_dataset_written_anew_is_not_read_from_old_bytes(tmp_path: Path, s3_folder: str) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 10_000)
    assert read(cache, put(f"{s3_folder}/a.tar", b"x" * 1000)) == b"x" * 1000
    assert read(cache, put(f"{s3_folder}/a.tar", b"z" * 1000)) == b"z" * 1000
    assert read(ShardCache(str(tmp_path / "cache"), 10_000), RemoteShard(uri=f"{s3_folder}/a.tar")) == b"z" * 1000


def test_shard_larger_than_the_cache_names_the_option(tmp_path: Path, s3_folder: str) -> None:
    shard = put(f"{s3_folder}/a.tar", b"x" * 1000)
    with pytest.raises(ValueError, match=r"data\.dataset_cache\.cache_size_gb"):
        ShardCache(str(tmp_path / "cache"), 500).open(shard)


def test_missing_remote_shard_is_named(tmp_path: Path, s3_folder: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.tar"):
        ShardCache(str(tmp_path / "cache"), 500).open(RemoteShard(uri=f"{s3_folder}/missing.tar", num_bytes=5))


READ_ALL = """
import hashlib, json, sys
from vla_foundry.data import cache as cache_module

count, real_download = 0, cache_module.download

def download(uri, path):
    global count
    count += 1
    real_download(uri, path)

cache_module.download = download
cache = cache_module.ShardCache(sys.argv[1], 2_500_000)
shards = [cache_module.RemoteShard(**values) for values in json.loads(sys.argv[2])]
for shard in shards * 3:
    file, _ = cache.open(shard)
    with file:
        assert hashlib.sha256(file.read()).hexdigest() == shard.sha256
print(count)
"""


def test_processes_share_the_cache_and_download_nothing_twice(tmp_path: Path, s3_folder: str) -> None:
    shards = [put(f"{s3_folder}/{number}.tar", os.urandom(300_000)) for number in range(8)]
    values = json.dumps([dataclasses.asdict(shard) for shard in shards])
    command = [sys.executable, "-c", READ_ALL, str(tmp_path / "cache"), values]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum(int(output) for output in outputs) == 8


START_DOWNLOAD = """
import json, pathlib, sys, time
from vla_foundry.data import cache as cache_module

def download(uri, path):
    pathlib.Path(path).write_bytes(b"half")
    print("started", flush=True)
    time.sleep(60)

cache_module.download = download
cache_module.ShardCache(sys.argv[1], 10_000).fetch(cache_module.RemoteShard(**json.loads(sys.argv[2])))
"""


def test_cache_survives_a_kill_during_a_download(tmp_path: Path, s3_folder: str) -> None:
    shard, folder = put(f"{s3_folder}/a.tar", b"x" * 1000), tmp_path / "cache"
    command = [sys.executable, "-c", START_DOWNLOAD, str(folder), json.dumps(dataclasses.asdict(shard))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        assert not ShardCache(str(folder), 10_000).fetch(shard, wait=False)  # it is being downloaded
        process.kill()
    assert list(folder.glob("*.part/shard"))  # the kill landed in the middle
    assert read(ShardCache(str(folder), 10_000), shard) == b"x" * 1000
    assert not list(folder.glob("*.part"))


def test_abandoned_downloads_of_other_shards_are_removed(tmp_path: Path, s3_folder: str) -> None:
    rubbish = tmp_path / "cache" / ("f" * 40 + ".part")
    rubbish.mkdir(parents=True)
    (rubbish / "room").write_bytes(b"\0" * 5000)
    cache = ShardCache(str(tmp_path / "cache"), 1500)
    read(cache, put(f"{s3_folder}/a.tar", b"x" * 1000))
    assert not rubbish.exists()


@pytest.mark.parametrize("is_size_known", [True, False])
def test_look_ahead_fetches_before_it_is_asked_but_at_most_half_the_cache(
    tmp_path: Path, s3_folder: str, is_size_known: bool
) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 6500)
    shards = [put(f"{s3_folder}/{number}.tar", bytes([number]) * 1000) for number in range(5)]
    if not is_size_known:
        shards = [RemoteShard(uri=shard.uri) for shard in shards]
    look_ahead = LookAhead(cache)
    look_ahead.want(shards)
    deadline = time.monotonic() + 30
    while not all(cache.holds(shard) for shard in shards[:3]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    assert not any(cache.holds(shard) for shard in shards[3:])
    look_ahead.close()


def test_look_ahead_survives_a_missing_shard(tmp_path: Path, s3_folder: str) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 10_000)
    missing, there = RemoteShard(uri=f"{s3_folder}/missing.tar", num_bytes=5), put(f"{s3_folder}/a.tar", b"x" * 1000)
    look_ahead = LookAhead(cache)
    look_ahead.want([missing, there])
    deadline = time.monotonic() + 30
    while not cache.holds(there):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    look_ahead.close()
