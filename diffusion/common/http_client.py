"""The HTTP client: a deadline or a least rate for each exchange, size limits and retries.

Credentials go to the origin that they are given for, not where it redirects to.
"""

import base64
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.request import getproxies, proxy_bypass

import httpcore
import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, stop_when_event_set
from tenacity.nap import sleep_using_event
from tenacity.wait import wait_random_exponential

from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.escaping import escape_controls

Result = TypeVar("Result")

PAUSE = wait_random_exponential(multiplier=0.5, max=20)
"""Seconds before another try."""
MAX_PAUSE = 60.0
"""Maximum pause before another try in seconds, also if a server requests more."""
MAX_REDIRECTS = 20
REDIRECTS = (301, 302, 303, 307, 308)
STEP_SECONDS = 0.25
"""Interval of a wait between checks whether the client is being closed, in seconds."""
PIECE = 2**14
"""Bytes that are sent between checks of the deadline."""
PUBLIC_HEADERS = ("accept", "accept-encoding", "range", "user-agent")
"""Headers that another origin gets as well, where a redirect leads there; others may be credentials."""


class HttpError(DarkroomError):
    """A request that fails; the message, one line, says why."""


class OversizedError(HttpError):
    """The answer has more bytes than are accepted."""


class RetryableError(HttpError):
    """A transient failure, to be retried; ``after``: seconds that the server asks to wait."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


def origin(url: str | httpx.URL) -> tuple[str, str, int]:
    """Return scheme, host and port of ``url``; raises httpx.InvalidURL."""
    place = httpx.URL(url)
    return place.scheme, place.host, place.port or (443 if place.scheme == "https" else 80)


@dataclass(frozen=True)
class HttpResponse:
    """An answer after all redirects, whose body is not read yet."""

    status: int
    headers: httpx.Headers
    pieces: Iterator[bytes]
    """The body; raises HttpError."""

    @property
    def reason(self) -> str:
        """``HTTP 404 Not Found``, with the status's standard name, if any, instead of the server's text."""
        return f"HTTP {self.status} {httpx.codes.get_reason_phrase(self.status)}".strip()


class HttpClient:
    """Thread-safe HTTP client with at most ``connections`` persistent connections, directly and through each proxy.

    Args:
        seconds: Deadline of one exchange, from the resolution of the name to the last byte, redirects included.
        min_rate: Least bytes per second of bodies that may be large: ``seconds`` are then the deadline of an exchange
            up to its body, and the time in which each ``min_rate * seconds`` bytes of it must come. None: the deadline
            is for the body, too.
        connections: Maximum number of connections.
        ssl_context: Certificates to trust and to show; None: the environment's.
        use_proxies: Whether the environment's proxies are used.
    """

    def __init__(
        self,
        seconds: float,
        min_rate: float | None = None,
        connections: int = 16,
        ssl_context: ssl.SSLContext | None = None,
        use_proxies: bool = True,
    ) -> None:
        self.seconds, self._min_rate = seconds, min_rate
        self.stopped = threading.Event()
        """Ends all waits once it is set."""
        self._exchange = threading.local()
        self._connections, self._ssl_context, self._lock = connections, ssl_context, threading.Lock()
        self._environment = getproxies() if use_proxies else {}
        addresses = {self._environment[name] for name in ("http", "https", "all") if self._environment.get(name)}
        self._proxies = {address: _proxy(address) for address in addresses}
        self._pools: dict[tuple[str, str], httpcore.ConnectionPool] = {}

    def close(self) -> None:
        """Close all connections."""
        for pool in self._pools.values():
            pool.close()

    def retrying(self, tries: int) -> Retrying:
        """Return what calls a function up to ``tries`` times, while it raises RetryableError."""
        return Retrying(
            retry=retry_if_exception_type(RetryableError),
            stop=stop_after_attempt(tries) | stop_when_event_set(self.stopped),
            wait=retry_delay,
            sleep=sleep_using_event(self.stopped),
            reraise=True,
        )

    @contextmanager
    def stream(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        content: bytes | Iterable[bytes] = b"",
        *,
        max_bytes: int,
    ) -> Iterator[HttpResponse]:
        """Yield the response to a request; its body must be read inside, by the same thread.

        Redirects of GET and HEAD are followed, with ``PUBLIC_HEADERS`` alone where they lead to another origin.

        Raises RetryableError for what may pass: an overdue answer, a broken connection, HTTP 408, 425, 429 and 5xx.
        Raises HttpError for a URL that cannot be, OversizedError for a body of more than
        ``max_bytes``, and HttpError for whatever else a server makes of HTTP.
        """
        self._exchange.deadline, self._exchange.transferred = time.monotonic() + self.seconds, 0
        with self._errors():
            raw_response = self._open(method, url, headers or {}, content)
        with closing(raw_response):
            fields = httpx.Headers(raw_response.headers)
            pieces = self._pieces(raw_response, fields, max_bytes)
            response = HttpResponse(raw_response.status, fields, pieces)
            if response.status in (408, 425, 429) or response.status >= 500:
                raise RetryableError(response.reason, retry_after(fields.get("Retry-After", "")))
            yield response

    def _open(
        self, method: str, url: str, headers: Mapping[str, str], content: bytes | Iterable[bytes]
    ) -> httpcore.Response:
        place = httpx.URL(url)
        fields = httpx.Headers({"User-Agent": "Darkroom", "Accept": "*/*"} | dict(headers))
        fields["Accept-Encoding"] = "identity"  # a few bytes may unpack to any number
        if isinstance(content, bytes):
            if content:
                fields["Content-Length"] = str(len(content))
            content = [content[start : start + PIECE] for start in range(0, len(content), PIECE)]
        for _ in range(MAX_REDIRECTS + 1):
            if place.scheme not in ("http", "https") or not place.host:
                raise httpcore.UnsupportedProtocol(place.scheme)
            fields["Host"] = place.netloc.decode("ascii")
            sent = fields.copy()
            if place.username or place.password:
                login = base64.b64encode(f"{place.username}:{place.password}".encode())
                sent["Authorization"] = f"Basic {login.decode()}"
            request = httpcore.Request(
                method,
                _for_httpcore(place),
                headers=sent.raw,
                content=self._counted(content),
                extensions={"timeout": {"pool": self.remaining_seconds()}},
            )
            response = self._pool(place).handle_request(request)
            location = httpx.Headers(response.headers).get("Location")
            if method not in ("GET", "HEAD") or response.status not in REDIRECTS or location is None:
                return response
            # Its body is not read: it is not needed and may be endless.
            response.close()
            previous, place = place, place.join(location)
            if origin(place) != origin(previous):
                fields = httpx.Headers([(name, text) for name, text in fields.items() if name in PUBLIC_HEADERS])
        raise httpx.TooManyRedirects(f"more than {MAX_REDIRECTS} redirects")

    def _pieces(self, response: httpcore.Response, headers: httpx.Headers, max_bytes: int) -> Iterator[bytes]:
        length, size = headers.get("Content-Length", ""), 0
        if re.fullmatch("[0-9]{1,18}", length) and int(length) > max_bytes:
            raise OversizedError(f"{int(length)} bytes are over the limit of {max_bytes}")
        if (encoding := headers.get("Content-Encoding", "identity")) != "identity":
            raise HttpError(f"sent with Content-Encoding {shorten_message(encoding)} although none was accepted")
        with self._errors():
            for piece in self._counted(response.iter_stream()):
                size += len(piece)
                if size > max_bytes:
                    raise OversizedError(f"more than the limit of {max_bytes} bytes")
                yield piece

    def _counted(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Yield ``pieces``, and move the deadline for each ``min_rate * seconds`` bytes of them."""
        for piece in pieces:
            yield piece
            self._exchange.transferred += len(piece)
            if self._min_rate is not None and self._exchange.transferred >= self._min_rate * self.seconds:
                self._exchange.deadline, self._exchange.transferred = time.monotonic() + self.seconds, 0

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors of a request into HttpError."""
        try:
            yield
        except (HttpError, OSError):  # of a file that is sent: httpcore has its own for the network
            raise
        except httpcore.UnsupportedProtocol as error:
            raise HttpError("leads to something that is neither http nor https") from error
        except (httpx.InvalidURL, httpx.TooManyRedirects) as error:
            raise HttpError(f"not to be had: {shorten_message(error)}") from error
        except httpcore.TimeoutException as error:
            rate = "" if self._min_rate is None else f", or less than {self._min_rate:g} bytes per second"
            raise RetryableError(f"no whole answer within {self.seconds:g} s{rate}") from error
        except (httpcore.NetworkError, httpcore.RemoteProtocolError, httpcore.ProxyError) as error:
            raise RetryableError(shorten_message(error) or type(error).__name__) from error
        except Exception as error:  # libraries raise whatever they like on answers that they did not expect
            message = f"{type(error).__name__}: {shorten_message(error)}"
            raise HttpError(f"an answer that is not understood: {message}") from error

    def _pool(self, url: httpx.URL) -> httpcore.ConnectionPool:
        _, host, port = origin(url)
        address = self._environment.get(url.scheme) or self._environment.get("all") or ""
        proxy = None if proxy_bypass(f"{host}:{port}", self._environment) else self._proxies.get(address)
        key = (url.scheme, address if proxy else "")
        with self._lock:
            if key not in self._pools:
                if url.scheme == "https" and self._ssl_context is None:
                    self._ssl_context = httpx.create_ssl_context()  # slow
                self._pools[key] = httpcore.ConnectionPool(
                    self._ssl_context, proxy=proxy, max_connections=self._connections, network_backend=_Network(self)
                )
            return self._pools[key]

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
    """Network backend that connects within the time of the thread's current exchange."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client

    def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> httpcore.NetworkStream:
        """Connect to the first address of ``host`` that accepts."""
        deadline = time.monotonic() + self._client.remaining_seconds()

        def connect() -> httpcore.NetworkStream:
            failure: Exception = httpcore.ConnectTimeout()
            for address in _addresses(host, port):
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
        # The timeout is for each part that the system accepts.
        for start in range(0, len(buffer), PIECE):
            self._stream.write(buffer[start : start + PIECE], self._client.remaining_seconds())

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


def _addresses(host: str, port: int) -> list[str]:
    """Resolve ``host``."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a host's name"
        raise httpcore.ConnectError(f"its host cannot be found: {reason}") from error
    return list(dict.fromkeys(str(info[4][0]) for info in infos))


def shorten_message(message: object) -> str:
    """Return the beginning of what a server or library says, on one line."""
    return escape_controls(str(message)[:150])


def retry_delay(state: RetryCallState) -> float:
    """Return the seconds before the next try: the server's Retry-After, bounded, or jittered exponential backoff."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, RetryableError) and error.after is not None:
        return min(max(error.after, 0), MAX_PAUSE) + random.uniform(0, 1)
    return PAUSE(state)


def retry_after(value: str) -> float | None:
    """Parse the seconds of a Retry-After header (RFC 9110, section 10.2.3); None if it is invalid."""
    if re.fullmatch("[0-9]+", value):
        return float(value[:9])  # more digits mean more than the longest pause
    try:
        date = parsedate_to_datetime(value[:64])
        return (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
