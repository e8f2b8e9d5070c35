"""A table of URLs, CSV or JSON lines: pictures fetched over HTTP."""

import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path

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

from diffusion.data.ahead import ahead
from diffusion.data.pictures import Refused
from diffusion.data.sources.base import Access, Entry, Payload
from diffusion.data.sources.conventions import as_text, records, sane, too_large
from diffusion.data.sources.local import open_text
from diffusion.errors import UserError

WORKERS = 16
PAUSE = wait_random_exponential(multiplier=0.5, max=20)
"""Seconds before another try."""
LONGEST_PAUSE = 60.0
"""Seconds; servers that ask for more are asked again after this."""
BUSY = {408, 425, 429}
"""Answers, besides those of 500 and more, after which another try may help."""


STAMP = "url"
"""Of all entries: what was fetched once is not fetched again, as asking a server costs nearly as much."""


class _Again(Exception):
    """This try failed; the next may not."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


@dataclass(frozen=True)
class Urls:
    """The pictures that ``table`` names by ``url`` (or ``image_url``), with ``label`` and ``text`` or ``caption``.

    Capitals in the names of columns do not matter. Only http and https are fetched, also after a redirect; proxies
    are those of the environment (``HTTPS_PROXY``, ``NO_PROXY``). What fails for good, or ``download_tries`` times, is
    quarantined.
    """

    table: Path
    access: Access
    in_order = True

    def entries(self) -> Iterator[Entry]:
        """All rows; raises UserError for a table that cannot be read or has no column of URLs."""
        with open_text(self.table) as lines:
            for number, row in enumerate(records(lines, self.table.name, str(self.table)), start=1):
                record = {name.lower(): value for name, value in row.items()}
                if "url" not in record and "image_url" not in record:
                    columns = ", ".join(row)
                    raise UserError(f"{self.table}, record {number} has no url or image_url: rename one of {columns}")
                url = str(record.get("url") or record.get("image_url") or "").strip()
                try:
                    label = as_text(record.get("label"))
                    caption = as_text(record.get("text") or record.get("caption"))
                except ValueError as error:
                    raise UserError(f"{self.table}, record {number}: {error}: give one text for each") from error
                name = as_text(sane(url)) or f"{self.table.name}/{number}"
                yield Entry(name, as_text(url) or "", STAMP, label, caption)

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Their bytes, several fetched at a time."""
        config = self.access.config
        stopped = threading.Event()
        with httpx.Client(
            follow_redirects=True,
            timeout=config.download_seconds,
            headers={"User-Agent": "Darkroom", "Accept": "image/*, */*;q=0.5", "Accept-Encoding": "identity"},
            limits=httpx.Limits(max_connections=WORKERS),
        ) as client:
            payloads = ahead(partial(self._fetch, client, stopped), entries, WORKERS)
            try:
                for payload in payloads:  # noqa: UP028 (it would close them before the waits are told to stop)
                    yield payload
            finally:
                stopped.set()
                payloads.close()

    def _fetch(self, client: httpx.Client, stopped: threading.Event, entry: Entry) -> Payload:
        url, config = entry.locator, self.access.config
        if not url:
            return Refused("a row without a URL")
        if not url.lower().startswith(("http://", "https://")):
            return Refused("neither an http:// nor an https:// URL: local files are read from a folder")
        retrying = Retrying(
            retry=retry_if_exception_type(_Again),
            stop=stop_after_attempt(config.download_tries) | stop_when_event_set(stopped),
            wait=_pause,
            sleep=sleep_using_event(stopped),
            reraise=True,
        )
        try:
            return retrying(_get, client, url, config.max_bytes, config.download_seconds)
        except _Again as error:
            return Refused(f"{error}, at each of {config.download_tries} tries")


def _get(client: httpx.Client, url: str, limit: int, seconds: float) -> Payload:
    """One try, at most about ``seconds`` long; raises _Again if another may do better."""
    deadline = time.monotonic() + seconds
    try:
        with client.stream("GET", url) as response:
            status = f"HTTP {response.status_code} {response.reason_phrase}".strip()
            if response.status_code in BUSY or response.status_code >= 500:
                raise _Again(status, _retry_after(response.headers.get("Retry-After", "")))
            if not response.is_success:
                return Refused(status)
            declared = response.headers.get("Content-Length", "")
            if declared.isdecimal() and int(declared) > limit:
                return too_large(int(declared), limit)
            if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
                # A few bytes of it may unpack to any number.
                return Refused(f"sent packed ({sane(encoding)}) although asked for as it is")
            body = bytearray()
            for piece in response.iter_raw():
                body += piece
                if len(body) > limit:
                    return Refused(f"more than the limit of {limit} bytes")
                if time.monotonic() > deadline:
                    raise _Again(f"not all there after {seconds:g} s")
            return bytes(body)
    except httpx.UnsupportedProtocol:
        return Refused("leads to something that is neither http nor https")
    except (httpx.InvalidURL, UnicodeError, httpx.TooManyRedirects) as error:
        return Refused(f"not to be had: {error}")
    except httpx.TimeoutException as error:
        raise _Again(f"no answer within {seconds:g} s") from error
    except httpx.TransportError as error:
        raise _Again(str(error) or type(error).__name__) from error


def _pause(state: RetryCallState) -> float:
    """Seconds before the next try: what the server asked for, within reason, or more and more; never quite the same."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, _Again) and error.after is not None:
        return min(max(error.after, 0), LONGEST_PAUSE) + random.uniform(0, 1)
    return PAUSE(state)


def _retry_after(value: str) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110, section 10.2.3); None if it does not."""
    if value.isdecimal():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    return (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
