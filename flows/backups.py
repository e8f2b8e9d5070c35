"""Backups of the local stack in a folder: bytes by their SHA-256, and a list for each backup, written last.

``TARGET/objects/ab/abcd…`` holds the bytes of objects and databases, each once however many backups have them, and
``TARGET/backups/20261126T035504Z.json`` says what a backup consists of. Passwords and keys are in none of them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, StringConstraints, ValidationError

from diffusion.config import Config
from diffusion.errors import UserError
from diffusion.files import make_folder, sha256_file, sync_file, sync_folder, write_json

STAMP = "%Y%m%dT%H%M%SZ"
SMALL = 2**20
"""Bytes of an object that is read as fast as it is found."""
NAMED = re.compile(r"\d{8}T\d{6}Z")
Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
"""Hex SHA-256."""
DatabasePath = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*\.db$")]
"""Where a database lies in the stack's folder."""


class SavedObject(Config):
    """An object of the bucket."""

    key: str
    size: int
    etag: str
    sha256: Digest
    content_type: str
    metadata: dict[str, str]


class Backup(Config):
    """All that a stack held at one moment."""

    format_version: Literal[1] = 1
    made: AwareDatetime
    bucket: str
    versions: dict[str, str]
    """Of the programs whose databases these are."""
    databases: dict[DatabasePath, Digest]
    """By their path in the stack's folder."""
    objects: list[SavedObject]

    @property
    def stamp(self) -> str:
        """What it is called."""
        return self.made.strftime(STAMP)


@dataclass(frozen=True)
class Backups:
    """Those in one folder."""

    folder: Path

    def stamps(self) -> list[str]:
        """Of all that are whole, oldest first."""
        found = (path.stem for path in (self.folder / "backups").glob("*.json"))
        return sorted(stamp for stamp in found if NAMED.fullmatch(stamp))

    def read(self, stamp: str | None = None) -> Backup:
        """One of them, by default the newest; raises UserError if there is none, or it cannot be read."""
        stamps = self.stamps()
        if not stamps or (stamp is not None and stamp not in stamps):
            there = (
                f"there is {', '.join(stamps)}" if stamps else "there is none: make one with `darkroom server backup`"
            )
            raise UserError(f"no backup {stamp or ''} in {self.folder}: {there}")
        path = self.folder / "backups" / f"{stamp or stamps[-1]}.json"
        try:
            return Backup.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise UserError(f"{path} is damaged, or of a newer Darkroom ({error.errors()[0]['msg']})") from error

    def write(self, backup: Backup) -> Path:
        """Keep ``backup``, all of whose bytes are here."""
        path = self.folder / "backups" / f"{backup.stamp}.json"
        write_json(path, backup.model_dump(mode="json"))
        return path

    def path(self, sha256: Digest) -> Path:
        """Where bytes lie, if they are here."""
        return self.folder / "objects" / sha256[:2] / sha256

    def whole(self, sha256: Digest) -> Path:
        """Where bytes lie; raises UserError if they are damaged or missing."""
        path = self.path(sha256)
        if not path.is_file() or sha256_file(path) != sha256:
            raise UserError(
                f"{path} is damaged or missing: delete it and take another backup, or take another copy of this folder"
            )
        return path

    def has(self, saved: SavedObject) -> bool:
        """Whether the bytes of an object need not be copied again."""
        path = self.path(saved.sha256)
        if not path.is_file() or path.stat().st_size != saved.size:
            return False
        # What a crash cuts has another size. To read all large ones each time would take as long as a first backup.
        return saved.size > SMALL or sha256_file(path) == saved.sha256

    def keep(self, write: Callable[[Path], None]) -> Digest:
        """Keep the bytes that ``write`` writes to the path that it is given; returns their SHA-256."""
        partial = self.folder / "objects" / ".partial"
        make_folder(partial.parent)
        partial.unlink(missing_ok=True)
        # Databases hold hashes of passwords, and objects people's pictures.
        partial.touch(mode=0o600)
        write(partial)
        sha256 = sha256_file(partial)
        sync_file(partial)
        path = self.path(sha256)
        make_folder(path.parent)
        partial.replace(path)
        sync_folder(path.parent)
        return sha256


def stamped(moment: datetime) -> datetime:
    """``moment`` to the second, as backups are called by it."""
    return moment.replace(microsecond=0)
