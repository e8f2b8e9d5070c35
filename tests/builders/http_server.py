"""HTTP servers in a thread of the test, for what no real one does to order."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Serve = Callable[[socket.socket], None]


class QuietHandler(BaseHTTPRequestHandler):
    """Handler that logs nothing."""

    def answer(self, body: bytes = b"", kind: str = "text/html", status: int = 200) -> None:
        """Send a whole response."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler], host: str = "127.0.0.1") -> Iterator[str]:
    """Inside, ``handler`` answers at this address."""
    with ThreadingHTTPServer((host, 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{host}:{server.server_port}"
        server.shutdown()


def response(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = (f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", "")
    return "\r\n".join(lines).encode("latin-1") + body


def request_of(client: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data and (piece := client.recv(65536)):
        data += piece
    return data


@contextmanager
def listening(serve: Serve) -> Iterator[int]:
    """The port of a server that hands each connection to ``serve``, in a thread of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run(client: socket.socket) -> None:
            with client, suppress(OSError):
                serve(client)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=run, args=(server.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def drip(client: socket.socket, data: bytes) -> None:
    for each in data:
        client.sendall(bytes([each]))
        time.sleep(0.05)


def dripped(start: bytes, data: bytes) -> Serve:
    def serve(client: socket.socket) -> None:
        request_of(client)
        client.sendall(start)
        drip(client, data)

    return serve
