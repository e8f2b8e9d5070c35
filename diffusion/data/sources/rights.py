"""Wishes of rights holders: what robots.txt, HTTP headers, TDM reservations and images themselves say about training.

Sources: RFC 9309 (robots.txt), X-Robots-Tag with the directives that image hosts use, the W3C's TDM Reservation
Protocol (https://w3c.github.io/tdm-reservation-protocol), and IPTC's property Data Mining (PLUS, in XMP).
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from threading import Lock
from urllib.parse import unquote, urlsplit

import httpx

from diffusion.common.errors import UserError
from diffusion.common.files import sha256_bytes, write_bytes
from diffusion.common.http_client import HttpClient, HttpError, HttpResponse, PrivateAddressError, RetryableError

PRODUCT = "darkroom"
"""Token by which robots.txt and X-Robots-Tag name this program."""
RESERVED = "reserved by "
"""Beginning of the reasons of images that are left out because a rights holder wishes so."""
DIRECTIVES = {"noai", "noimageai", "noml", "noindex", "noimageindex", "none"}
"""Directives of X-Robots-Tag that exclude an image; the first three are no standard, and widely sent."""
OTHER_FIELDS = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
"""Directives with a colon of their own, which names no crawler."""
MAX_FILE = 500 * 1024
"""Bytes of robots.txt and tdmrep.json that count, as RFC 9309 allows."""
MAX_LIST = 64 * 2**20
IPTC = b"ns.useplus.org/ldf/vocab/DMI-PROHIBITED"
"""Beginning of all values of Data Mining that prohibit training; the packet of XMP is plain text in every format."""


class ReservedError(HttpError):
    """A rights holder does not want this file to be used."""


def find_reservation(payload: bytes) -> str | None:
    """Return the reason why an image file must not be used, by IPTC's Data Mining in it; None if it says nothing."""
    return f"{RESERVED}IPTC Data Mining in the file" if IPTC in payload else None


@dataclass(frozen=True)
class PathRules:
    """Rules of a robots.txt, or of a tdmrep.json, whose patterns are the same: pattern and whether it allows."""

    rules: tuple[tuple[str, bool], ...]

    @classmethod
    def of_robots(cls, text: str) -> "PathRules":
        """Take the groups that name this program, or else those for all (RFC 9309, 2.2)."""
        groups: dict[str, list[tuple[str, bool]]] = {}
        agents, in_rules = list[str](), False
        for line in text.splitlines():
            field, _, value = (part.strip() for part in line.partition("#")[0].partition(":"))
            if (field := field.lower()) == "user-agent":
                agents = [value.lower()] if in_rules else [*agents, value.lower()]
                in_rules = False
                groups.setdefault(value.lower(), [])
            elif field in ("allow", "disallow"):
                in_rules = True
                if value:
                    for agent in agents:
                        groups[agent].append((value, field == "allow"))
        return cls(tuple(groups.get(PRODUCT, groups.get("*", ()))))

    @classmethod
    def of_reservations(cls, text: str) -> "PathRules":
        """Take the rules of a tdmrep.json that can be understood; another page has none."""
        try:
            rules = json.loads(text)
        except (ValueError, RecursionError):
            return cls(())
        return cls(
            tuple(
                (rule["location"], rule.get("tdm-reservation") != 1)
                for rule in (rules if isinstance(rules, list) else ())
                if isinstance(rule, dict) and isinstance(rule.get("location"), str)
            )
        )

    def allows(self, path: str) -> bool:
        """Whether the longest pattern that matches allows ``path``, with its query; of equal ones the allowing one."""
        matching = [(len(pattern), allows) for pattern, allows in self.rules if matches(pattern, path)]
        return max(matching)[1] if matching else True


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern with ``*`` and a final ``$`` matches the beginning of ``path``, in linear time."""
    anchored = pattern.endswith("$")
    first, *rest = (unquote(piece) for piece in pattern.removesuffix("$").split("*"))
    path = unquote(path)
    if not path.startswith(first):
        return False
    if not rest:
        return not anchored or path == first
    place = len(first)
    for piece in rest[:-1]:
        if (place := path.find(piece, place)) < 0:
            return False
        place += len(piece)
    return path.endswith(rest[-1], place) if anchored else path.find(rest[-1], place) >= 0


def is_excluded(values: list[str]) -> bool:
    """Whether X-Robots-Tag, of which there may be several, excludes an image from indexes or from training."""
    for value in values:
        agent = "*"
        for part in value.lower().split(","):
            name, colon, directive = (piece.strip() for piece in part.partition(":"))
            if colon and name not in OTHER_FIELDS:
                agent, name = name, directive
            if agent in ("*", PRODUCT) and name in DIRECTIVES:
                return True
    return False


class Reservations:
    """What hosts say about their files; their robots.txt and tdmrep.json are read once, and kept in ``folder``.

    Thread-safe, and shared by processes through the folder.
    """

    def __init__(self, client: HttpClient, folder: Path, tries: int) -> None:
        self.client, self.folder, self.tries = client, folder, tries
        self._lock, self._locks = Lock(), dict[str, Lock]()
        self._rules: dict[str, PathRules] = {}
        self._failures: dict[str, str] = {}
        """What became of files that cannot be read, which are not asked for again."""

    def require_permitted(self, url: str) -> None:
        """Raise ReservedError if the host's robots.txt disallows ``url``, and HttpError if that cannot be known."""
        if not self._rules_of(url, "/robots.txt", PathRules.of_robots).allows(_path(url)):
            raise ReservedError(f"{RESERVED}robots.txt")

    def require_unreserved(self, response: HttpResponse) -> None:
        """Raise ReservedError if the headers of a response, or else the host's tdmrep.json, reserve the file."""
        if is_excluded(response.headers.get_list("X-Robots-Tag")):
            raise ReservedError(f"{RESERVED}X-Robots-Tag")
        header = response.headers.get("tdm-reservation", "").strip()
        # The header says more about a file than the rules of its host do.
        is_reserved = header == "1"
        if header not in ("0", "1"):
            rules = self._rules_of(response.url, "/.well-known/tdmrep.json", PathRules.of_reservations)
            is_reserved = not rules.allows(_path(response.url))
        if is_reserved:
            raise ReservedError(f"{RESERVED}a TDM reservation")

    def _rules_of(self, url: str, path: str, parse: Callable[[str], PathRules]) -> PathRules:
        """Rules of the host of ``url`` in its file at ``path``; raises HttpError if they cannot be known."""
        place = httpx.URL(url)
        address = f"{place.scheme}://{place.netloc.decode('ascii')}{path}"
        file = self.folder / f"{sha256_bytes(address.encode())[:32]}.txt"
        with self._lock:
            lock = self._locks.setdefault(address, Lock())
        with lock:
            if (rules := self._rules.get(address)) is not None:
                return rules
            if (failure := self._failures.get(address)) is not None:
                raise HttpError(failure)
            try:
                text = file.read_text() if file.is_file() else self.client.retrying(self.tries)(self._fetch, address)
            except PrivateAddressError:
                raise
            except HttpError as error:
                tries = f", at each of {self.tries} tries" if isinstance(error, RetryableError) else ""
                self._failures[address] = failure = f"{path} of its host cannot be read: {error}{tries}"
                raise HttpError(failure) from error
            if not file.is_file():
                write_bytes(file, text.encode())
            self._rules[address] = rules = parse(text)
            return rules

    def _fetch(self, address: str) -> str:
        with self.client.stream("GET", address, max_bytes=2**40) as response:
            return _head(response.pieces).decode("utf-8-sig", "replace") if 200 <= response.status < 300 else ""


def _head(pieces: Iterator[bytes]) -> bytes:
    """Return the first MAX_FILE bytes, without reading on."""
    data = b""
    for piece in pieces:
        data += piece
        if len(data) >= MAX_FILE:
            break
    return data[:MAX_FILE]


def _path(url: str) -> str:
    place = urlsplit(url)
    return (place.path or "/") + (f"?{place.query}" if place.query else "")


@dataclass(frozen=True)
class LeaveOutList:
    """Images that a person has named: names, patterns of names, and digests of files or of stored pixels."""

    names: frozenset[str]
    patterns: tuple[str, ...]
    digests: frozenset[str]
    digest: str
    """SHA-256 of the list."""

    @classmethod
    def read(cls, path: Path) -> "LeaveOutList":
        """Read a list with an entry per line, or a comment after ``#``. Raises UserError for another file."""
        return _read_list(path, path.stat().st_mtime_ns if path.is_file() else 0)

    def reason(self, name: str) -> str | None:
        """Return why an entry of the source is left out; None if it is not."""
        if name in self.names or any(fnmatchcase(name, pattern) for pattern in self.patterns):
            return f"{RESERVED}the list ingest.leave_out"
        return None


@lru_cache(maxsize=4)
def _read_list(path: Path, _: int) -> LeaveOutList:
    try:
        if path.stat().st_size > MAX_LIST:
            raise UserError(f"ingest.leave_out: {path} has over {MAX_LIST} bytes: give a list with an entry per line")
        data = path.read_bytes()
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines() if not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"ingest.leave_out: {path} cannot be read as text ({error}): give a list of names") from error
    entries = frozenset(filter(None, lines))
    digests = frozenset(entry.lower() for entry in entries if re.fullmatch("[0-9a-fA-F]{64}", entry))
    patterns = tuple(sorted(entry for entry in entries if set(entry) & set("*?[")))
    return LeaveOutList(entries, patterns, digests, sha256_bytes(data))


def count_reservations(reasons: Mapping[str, int]) -> dict[str, int]:
    """Count, of the images quarantined for ``reasons``, those that a rights holder reserved, by how that was said."""
    return {reason.removeprefix(RESERVED): count for reason, count in reasons.items() if reason.startswith(RESERVED)}
