"""Idempotency of retraining: a note on S3 that a request was done, so that no machine does it again.

``s3://BUCKET/retrained/MODEL/<key>.json`` is written last. The key is the digest of the data set's content, the
configuration except for the source of images, and the contact sheet. Nothing else counts as a change: not the machine,
the code, or the champion, except for an autoencoder that is named by its alias.
"""

import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import AliasPath, BaseModel, Field, ValidationError

from diffusion.common.config import Config, PlainName
from diffusion.common.errors import ConflictError, UserError
from diffusion.common.files import digest_of
from diffusion.data.manifest import Manifest
from diffusion.generation.config import Conditions
from flows.config import Params, registered
from flows.environment import settings
from flows.registry.ledger import Ledger
from flows.storage.s3 import Missing, Store
from flows.storage.tags import VersionNumber

logger = logging.getLogger(__name__)


class Note(BaseModel):
    """Fields of a note, a ``RetrainResult`` in JSON, that are read here and by ``retrain``."""

    model: PlainName = Field(validation_alias=AliasPath("verdict", "version", "model"))
    number: VersionNumber = Field(validation_alias=AliasPath("verdict", "version", "number"))
    reason: str = Field(validation_alias=AliasPath("verdict", "reason"))


@dataclass(frozen=True)
class Request:
    """Retraining request identified by ``key``."""

    model: str
    key: str

    @classmethod
    def of(
        cls, params: Params, version: Manifest, count: int, seed: int, to: str | None, conditions: Conditions
    ) -> "Request":
        """Request to retrain on ``version``; the other arguments are those of ``sample`` for the contact sheet."""
        uri = registered(params)
        champion = None
        if uri is not None and uri.endswith("@champion"):
            head = Ledger.of(uri.removeprefix("models:/").removesuffix("@champion")).head()
            champion = head.standing.champion if head else None
        parts = {
            "content": version.content_digest,
            # Windowed training order depends on the layout of the shards.
            "layout": version.layout_digest if params.training.window is not None else None,
            "params": params.model_dump(mode="json", exclude={"ingest", "retention"}),
            "autoencoder": champion,
            "samples": [count, seed, to, conditions.model_dump(mode="json")],
        }
        return cls(params.model_name, digest_of(parts))

    @property
    def _note(self) -> tuple[str, str]:
        return settings().bucket, f"retrained/{self.model}/{self.key}.json"

    def done(self) -> dict[str, Any] | None:
        """Result of an earlier retraining with the same key; None if there is none."""
        try:
            note = Store().get(*self._note, most=2**24)
            Note.model_validate_json(note)
        except Missing:
            return None
        except (ValidationError, UserError):
            # Each step finds its earlier results by itself.
            logger.warning(
                "s3://%s/%s is no note of a retraining, so that this one is done again: delete it", *self._note
            )
            return None
        return dict(json.loads(note))

    def note(self, result: Config) -> None:
        """Write the note that the request is done."""
        # Another machine may have finished the same request with another result.
        with suppress(ConflictError):
            Store().put_once(*self._note, result.model_dump_json().encode(), content_type="application/json")
