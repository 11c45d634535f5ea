"""A gate before a Ray dashboard that can be shut, and that sees what goes in."""

import re
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field


@dataclass
class Gate:
    """Lets connections through to `target` (host, port), each for one request, with `token`. While it is
    `shut` it breaks off each new one; the answer to the next request that begins with `unanswered` is
    lost. `sent` are the requests, whole.
    """

    target: tuple[str, int]
    token: str | None = None
    address: str = ""
    shut: bool = False
    unanswered: bytes | None = None
    sent: list[bytearray] = field(default_factory=list)
    through: set[socket.socket] = field(default_factory=set)

    def cut(self) -> None:
        """Breaks off what is going through."""
        for connection in list(self.through):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def streams(self) -> int:
        """How many requests have asked for the stream of a log."""
        return sum(b"/logs/tail " in request for request in self.sent)


class _Handler(socketserver.BaseRequestHandler):
    gate: Gate

    def handle(self) -> None:
        if self.gate.shut:
            return
        with socket.create_connection(self.gate.target) as server, suppress(OSError):
            self.gate.through |= {self.request, server}
            request = bytearray()
            while b"\r\n\r\n" not in request and (data := self.request.recv(65536)):
                request += data
            self.gate.sent.append(request)
            lost = self.gate.unanswered and request.startswith(self.gate.unanswered)
            self.gate.unanswered = None if lost else self.gate.unanswered
            sink = None if lost else self.request
            answering = threading.Thread(target=self._pass, args=(server, sink))
            answering.start()
            server.sendall(self._admitted(bytes(request)))
            while data := self.request.recv(65536):
                request += data
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)
            answering.join()
        self.gate.through -= {self.request, server}

    def _admitted(self, head: bytes) -> bytes:
        line, _, rest = head.partition(b"\r\n")
        if b"upgrade: websocket" not in rest.lower():
            rest = b"Connection: close\r\n" + re.sub(rb"(?im)^connection:.*\r\n", b"", rest)
        if self.gate.token:
            rest = re.sub(rb"(?im)^(x-ray-)?authorization:.*\r\n", b"", rest)
            rest = f"Authorization: Bearer {self.gate.token}\r\n".encode() + rest
        return line + b"\r\n" + rest

    def _pass(self, server: socket.socket, client: socket.socket | None) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                if client:
                    client.sendall(data)
            (client or self.request).shutdown(socket.SHUT_RDWR)


@contextmanager
def gate_before(address: str, token: str | None = None) -> Iterator[Gate]:
    """A running gate before the dashboard at an address."""
    host, port = address.removeprefix("http://").split(":")
    gate = Gate((host, int(port)), token)
    handler = type("Handler", (_Handler,), {"gate": gate})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        gate.address = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield gate
        finally:
            server.shutdown()
            gate.cut()
