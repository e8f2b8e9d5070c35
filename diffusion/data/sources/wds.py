"""WebDataset shards of any origin, local or in an object store."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from diffusion.common.errors import UserError
from diffusion.data.ingest.decode import UnusableEntry
from diffusion.data.sources import tars
from diffusion.data.sources.base import MISSING, Access, Entry, Payload
from diffusion.data.sources.conventions import as_text, is_image, printable
from diffusion.data.sources.local_files import WILD, before_wild, expanded, matching, stamp_of, uncompressed
from diffusion.data.sources.object_store import fetched, require

SIDECARS = ("json", "txt", "cls")
LONGEST_SIDECAR = 2**18
"""Maximum bytes of a text beside an image; parsed JSON may take a hundred times as many."""
MOST_OF_A_KEY = 1000
"""Maximum number of images per key; a tar with more was not made for WebDataset."""


@dataclass(frozen=True)
class WebDataset:
    """The images in tars, named ``SHARD/MEMBER``, with labels and captions from other members of the same key.

    A key is a member's path up to the first dot in its name; members of a key lie together. Label and caption come
    from ``KEY.json`` (``label``; ``caption`` or ``text``), else from ``KEY.cls`` and ``KEY.txt``; other members are
    ignored.

    ``pattern`` is a path, a folder, a glob or has braces; after ``s3://`` it is no folder. Shards in an object store
    are fetched, once, into the scratch folder.
    """

    pattern: str
    access: Access
    in_order = True

    def entries(self) -> Iterator[Entry]:
        """Yield all images, shard by shard; raises UserError for missing or damaged shards."""
        for name, place, stamp in self._shards():
            path, known = self._here(place, stamp)
            plain = uncompressed(path, known, self.access)
            with plain.open("rb") as file:
                for images, texts in _samples(plain, place):
                    label = caption = reason = None
                    try:
                        label, caption = _about(texts, file) if images else (None, None)
                    except ValueError as error:
                        reason = f"what its shard says about it cannot be read ({error})"
                    for member in images:
                        locator = json.dumps([place, reason or member.place])
                        yield Entry(f"{name}/{member.name}", locator, stamp, label, caption)

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield their bytes; raises UserError if a shard has changed since it was listed."""
        located = ((json.loads(entry.locator), entry.stamp) for entry in entries)
        for (shard, stamp), group in groupby(located, key=lambda each: (each[0][0], each[1])):
            places = (place for (_, place), _ in group)
            try:
                path, known = self._here(shard, stamp)
            except FileNotFoundError:
                yield from (UnusableEntry(MISSING) for _ in places)
            else:
                yield from tars.read(path, known, places, self.access)

    def _here(self, place: str, stamp: str) -> tuple[Path, str]:
        """Return the local file of a shard, and its stamp."""
        if not place.startswith("s3://"):
            return Path(place), stamp
        path = fetched(place, stamp, self.access)
        return path, stamp_of(path)

    def _shards(self) -> Iterator[tuple[str, str, str]]:
        """Yield the unique name, the path or URI, and the stamp or ETag of each shard."""
        if self.pattern.startswith("s3://"):
            yield from self._remote()
        else:
            yield from ((name, str(path), stamp_of(path)) for name, path in matching(self.pattern, ".tar"))

    def _remote(self) -> Iterator[tuple[str, str, str]]:
        objects = require(self.pattern, self.access)
        base = before_wild(self.pattern).rpartition("/")[0] + "/"
        matches: dict[str, str] = {}
        for piece in expanded(self.pattern):
            found = objects.find(before_wild(piece, WILD))
            etags = {each.uri: each.etag for each in found if _matches(each.uri, piece)}
            if not etags or "**" in piece:
                raise UserError(f"there is no object {piece}: check the name (** has no meaning here)")
            matches |= etags
        yield from ((printable(uri.removeprefix(base)), uri, etag) for uri, etag in sorted(matches.items()))


def _matches(uri: str, pattern: str) -> bool:
    """Match as a glob of files does: wildcards do not match slashes."""
    parts, patterns = uri.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _samples(path: Path, where: str) -> Iterator[tuple[list[tars.TarMember], dict[str, tars.TarMember]]]:
    """Yield the images of each key, and the other members of the key by extension."""
    for key, members in groupby(tars.members(path, where), key=lambda member: _key_and_extension(member.name)[0]):
        images: list[tars.TarMember] = []
        sidecars: dict[str, tars.TarMember] = {}
        for member in members:
            extension = _key_and_extension(member.name)[1].lower()
            if is_image(member.name):
                images.append(member)
            elif extension in SIDECARS:
                sidecars[extension] = member
            if len(images) > MOST_OF_A_KEY:
                raise UserError(
                    f"{where} has over {MOST_OF_A_KEY} images of key {key}: read it without wds: as a plain tar"
                )
        yield images, sidecars


def _key_and_extension(name: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension


def _about(sidecars: dict[str, tars.TarMember], file: BinaryIO) -> tuple[str | None, str | None]:
    """Return label and caption of a sample; raises ValueError for invalid ones."""
    texts = {}
    for kind, member in sidecars.items():
        data = tars.read_slice(file, member.place, LONGEST_SIDECAR)
        if isinstance(data, UnusableEntry):
            raise ValueError(f"{member.name}: {data}")
        texts[kind] = data.decode("utf-8-sig").strip()
    try:
        about = json.loads(texts.get("json", "{}"))
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    if not isinstance(about, dict):
        about = {}
    label, caption = as_text(about.get("label")), as_text(about.get("caption") or about.get("text"))
    return label or texts.get("cls") or None, caption or texts.get("txt") or None
