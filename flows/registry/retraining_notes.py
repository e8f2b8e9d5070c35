"""Notes on S3 of retrainings that were done, by which the same one is not done twice."""

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
from flows.config import Params, registered_autoencoder
from flows.environment import settings
from flows.registry.ledger import Ledger
from flows.storage.s3 import Store
from flows.storage.s3_errors import MissingObjectError
from flows.storage.tags import VersionNumber

logger = logging.getLogger(__name__)


class Note(BaseModel):
    """Fields of a note, a ``RetrainResult`` in JSON, that ``retrain`` reads."""

    model: PlainName = Field(validation_alias=AliasPath("verdict", "version", "model"))
    number: VersionNumber = Field(validation_alias=AliasPath("verdict", "version", "number"))
    reason: str = Field(validation_alias=AliasPath("verdict", "reason"))
    seconds: dict[str, float] = {}


@dataclass(frozen=True)
class RetrainRequest:
    """Retraining request, done once: a note on S3, ``retrained/MODEL/<key>.json``, is written last.

    ``key`` is the digest of the data set's content, the configuration except for the source of images, the contact
    sheet, and the autoencoder if its alias names it. Machine, code and champion do not count as changes.
    """

    model: str
    key: str

    @classmethod
    def of(
        cls, params: Params, version: Manifest, count: int, seed: int, to: str | None, conditions: Conditions
    ) -> "RetrainRequest":
        """Request to retrain on ``version``; the other arguments are for ``sample``, which makes the contact sheet."""
        uri = registered_autoencoder(params)
        champion = None
        if uri is not None and uri.endswith("@champion"):
            head = Ledger.of(uri.removeprefix("models:/").removesuffix("@champion")).head()
            champion = head.alias_numbers.champion if head else None
        parts = {
            "content": version.content_digest,
            # Windowed training order depends on the layout of the shards.
            "layout": version.layout_digest if params.training.window is not None else None,
            "params": params.model_dump(mode="json", exclude={"ingest", "curation", "retention", "monitor"}),
            "autoencoder": champion,
            "samples": [count, seed, to, conditions.model_dump(mode="json")],
        }
        return cls(params.model_name, digest_of(parts))

    @property
    def _note(self) -> tuple[str, str]:
        return settings().bucket, f"retrained/{self.model}/{self.key}.json"

    def find_earlier_result(self) -> dict[str, Any] | None:
        """Result of an earlier retraining with the same key; None if there is none."""
        try:
            note = Store().get(*self._note, max_bytes=2**24)
            Note.model_validate_json(note)
        except MissingObjectError:
            return None
        except (ValidationError, UserError):
            # Each step finds its earlier results by itself.
            logger.warning(
                "s3://%s/%s is not the note of a retraining, so this one is done again: delete it", *self._note
            )
            return None
        return dict(json.loads(note))

    def estimate_phase_seconds(self) -> dict[str, float]:
        """Seconds of the phases after training, as in the newest retraining of the model; empty if there is none."""
        bucket, store = settings().bucket, Store()
        notes = store.list_objects(bucket, f"retrained/{self.model}/")
        if (note := max(notes, key=lambda entry: entry.written, default=None)) is None:
            return {}
        try:
            seconds = Note.model_validate_json(store.get(bucket, note.key, max_bytes=2**24)).seconds
        except (MissingObjectError, ValidationError, UserError):
            return {}
        # That of the training is measured as it goes.
        return {name: duration for name, duration in seconds.items() if name not in ("ingest", "train")}

    def write_note(self, result: Config) -> None:
        """Write the note that the request is done."""
        # Another machine may have finished the same request with another result.
        with suppress(ConflictError):
            Store().put_once(*self._note, result.model_dump_json().encode(), content_type="application/json")
