"""Tables of URLs, fetched from a server that behaves in all the ways that servers do."""

import gzip
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
from tenacity import wait_none

from diffusion.common.errors import UserError
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.sources import open_source
from tests.builders.archives import peak
from tests.builders.reading_sources import access, payloads, png, read_all
from tests.builders.url_tables import table

BOMB = gzip.compress(bytes(50_000_000), 1)


class Server:
    """A web server whose paths say how it is to answer."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self.path in ("/robots.txt", "/.well-known/tdmrep.json"):
                    self.send(404, b"")
                    return
                with lock:
                    server.requests[self.path] += 1
                    server.times.append(time.monotonic())
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                try:
                    self.answer(*unquote(self.path).strip("/").split("/"))
                finally:
                    with lock:
                        server.at_once -= 1

            def answer(self, kind: str, value: str = "") -> None:
                times = server.requests[self.path]
                match kind:
                    case "png":
                        self.send(200, png(int(value)))
                    case "slow":
                        time.sleep(float(value))
                        self.send(200, value.encode())
                    case "status":
                        self.send(int(value), b"no")
                    case "busy":  # twice, and then no more
                        status, _, wait = value.partition(",")
                        self.send(
                            int(status), b"no", {"Retry-After": wait} if wait else {}
                        ) if times < 3 else self.send(200, b"ok")
                    case "to":
                        self.send(
                            302,
                            b"",
                            {"Location": {"file": "file:///etc/passwd", "png": "/png/1", "round": self.path}[value]},
                        )
                    case "size":
                        self.send(200, b"x" * int(value))
                    case "endless":
                        self.send_response(200)
                        self.send_header("Transfer-Encoding", "chunked")
                        self.end_headers()
                        while True:
                            self.wfile.write(b"400\r\n" + b"x" * 1024 + b"\r\n")
                    case "trickle":
                        self.send_response(200)
                        self.send_header("Content-Length", "1000")
                        self.end_headers()
                        for _ in range(1000):
                            self.wfile.write(b"x")
                            time.sleep(0.05)
                    case "bomb":
                        self.send(200, BOMB, {"Content-Encoding": "gzip"})
                    case "cut":  # twice, and then no more
                        data = png(1)
                        self.send_response(200)
                        self.send_header("Content-Length", str(len(data)))
                        self.end_headers()
                        self.wfile.write(data if times == 3 else data[:50])
                        self.close_connection = True

            def send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def handle(self) -> None:
                with suppress(ConnectionError):  # the other side has seen enough
                    super().handle()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between tries, so that the tests are fast."""
    monkeypatch.setattr("diffusion.common.http_client.PAUSE", wait_none())


def answers(server: Server, tmp_path: Path, *places: str, **fields: object) -> list[object]:
    rows: list[dict[str, object]] = [{"url": f"{server.url}/{place}"} for place in places]
    source_access = access(tmp_path / "scratch", **fields)
    return [each.payload for each in read_all(table(tmp_path / "urls.jsonl", rows), source_access)]


@pytest.mark.parametrize("column", ["url", "URL", "image_url"])
def test_url_tables_are_fetched_in_order_with_labels_and_captions(server: Server, tmp_path: Path, column: str) -> None:
    text = f'{column},label,TEXT\n{server.url}/png/1,cat,"one, two"\n{server.url}/png/0,,\n,dog,none\n'
    (tmp_path / "urls.csv").write_text(text)
    rows: list[dict[str, object]] = [
        {column: f"{server.url}/png/1", "label": "cat", "Caption": "one, two"},
        {column: f" {server.url}/png/0 "},
        {column: None, "label": "dog", "caption": "none"},
    ]
    table(tmp_path / "urls.jsonl", rows)
    for name in ("urls.csv", "urls.jsonl"):
        items = read_all(tmp_path / name, access(tmp_path / "scratch"))
        assert [(each.name, each.label, each.caption, each.payload) for each in items] == [
            (f"{server.url}/png/1", "cat", "one, two", png(1)),
            (f"{server.url}/png/0", None, None, png(0)),
            (f"{name}/3", "dog", "none", "a row without a URL"),
        ]


def test_many_are_fetched_at_once_and_come_in_order(server: Server, tmp_path: Path) -> None:
    waits = [f"slow/{0.4 if number % 10 == 0 else 0.1}{number:04d}" for number in range(60)]
    assert answers(server, tmp_path, *waits) == [wait.removeprefix("slow/").encode() for wait in waits]
    assert 8 < server.most_at_once <= 16


def test_only_http_is_fetched_even_after_a_redirect(server: Server, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    places = [f"file://{tmp_path}/secret.png", f"{tmp_path}/secret.png", "ftp://127.0.0.1/x", "http:///x"]
    rows: list[dict[str, object]] = [
        {"url": place} for place in (*places, f"{server.url}/to/file", f"{server.url}/to/png")
    ]
    contents = [each.payload for each in read_all(table(tmp_path / "urls.jsonl", rows), access(tmp_path / "scratch"))]
    assert contents[:3] == ["neither an http:// nor an https:// URL: local files are read from a folder"] * 3
    assert contents[3:] == ["leads to something that is neither http nor https"] * 2 + [png(1)]
    assert "not to be had" in str(answers(server, tmp_path, "to/round")[0])


def test_invalid_urls_are_quarantined(tmp_path: Path) -> None:
    places = [
        f"http://{host}/a.png"
        for host in ("xn--", "a" * 300, "\u2100\ufffd", "a b", "[", "x:99999", "a\x00b", "é" * 99)
    ]
    contents = payloads(
        table(tmp_path / "urls.jsonl", [{"url": each} for each in places]), access(tmp_path / "scratch")
    )
    assert len(contents) == len(places)
    assert all(isinstance(each, str) and "\n" not in each for each in contents.values())


def test_permanent_http_errors_are_quarantined_and_transient_ones_retried(server: Server, tmp_path: Path) -> None:
    places = ["status/404", "status/403", "status/410", "status/500", "status/429", "busy/500", "busy/503", "cut/1"]
    assert answers(server, tmp_path, *places) == [
        "HTTP 404 Not Found",
        "HTTP 403 Forbidden",
        "HTTP 410 Gone",
        "HTTP 500 Internal Server Error, at each of 4 tries",
        "HTTP 429 Too Many Requests, at each of 4 tries",
        b"ok",
        b"ok",
        png(1),
    ]
    assert [server.requests[f"/{place}"] for place in places] == [1, 1, 1, 4, 4, 3, 3, 3]
    assert answers(server, tmp_path, "busy/502", download_tries=2) == ["HTTP 502 Bad Gateway, at each of 2 tries"]


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_retry_after_header_is_honoured(server: Server, tmp_path: Path, kind: str) -> None:
    # A date has whole seconds: the one after the next is between one and two away.
    wait = "1" if kind == "seconds" else formatdate(int(time.time()) + 2, usegmt=True)
    assert answers(server, tmp_path, f"busy/503,{wait}") == [b"ok"]
    pauses = [after - before for before, after in pairwise(server.times)]
    assert pauses[0] > 0.9
    assert kind == "date" or pauses[1] > 0.9


def test_oversized_downloads_are_aborted(server: Server, tmp_path: Path) -> None:
    results = answers(server, tmp_path, "size/2048", "size/2049", "endless/1", max_bytes=2048)
    assert results == [
        b"x" * 2048,
        "2049 bytes are over the limit of 2048",
        "more than the limit of 2048 bytes",
    ]
    results = []
    assert peak(lambda: results.extend(answers(server, tmp_path, "bomb/1", max_bytes=2**20))) < 10_000_000
    assert results == ["sent with Content-Encoding gzip although none was accepted"]


def test_slow_downloads_time_out(server: Server, tmp_path: Path) -> None:
    start = time.monotonic()
    results = answers(server, tmp_path, "slow/30", "trickle/1", download_seconds=0.3, download_tries=2)
    assert results == [
        "no whole answer within 0.3 s, at each of 2 tries",
        "no whole answer within 0.3 s, at each of 2 tries",
    ]
    assert time.monotonic() - start < 5


def test_a_server_that_is_away_is_a_reason(server: Server, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"url": "http://127.0.0.1:9/a.png"}, {"url": "http://no-such-host.invalid/a.png"}]
    contents = payloads(table(tmp_path / "urls.jsonl", rows), access(tmp_path / "scratch"))
    assert [str(each).rpartition(", ")[2] for each in contents.values()] == ["at each of 4 tries"] * 2


def test_closing_the_reader_does_not_wait_for_retries(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, object]] = [{"url": f"{server.url}/png/1"}, {"url": f"{server.url}/busy/503,50"}]
    source_access = access(tmp_path / "scratch")
    source = open_source(str(table(tmp_path / "urls.jsonl", rows)), source_access)
    reading = source.read(list(source.entries()))
    assert next(reading) == png(1)
    while server.requests["/busy/503,50"] == 0:
        time.sleep(0.01)
    start = time.monotonic()
    reading.close()  # type: ignore[attr-defined]
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("urls.csv", "link,label\nhttp://x/a.png,cat\n", "record 1 has no url or image_url: rename one of link, label"),
        ("urls.jsonl", '{"url": "http://x/a.png", "label": ["a"]}\n', "record 1: .* give one text for the label"),
        ("urls.jsonl", "no json\n", "cannot be read"),
        ("urls.csv", "url\n\x00\xff", "cannot be read"),
    ],
)
def test_invalid_tables_are_errors_of_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message) as error:
        read_all(tmp_path / name, access(tmp_path / "scratch"))
    assert "\n" not in str(error.value)


def test_known_urls_are_skipped_and_quarantined_ones_requeued(server: Server, tmp_path: Path) -> None:
    config = IngestConfig(source=str(tmp_path / "urls.jsonl"), size=8, held_out=0.33, allow_private_addresses=True)
    rows: list[dict[str, object]] = [{"url": f"{server.url}/png/{number}", "label": number % 2} for number in range(12)]
    table(tmp_path / "urls.jsonl", [*rows, {"url": f"{server.url}/status/404"}])
    first = ingest(tmp_path / "data", config)
    assert (first.kept, [each.reason for each in first.quarantined]) == (12, ["HTTP 404 Not Found"])
    table(tmp_path / "urls.jsonl", [{"url": f"{server.url}/png/99"}, *rows, {"url": f"{server.url}/status/404"}])
    grown = ingest(tmp_path / "data", config)
    assert (grown.read, grown.added) == (1, 1)
    assert set(server.requests.values()) == {1}
    ingest(tmp_path / "data", config, requeue=True)
    assert [place for place, times in server.requests.items() if times > 1] == ["/status/404"]
