"""What was taken down from a data set, as far as this machine knows."""

from pathlib import Path

from pydantic import Field

from diffusion.data.selection import Chosen
from diffusion.files import write_json


class Removal(Chosen):
    """A removal that is done."""

    dataset: str
    asked: str = Field(pattern="^[0-9a-f]{16}$")
    """Digest of the selection and the reason, by which the same words find what was done. Part of a file's name."""
    reason: str
    parent: str | None
    """The version that held the pictures last; None if that can no longer be told."""
    version: str
    """The first without them."""
    content_digest: str
    tables: list[str]
    """SHA-256 of the tables, gone since, that told of these pictures as kept, sorted; empty if that is not known."""
    already: bool
    """Whether it had been done before."""


def removals(work: Path, asked: str = "") -> list[Removal]:
    """The removals of which this machine knows, from the data set with the work folder ``work``.

    ``asked``: only those that were asked for in the words with this digest.
    """
    paths = sorted((work / "removals").glob(f"{asked}*.json"))
    return [Removal.model_validate_json(path.read_bytes()) for path in paths]


def write_removal(work: Path, removal: Removal) -> None:
    """Let this machine know of ``removal``."""
    write_json(work / "removals" / f"{removal.asked}-{removal.name}.json", removal.model_dump(mode="json"))
