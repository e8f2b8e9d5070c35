"""A table of URLs, CSV or JSON lines: images fetched over HTTP from hosts that are not trusted.

Host names are resolved here, addresses that are not public are refused at every redirect, and the connection goes to
exactly the address that was checked, which prevents DNS rebinding. TLS certificates, SNI and ``Host`` keep the name.
"""

import base64
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, TypeVar
from urllib.request import getproxies, proxy_bypass

import httpcore
import httpx
import psutil
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_when_event_set,
    wait_random_exponential,
)
from tenacity.nap import sleep_using_event

from diffusion.common.errors import UserError
from diffusion.data.ingest.decode import UnusableEntryError
from diffusion.data.prefetch import prefetch
from diffusion.data.sources.base import Access, Entry, Payload, too_large_error
from diffusion.data.sources.conventions import make_printable, records, texts_of, to_text
from diffusion.data.sources.local_files import open_text
from diffusion.data.sources.object_store import IN_MEMORY

Result = TypeVar("Result")

WORKERS = 16
PAUSE = wait_random_exponential(multiplier=0.5, max=20)
"""Seconds before another try."""
LONGEST_PAUSE = 60.0
"""Seconds; longest pause, also if a server requests more."""
MOST_REDIRECTS = 20
STEP_SECONDS = 0.25
"""Interval of a wait between checks whether the client is being closed, in seconds."""

NOT_PUBLIC = tuple(
    ip_network(network)
    for network in (
        # IANA's registries of special-purpose, multicast and reserved addresses.
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        # Of the global unicast addresses of IPv6: protocol assignments with Teredo, documentation, 6to4.
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
        # The metadata service of Azure; those of other clouds are in the networks above.
        "168.63.129.16/32",
    )
)


def is_public(address: str) -> bool:
    """Return whether a numeric IPv4 or IPv6 address is that of a host on the public internet, reached by no tunnel."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address):
        # Identifiers of ISATAP's tunnels to the IPv4 address in the last 32 bits (RFC 5214).
        if ip.scope_id is not None or int(ip) >> 32 & 0xFFFFFFFF in (0x00005EFE, 0x02005EFE):
            return False
        if ip.ipv4_mapped is not None or ip in ip_network("64:ff9b::/96"):  # NAT64 (RFC 6052)
            ip = IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip not in ip_network("2000::/3"):  # IANA's global unicast addresses
            return False
    return not any(ip in network for network in NOT_PUBLIC)


def is_own(address: str) -> bool:
    """Return whether ``address`` is this machine's own: services hidden only by a firewall would answer there."""
    interfaces = psutil.net_if_addrs().values()
    return any(item.address.partition("%")[0] == address for interface in interfaces for item in interface)


class HttpClient:
    """Thread-safe HTTP client with at most ``connections`` persistent connections, directly and through each proxy.

    ``seconds``: timeout of one exchange, from the name's resolution to the last byte, redirects included.
    ``allow_private``: whether hosts may have any address. Proxies are those of the environment and may have any
    address; they resolve names again, so the check here does not bind them.
    """

    def __init__(self, seconds: float, allow_private: bool, connections: int) -> None:
        self.seconds = seconds
        self._allow_private = allow_private
        self.stopped = threading.Event()
        """Ends all waits once it is set."""
        self._exchange = threading.local()
        new_pool = partial(httpcore.ConnectionPool, ssl_context=httpx.create_ssl_context(), max_connections=connections)
        self._environment = getproxies()
        direct = new_pool(network_backend=_Network(self, allow_private))
        self._pools: dict[str | None, httpcore.ConnectionPool] = {None: direct}
        for scheme in ("http", "https", "all"):
            if address := self._environment.get(scheme):
                # It comes from the environment, which is trusted.
                self._pools[address] = new_pool(proxy=_proxy(address), network_backend=_Network(self, True))

    def close(self) -> None:
        """Close all connections."""
        for pool in self._pools.values():
            pool.close()

    @contextmanager
    def get(self, url: str) -> Iterator[httpcore.Response]:
        """Yield the response to a GET of ``url`` after all redirects; its body, as sent, must be read inside.

        Raises UnusableEntryError (the host has no allowed address), httpx.InvalidURL, httpx.TooManyRedirects,
        httpcore.UnsupportedProtocol (anything but http and https), httpcore.TimeoutException, or another exception of
        httpcore.
        """
        self._exchange.deadline = time.monotonic() + self.seconds
        place = httpx.URL(url)
        for _ in range(MOST_REDIRECTS + 1):
            if place.scheme not in ("http", "https") or not place.host:
                raise httpcore.UnsupportedProtocol(place.scheme)
            headers: dict[bytes | str, bytes | str] = {
                "Host": place.netloc,
                "User-Agent": "Darkroom",
                "Accept": "image/*, */*;q=0.5",
                "Accept-Encoding": "identity",
            }
            if place.username or place.password:
                login = f"{place.username}:{place.password}".encode()
                headers["Authorization"] = b"Basic " + base64.b64encode(login)
            pool, extensions = self._pool(place), {"timeout": {"pool": self.remaining_seconds()}}
            with pool.stream("GET", _for_httpcore(place), headers=headers, extensions=extensions) as response:
                location = httpx.Headers(response.headers).get("Location")
                if response.status not in (301, 302, 303, 307, 308) or location is None:
                    yield response
                    return
            # Its body is not read: it is not needed and may be endless.
            place = place.join(location)
        raise httpx.TooManyRedirects(f"more than {MOST_REDIRECTS} redirects")

    def _pool(self, url: httpx.URL) -> httpcore.ConnectionPool:
        port = url.port or (443 if url.scheme == "https" else 80)
        proxy = self._environment.get(url.scheme) or self._environment.get("all")
        if not proxy or proxy_bypass(f"{url.host}:{port}", self._environment):
            return self._pools[None]
        if not self._allow_private:
            self.wait_for(lambda: _addresses(url.raw_host.decode(), port, allow_private=False))
        return self._pools[proxy]

    def remaining_seconds(self) -> float:
        """Return the seconds left for this thread's exchange; raises httpcore.ReadTimeout if there are none."""
        seconds: float = self._exchange.deadline - time.monotonic()
        if seconds <= 0 or self.stopped.is_set():
            raise httpcore.ReadTimeout
        return seconds

    def wait_for(self, work: Callable[[], Result]) -> Result:
        """Return the result of ``work``, which may block for longer than this thread may wait."""
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except Exception as error:  # noqa: BLE001 (handed on)
                future.set_exception(error)

        # Not from a pool: the interpreter would wait for it at exit, and a resolver cannot be stopped.
        threading.Thread(target=run, daemon=True).start()
        while not future.done():
            wait([future], min(self.remaining_seconds(), STEP_SECONDS))
        return future.result()


def _proxy(address: str) -> httpcore.Proxy:
    try:
        proxy = httpx.Proxy(address if "://" in address else f"http://{address}")
    except (ValueError, httpx.InvalidURL) as error:
        raise UserError(f"the proxy in the environment cannot be used ({error}): mend HTTPS_PROXY") from error
    return httpcore.Proxy(_for_httpcore(proxy.url), proxy.raw_auth, proxy.headers.raw, proxy.ssl_context)


def _for_httpcore(url: httpx.URL) -> httpcore.URL:
    return httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)


class _Network(httpcore.NetworkBackend):
    """Network backend that connects to allowed addresses only, within the time of the thread's current exchange."""

    def __init__(self, client: HttpClient, allow_private: bool) -> None:
        self._client, self._allow_private = client, allow_private

    def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> httpcore.NetworkStream:
        """Connect to the first allowed address of ``host`` that accepts; raises UnusableEntryError if it has none."""
        deadline = time.monotonic() + self._client.remaining_seconds()

        def connect() -> httpcore.NetworkStream:
            failure: Exception = httpcore.ConnectTimeout()
            for address in _addresses(host, port, self._allow_private):
                try:
                    return httpcore.SyncBackend().connect_tcp(address, port, max(deadline - time.monotonic(), 0.001))
                except (httpcore.NetworkError, httpcore.TimeoutException) as error:
                    failure = error
            raise failure

        return _Stream(self._client.wait_for(connect), self._client)


class _Stream(httpcore.NetworkStream):
    """Connection whose waits end with the exchange of the thread that uses it."""

    def __init__(self, stream: httpcore.NetworkStream, client: HttpClient) -> None:
        self._stream, self._client = stream, client

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        while True:
            try:
                return self._stream.read(max_bytes, min(self._client.remaining_seconds(), STEP_SECONDS))
            except httpcore.ReadTimeout:
                self._client.remaining_seconds()

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._client.remaining_seconds())

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> "_Stream":
        seconds = self._client.remaining_seconds()
        # The timeout is for the whole handshake.
        stream = self._client.wait_for(lambda: self._stream.start_tls(ssl_context, server_hostname, seconds))
        return _Stream(stream, self._client)


def _addresses(host: str, port: int, allow_private: bool) -> list[str]:
    """Resolve ``host``; raises UnusableEntryError if only public addresses are allowed and it has none."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a host's name"
        raise httpcore.ConnectError(f"its host cannot be found: {reason}") from error
    addresses = list(dict.fromkeys(str(info[4][0]) for info in infos))
    allowed_addresses = [ip for ip in addresses if allow_private or (is_public(ip) and not is_own(ip))]
    if addresses and not allowed_addresses:
        raise UnusableEntryError(
            f"leads to {addresses[0]}, an address that is private, reserved or this machine's: set "
            "ingest.allow_private_addresses to true if what answers there may be asked"
        )
    return allowed_addresses


class RetryableError(Exception):
    """A transient failure, to be retried."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


@dataclass(frozen=True)
class Urls:
    """The images that ``table`` names by ``url`` (or ``image_url``), with ``label`` and ``text`` or ``caption``.

    Column names are case-insensitive. Only http and https are fetched, and only from hosts with a public address unless
    ``allow_private_addresses``. Permanent failures, or ``download_tries`` transient ones, are quarantined.
    """

    table: Path
    access: Access
    in_order = True

    def entries(self) -> Iterator[Entry]:
        """Yield all rows; raises UserError for a table that cannot be read or has no column of URLs."""
        with open_text(self.table) as lines:
            for number, row in enumerate(records(lines, str(self.table)), start=1):
                record = {name.lower(): value for name, value in row.items()}
                if "url" not in record and "image_url" not in record:
                    columns = ", ".join(row)
                    raise UserError(f"{self.table}, record {number} has no url or image_url: rename one of {columns}")
                url = str(record.get("url") or record.get("image_url") or "").strip()
                texts = texts_of(record, f"{self.table}, record {number}")
                name = to_text(make_printable(url)) or f"{self.table.name}/{number}"
                # A constant stamp: URLs are fetched once, as revalidation costs nearly as much.
                yield Entry(name, to_text(url) or "", "url", *texts)

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield their bytes, fetched concurrently."""
        config = self.access.config
        client = HttpClient(config.download_seconds, config.allow_private_addresses, WORKERS)
        answers = prefetch(partial(self._fetch, client), entries, WORKERS)
        try:
            for answer in answers:
                if isinstance(answer, UnusableEntryError):
                    yield answer
                    continue
                with answer:
                    answer.seek(0)
                    yield answer.read()
        finally:
            client.stopped.set()
            answers.close()
            client.close()

    def _fetch(self, client: HttpClient, entry: Entry) -> "SpooledTemporaryFile[bytes] | UnusableEntryError":
        url, config = entry.locator, self.access.config
        if not url:
            return UnusableEntryError("a row without a URL")
        if not url.lower().startswith(("http://", "https://")):
            return UnusableEntryError("neither an http:// nor an https:// URL: local files are read from a folder")
        retry_policy = Retrying(
            retry=retry_if_exception_type(RetryableError),
            stop=stop_after_attempt(config.download_tries) | stop_when_event_set(client.stopped),
            wait=retry_delay,
            sleep=sleep_using_event(client.stopped),
            reraise=True,
        )
        try:
            return retry_policy(_get, client, url, config.max_bytes, self.access.scratch)
        except UnusableEntryError as error:
            return error
        except RetryableError as error:
            return UnusableEntryError(f"{error}, at each of {config.download_tries} tries")


def _get(client: HttpClient, url: str, limit: int, scratch: Path) -> "SpooledTemporaryFile[bytes]":
    """Fetch a URL once; raises RetryableError for a transient failure, UnusableEntryError for any other one."""
    try:
        with client.get(url) as response:
            status, headers = response.status, httpx.Headers(response.headers)
            if not 200 <= status < 300:
                # The standard name, if any, instead of the server's text.
                line = f"HTTP {status} {httpx.codes.get_reason_phrase(status)}".strip()
                if status in (408, 425, 429) or status >= 500:
                    raise RetryableError(line, retry_after(headers.get("Retry-After", "")))
                raise UnusableEntryError(line)
            length = headers.get("Content-Length", "")
            if re.fullmatch("[0-9]{1,18}", length) and int(length) > limit:
                raise too_large_error(int(length), limit)
            if (encoding := headers.get("Content-Encoding", "identity")) != "identity":
                # A few bytes may unpack to any number.
                raise UnusableEntryError(
                    f"sent with Content-Encoding {shorten_message(encoding)} although none was accepted"
                )
            file = SpooledTemporaryFile(IN_MEMORY, dir=str(scratch))  # noqa: SIM115 (closed by the generator that yields it)
            for piece in response.iter_stream():
                file.write(piece)
                if file.tell() > limit:
                    raise UnusableEntryError(f"more than the limit of {limit} bytes")
            return file
    except (RetryableError, UnusableEntryError):
        raise
    except httpcore.UnsupportedProtocol as error:
        raise UnusableEntryError("leads to something that is neither http nor https") from error
    except (httpx.InvalidURL, httpx.TooManyRedirects) as error:
        raise UnusableEntryError(f"not to be had: {shorten_message(error)}") from error
    except httpcore.TimeoutException as error:
        raise RetryableError(f"no whole answer within {client.seconds:g} s") from error
    except (httpcore.NetworkError, httpcore.RemoteProtocolError, httpcore.ProxyError) as error:
        raise RetryableError(shorten_message(error) or type(error).__name__) from error
    except OSError:  # of the disk: httpcore has its own for the network
        raise
    except Exception as error:  # libraries raise whatever they like on answers that they did not expect
        raise UnusableEntryError(
            f"an answer that is not understood: {type(error).__name__}: {shorten_message(error)}"
        ) from error


def shorten_message(message: object) -> str:
    """Return the beginning of what a server or library says, on one line."""
    return make_printable(str(message)[:150])


def retry_delay(state: RetryCallState) -> float:
    """Return the seconds before the next try: the server's Retry-After, bounded, or jittered exponential backoff."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, RetryableError) and error.after is not None:
        return min(max(error.after, 0), LONGEST_PAUSE) + random.uniform(0, 1)
    return PAUSE(state)


def retry_after(value: str) -> float | None:
    """Parse the seconds of a Retry-After header (RFC 9110, section 10.2.3); None if it is invalid."""
    if re.fullmatch("[0-9]+", value):
        return float(value[:9])  # any more digits are no less than the longest pause
    try:
        date = parsedate_to_datetime(value[:64])
        return (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
