"""Connections to servers of Darkroom's own, by clients that mean harm."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from flows.local_stack import http_protocol
from flows.local_stack.http_protocol import BoundedProtocol

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


class App:
    """Answers GET at once, and POST when its client has left."""

    def __init__(self) -> None:
        self.asked, self.left = threading.Event(), threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "POST":
            assert (await receive())["type"] == "http.request"
            self.asked.set()
            assert (await receive())["type"] == "http.disconnect"
            self.left.set()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def port(app: App, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(http_protocol, "HEADER_SECONDS", 1)
    monkeypatch.setattr(http_protocol, "MAX_CONNECTIONS", 8)
    server = uvicorn.Server(uvicorn.Config(app, http=BoundedProtocol, lifespan="off", log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


def connect(port: int, sent: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(sent)
    return connection


def is_closed(connection: socket.socket) -> bool:
    """Wait for the other side to close a connection, or to answer."""
    try:
        return connection.recv(1000) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("sent", [b"", GET, GET + b"X: "])
def test_a_header_that_does_not_arrive_ends_the_connection(port: int, sent: bytes) -> None:
    with connect(port, sent) as connection:
        assert is_closed(connection)


def test_after_an_answer_the_next_header_has_a_deadline(port: int) -> None:
    with connect(port, GET + b"\r\n") as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        connection.sendall(GET)
        assert is_closed(connection)


def test_silent_connections_leave_room_for_others(port: int) -> None:
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(connect(port, GET))
        for _ in range(5):
            with connect(port, GET + b"\r\n") as connection:
                assert connection.recv(1000).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("more", [b"", b"G", GET + b"\r\n"])
def test_a_client_that_leaves_is_noticed_whatever_it_sent_before(port: int, app: App, more: bytes) -> None:
    with connect(port, b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}") as connection:
        assert app.asked.wait(20)
        connection.sendall(more)
        time.sleep(0.2)
    assert app.left.wait(20)
