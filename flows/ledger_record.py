"""MLflow's record of a ledger: which entry is the newest, and a copy of each, so that none is lost or changed unseen.

Two servers would have to be altered together. The record is asked for before the ledger is read, and written after it:
so it is never ahead of the ledger unless something was taken from there. It may be behind, when a process was stopped
between the two or MLflow came back of a backup; whoever comes by brings it up to date.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import mlflow
from mlflow.client import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from diffusion.errors import UserError
from diffusion.files import sha256_bytes
from flows.history import Entry, History
from flows.ledger import NEWEST, Known, Ledger, Newest

logger = logging.getLogger(__name__)

COPY = "darkroom.ledger."
"""Tags of versions: with an entry's number behind it, that entry for people, and its SHA-256."""
DATA = ".json"
"""Behind such a tag's name, on the version that the entry is about: the bytes of the entry."""
COPY_NAME = re.compile(re.escape(COPY) + r"([0-9]{8})")
DATA_NAME = re.compile(COPY_NAME.pattern + re.escape(DATA))
COPY_END = re.compile(r"\(sha256 ([0-9a-f]{64})\)\Z")


def registered_model(client: MlflowClient, model: str) -> RegisteredModel | None:
    """What MLflow has of that name."""
    try:
        return client.get_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def known_newest(model: str, tags: Mapping[str, str]) -> Known:
    """The same as what is on record; raises UserError as ``Newest.of`` does."""
    newest = Newest.of(model, tags)
    return {newest.number: newest.sha256} if newest else {}


@dataclass(frozen=True)
class Record:
    """All that MLflow has on record of the ledger of a model."""

    known: Known
    versions: Mapping[int, ModelVersion]
    """Those registered, by number."""

    @classmethod
    def of(cls, client: MlflowClient, model: str) -> "Record":
        """That of ``model``; raises UserError if MLflow's copies contradict each other."""
        registered = registered_model(client, model)
        if registered is None:
            return cls({}, {})
        found = mlflow.search_model_versions(filter_string=f"name='{model}'")
        versions = {int(each.version): each for each in found}
        known = dict(known_newest(model, registered.tags))
        for number, digest in _copied(versions.values()):
            if known.setdefault(number, digest) != digest:
                raise UserError(
                    f"MLflow has two records of entry {number} of the ledger of {model} (sha256 {known[number][:12]}… "
                    f"and {digest[:12]}…): one of the tags {COPY}* was altered: see docs/runbook/ledger-broken.md"
                )
        return cls(known, versions)


def verified(client: MlflowClient, ledger: Ledger) -> History:
    """All entries of the ledger; raises UserError if it is not what MLflow has on record."""
    return ledger.read(Record.of(client, ledger.model).known)


def append(client: MlflowClient, ledger: Ledger, decide: Callable[[History], Entry | None]) -> History:
    """``Ledger.append``, with MLflow's record asked before the entry is written, and brought up to date after it."""
    history = ledger.append(decide, lambda: Record.of(client, ledger.model).known)
    for each in history.foreign:
        logger.warning("foreign object in %s, which decides nothing: %s", ledger.place, each)
    remember(client, ledger, history)
    return history


def remember(client: MlflowClient, ledger: Ledger, history: History) -> None:
    """Put the newest entry on record, unless a newer one is."""
    registered = registered_model(client, history.model)
    if registered is None or history.head is None:
        return
    there, ours = (
        Newest.of(history.model, registered.tags),
        Newest(history.head.number, history.head.digest, str(ledger.place)),
    )
    if there is None or (there.number <= ours.number and there != ours):
        client.set_registered_model_tag(history.model, NEWEST, str(ours))


def copies(history: History) -> dict[int, dict[str, str]]:
    """The tags that each version has of the entries, by its number."""
    found: dict[int, dict[str, str]] = {}
    for entry in history.entries:
        tag = f"{COPY}{entry.number:08d}"
        for number in {entry.version, entry.to_version, entry.from_version} if entry.moves else {entry.version}:
            if number is not None:
                found.setdefault(number, {})[tag] = f"{entry} (sha256 {entry.digest})"
        found[entry.version][tag + DATA] = entry.data.decode()
    return found


def restore(client: MlflowClient, ledger: Ledger) -> list[int]:
    """Write the entries that are on record and missing on S3 from MLflow's copies; returns their numbers.

    What lies there is left, altered or not. Raises UserError, and writes nothing, if something would be missing still.
    """
    record = Record.of(client, ledger.model)
    tags = [tag for version in record.versions.values() for tag in version.tags.items()]
    data = {int(name[1]): text.encode() for tag, text in tags if (name := DATA_NAME.fullmatch(tag))}
    return ledger.restore(data, record.known)


def _copied(versions: Iterable[ModelVersion]) -> Iterator[tuple[int, str]]:
    """Number and SHA-256 of each copy of an entry."""
    for version in versions:
        for tag, text in version.tags.items():
            if name := DATA_NAME.fullmatch(tag):
                yield int(name[1]), sha256_bytes(text.encode())
            elif (name := COPY_NAME.fullmatch(tag)) and (end := COPY_END.search(text)):
                yield int(name[1]), end[1]
