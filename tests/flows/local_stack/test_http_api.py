"""Servers are asked with the login that they are named with, and named without it."""

import base64
from http.server import BaseHTTPRequestHandler

import pytest

from flows.local_stack.http_api import NotServingError, fetch, request_json
from tests.builders.http_server import serving


class EchoLoginHandler(BaseHTTPRequestHandler):
    """Answers with the login that it was sent."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(base64.b64decode(self.headers.get("Authorization", "Basic ").removeprefix("Basic ")))

    def log_message(self, *_: object) -> None:
        pass


def test_a_login_in_the_address_is_sent_unless_another_is_given() -> None:
    with serving(EchoLoginHandler) as address:
        named = address.replace("//", "//someone:p%40ss:@")
        assert fetch(named) == b"someone:p@ss:"
        assert fetch(named, "other:word") == b"other:word"
        assert fetch(address) == b""


def test_displayed_url_has_no_credentials() -> None:
    with serving(EchoLoginHandler) as address, pytest.raises(NotServingError) as caught:
        request_json(address.replace("//", "//someone:test-secret@"))
    assert str(caught.value).startswith(f"{address}: ")
    with pytest.raises(NotServingError) as caught:
        fetch("http://someone:test-secret@127.0.0.1:9")
    assert "test-secret" not in str(caught.value)
