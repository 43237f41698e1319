"""Read files from web servers, `http://` and `https://`; nothing is written there. Folders are read from listings."""

import http.client
import io
import os
import random
import re
import shutil
import time
import urllib.error
import urllib.request
from html.parser import HTMLParser
from typing import Any, BinaryIO, NoReturn, cast
from urllib.parse import quote, urljoin, urlsplit

from vla_foundry.storage.local import IncompleteDownload, Listed, RemoteFile, replace_file

_READ_SIZE = 4 << 20
_TIMEOUT_SECONDS = 30.0
# what breaks off, and what an overloaded server refuses, is asked for again
_ATTEMPTS = 5
_BUSY = (408, 429)
# wait before the second attempt, about; it doubles each time
_FIRST_WAIT_SECONDS = 0.5
# what a listing may be, so that a server cannot keep us busy for ever
_MAX_PAGE_BYTES, _MAX_PAGES, _MAX_DEPTH = 64 << 20, 10_000, 32
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


class HttpStorage:
    """See vla_foundry.storage.uri.Storage."""

    def open_input(self, uri: str) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(_HttpFile(uri), _READ_SIZE))

    def read_range(self, uri: str, offset: int, size: int, version: str | None = None) -> bytes:
        with io.BufferedReader(_HttpFile(uri, offset, offset + size, version), _READ_SIZE) as file:
            return file.read(size)

    def describe(self, uri: str) -> Listed:
        with _HttpFile(uri) as file:
            return Listed(file.num_bytes, file.version or "")

    def list_entries(self, folder_or_glob: str) -> dict[str, Listed]:
        return {folder_or_glob: self.describe(folder_or_glob)}

    def download(self, uri: str, path: str) -> None:
        with replace_file(path) as temporary, _HttpFile(uri) as source:
            with open(temporary, "xb") as target:
                shutil.copyfileobj(source, target, _READ_SIZE)
            if os.path.getsize(temporary) != source.num_bytes:
                raise IncompleteDownload(f"{uri}: {os.path.getsize(temporary)} of {source.num_bytes} bytes arrived.")

    def write_bytes(self, uri: str, data: bytes) -> NoReturn:
        raise ValueError(f"{uri} is on a web server, where nothing can be written. Use a local path, s3:// or hf://.")

    def upload(self, path: str, uri: str) -> None:
        self.write_bytes(uri, b"")

    def delete(self, uri: str) -> None:
        self.write_bytes(uri, b"")


class _HttpFile(RemoteFile):
    """A file that is read from some byte on by one request, which is made again where it broke off.

    Args:
        uri: its name.
        position: first byte to read.
        end: read no byte from here on; None: the end of the file.
        version: see Listed; None: any.
    """

    def __init__(self, uri: str, position: int = 0, end: int | None = None, version: str | None = None) -> None:
        super().__init__(uri, -1)
        self._position, self._end, self.version = position, end, version
        self._answer: Any = None
        # where the answer goes on
        self._next = position
        self.readinto(bytearray())  # a missing file is an error now

    @property
    def num_bytes(self) -> int:
        """The size of the file."""
        return self._size

    def readinto(self, buffer: Any, /) -> int:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._read(memoryview(buffer).cast("B"))
            except (OSError, http.client.HTTPException) as error:
                self._hang_up()
                code = error.code if isinstance(error, urllib.error.HTTPError) else 500
                if code in (404, 410):
                    raise FileNotFoundError(f"{self._uri} does not exist.") from None
                reason = " ".join(str(error).split()) or type(error).__name__
                if attempt == _ATTEMPTS or (code < 500 and code not in _BUSY):
                    raise ValueError(f"{self._uri}: {reason} ({attempt} attempts)") from None
            # the processes of a run must not all come back at the same time
            time.sleep(random.uniform(0.5, 1) * _FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")

    def _read(self, view: memoryview) -> int:
        if self._next != self._position:
            self._hang_up()
        if self._answer is None and not 0 <= self._size <= self._position:
            self._ask()
        left = min(self._size, self._end or self._size) - self._position
        if not len(view) or left <= 0:
            return 0
        assert self._answer is not None, "bytes are left, so they were asked for"
        count = self._answer.readinto(view[:left])
        if not count:
            raise ConnectionError(f"{self._position} of {self._size} bytes arrived")
        self._position = self._next = self._position + count
        return count

    def _ask(self) -> None:
        span = f"bytes={self._position}-{'' if self._end is None else self._end - 1}"
        whole = self._position == 0 and self._end is None
        request = urllib.request.Request(_quote(self._uri), headers={} if whole else {"Range": span})
        try:
            self._answer = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise
            self._size = self._next = self._position  # the file ends before
            return
        headers = self._answer.headers
        found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
        if "Content-Length" not in headers:
            raise ValueError(f"{self._uri}: the server does not say how long it is (Content-Length).")
        first, self._size = map(int, found.groups()) if found else (0, int(headers["Content-Length"]))
        version = headers.get("ETag") or headers.get("Last-Modified") or ""
        if self.version not in (None, version):
            raise ValueError(f"{self._uri} changed while it was being read. Run again.")
        self.version = version
        while first < self._position:  # a server without ranges sends the whole file
            first += len(self._answer.read(min(_READ_SIZE, self._position - first))) or self._size
        self._next = self._position

    def _hang_up(self) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.close()

    def close(self) -> None:
        self._hang_up()
        super().close()


class _Links(HTMLParser):
    """Collects where the links of a page lead."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """See HTMLParser."""
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


def list_links(folder: str) -> list[str]:
    """Return the files at any depth below a folder that the server lists (Apache, nginx, Python's http.server).

    A link counts if it leads below the page that it is on, so links to sort a listing, or to its parent, do not.

    Raises:
        FileNotFoundError: there is no listing.
        ValueError: the server fails, or its listings are too large.
    """
    files: set[str] = set()
    folder = _quote(folder)
    pages, seen = [folder], {folder}
    while pages:
        page = pages.pop()
        links = _Links()
        links.feed(_read_page(page))
        for link in links.found:
            uri = _quote(urljoin(page, link))
            if urlsplit(uri).query or "#" in uri or not uri.startswith(page) or uri == page:
                continue
            if not uri.endswith("/"):
                files.add(uri)
            elif uri not in seen:
                seen.add(uri)
                pages.append(uri)
        if len(seen) > _MAX_PAGES or page.count("/") - folder.count("/") > _MAX_DEPTH:
            raise ValueError(
                f"{folder} lists more than {_MAX_PAGES} folders, or some more than {_MAX_DEPTH} levels deep."
            )
    if not files:
        raise FileNotFoundError(f"{folder} lists no files.")
    return sorted(files)


def _quote(uri: str) -> str:
    """Return an address with the characters escaped that may not be in one, such as spaces."""
    return quote(uri, safe="%/:=&?~#+!$,;'@()*[]")


def _read_page(uri: str) -> str:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with urllib.request.urlopen(_quote(uri), timeout=_TIMEOUT_SECONDS) as answer:
                content = answer.read(_MAX_PAGE_BYTES + 1)
            break
        except (OSError, http.client.HTTPException) as error:
            code = error.code if isinstance(error, urllib.error.HTTPError) else 500
            if code in (404, 410):
                raise FileNotFoundError(f"{uri} does not exist.") from None
            if attempt == _ATTEMPTS or (code < 500 and code not in _BUSY):
                raise ValueError(f"{uri}: {' '.join(str(error).split())} ({attempt} attempts)") from None
        time.sleep(random.uniform(0.5, 1) * _FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
    else:
        raise AssertionError("the last attempt breaks or raises")
    if len(content) > _MAX_PAGE_BYTES:
        raise ValueError(f"{uri}: a listing of more than {_MAX_PAGE_BYTES:,} bytes.")
    return content.decode("utf-8", errors="replace")
