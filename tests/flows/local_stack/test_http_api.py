"""Servers are asked with the login that they are named with, and named without it."""

import base64
import socket
import time

import pytest

from flows.local_stack.http_api import NotServingError, fetch, request_json
from tests.builders.http_server import QuietHandler, dripped, listening, request_of, response, serving


class EchoLoginHandler(QuietHandler):
    """Answers with the login that it was sent."""

    def do_GET(self) -> None:
        self.answer(base64.b64decode(self.headers.get("Authorization", "Basic ").removeprefix("Basic ")))


def test_a_login_in_the_address_yields_to_another() -> None:
    with serving(EchoLoginHandler) as address:
        address_with_login = address.replace("//", "//someone:p%40ss:@")
        assert fetch(address_with_login) == b"someone:p@ss:"
        assert fetch(address_with_login, "other:word") == b"other:word"
        assert fetch(address) == b""


def test_displayed_url_has_no_credentials() -> None:
    with serving(EchoLoginHandler) as address, pytest.raises(NotServingError) as error:
        request_json(address.replace("//", "//someone:test-secret@"))
    assert str(error.value).startswith(f"{address}: ")
    with pytest.raises(NotServingError) as error:
        fetch("http://someone:test-secret@127.0.0.1:9")
    assert "test-secret" not in str(error.value)


def test_a_login_follows_no_redirect_nor_waits_long() -> None:
    requests: list[bytes] = []
    with listening(lambda client: requests.append(request_of(client))) as other:

        def redirect(client: socket.socket) -> None:
            request_of(client)
            client.sendall(response(b"", f"Location: http://127.0.0.1:{other}/", status="302 Found"))

        with listening(redirect) as port, pytest.raises(NotServingError):
            fetch(f"http://127.0.0.1:{port}/", "someone:test-secret")
    assert [b"authorization" in request.lower() for request in requests] == [False]
    with listening(dripped(b"", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000)) as port:
        start = time.monotonic()
        with pytest.raises(NotServingError):
            fetch(f"http://127.0.0.1:{port}/", timeout=0.3)
        assert time.monotonic() - start < 3
