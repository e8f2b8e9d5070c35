"""The client of captioner, Hub and servers: credentials, deadlines, rates and sizes."""

import gzip
import socket
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from diffusion.common.http_client import HttpClient, HttpError, OversizedError, RetryableError
from tests.builders.archives import peak
from tests.builders.http_server import Serve, drip, dripped, listening, request_of, response

SECRETS = {"Authorization": "Bearer hush", "Cookie": "session=hush", "X-Api-Key": "hush"}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def client() -> Iterator[HttpClient]:
    with closing(HttpClient(0.5)) as client:
        yield client


def get(client: HttpClient, url: str, max_bytes: int = 2**20) -> bytes:
    with client.stream("GET", url, SECRETS, max_bytes=max_bytes) as answer:
        assert answer.status == 200
        return b"".join(answer.pieces)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_credentials_follow_no_redirect_to_another_origin(client: HttpClient, host: str) -> None:
    """Another port, and another name of the same machine, are other origins; so is what they redirect back to."""
    requests: list[bytes] = []

    def other(socket: socket.socket) -> None:
        requests.append(request_of(socket))
        socket.sendall(response(b"there"))

    with listening(other) as port:

        def first(socket: socket.socket) -> None:
            requests.append(request_of(socket))
            place = b"/here" if b" /start " in requests[-1] else f"http://{host}:{port}/".encode()
            socket.sendall(response(b"", f"Location: {place.decode()}", "Connection: close", status="302 Found"))

        with listening(first) as start:
            assert get(client, f"http://127.0.0.1:{start}/start") == b"there"
    assert [request.count(b"hush") for request in requests] == [3, 3, 0]


def test_login_of_a_url_stays_with_its_origin(client: HttpClient) -> None:
    requests: list[bytes] = []

    def other(socket: socket.socket) -> None:
        requests.append(request_of(socket))
        socket.sendall(response(b""))

    with listening(other) as port:

        def first(socket: socket.socket) -> None:
            requests.append(request_of(socket))
            socket.sendall(response(b"", f"Location: http://127.0.0.1:{port}/", status="302 Found"))

        login = "me:hush"
        with listening(first) as start, client.stream("GET", f"http://{login}@127.0.0.1:{start}/", max_bytes=9):
            pass
    assert [b"Authorization: Basic" in request for request in requests] == [True, False]


def test_redirects_of_a_post_are_not_followed(client: HttpClient) -> None:
    with (
        listening(lambda each: each.sendall(response(b"", "Location: /other", status="307 Moved"))) as port,
        client.stream("POST", f"http://127.0.0.1:{port}/", SECRETS, b"body", max_bytes=9) as answer,
    ):
        assert answer.status == 307


def keeping_rate(socket: socket.socket) -> None:
    request_of(socket)
    socket.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n")
    for _ in range(10):
        time.sleep(0.3)
        socket.sendall(bytes(1000))


def test_a_body_may_take_longer_if_it_keeps_the_rate() -> None:
    with listening(keeping_rate) as port:
        with closing(HttpClient(2, min_rate=1000)) as client:
            assert len(get(client, f"http://127.0.0.1:{port}/")) == 10_000
        with closing(HttpClient(2)) as client, pytest.raises(RetryableError):
            get(client, f"http://127.0.0.1:{port}/")


SLOW: dict[str, Serve] = {
    "headers": dripped(b"", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000),
    "body": dripped(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"x" * 1000),
    "1xx": lambda each: drip(each, b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100),
    "chunks": dripped(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1;" + b"x" * 5000),
    "nothing": lambda each: time.sleep(20),
}


@pytest.mark.parametrize("min_rate", [None, 1000.0])
@pytest.mark.parametrize("kind", SLOW)
def test_what_is_slower_than_the_rate_ends(kind: str, min_rate: float | None) -> None:
    with listening(SLOW[kind]) as port, closing(HttpClient(0.3, min_rate)) as client:
        start = time.monotonic()
        with pytest.raises(RetryableError):
            get(client, f"http://127.0.0.1:{port}/")
        assert time.monotonic() - start < 3


@pytest.mark.parametrize("content", [bytes(50_000_000), [bytes(50_000_000)]], ids=["bytes", "pieces"])
def test_an_upload_that_is_read_slowly_ends(client: HttpClient, content: bytes | list[bytes]) -> None:
    def reading_slowly(socket: socket.socket) -> None:
        while socket.recv(2**17):
            time.sleep(0.02)

    with listening(reading_slowly) as port:
        start, url = time.monotonic(), f"http://127.0.0.1:{port}/"
        headers = {"Content-Length": "50000000"}
        with pytest.raises(RetryableError), client.stream("POST", url, headers, content, max_bytes=9):
            pass
        assert time.monotonic() - start < 5


def test_bodies_are_bounded_and_never_unpacked(client: HttpClient) -> None:
    bomb = gzip.compress(bytes(50_000_000), 1)
    answers = {
        b"/long": response(bytes(2000)),
        b"/endless": b"HTTP/1.1 200 OK\r\n\r\n" + bytes(2000),
        b"/bomb": response(bomb, "Content-Encoding: gzip"),
    }

    def serve(socket: socket.socket) -> None:
        socket.sendall(answers[request_of(socket).split()[1]])

    with listening(serve) as port:
        for path, error in ((b"/long", OversizedError), (b"/endless", OversizedError), (b"/bomb", HttpError)):

            def fetch(path: bytes = path, error: type[HttpError] = error) -> None:
                with pytest.raises(error):
                    get(client, f"http://127.0.0.1:{port}{path.decode()}", 1000 if path != b"/bomb" else 2**20)

            assert peak(fetch) < 5_000_000


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
def test_statuses_that_may_pass_are_retried(client: HttpClient, status: int) -> None:
    answers = iter([response(b"", "Retry-After: 0", status=f"{status} Busy"), response(b"ok")])

    def serve(socket: socket.socket) -> None:
        request_of(socket)
        socket.sendall(next(answers))

    with listening(serve) as port:
        assert client.retrying(2)(get, client, f"http://127.0.0.1:{port}/") == b"ok"
