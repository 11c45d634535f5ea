"""A proxy before an S3 server that spoils a share of the answers, and counts what is asked and sent."""

import http.client
import os
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen

FAULTS = ("500", "503", "reset", "lost", "cut", "slow")
"""Answers 500 and 503 (SlowDown); a connection reset before the request is done, or after; a body cut
short; a body with a pause in the middle. There are also "403" (AccessDenied) and "silent" (a pause
before the answer).
"""

ERRORS = {"403": "AccessDenied", "500": "InternalError", "503": "SlowDown"}
SIGNED = "AWS4-HMAC-SHA256 Credential=testing/20240506/us-east-1/s3/aws4_request, Signature=none"
LEFT_OUT = {"connection", "transfer-encoding", "content-length"}


@dataclass
class FaultyS3:
    """What the proxy does (`share` of the requests get one of `faults`, all of which may be changed at
    any moment), and what it saw: requests and bytes of bodies sent, by (method, "bucket/key").
    """

    target: str
    share: float = 0.0
    faults: tuple[str, ...] = FAULTS
    pause_s: float = 0.05
    address: str = ""
    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    sent_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    injected: Counter[str] = field(default_factory=Counter)
    largest_range: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def forget(self) -> None:
        """Starts counting anew; the faults that follow are the same again."""
        with self.lock:
            self.largest_range = 0
            for counter in (self.requests, self.sent_bytes, self.injected):
                counter.clear()

    def next_fault(self, method: str, key: str, headers: Any) -> str | None:
        """Counts a request and says what happens to it: the same for the n-th one of a key each time."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("Range", ""))
        with self.lock:
            self.requests[method, key] += 1
            if asked:
                self.largest_range = max(self.largest_range, int(asked[2]) - int(asked[1]) + 1)
            chance = random.Random(f"{method} {key} {self.requests[method, key]}")
            if chance.random() >= self.share:
                return None
            fault = chance.choice(self.faults)
            self.injected[fault] += 1
            return fault


@contextmanager
def faulty_s3(target: str, **settings: Any) -> Iterator[FaultyS3]:
    """A running proxy before the server at the URL `target`, found at its `address`."""
    proxy = FaultyS3(target, **settings)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    proxy.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def send(method: str, path: str, data: bytes | None = None) -> None:
    """A request past the client that the code under test uses."""
    address = f"{os.environ['AWS_ENDPOINT_URL']}/{quote(path)}"
    headers = {"Content-Type": "application/octet-stream", "Authorization": SIGNED}
    with urlopen(Request(address, data, headers, method=method), timeout=10):
        pass


def put(bucket: str, key: str, data: bytes) -> str:
    send("PUT", f"{bucket}/{key}", data)
    return f"s3://{bucket}/{key}"


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultyS3
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        with suppress(OSError):  # the client is gone
            if self.raw_requestline and self.parse_request():
                self._answer()
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        body = self._request_body()
        key = unquote(urlsplit(self.path).path).strip("/")
        fault = self.proxy.next_fault(self.command, key, self.headers)
        if fault == "reset":
            return self._reset()
        if fault in ERRORS:
            return self._refuse(int(fault), ERRORS[fault], key)
        if fault == "silent":
            time.sleep(self.proxy.pause_s)
        status, headers, content = self._forward(body)
        if fault == "lost" or (fault == "cut" and not content):
            return self._reset()
        half = len(content) // 2
        self._head(status, headers, len(content))
        self._send(content[:half], key)
        if fault == "cut":
            return
        if fault == "slow":
            time.sleep(self.proxy.pause_s)
        self._send(content[half:], key)

    def _request_body(self) -> bytes:
        """The body as it came, in its chunks if it came in chunks."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while True:
            parts.append(self.rfile.readline())
            size = int(parts[-1].split(b";")[0], 16)
            parts.append(self.rfile.read(size) if size else b"")
            parts.append(self.rfile.readline())
            if not size:
                while parts[-1].strip():  # trailers
                    parts.append(self.rfile.readline())
                return b"".join(parts)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        server = http.client.HTTPConnection(urlsplit(self.proxy.target).netloc, timeout=60)
        try:
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):  # 100 has been answered by now
                    server.putheader(name, value)
            server.putheader("Connection", "close")
            server.endheaders(body)
            answer = server.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            server.close()

    def _refuse(self, status: int, code: str, key: str) -> None:
        xml = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        self._head(status, [("Content-Type", "application/xml")], len(xml))
        if self.command != "HEAD":
            self._send(xml, key)

    def _head(self, status: int, headers: list[tuple[str, str]], size: int) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in LEFT_OUT or (
                name.lower() == "content-length" and self.command == "HEAD"
            ):
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(size))
        self.send_header("Connection", "close")
        self.end_headers()

    def _send(self, content: bytes, key: str) -> None:
        self.wfile.write(content)
        with self.proxy.lock:
            self.proxy.sent_bytes[self.command, key] += len(content)

    def _reset(self) -> None:
        """Closes with a reset instead of an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for end in (self.rfile, self.wfile, self.connection):
            end.close()
