"""The heads of a data set: which of its versions is the newest, for all machines that add to it.

``s3://BUCKET/datasets/NAME/heads/00000001.json`` and so on are written once, and the last one names the newest version,
the head. To create entry N + 1 with If-None-Match is one write, which one of several succeeds with; who does not finds
that the data set moved on. A version is put into the catalogue first and becomes the head then. So a process that is
killed in between leaves nothing that another machine would wait for, and the same command again goes on.
"""

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, ValidationError

from diffusion.config import Config
from diffusion.data.manifest import Sha256
from diffusion.errors import Held
from diffusion.files import canonical_json
from flows.catalogue import Catalogue
from flows.s3 import Location, Store

NAME = re.compile(r"(\d{8})\.json")

logger = logging.getLogger(__name__)


class Head(Config):
    """An entry of the chain."""

    format_version: Literal[1] = 1
    number: int = Field(ge=1)
    version: Sha256
    """The newest version from here on."""
    before: Sha256 | None
    """The head before it; None: there was none."""


@dataclass(frozen=True)
class Heads:
    """The chain of one data set."""

    catalogue: Catalogue

    def newest(self) -> str | None:
        """Digest of the version that the next ingest adds to; None if the catalogue has no version.

        A head that somebody deleted from the catalogue counts no more. A catalogue from before there were heads goes by
        the time of writing.
        """
        number = self._count()
        for each in range(number, 0, -1):
            if (head := self._read(each)) is None:
                continue
            if self.catalogue.written(head.version) is not None:
                return head.version
            logger.warning(
                "version %s of data set %s was its newest, and is not in the catalogue any more: the one before it is",
                head.version[:12],
                self.catalogue.name,
            )
        return self._last_written()

    def adopt(self) -> str | None:
        """``newest``, which becomes the first entry where there are versions and no chain yet."""
        newest = self.newest()
        if newest is not None and not self._count():
            return self.advance(newest, ()) or newest
        return newest

    def advance(self, version: str, onto: Collection[str]) -> str | None:
        """Make ``version``, which is in the catalogue, the head instead of one of ``onto``.

        Returns the head that is in the way: somebody was faster. None: ``version`` is the head now.
        """
        place = self._place
        self._store.require_conditional_puts(place.bucket, place.prefix)
        while True:
            number = self._count()
            head = self.newest() if number else None
            if head == version:
                return None
            if head is not None and head not in onto:
                return head
            entry = Head(number=number + 1, version=version, before=head)
            try:
                self._store.put_once(
                    place.bucket,
                    place.key(_name(entry.number)),
                    canonical_json(entry.model_dump(mode="json")).encode(),
                    content_type="application/json",
                )
            except Held:
                if self._count() < entry.number:
                    raise

    @property
    def _place(self) -> Location:
        return self.catalogue.place / "heads"

    @property
    def _store(self) -> Store:
        return self.catalogue.store

    def _count(self) -> int:
        """How many entries there are, of numbers without a gap."""
        prefix = self._place.key("")
        keys = self._store.list_keys(self._place.bucket, prefix)
        numbers = {int(found[1]) for key in keys if (found := NAME.fullmatch(key.removeprefix(prefix)))}
        # A junk object with a number far off must not be what comes after the last one.
        count = 0
        while count + 1 in numbers:
            count += 1
        return count

    def _read(self, number: int) -> Head | None:
        """An entry; None if it is none that this Darkroom understands, which then counts no more than a junk object."""
        try:
            found = Head.model_validate_json(self._store.get(self._place.bucket, self._place.key(_name(number))))
        except ValidationError:
            logger.warning("%s is no head of a data set, and is passed over", self._place / _name(number))
            return None
        return found if found.number == number else None

    def _last_written(self) -> str | None:
        """The version written last, of those that no other one was made from."""
        published = self.catalogue.published()
        if len(published) > 1:
            parents = {each.parent for each in self.catalogue.versions().values()}
            published = {digest: written for digest, written in published.items() if digest not in parents}
        return max(published, key=lambda digest: (published[digest], digest), default=None)


def _name(number: int) -> str:
    return f"{number:08d}.json"
