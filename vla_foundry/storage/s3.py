"""Read and write objects in S3 and compatible stores with boto3.

Credentials, region and endpoint (AWS_ENDPOINT_URL) come from boto3's usual places. VLA_FOUNDRY_S3_ANONYMOUS=1 sends
unsigned requests, for public buckets.
"""

import functools
import io
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any, BinaryIO, cast

from vla_foundry.storage.local import IncompleteDownload, Listed, RemoteFile, compile_pattern, is_pattern, replace_file

# bytes asked for in one request when a file is read from front to back
_READ_SIZE = 4 << 20
# attempts to read one range; botocore retries what fails before the first byte
_READ_ATTEMPTS = 5
# wait before the second attempt, about; it doubles each time
_FIRST_WAIT_SECONDS = 0.5
# a range that comes slower is asked for again
_SLOWEST_BYTES_PER_SECOND = 50e3
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
# a file is downloaded in parts of this size, as many at once as there are threads
_PART_SIZE, _NUM_THREADS = 8 << 20, 8
_MULTIPART_SIZE = 16 << 20
# a store that hangs is given up after six of these, about four minutes
_CONNECT_SECONDS, _READ_SECONDS = 10.0, 30.0
_CLIENT_LOCK = threading.Lock()


def _client() -> Any:
    # a client must not cross a fork, and a changed environment may name another store
    names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_ACCESS_KEY_ID", "VLA_FOUNDRY_S3_ANONYMOUS")
    with _CLIENT_LOCK:
        return _create_client(os.getpid(), tuple(os.environ.get(name) for name in names))


@functools.lru_cache(maxsize=4)
def _create_client(pid: int, environment: tuple[str | None, ...]) -> Any:
    try:
        import botocore
        from boto3.session import Session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise ValueError("s3:// needs boto3, which is not installed: uv pip install 'vla-foundry[aws]'") from None
    settings: dict[str, Any] = {
        "connect_timeout": _CONNECT_SECONDS,
        "read_timeout": _READ_SECONDS,
        "max_pool_connections": 32,
    }
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        settings["retries"] = {"mode": "standard", "total_max_attempts": 6}
    if os.environ.get("VLA_FOUNDRY_S3_ANONYMOUS") == "1":
        settings["signature_version"] = botocore.UNSIGNED
    try:
        session = Session()
        # any region will do: S3 redirects to the bucket's own, and other stores ignore it
        return session.client("s3", region_name=session.region_name or "us-east-1", config=Config(**settings))
    except (BotoCoreError, ValueError) as error:
        raise ValueError(f"s3:// cannot be used: {error}") from None


def _transfer_config() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=_MULTIPART_SIZE, multipart_chunksize=_MULTIPART_SIZE, max_concurrency=8)


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri[len("s3://") :].partition("/")
    if not bucket:
        raise ValueError(f"'{uri}' has no bucket. Write s3://bucket/key.")
    return bucket, key


@contextmanager
def _named_errors(uri: str, passed_on: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn boto3's errors into FileNotFoundError or a one-line ValueError that names `uri`, but for some."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    try:
        yield
    except passed_on:
        raise
    except (NoCredentialsError, PartialCredentialsError):
        raise ValueError(
            f"{uri} needs AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or "
            "AWS_PROFILE, or VLA_FOUNDRY_S3_ANONYMOUS=1 for a public bucket."
        ) from None
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in ("404", "NoSuchKey", "NoSuchBucket", "NotFound"):
            raise FileNotFoundError(f"{uri} does not exist.") from None
        if code in ("412", "PreconditionFailed"):
            raise ValueError(f"{uri} changed while it was being read. Run again.") from None
        if code in ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"):
            raise ValueError(f"{uri}: access is denied ({code}). Check the AWS credentials.") from None
        raise ValueError(f"{uri}: the store returned {_one_line(error)}") from None
    except (BotoCoreError, Boto3Error) as error:
        raise ValueError(f"{uri}: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


class S3Storage:
    """See vla_foundry.storage.uri.Storage."""

    def _head(self, uri: str) -> tuple[int, str]:
        bucket, key = _split(uri)
        if not key or key.endswith("/"):
            raise FileNotFoundError(f"{uri} is not a file.")
        client = _client()
        with _named_errors(uri):
            head = client.head_object(Bucket=bucket, Key=key)
        return head["ContentLength"], head["ETag"]

    def open_input(self, uri: str) -> BinaryIO:
        size, etag = self._head(uri)
        return cast(BinaryIO, io.BufferedReader(_S3File(uri, size, etag), _READ_SIZE))

    def read_range(self, uri: str, offset: int, size: int, version: str | None = None) -> bytes:
        return _read_range(uri, offset, size, version)

    def describe(self, uri: str) -> Listed:
        return Listed(*self._head(uri))

    def list_entries(self, folder_or_glob: str) -> dict[str, Listed]:
        bucket, key = _split(folder_or_glob)
        if is_pattern(key):
            prefix, matches = compile_pattern(key)
            found = {name: listed for name, listed in self._list(bucket, prefix, folder_or_glob) if matches(name)}
        else:
            prefix = key.rstrip("/") + "/" if key.rstrip("/") else ""
            found = dict(self._list(bucket, prefix, folder_or_glob))
        if not found and key:
            found = {key: Listed(*self._head(folder_or_glob))}
        if not found:
            raise FileNotFoundError(f"Nothing found at {folder_or_glob}.")
        return {f"s3://{bucket}/{name}": listed for name, listed in found.items()}

    def _list(self, bucket: str, prefix: str, uri: str) -> Iterator[tuple[str, Listed]]:
        client = _client()
        with _named_errors(uri):
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
                for item in page.get("Contents", []):
                    if not item["Key"].endswith("/"):  # such a key only marks a folder
                        yield item["Key"], Listed(item["Size"], item["ETag"])

    def write_bytes(self, uri: str, data: bytes) -> None:
        bucket, key = _split(uri)
        client = _client()
        with _named_errors(uri):
            client.upload_fileobj(io.BytesIO(data), bucket, key, Config=_transfer_config())

    def download(self, uri: str, path: str) -> None:
        size, etag = self._head(uri)
        with replace_file(path) as temporary:
            with open(temporary, "xb") as file, ThreadPoolExecutor(_NUM_THREADS) as pool:

                def copy(first: int) -> None:
                    os.pwrite(file.fileno(), _read_range(uri, first, _PART_SIZE, etag), first)

                copies = [pool.submit(copy, first) for first in range(0, size, _PART_SIZE)]
                try:
                    for each in copies:
                        each.result()
                finally:
                    pool.shutdown(cancel_futures=True)
            if os.path.getsize(temporary) != size:
                raise IncompleteDownload(f"{uri} is truncated: {os.path.getsize(temporary)} of {size} bytes arrived.")

    def upload(self, path: str, uri: str) -> None:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} is not a file.")
        bucket, key = _split(uri)
        client = _client()
        with _named_errors(uri):
            client.upload_file(path, bucket, key, Config=_transfer_config())

    def delete(self, uri: str) -> None:
        bucket, key = _split(uri)
        client = _client()
        with _named_errors(uri):
            client.delete_object(Bucket=bucket, Key=key)


class _BadAnswer(Exception):
    """An answer without the bytes that were asked for: worth another try."""


def _read_range(uri: str, offset: int, size: int, etag: str | None = None) -> bytes:
    from botocore.exceptions import HTTPClientError, IncompleteReadError

    for attempt in range(1, _READ_ATTEMPTS + 1):
        try:
            return _within(
                _CONNECT_SECONDS + _READ_SECONDS + size / _SLOWEST_BYTES_PER_SECOND, _ask, uri, offset, size, etag
            )
        except (_BadAnswer, HTTPClientError, IncompleteReadError) as error:
            if attempt == _READ_ATTEMPTS:
                raise ValueError(f"{uri}: {_one_line(error)} ({attempt} attempts)") from None
        # the processes of a run must not all come back at the same time
        time.sleep(random.uniform(0.5, 1) * _FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
    raise AssertionError("the last attempt returns or raises")


def _ask(uri: str, offset: int, size: int, etag: str | None) -> bytes:
    """Return a range as one answer gives it; nothing, if the file ends before it begins."""
    from botocore.exceptions import ClientError, HTTPClientError, IncompleteReadError

    bucket, key = _split(uri)
    request = {"Bucket": bucket, "Key": key, "Range": f"bytes={offset}-{offset + size - 1}"}
    if etag is not None:
        request["IfMatch"] = etag
    client = _client()
    with _named_errors(uri, (HTTPClientError, IncompleteReadError)):
        try:
            answer = client.get_object(**request)
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in ("InvalidRange", "416"):
                return b""
            raise
        with closing(answer["Body"]) as body:
            span = _CONTENT_RANGE.fullmatch(answer.get("ContentRange", ""))
            size_of_answer = answer["ContentLength"]
            # without a range it is the whole file
            first, last, total = map(int, span.groups()) if span else (0, size_of_answer - 1, size_of_answer)
            if (first, last) != (offset, min(offset + size, total) - 1):
                raise _BadAnswer(f"the store sent bytes {first} to {last}, not {size} bytes from byte {offset}")
            data = body.read()
    if len(data) != last - first + 1:
        raise _BadAnswer(f"{len(data)} of {last - first + 1} bytes arrived")
    return data


def _within(seconds: float, function: Callable[..., bytes], *arguments: Any) -> bytes:
    """Return a function's result.

    The timeouts of sockets start again with every byte, so a store that trickles is left to a thread of its own.

    Raises:
        _BadAnswer: it takes longer.
    """
    results: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put(function(*arguments))
        except Exception as error:  # raised below, in the thread that asked
            results.put(error)

    threading.Thread(target=run, daemon=True, name="s3-read").start()
    try:
        result = results.get(timeout=seconds)
    except queue.Empty:
        raise _BadAnswer(f"no whole answer within {seconds:.0f} s: the store is too slow") from None
    if isinstance(result, Exception):
        raise result
    return result


class _S3File(RemoteFile):
    """One object as a seekable raw file; every read is one ranged request for the version first seen."""

    def __init__(self, uri: str, size: int, etag: str) -> None:
        super().__init__(uri, size)
        self._etag = etag

    def _read(self, size: int) -> bytes:
        size = min(size, self._size - self._position)
        if size <= 0:
            return b""
        data = _read_range(self._uri, self._position, size, self._etag)
        self._position += len(data)
        return data

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        data = self._read(len(view))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._read(self._size)
