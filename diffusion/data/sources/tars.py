"""Tar archives of images and WebDataset shards, read by offset without holding the list of members in memory."""

import io
import json
import posixpath
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO, TypeAlias, cast

from diffusion.common.errors import UserError
from diffusion.common.parsing import parse_json
from diffusion.data.ingest.decode import UnusableEntryError
from diffusion.data.sources.base import (
    MAX_CHARACTERS,
    MISSING,
    Access,
    Entry,
    Payload,
    Source,
    shorten_name,
    too_large_error,
    too_long_reason,
)
from diffusion.data.sources.caption_files import MAX_TEXT_BYTES, to_caption, to_text
from diffusion.data.sources.conventions import is_image, list_images, make_printable
from diffusion.data.sources.local_files import TARS, decompress, find_files, open_unchanged, stamp_of
from diffusion.data.sources.mask_files import ORPHAN, UNUSED, stem_of_image
from diffusion.data.sources.object_store import fetch_object, find_objects

MAX_HEADER_BYTES = 2**20
"""Maximum bytes of all headers of a member."""
LINK = "a link or a device inside an archive: only files are read"

SIDECARS = ("json", "txt", "cls")
MAX_IMAGES_PER_KEY = 1000
"""Maximum number of images per key; a tar with more was not made for WebDataset."""

Place: TypeAlias = str | Sequence[int]
"""Offset and size of a member, or the reason why it cannot be read."""


class TarMember(NamedTuple):
    """A file in a tar; its name, as stored without a leading ``./``, is never used as a path."""

    name: str
    place: Place


class Tar(Source):
    """The images in a tar, as ``list_images`` finds them, named ``ARCHIVE/MEMBER``; links are quarantined.

    They are sorted by name, so that the same images in a folder, a tar and a zip give the same data set.
    """

    scheme = "tar"
    form = "a .tar (.tar.gz, .tar.bz2, .tar.xz)"
    suffixes = TARS

    def entries(self) -> Iterator[Entry]:
        """Yield its images in its own or its metadata's order; raises UserError if it is damaged."""
        file_stamp, where = stamp_of(self.path), str(self.path)
        plain_path = decompress(self.path, file_stamp, self.access)
        files = ((member.name, json.dumps(member.place), file_stamp) for member in members(plain_path, where))
        for entry in list_images(files, where, self._table, self.read_texts, self.access):
            yield entry._replace(source=f"{self.path.name}/{entry.source}", stamp=file_stamp)

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield their bytes; raises UserError if the tar has changed since it was listed."""
        if entries:
            yield from read(self.path, entries[0].stamp, (json.loads(entry.locator) for entry in entries), self.access)

    @contextmanager
    def _table(self, locator: str, file_stamp: str) -> Iterator[TextIO]:
        place = json.loads(locator)
        if isinstance(place, str):
            raise UserError(f"the metadata in {self.path} cannot be read ({place}): fix it or remove it")
        with tarfile.open(decompress(self.path, file_stamp, self.access), "r:") as tar:
            info = tarfile.TarInfo()
            info.offset_data, info.size = place
            yield io.TextIOWrapper(cast(BinaryIO, tar.extractfile(info)), encoding="utf-8-sig", newline="")


def members(path: Path, where: str) -> Iterator[TarMember]:
    """Yield all files in a plain tar, links with a reason; raises UserError, naming ``where``, for a damaged one."""
    try:
        with _Headers(io.FileIO(path)) as file, tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            while (info := tar.next()) is not None:
                file.left = MAX_HEADER_BYTES
                tar.members.clear()  # type: ignore[attr-defined] # typeshed leaves it out
                # They are copied to every member.
                if sum(len(name) + len(value) for name, value in tar.pax_headers.items()) > 2**16:
                    raise tarfile.ReadError("its headers for all members are too long")
                if info.size < 0:
                    raise tarfile.ReadError("a member has a negative size")
                if not info.isdir():
                    yield _member(info)
            # ``tarfile`` takes any invalid header for the end.
            file.seek(tar.offset)
            if io.BufferedReader.read(file, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end and no member at byte {tar.offset}")
            while piece := io.BufferedReader.read(file, MAX_HEADER_BYTES):
                if piece.count(0) != len(piece):
                    raise tarfile.ReadError("more follows after its end: was it glued to another tar?")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{where} cannot be read as a tar ({error}): it is damaged or was cut short") from error


def read(path: Path, file_stamp: str, places: Iterable[Place], access: Access) -> Iterator[Payload]:
    """Yield members of the tar at ``path``; raises UserError if its stamp is no longer ``file_stamp``."""
    try:
        plain_path = decompress(path, file_stamp, access)
        file = open_unchanged(path, file_stamp) if plain_path == path else plain_path.open("rb")
    except FileNotFoundError:
        file = None
    with file or nullcontext():
        for place in places:
            yield read_slice(file, place, access.config.max_bytes)


def read_slice(file: BinaryIO | None, place: Place, limit: int) -> bytes | UnusableEntryError:
    """Read the bytes at (offset, size), unless they are more than ``limit``, or the tar is gone (None)."""
    if isinstance(place, str):
        return UnusableEntryError(place)
    offset, size = place
    if file is None:
        return UnusableEntryError(MISSING)
    if size > limit:
        return too_large_error(size, limit)
    file.seek(offset)
    data = file.read(size)
    return data if len(data) == size else UnusableEntryError("cut short in the tar")


class _Headers(io.BufferedReader):
    """File object of a tar that reads headers only."""

    left = MAX_HEADER_BYTES
    """Bytes left for the headers of the next member: long names and sparse maps may be endless."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read at most ``size`` bytes, if headers have such a size."""
        if size is None or not 0 <= size <= self.left:
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.left -= size
        return super().read(size)


def _member(info: tarfile.TarInfo) -> TarMember:
    name, place = info.name.removeprefix("./"), (info.offset_data, info.size)
    if len(name) > MAX_CHARACTERS["name"]:
        # WebDataset keeps all names of a key.
        return TarMember(make_printable(shorten_name(name)), too_long_reason("name"))
    if info.issparse():
        return TarMember(make_printable(name), "stored as a sparse file: pack it again without --sparse")
    return TarMember(make_printable(name), place if info.isreg() else LINK)


class WebDataset(Source):
    """The images in tars, named ``SHARD/MEMBER``, with labels and captions from other members of the same key.

    A key is a member's path up to the first dot in its name; members of a key lie together. Label and caption come
    from ``KEY.json`` (``label``; ``caption`` or ``text``), else from ``KEY.cls`` and ``KEY.txt``. The place is a path,
    a folder, a glob or has braces; after ``s3://`` it is not a folder, and its shards are fetched once.
    """

    scheme = "wds"
    form = "wds:SHARDS of WebDataset"
    in_order = True

    def entries(self) -> Iterator[Entry]:
        """Yield all images, shard by shard; raises UserError for missing or damaged shards."""
        for name, place, stamp in self._shards():
            path, file_stamp = self._local_file(place, stamp)
            plain_path = decompress(path, file_stamp, self.access)
            with plain_path.open("rb") as file:
                for images, masks, texts in self._samples(plain_path, place):
                    label = caption = reason = None
                    try:
                        label, caption = _read_texts(texts, file) if images else (None, None)
                    except ValueError as error:
                        reason = f"what its shard says about it cannot be read ({error})"
                    for member in images:
                        locator = json.dumps([place, reason or member.place])
                        mask = masks.get(posixpath.splitext(member.name)[0])
                        mask_place = mask and json.dumps([json.dumps([place, mask.place]), stamp])
                        yield Entry(f"{name}/{member.name}", locator, stamp, label, caption, mask=mask_place)

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield their bytes; raises UserError if a shard has changed since it was listed."""
        locations = ((json.loads(entry.locator), entry.stamp) for entry in entries)
        for (shard, stamp), group in groupby(locations, key=lambda location: (location[0][0], location[1])):
            places = (place for (_, place), _ in group)
            try:
                path, file_stamp = self._local_file(shard, stamp)
            except FileNotFoundError:
                yield from (UnusableEntryError(MISSING) for _ in places)
            else:
                yield from read(path, file_stamp, places, self.access)

    def _samples(
        self, path: Path, where: str
    ) -> Iterator[tuple[list[TarMember], dict[str, TarMember], dict[str, TarMember]]]:
        """Yield the images of each key, the masks that are used by their images' names, and its other members."""
        is_used, tally = self.access.config.masks == "files", self.access.captions
        for members, texts in _samples(path, where):
            stems = {posixpath.splitext(member.name)[0] for member in members}
            images, masks = list[TarMember](), dict[str, TarMember]()
            for member in members:
                image = stem_of_image(posixpath.splitext(member.name)[0])
                if image is None or (image not in stems and not is_used):
                    images.append(member)
                elif is_used and image in stems:
                    masks[image] = member
                else:
                    tally.ignore(ORPHAN if is_used else UNUSED, member.name)
            yield images, masks, texts

    def _local_file(self, place: str, stamp: str) -> tuple[Path, str]:
        """Return the local file of a shard, and its stamp."""
        if not place.startswith("s3://"):
            return Path(place), stamp
        path = fetch_object(place, stamp, self.access)
        return path, stamp_of(path)

    def _shards(self) -> Iterator[tuple[str, str, str]]:
        """Yield the unique name, the path or URI, and the stamp or ETag of each shard."""
        if self.place.startswith("s3://"):
            yield from find_objects(self.place, self.access)
        else:
            yield from ((name, str(path), stamp_of(path)) for name, path in find_files(self.place, ".tar"))


def _samples(path: Path, where: str) -> Iterator[tuple[list[TarMember], dict[str, TarMember]]]:
    """Yield the images of each key, masks among them, and the other members of the key by extension."""
    for key, group in groupby(members(path, where), key=lambda member: _key_and_extension(member.name)[0]):
        images: list[TarMember] = []
        sidecars: dict[str, TarMember] = {}
        for member in group:
            extension = _key_and_extension(member.name)[1].lower()
            if is_image(member.name):
                images.append(member)
            elif extension in SIDECARS:
                sidecars[extension] = member
            if len(images) > MAX_IMAGES_PER_KEY:
                raise UserError(
                    f"{where} has over {MAX_IMAGES_PER_KEY} images of key {key}: read it without wds: as a plain tar"
                )
        yield images, sidecars


def _key_and_extension(name: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension


def _read_texts(sidecars: dict[str, TarMember], file: BinaryIO) -> tuple[str | None, str | None]:
    """Return label and caption of a sample; raises ValueError for invalid ones."""
    texts = {}
    for kind, member in sidecars.items():
        data = read_slice(file, member.place, MAX_TEXT_BYTES)
        if isinstance(data, UnusableEntryError):
            raise ValueError(f"{member.name}: {data}")
        texts[kind] = data.decode("utf-8-sig").strip()
    metadata = parse_json(texts.get("json", "{}"))
    if not isinstance(metadata, dict):
        metadata = {}
    label, caption = to_text(metadata.get("label")), to_caption(metadata.get("caption") or metadata.get("text"))
    return label or texts.get("cls") or None, caption or texts.get("txt") or None
