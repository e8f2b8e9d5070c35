"""A table of URLs, CSV or JSON lines: images fetched over HTTP."""

import random
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from tempfile import SpooledTemporaryFile

import httpcore
import httpx
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
from diffusion.data.ingest.decode import UnusableEntry
from diffusion.data.prefetch import prefetch
from diffusion.data.sources.base import Access, Entry, Payload, too_large
from diffusion.data.sources.conventions import as_text, printable, records, texts_of
from diffusion.data.sources.http_client import HttpClient
from diffusion.data.sources.local_files import open_text

WORKERS = 16
PAUSE = wait_random_exponential(multiplier=0.5, max=20)
"""Seconds before another try."""
LONGEST_PAUSE = 60.0
"""Seconds; longest pause, also if a server requests more."""
IN_MEMORY = 2**20
"""Bytes from which files fetched ahead are kept on disk."""


class _Again(Exception):
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
                name = as_text(printable(url)) or f"{self.table.name}/{number}"
                # A constant stamp: URLs are fetched once, as revalidation costs nearly as much.
                yield Entry(name, as_text(url) or "", "url", *texts)

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield their bytes, fetched concurrently."""
        config = self.access.config
        stopped = threading.Event()
        client = HttpClient(config.download_seconds, config.allow_private_addresses, WORKERS, stopped)
        with closing(client):
            answers = prefetch(partial(self._fetch, client, stopped), entries, WORKERS)
            try:
                for answer in answers:
                    if isinstance(answer, UnusableEntry):
                        yield answer
                        continue
                    with answer:
                        answer.seek(0)
                        yield answer.read()
            finally:
                stopped.set()
                answers.close()

    def _fetch(
        self, client: HttpClient, stopped: threading.Event, entry: Entry
    ) -> "SpooledTemporaryFile[bytes] | UnusableEntry":
        url, config = entry.locator, self.access.config
        if not url:
            return UnusableEntry("a row without a URL")
        if not url.lower().startswith(("http://", "https://")):
            return UnusableEntry("neither an http:// nor an https:// URL: local files are read from a folder")
        retrying = Retrying(
            retry=retry_if_exception_type(_Again),
            stop=stop_after_attempt(config.download_tries) | stop_when_event_set(stopped),
            wait=_pause,
            sleep=sleep_using_event(stopped),
            reraise=True,
        )
        try:
            return retrying(_get, client, url, config.max_bytes, self.access.scratch)
        except UnusableEntry as error:
            return error
        except _Again as error:
            return UnusableEntry(f"{error}, at each of {config.download_tries} tries")


def _get(client: HttpClient, url: str, limit: int, scratch: Path) -> "SpooledTemporaryFile[bytes]":
    """Fetch a URL once, within ``client.seconds``.

    Raises _Again for a transient failure, else UnusableEntry, and nothing else for any behaviour of a server.
    """
    try:
        with client.get(url) as response:
            status, headers = response.status, httpx.Headers(response.headers)
            if not 200 <= status < 300:
                # The standard name, if any, instead of the server's text.
                line = f"HTTP {status} {httpx.codes.get_reason_phrase(status)}".strip()
                if status in (408, 425, 429) or status >= 500:
                    raise _Again(line, _retry_after(headers.get("Retry-After", "")))
                raise UnusableEntry(line)
            declared = headers.get("Content-Length", "")
            if re.fullmatch("[0-9]{1,18}", declared) and int(declared) > limit:
                raise too_large(int(declared), limit)
            if (encoding := headers.get("Content-Encoding", "identity")) != "identity":
                # A few bytes may unpack to any number.
                raise UnusableEntry(f"sent with Content-Encoding {_short(encoding)} although none was accepted")
            file = SpooledTemporaryFile(IN_MEMORY, dir=str(scratch))  # noqa: SIM115 (closed by the generator that yields it)
            for piece in response.iter_stream():
                file.write(piece)
                if file.tell() > limit:
                    raise UnusableEntry(f"more than the limit of {limit} bytes")
            return file
    except (_Again, UnusableEntry):
        raise
    except httpcore.UnsupportedProtocol as error:
        raise UnusableEntry("leads to something that is neither http nor https") from error
    except (httpx.InvalidURL, httpx.TooManyRedirects) as error:
        raise UnusableEntry(f"not to be had: {_short(error)}") from error
    except httpcore.TimeoutException as error:
        raise _Again(f"no whole answer within {client.seconds:g} s") from error
    except (httpcore.NetworkError, httpcore.RemoteProtocolError, httpcore.ProxyError) as error:
        raise _Again(_short(error) or type(error).__name__) from error
    except OSError:  # of the disk: httpcore has its own for the network
        raise
    except Exception as error:  # libraries raise whatever they like on answers that they did not expect
        raise UnusableEntry(f"an answer that is not understood: {type(error).__name__}: {_short(error)}") from error


def _short(said: object) -> str:
    return printable(str(said)[:150])


def _pause(state: RetryCallState) -> float:
    """Return the seconds before the next try: the server's Retry-After, bounded, or jittered exponential backoff."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, _Again) and error.after is not None:
        return min(max(error.after, 0), LONGEST_PAUSE) + random.uniform(0, 1)
    return PAUSE(state)


def _retry_after(value: str) -> float | None:
    """Parse the seconds of a Retry-After header (RFC 9110, section 10.2.3); None if it is invalid."""
    if re.fullmatch("[0-9]+", value):
        return float(value[:9])  # any more digits are no less than the longest pause
    try:
        when = parsedate_to_datetime(value[:64])
        return (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
