"""What a retraining is asked for, and the note on S3 that it was done: nobody does it again, on whatever machine.

``s3://BUCKET/retrained/MODEL/<key>.json`` is written last. The key is the digest of the data set's content, the whole
configuration but for where images come from, and what is printed. So these count as changed, and nothing else does:
not the machine, the code, or who is champion, except of an autoencoder that is named by its alias.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from diffusion.common.config import Config, PlainName
from diffusion.common.errors import Held, UserError
from diffusion.common.files import digest_of
from diffusion.data.manifest import Manifest
from diffusion.generation.config import Conditions
from flows.config import Params, registered
from flows.environment import settings
from flows.registry.ledger import Ledger
from flows.storage.s3 import Location, Store
from flows.storage.s3_errors import Missing
from flows.storage.tags import VersionNumber

logger = logging.getLogger(__name__)

LARGEST_NOTE = 2**24
"""Bytes that the note of a retraining may have."""


class NotedVersion(BaseModel):
    """The registered version that a retraining ended in."""

    model_config = ConfigDict(extra="allow")

    model: PlainName
    number: VersionNumber


class NotedVerdict(BaseModel):
    """What the gate said of it."""

    model_config = ConfigDict(extra="allow")

    version: NotedVersion
    reason: str


class Note(BaseModel):
    """What a retraining left behind, as far as it is read here; the rest of ``Retrained`` is passed on."""

    model_config = ConfigDict(extra="allow")

    verdict: NotedVerdict


@dataclass(frozen=True)
class ContactSheet:
    """The contact sheet that ends a retraining, as ``sample`` takes it."""

    count: int
    seed: int
    to: str | None
    conditions: Conditions


@dataclass(frozen=True)
class Request:
    """A retraining, known by ``key``."""

    model: str
    key: str

    @classmethod
    def of(cls, params: Params, version: Manifest, sheet: ContactSheet) -> "Request":
        """To retrain on ``version`` as ``params`` say."""
        parts = {
            "content": version.content_digest,
            # The order of training goes by how shards lie if it goes window by window.
            "layout": version.layout_digest if params.training.window is not None else None,
            "params": params.model_dump(mode="json", exclude={"ingest", "retention"}),
            "autoencoder": _champion(registered(params)),
            "printing": [sheet.count, sheet.seed, sheet.to, sheet.conditions.model_dump(mode="json")],
        }
        return cls(params.model_name, digest_of(parts))

    @property
    def place(self) -> Location:
        """Where the note of it lies."""
        return Location(settings().bucket) / "retrained" / self.model

    def done(self) -> dict[str, Any] | None:
        """What the retraining left behind that did this before; None if none did."""
        try:
            noted = Store().get(self.place.bucket, self._name, LARGEST_NOTE)
            return Note.model_validate_json(noted).model_dump(mode="json")
        except Missing:
            return None
        except (ValidationError, UserError):
            # Whatever was done before is found again by each step.
            logger.warning(
                "s3://%s/%s is no note of a retraining, so that this one is done again: delete it",
                self.place.bucket,
                self._name,
            )
            return None

    def note(self, result: Config) -> None:
        """Write down that it is done."""
        # Somebody else may have done the same, and have had it elsewhere.
        with suppress(Held):
            Store().put_once(
                self.place.bucket, self._name, result.model_dump_json().encode(), content_type="application/json"
            )

    @property
    def _name(self) -> str:
        return self.place.key(f"{self.key}.json")


def _champion(uri: str | None) -> int | None:
    """Which version an alias ``champion`` means now; None: ``uri`` is something else."""
    if uri is None or not uri.endswith("@champion"):
        return None
    head = Ledger.of(uri.removeprefix("models:/").removesuffix("@champion")).head()
    return head.standing.champion if head else None
