"""Where tables of URLs may lead, and how long a server may take, whatever it does."""

import itertools
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tenacity import wait_none

from diffusion.common.http_client import is_own, is_public
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.sources import open_source
from tests.builders.archives import peak
from tests.builders.http_server import Serve, drip, dripped, listening, request_of, response
from tests.builders.reading_sources import access, png, read_all
from tests.builders.url_tables import table

PUBLIC = "93.184.215.14"
"""An address that nothing here ever connects to."""
OPTION = "ingest.allow_private_addresses"


class Names:
    """A name server and routes: which addresses each name has, one answer after the other, and what is at an address.

    Nothing leaves the machine: addresses that are not loopback are connected to the port of ``routes``, or not at all.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: dict[str, Iterator[list[str]]] = {}
        self.queries: list[str] = []
        self.routes: dict[str, int] = {}
        self.connected: list[str] = []
        resolve, connect = socket.getaddrinfo, socket.create_connection

        def getaddrinfo(host: str, *args: object, **options: object) -> object:
            if host not in self.answers:
                return resolve(host, *args, **options | {"flags": socket.AI_NUMERICHOST})  # type: ignore[arg-type]
            self.queries.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, 0)) for each in next(self.answers[host])]

        def create_connection(address: tuple[str, int], *args: object, **options: object) -> socket.socket:
            self.connected.append(address[0])
            if not address[0].startswith("127."):
                if address[0] not in self.routes:
                    raise OSError("no route to host")
                address = ("127.0.0.1", self.routes[address[0]])
            return connect(address, *args, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr(socket, "create_connection", create_connection)

    def give(self, name: str, *answers: list[str]) -> None:
        self.answers[name] = itertools.chain(answers, itertools.repeat(answers[-1]))


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.lower(), raising=False)
    return Names(monkeypatch)


def fetched(tmp_path: Path, *urls: str, **fields: object) -> list[object]:
    rows: list[dict[str, object]] = [{"url": url} for url in urls]
    settings = {"download_tries": 1, "allow_private_addresses": False, "opt_outs": "ignore"}
    source_access = access(tmp_path / "scratch", **(settings | fields))
    return [each.payload for each in read_all(table(tmp_path / "urls.jsonl", rows), source_access)]


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255"),
        *("192.168.1.1", "169.254.169.254", "169.254.1.1", "100.64.0.1", "100.100.100.200", "192.0.0.192"),
        *("168.63.129.16", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "192.88.99.1"),
        *("224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "100::1"),
        *("::127.0.0.1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:0:10.0.0.1", "64:ff9b::7f00:1"),
        *("64:ff9b::a9fe:a9fe", "64:ff9b:1::808:808", "2002:7f00:1::1", "2002:808:808::1", "2001:0:808:808::1"),
        *("2001:db8::1", "3fff::1", "2606:2800::5efe:10.0.0.1", "5f00::1", "4000::1"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


def test_addresses_of_this_machine_are_known() -> None:
    assert is_own("127.0.0.1")
    assert not is_own(PUBLIC)


def test_local_addresses_are_rejected_in_every_notation(names: Names, tmp_path: Path) -> None:
    requests = []
    with listening(lambda client: requests.append(request_of(client))) as port:
        hosts = [
            "127.0.0.1",
            "127.1",
            "2130706433",
            "0x7f.1",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "0",
        ]
        names.give("local.test", ["127.0.0.1"])
        names.give("mixed.test", [PUBLIC, "127.0.0.1"])
        downloads = fetched(tmp_path, *(f"http://{host}:{port}/a.png" for host in (*hosts, "local.test")))
        assert [each for each in downloads if OPTION not in str(each)] == []
        # Of the addresses of a name only the public ones are tried.
        assert fetched(tmp_path, f"http://mixed.test:{port}/a.png") == ["no route to host, at each of 1 tries"]
    assert requests == []
    assert names.connected == [PUBLIC]


def test_redirect_to_a_local_address_is_rejected(names: Names, tmp_path: Path) -> None:
    requests: list[bytes] = []

    def local(client: socket.socket) -> None:
        requests.append(request_of(client))
        client.sendall(response(png(1)))

    with listening(local) as port:
        places = {b"/1": f"http://127.0.0.1:{port}/x", b"/2": f"//[::1]:{port}/x", b"/3": f"http://local.test:{port}/x"}

        def public(client: socket.socket) -> None:
            path = request_of(client).split()[1]
            client.sendall(response(b"", f"Location: {places.get(path, '/1')}", status="302 Found"))

        names.give("local.test", ["127.0.0.1"])
        names.give("public.test", [PUBLIC])
        with listening(public) as names.routes[PUBLIC]:
            downloads = fetched(tmp_path, *(f"http://public.test/{number}" for number in range(5)))
            assert [each for each in downloads if OPTION not in str(each)] == []
            assert requests == []
            downloads = fetched(tmp_path, "http://public.test/1", allow_private_addresses=True)
            assert downloads == [png(1)]


def test_names_are_resolved_once_to_checked_addresses(names: Names, tmp_path: Path) -> None:
    requests: list[bytes] = []

    def serve(client: socket.socket) -> None:
        requests.append(request_of(client))
        client.sendall(response(png(1), "Connection: close"))

    names.give("rebind.test", [PUBLIC], ["127.0.0.1"])
    with listening(serve) as names.routes[PUBLIC]:
        assert fetched(tmp_path, "http://rebind.test/a.png") == [png(1)]
        assert names.queries == ["rebind.test"]
        assert names.connected == [PUBLIC]
        assert b"host: rebind.test\r\n" in requests[0].lower()
        # The next answer of the name server is checked anew.
        assert OPTION in str(fetched(tmp_path, "http://rebind.test/a.png")[0])
        assert len(requests) == 1


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now, number = datetime.now(UTC), x509.random_serial_number()
    builder = (
        x509.CertificateBuilder(subject, subject, key.public_key(), number, now, now + timedelta(days=9))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(builder.public_bytes(encoding))
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(private)
    return folder / "cert.pem", folder / "key.pem"


def test_tls_is_verified_by_name(names: Names, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = certificate(tmp_path, "images.test")
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    indicated: list[str] = []
    context.sni_callback = lambda _, name, __: indicated.append(name)

    def serve(client: socket.socket) -> None:
        with context.wrap_socket(client, server_side=True) as secured:
            request_of(secured)
            secured.sendall(response(png(1)))

    with listening(serve) as names.routes[PUBLIC]:
        names.give("images.test", [PUBLIC])
        names.give("other.test", [PUBLIC])
        first, second = fetched(tmp_path, "https://images.test/a.png", "https://other.test/a.png")
        assert first == png(1)
        assert "CERTIFICATE_VERIFY_FAILED" in str(second)
        assert sorted(indicated) == ["images.test", "other.test"]


@pytest.mark.parametrize("through", ["HTTP_PROXY", "ALL_PROXY"])
def test_proxy_receives_no_private_or_unresolvable_urls(
    names: Names, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, through: str
) -> None:
    requests: list[bytes] = []

    def proxy(client: socket.socket) -> None:
        while request := request_of(client):
            requests.append(request.split()[1])
            client.sendall(response(png(1)))

    names.give("public.test", [PUBLIC])
    names.give("local.test", ["10.0.0.1"])
    with listening(proxy) as port:
        monkeypatch.setenv(through, f"127.0.0.1:{port}")
        urls = [f"http://{host}/a.png" for host in ("public.test", "local.test", "127.0.0.1:9333", "unknown.test")]
        downloads = fetched(tmp_path, *urls)
        assert downloads[0] == png(1)
        assert all(OPTION in str(each) for each in downloads[1:3])
        assert "its host cannot be found" in str(downloads[3])
        assert requests == [b"http://public.test/a.png"]
        assert names.connected == ["127.0.0.1"]
        # The proxy knows names that this machine does not.
        assert fetched(tmp_path, *urls, allow_private_addresses=True) == [png(1)] * 4
        monkeypatch.setenv("NO_PROXY", "public.test")
        assert "no route to host" in str(fetched(tmp_path, urls[0])[0])


def test_quarantined_private_urls_are_fetched_once_allowed(names: Names, tmp_path: Path) -> None:
    def serve(client: socket.socket) -> None:
        number = int(request_of(client).split()[1].strip(b"/"))
        client.sendall(response(png(number), "Connection: close"))

    names.give("public.test", [PUBLIC])
    with listening(serve) as port:
        names.routes[PUBLIC] = port
        rows = [f"http://public.test/{number}" for number in range(12)] + [f"http://127.0.0.1:{port}/99"]
        path = table(tmp_path / "urls.jsonl", [{"url": url, "label": "a"} for url in rows])
        config = IngestConfig(source=str(path), size=8, held_out=0.33, opt_outs="ignore")
        allowed = config.model_copy(update={"allow_private_addresses": True})
        first = ingest(tmp_path / "data", config)
        assert (first.kept, [each.source for each in first.quarantined]) == (12, [rows[-1]])
        assert OPTION in first.quarantined[0].reason
        assert not ingest(tmp_path / "data", allowed).changed
        second = ingest(tmp_path / "data", allowed, requeue=True)
        assert (second.read, second.kept, second.quarantined_count) == (1, 13, 0)
        assert second.content_digest == ingest(tmp_path / "other", allowed).content_digest


def forever(data: bytes) -> Serve:
    def serve(client: socket.socket) -> None:
        request_of(client)
        while True:
            client.sendall(data)

    return serve


def at_once(data: bytes) -> Serve:
    def serve(client: socket.socket) -> None:
        request_of(client)
        client.sendall(data)

    return serve


def redirecting(client: socket.socket) -> None:
    while request_of(client):
        time.sleep(0.3)
        client.sendall(response(b"", "Location: /again", status="302 Found"))


def with_endless_redirects(client: socket.socket) -> None:
    request_of(client)
    client.sendall(b"HTTP/1.1 302 Found\r\nLocation: /again\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        client.sendall(b"8000\r\n" + bytes(0x8000) + b"\r\n")


SLOW: dict[str, Serve] = {
    "headers": dripped(b"", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000),
    "body": dripped(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"x" * 1000),
    "chunks": dripped(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 500),
    "silence": lambda client: time.sleep(60),
    "redirects": redirecting,
    "flood of 1xx": forever(b"HTTP/1.1 103 Early Hints\r\n\r\n"),
}
HEAD = b"HTTP/1.1 200 OK\r\n"
ODD: dict[str, Serve] = {
    "endless header": forever(b"X" * 4096),
    "endless headers": forever(b"X: y\r\n" * 1000),
    "length of many digits": at_once(HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n"),
    "length of other digits": at_once(HEAD + "Content-Length: ²\r\n\r\n".encode()),
    "two lengths": at_once(HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"),
    "negative length": at_once(HEAD + b"Content-Length: -1\r\n\r\n"),
    "endless chunk extension": at_once(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 300_000),
    "chunk of no size": at_once(HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n"),
    "status of no number": at_once(b"HTTP/1.1 \xc2\xb2\xc2\xb2\xc2\xb2 OK\r\n\r\n"),
    "status of 999": at_once(b"HTTP/1.1 999 \x80\xff\r\nContent-Length: 0\r\n\r\n"),
    "status without an end": at_once(b"HTTP/1.1 404 " + b"N" * 90_000 + b"\r\nContent-Length: 0\r\n\r\n"),
    "no HTTP": at_once(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "switching protocols": at_once(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"),
    "redirects with endless bodies": with_endless_redirects,
    "unreadable place": at_once(response(b"", "Location: http://[", status="302 Found")),
    "place of bytes": at_once(response(b"", "Location: http://\xff\xfe\x80/", status="302 Found")),
    "place with a dot in front": at_once(response(b"", "Location: https://.a.b/", status="302 Found")),
    "long place": at_once(response(b"", f"Location: /{'x' * 80_000}", status="302 Found")),
    "encoding without an end": at_once(response(b"", f"Content-Encoding: {'x' * 80_000}")),
    "nothing": lambda client: None,
}


@pytest.mark.parametrize("kind", SLOW)
def test_no_exchange_lasts_longer_than_it_may(names: Names, tmp_path: Path, kind: str) -> None:
    with listening(SLOW[kind]) as port:
        start = time.monotonic()
        url, limits = f"http://127.0.0.1:{port}/a.png", {"allow_private_addresses": True, "download_seconds": 0.5}
        (download,) = fetched(tmp_path, url, **limits)
        assert "0.5 s, at each of 1 tries" in str(download)
        assert time.monotonic() - start < 10


def test_no_handshake_lasts_longer_than_it_may(names: Names, tmp_path: Path) -> None:
    def serve(client: socket.socket) -> None:
        client.recv(1)
        # The head of a record of 16 KiB, and then its bytes, one by one.
        drip(client, b"\x16\x03\x03\x40\x00" + b"\x02\x00\x3f\xfc" + bytes(2000))

    with listening(serve) as port:
        start = time.monotonic()
        url, limits = f"https://127.0.0.1:{port}/a.png", {"allow_private_addresses": True, "download_seconds": 0.5}
        (download,) = fetched(tmp_path, url, **limits)
        assert "at each of 1 tries" in str(download)
        assert time.monotonic() - start < 10


def test_no_resolution_of_a_name_lasts_longer_than_it_may(
    names: Names, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone_on = threading.Event()

    def getaddrinfo(*_: object, **__: object) -> object:
        gone_on.wait(60)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    start = time.monotonic()
    assert fetched(tmp_path, "http://slow.test/a.png", download_seconds=0.5) == [
        "no whole answer within 0.5 s, at each of 1 tries"
    ]
    assert time.monotonic() - start < 10
    gone_on.set()


def test_whatever_a_server_answers_is_a_reason(names: Names, tmp_path: Path) -> None:
    with all_listening(ODD) as ports:
        urls = [f"http://127.0.0.1:{port}/a.png" for port in ports]
        downloads = fetched(tmp_path, *urls, allow_private_addresses=True, download_seconds=5)
    for kind, each in zip(ODD, downloads, strict=True):
        assert isinstance(each, str), kind
        assert "\n" not in each, kind
        assert len(each) < 300, kind


@contextmanager
def all_listening(kinds: dict[str, Serve]) -> Iterator[list[int]]:
    if not kinds:
        yield []
        return
    (_, first), *others = kinds.items()
    with listening(first) as port, all_listening(dict(others)) as ports:
        yield [port, *ports]


@pytest.mark.parametrize(
    "seconds",
    [
        *(
            "9" * 400,
            "9" * 5000,
            "inf",
            "nan",
            "1e400",
            "-5",
            "²",
            "٣",
            "",
            "soon",
            "0x10",
            "Fri, 31 Dec 9999 23:59:59 GMT",
        ),
        *(
            "Mon, 01 Jan 0001 00:00:00 +2359",
            "Fri, 99 Feb 99999999999 99:99:99",
            "Fri, 31 Dec 1999 23:59:59 +9999999999",
        ),
    ],
)
def test_no_retry_after_stops_an_ingest(
    names: Names, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: str
) -> None:
    monkeypatch.setattr("diffusion.common.http_client.PAUSE", wait_none())
    monkeypatch.setattr("diffusion.common.http_client.MAX_PAUSE", 0.0)
    busy = at_once(response(b"", f"Retry-After: {seconds}".encode().decode("latin-1"), status="503 Busy"))
    with listening(busy) as port:
        url = f"http://127.0.0.1:{port}/a.png"
        assert fetched(tmp_path, url, allow_private_addresses=True, download_tries=2) == [
            "HTTP 503 Service Unavailable, at each of 2 tries"
        ]


def test_closing_the_reader_does_not_wait_for_a_slow_server(names: Names, tmp_path: Path) -> None:
    begun = threading.Event()

    def serve(client: socket.socket) -> None:
        if b"/first" in request_of(client):
            client.sendall(response(png(1)))
            return
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        begun.set()
        drip(client, bytes(1000))

    with listening(serve) as port:
        rows: list[dict[str, object]] = [{"url": f"http://127.0.0.1:{port}/{name}"} for name in ("first", "second")]
        source_access = access(tmp_path / "scratch", download_seconds=600, opt_outs="ignore")
        source = open_source(str(table(tmp_path / "urls.jsonl", rows)), source_access)
        reading = source.read(list(source.entries()))
        assert next(reading) == png(1)
        assert begun.wait(60)
        start = time.monotonic()
        reading.close()  # type: ignore[attr-defined]
        assert time.monotonic() - start < 20


def test_prefetching_is_bounded_in_memory(names: Names, tmp_path: Path) -> None:
    size = 4_000_000
    with listening(at_once(response(bytes(size), "Connection: close"))) as port:
        rows: list[dict[str, object]] = [{"url": f"http://127.0.0.1:{port}/{number}"} for number in range(30)]
        source = open_source(str(table(tmp_path / "urls.jsonl", rows)), access(tmp_path / "scratch"))
        entries = list(source.entries())
        lengths = []
        assert peak(lambda: lengths.extend(len(each) for each in source.read(entries))) < 12 * size  # type: ignore[arg-type]
        assert lengths == [size] * 30
