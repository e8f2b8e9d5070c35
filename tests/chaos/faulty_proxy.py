"""What stands between a client and a real S3 server, and lets happen what happens on networks."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from enum import Enum
from urllib.parse import urlsplit

SLOW = 0.5
"""Seconds that a slow answer takes."""
ANSWER = (
    "HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n{body}"
)


class Fault(Enum):
    """What becomes of a request."""

    BUSY = "503 Slow Down"
    DENIED = "403 Forbidden"
    RESET = "the connection is reset before the server hears of it"
    UNANSWERED = "the server does it, and the connection is reset before the answer"
    CUT = "the server does it, and the answer ends in the middle of its body, or of its first line if it has none"
    SLOW = "it takes its time"


CODES = {Fault.BUSY: "SlowDown", Fault.DENIED: "AccessDenied"}


class FaultyProxy:
    """On loopback, in front of ``server``; ``fault`` says what becomes of a request, by its number and first line.

    Each connection carries one request. Signatures hold, as they are over what the client calls the server.
    """

    def __init__(self, server: str, fault: Callable[[int, str], Fault | None]) -> None:
        there = urlsplit(server)
        assert there.hostname
        assert there.port
        self.server = (there.hostname, there.port)
        self.fault = fault
        self.met: list[Fault | None] = []
        """What became of the requests so far."""
        self._turn = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        # Closing alone would not wake the thread that waits in accept.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _listen(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        # A peer that hangs up is nothing unusual here.
        with client, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                if not (piece := client.recv(65536)):
                    return
                head += piece
            line, _, rest = head.partition(b"\r\n")
            with self._turn:
                fault = self.fault(len(self.met), line.decode())
                self.met.append(fault)
            if fault is Fault.RESET:
                _reset(client)
                return
            if fault in CODES:
                _refuse(client, fault, with_body=not line.startswith(b"HEAD"))
                return
            with socket.create_connection(self.server) as server:
                server.sendall(line + b"\r\nConnection: close\r\n" + rest)
                threading.Thread(target=_pump, args=(client, server), daemon=True).start()
                if fault in (Fault.UNANSWERED, Fault.CUT):
                    head, end, body = _last_answer(server, client).partition(b"\r\n\r\n")
                    if fault is Fault.UNANSWERED:
                        _reset(client)
                    else:
                        client.sendall(head + end + body[: len(body) // 2] if body else head[:10])
                        client.shutdown(socket.SHUT_RDWR)
                    return
                if fault is Fault.SLOW:
                    time.sleep(SLOW)
                while piece := server.recv(65536):
                    client.sendall(piece)
                client.shutdown(socket.SHUT_RDWR)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(65536):
            target.sendall(piece)


def _last_answer(server: socket.socket, client: socket.socket) -> bytes:
    """The server's answer, of which the client learns no more than that it may send its body."""
    answer = b""
    while piece := server.recv(65536):
        if piece.startswith(b"HTTP/1.1 100"):
            client.sendall(piece)
        else:
            answer += piece
    return answer


def _refuse(client: socket.socket, fault: Fault, with_body: bool) -> None:
    body = f"<Error><Code>{CODES[fault]}</Code><Message>a drill</Message></Error>" if with_body else ""
    client.sendall(ANSWER.format(status=fault.value, size=len(body), body=body).encode())
    client.shutdown(socket.SHUT_WR)
    client.settimeout(5)
    # What is unread when a socket is closed resets the connection, and the answer with it.
    with contextlib.suppress(OSError):
        while client.recv(65536):
            pass


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    # While another thread waits for more of it, a socket that is closed stays open.
    client.shutdown(socket.SHUT_RD)
