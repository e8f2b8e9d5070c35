"""HTTP client for untrusted URLs: limits the addresses it connects to and the duration of an exchange.

Host names are resolved here, addresses that are not public are refused at every redirect, and the connection goes to
exactly the address that was checked, which prevents DNS rebinding. TLS certificates, SNI and ``Host`` keep the name.
"""

import base64
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, TypeVar
from urllib.request import getproxies, proxy_bypass

import httpcore
import httpx
import psutil

from diffusion.common.errors import UserError
from diffusion.data.ingest.decode import UnusableEntry

Result = TypeVar("Result")

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
    """Return whether ``address`` (numeric IPv4 or IPv6) is that of a host on the public internet.

    IPv4 addresses embedded in IPv6 ones are checked as such; those reached by a tunnel are refused.
    """
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
    return any(each.address.partition("%")[0] == address for interface in interfaces for each in interface)


class HttpClient:
    """Thread-safe HTTP client with at most ``connections`` persistent connections, directly and through each proxy.

    ``seconds``: timeout of one exchange, from the name's resolution to the last byte, redirects included.
    ``allow_private``: whether hosts may have any address. ``stopped`` ends all waits once it is set. Proxies are those
    of the environment and may have any address; they resolve names again, so the check here does not bind them.
    """

    def __init__(self, seconds: float, allow_private: bool, connections: int, stopped: threading.Event) -> None:
        self.seconds = seconds
        self._allow_private = allow_private
        self._stopped = stopped
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

        Raises UnusableEntry (the host has no allowed address), httpx.InvalidURL, httpcore.UnsupportedProtocol (anything
        but http and https), httpx.TooManyRedirects, httpcore.TimeoutException, or another exception of httpcore.
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
            pool, extensions = self._pool(place), {"timeout": {"pool": self.left()}}
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

    def left(self) -> float:
        """Return the seconds left for this thread's exchange; raises httpcore.ReadTimeout if there are none."""
        left: float = self._exchange.deadline - time.monotonic()
        if left <= 0 or self._stopped.is_set():
            raise httpcore.ReadTimeout
        return left

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
            wait([future], min(self.left(), STEP_SECONDS))
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
        self._client = client
        self._allow_private = allow_private

    def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> httpcore.NetworkStream:
        """Connect to the first allowed address of ``host`` that accepts; raises UnusableEntry if it has none."""
        deadline = time.monotonic() + self._client.left()

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
        self._stream = stream
        self._client = client

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        while True:
            try:
                return self._stream.read(max_bytes, min(self._client.left(), STEP_SECONDS))
            except httpcore.ReadTimeout:
                self._client.left()

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._client.left())

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> "_Stream":
        left = self._client.left()
        # The timeout is for the whole handshake.
        stream = self._client.wait_for(lambda: self._stream.start_tls(ssl_context, server_hostname, left))
        return _Stream(stream, self._client)


def _addresses(host: str, port: int, allow_private: bool) -> list[str]:
    """Resolve ``host``; raises UnusableEntry if only public addresses are allowed and it has none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a host's name"
        raise httpcore.ConnectError(f"its host cannot be found: {reason}") from error
    addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
    allowed = [each for each in addresses if allow_private or (is_public(each) and not is_own(each))]
    if addresses and not allowed:
        raise UnusableEntry(
            f"leads to {addresses[0]}, an address that is private, reserved or this machine's: set "
            "ingest.allow_private_addresses to true if what answers there may be asked"
        )
    return allowed
