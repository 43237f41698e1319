"""An object store on this machine that fails: moto's, behind a proxy that answers 500, is slow and cuts connections."""

import http.client
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_KINDS = ("500", "503", "reset", "half", "slow")


class Store:
    """What a case changes and reads.

    Attributes:
        rate: share of requests that fail.
        faults: how many, by kind.
    """

    def __init__(self, seed: float, target: tuple[str, int]) -> None:
        self.rate, self.num_requests = 0.0, 0
        self.faults: Counter[str] = Counter()
        self.target = target
        self.bucket = "s3://faulty"
        self.environment: dict[str, str] = {}
        self._draw, self._lock = random.Random(seed), threading.Lock()

    def draw_fault(self) -> str:
        """Return what befalls the next request; "" for nothing."""
        with self._lock:
            self.num_requests += 1
            kind = self._draw.choice(_KINDS) if self._draw.random() < self.rate else ""
            self.faults.update([kind] if kind else [])
            return kind


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def forward(self) -> None:
        """Answer a request as the store does, or with a fault."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.store.draw_fault()
        if fault == "reset":
            self.close_connection = True
            return
        if fault in ("500", "503"):
            self.send_response(int(fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "slow":
            time.sleep(0.3)
        connection = http.client.HTTPConnection(*self.store.target)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if fault == "half" else content)
        self.close_connection = fault == "half"

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


@contextmanager
def serve_faulty_store(seed: float, data: Path) -> Iterator[Store]:
    """Serve a store that holds a folder as `data/`; it does not fail until `rate` is set."""
    from boto3.session import Session
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    inner = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    inner.start()
    store = Store(seed, inner.get_host_and_port())
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), type("Proxy", (_Proxy,), {"store": store}))
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    store.environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
    client = Session(**keys).client("s3", endpoint_url=store.environment["AWS_ENDPOINT_URL"])
    client.create_bucket(Bucket="faulty")
    for path in data.iterdir():
        client.upload_file(str(path), "faulty", f"data/{path.name}")
    try:
        yield store
    finally:
        proxy.shutdown()
        proxy.server_close()
        inner.stop()
