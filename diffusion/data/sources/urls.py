"""A table of URLs, CSV or JSON lines: images fetched over HTTP from hosts that are not trusted."""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from tempfile import SpooledTemporaryFile

from diffusion.common.errors import UserError
from diffusion.common.http_client import HttpClient, HttpError, PrivateAddressError, RetryableError
from diffusion.data.ingest.decode import UnusableEntryError
from diffusion.data.prefetch import prefetch
from diffusion.data.sources.base import Entry, Payload, Source
from diffusion.data.sources.caption_files import to_text
from diffusion.data.sources.conventions import make_printable, records, texts_of
from diffusion.data.sources.local_files import open_text
from diffusion.data.sources.mask_files import MASK_COLUMN
from diffusion.data.sources.object_store import IN_MEMORY, read_spooled
from diffusion.data.sources.rights import Reservations

WORKERS = 16


class Urls(Source):
    """The images that a table names by ``url`` (or ``image_url``), with ``label`` and ``text`` or ``caption``.

    Column names are case-insensitive. ``mask`` is the URL of an image's mask. Only http and https are fetched, and only
    from hosts with a public address unless ``allow_private_addresses``, as far as robots.txt permits it. What is
    reserved (``diffusion.data.sources.rights``), permanent failures, or ``download_tries`` transient ones, are
    quarantined.
    """

    scheme = "urls"
    form = "a .csv or .jsonl table of URLs"
    suffixes = (".csv", ".jsonl")
    in_order = True

    def entries(self) -> Iterator[Entry]:
        """Yield all rows; raises UserError for a table that cannot be read or has no column of URLs."""
        with open_text(self.path) as lines:
            for number, row in enumerate(records(lines, str(self.path)), start=1):
                record = {name.lower(): value for name, value in row.items()}
                if "url" not in record and "image_url" not in record:
                    columns = ", ".join(row)
                    raise UserError(f"{self.path}, record {number} has no url or image_url: rename one of {columns}")
                url = str(record.get("url") or record.get("image_url") or "").strip()
                texts = texts_of(record, f"{self.path}, record {number}")
                name = to_text(make_printable(url)) or f"{self.path.name}/{number}"
                # A constant stamp: URLs are fetched once, as revalidation costs nearly as much.
                mask = to_text(record.get(MASK_COLUMN)) if self.access.config.masks == "files" else None
                place = mask and json.dumps([mask.strip(), mask.strip()])
                yield Entry(name, to_text(url) or "", "url", *texts, mask=place)

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield their bytes, fetched concurrently."""
        config = self.access.config
        make_client = partial(
            HttpClient, config.download_seconds, connections=WORKERS, public_only=not config.allow_private_addresses
        )
        # Its own, as a client has one exchange per thread at a time.
        with closing(make_client()) as asking:
            folder, tries = self.access.scratch / "rights", config.download_tries
            rights = Reservations(asking, folder, tries) if config.opt_outs == "respect" else None
            client = make_client(permit=rights.require_permitted if rights else None)
            answers = prefetch(partial(self._fetch, client, rights), entries, WORKERS)
            try:
                yield from read_spooled(answers)
            finally:
                client.stopped.set()
                asking.stopped.set()
                answers.close()
                client.close()

    def _fetch(
        self, client: HttpClient, rights: Reservations | None, entry: Entry
    ) -> "SpooledTemporaryFile[bytes] | UnusableEntryError":
        url, config = entry.locator, self.access.config
        if not url:
            return UnusableEntryError("a row without a URL")
        if not url.lower().startswith(("http://", "https://")):
            return UnusableEntryError("neither an http:// nor an https:// URL: local files are read from a folder")
        try:
            return client.retrying(config.download_tries)(self._get, client, rights, url)
        except RetryableError as error:
            return UnusableEntryError(f"{error}, at each of {config.download_tries} tries")
        except PrivateAddressError as error:
            return UnusableEntryError(
                f"{error}: set ingest.allow_private_addresses to true if what answers there may be asked"
            )
        except HttpError as error:
            return UnusableEntryError(str(error))

    def _get(self, client: HttpClient, rights: Reservations | None, url: str) -> "SpooledTemporaryFile[bytes]":
        headers = {"Accept": "image/*, */*;q=0.5"}
        with client.stream("GET", url, headers, max_bytes=self.access.config.max_bytes) as response:
            if not 200 <= response.status < 300:
                raise HttpError(response.reason)
            if rights is not None:
                rights.require_unreserved(response)
            file = SpooledTemporaryFile(IN_MEMORY, dir=str(self.access.scratch))  # noqa: SIM115 (closed by its reader)
            for piece in response.pieces:
                file.write(piece)
            return file
