"""Data sets of the Hugging Face Hub (``hf://datasets/``): Parquet, WebDataset and ImageFolder layouts.

Files are fetched whole, verified, and read as local ones are. What stands in a file that has not changed is remembered,
so that listing it again fetches nothing.
"""

import gzip
import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from tempfile import SpooledTemporaryFile
from typing import Any, NamedTuple, Self, TextIO

from filelock import FileLock

from diffusion.common.errors import UserError
from diffusion.common.files import digest_of, write_atomically
from diffusion.common.hub import HubFile, Repository, parse_hub_uri
from diffusion.data.ingest.decode import UnusableEntryError
from diffusion.data.prefetch import prefetch
from diffusion.data.sources.base import Access, Entry, Payload, Source, too_large_error
from diffusion.data.sources.caption_files import CAPTION_TABLE
from diffusion.data.sources.conventions import METADATA_FILES, is_hidden, is_image, list_images, make_printable
from diffusion.data.sources.local_files import TARS, expand_braces, open_text, stamp_of
from diffusion.data.sources.object_store import IN_MEMORY, read_spooled
from diffusion.data.sources.parquet import Parquet
from diffusion.data.sources.tars import WebDataset

IMAGES_AT_ONCE, FILES_AT_ONCE = 16, 4
"""Concurrent downloads of images, and of files with many of them."""
MAX_TABLE_BYTES = 2**32
"""Maximum bytes of a metadata file."""
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the names of folders and files that tell the split, as in Hugging Face's ``datasets``."""
NUMBERED = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5,}[^/]*")
FORMAT = 1
"""Incremented when files would be listed in another way."""


class HubDataset(Source):
    """The images of a split of a data set of the Hub, named ``OWNER/NAME/FILE[/MEMBER OR ROW]``.

    ``config`` and ``split`` select files as the data set's card says, or else by the names of folders and files. Their
    defaults are the only or default configuration, and ``train`` or the only split; ``split=all`` is everything. The
    columns ``image``, ``label`` and ``caption`` of Parquet files are as for ``parquet:``. The revision (default
    ``main``) is resolved to a commit whenever the images are listed.
    """

    scheme = "hf"
    form = "hf://datasets/OWNER/NAME"
    options = ("config", "split", *Parquet.options)
    in_order = True

    def __init__(self, place: str, access: Access, values: Mapping[str, str] = {}) -> None:
        """Parse the place; raises UserError for anything but a data set's name."""
        super().__init__(place, access, values)
        self.name, self.revision = parse_hub_uri(f"hf:{place}", "dataset")

    def find(self) -> tuple[Repository, list[HubFile]]:
        """Resolve the revision and select the files; raises UserError for names that the Hub or data set lacks."""
        repository = Repository.resolve("dataset", self.name, self.revision)
        config, groups = _splits(repository, self.values.get("config"))
        split = self.values.get("split")
        if split is None:
            split = "train" if len(groups) != 1 else next(iter(groups))
            if groups and split not in groups:
                raise UserError(f"{self.uri} has several splits: choose one of {', '.join(groups)} with split=")
        if split == "all" and split not in groups:
            files = {file.path: file for group in groups.values() for file in group}
            return repository, sorted(files.values())
        if groups and split not in groups:
            suffix = f" of configuration {config}" if config else ""
            raise UserError(f"{self.uri}{suffix} has no split {split}: there is {', '.join(groups)}")
        return repository, groups.get(split, [])

    @property
    def uri(self) -> str:
        """The data set's own address, without options."""
        return f"hf://datasets/{self.name}" + (f"@{self.revision}" if self.revision else "")

    def entries(self) -> Iterator[Entry]:
        """Yield all images, file by file; raises UserError for what is missing, damaged or has no images."""
        repository, files = self.find()
        options = "&".join(f"{name}={value}" for name, value in sorted(self.values.items()))
        self.access.about["source"] = f"{repository.uri}?{options}" if options else repository.uri
        if repository.licence is not None:
            self.access.about["licence"] = repository.licence
        columns = self._columns
        tables = [file for file in files if file.path.endswith(".parquet")]
        shards = [file for file in files if file.path.endswith(TARS)]
        if columns and not tables:
            raise UserError(f"{self.uri} has no Parquet files: {', '.join(columns)} name their columns, leave them out")
        if tables or shards:
            for path in prefetch(partial(self._listing, repository), tables or shards, FILES_AT_ONCE):
                with gzip.open(path, "rt", encoding="utf-8") as rows:
                    file = HubFile(*json.loads(next(rows)))
                    for name, location, *texts in map(json.loads, rows):
                        source = f"{self.name}/{make_printable(file.path)}/{name}"
                        place, *masks = (json.dumps([repository.commit, *file, row]) for row in (location, *texts[3:]))
                        mask = json.dumps([masks[0], file.digest]) if masks else None
                        yield Entry(source, place, file.digest, texts[0], texts[1], texts[2], mask)
        else:
            yield from self._images(repository, files)

    def _listing(self, repository: Repository, file: HubFile) -> Path:
        """Return the table of the images in a file, which is fetched unless the table is there already."""
        folder = self.access.listings or self.access.scratch
        # Two files of a data set may have the same content.
        masks = [self.access.config.masks] if self.access.config.masks == "files" else []
        path = folder / f"{digest_of([FORMAT, file, self._columns, *masks])[:32]}.jsonl.gz"
        if path.is_file():
            return path
        local = self._fetch(repository.commit, file)
        address = f"{file.path} of {self.uri}"

        def write(partial: Path) -> None:
            with gzip.open(partial, "wt", encoding="utf-8", compresslevel=3) as lines:
                lines.write(json.dumps(file) + "\n")
                for entry in self._reader(file, local).entries():
                    name = entry.source.removeprefix(f"{local.name}/")
                    _, *location = json.loads(entry.locator)
                    mask = [] if entry.mask is None else [json.loads(json.loads(entry.mask)[0])[1:]]
                    lines.write(json.dumps([name, location, *entry[3:6], *mask]) + "\n")

        try:
            write_atomically(path, write)
        except UserError as error:
            raise UserError(str(error).replace(str(local), address)) from error
        return path

    def _reader(self, file: HubFile, local: Path) -> Source:
        if not file.path.endswith(".parquet"):
            return WebDataset(str(local), self.access)
        return Parquet(str(local), self.access, self._columns)

    @property
    def _columns(self) -> dict[str, str]:
        return {name: self.values[name] for name in Parquet.options if name in self.values}

    def _images(self, repository: Repository, files: Sequence[HubFile]) -> Iterator[Entry]:
        visible_files = [file for file in files if not is_hidden(file.path)]
        tables = [file.path for file in visible_files if posixpath.basename(file.path) in METADATA_FILES]
        images = [file.path for file in visible_files if is_image(file.path)]
        caption_tables = [file.path for file in visible_files if posixpath.basename(file.path) == CAPTION_TABLE]
        if len(tables) > 1 and len({posixpath.dirname(path) for path in tables}) > 1:
            raise UserError(f"{self.uri} has metadata in several folders ({', '.join(tables[:5])}): choose a split")
        if not images:
            extensions = sorted({posixpath.splitext(file.path)[1] or file.path for file in visible_files})
            raise UserError(
                f"no images in {self.uri}: it has {', '.join(extensions[:10]) or 'no files'}, and Parquet, WebDataset "
                "and folders of images are read; download others and give their path"
            )
        root = posixpath.dirname(tables[0]) if tables else _common_folder([*images, *caption_tables])
        prefix = f"{root}/" if root else ""
        members = [file for file in visible_files if file.path.startswith(prefix)]
        rows = (
            (make_printable(file.path.removeprefix(prefix)), json.dumps([repository.commit, *file, None]), file.digest)
            for file in members
        )
        for entry in list_images(rows, f"{self.uri}/{root}", self._table, self.read_texts, self.access):
            yield entry._replace(source=make_printable(f"{self.name}/{prefix}") + entry.source)

    def _table(self, locator: str, _: str) -> TextIO:
        commit, *file, _inside = json.loads(locator)
        if (table := HubFile(*file)).size > MAX_TABLE_BYTES:
            raise UserError(f"{table.path} of {self.uri} has {table.size} bytes, over the limit of {MAX_TABLE_BYTES}")
        return open_text(self._fetch(commit, table))

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield their bytes, files fetched concurrently; raises DarkroomError if the Hub cannot be reached."""
        places = (_Place.from_entry(entry) for entry in entries)
        for is_file, group in groupby(places, key=lambda place: place.inside is None):
            if is_file:
                yield from read_spooled(prefetch(self._image, group, IMAGES_AT_ONCE))
                continue
            for (commit, file), members in groupby(group, key=lambda place: (place.commit, place.file)):
                local = self._fetch(commit, file)
                stamp = stamp_of(local)
                sub_entries = [Entry("", json.dumps([str(local), *(member.inside or ())]), stamp) for member in members]
                yield from self._reader(file, local).read(sub_entries)

    def _image(self, place: "_Place") -> "SpooledTemporaryFile[bytes] | UnusableEntryError":
        if place.problem is not None:
            return UnusableEntryError(place.problem)
        if place.file.size > self.access.config.max_bytes:
            return too_large_error(place.file.size, self.access.config.max_bytes)
        data = SpooledTemporaryFile(IN_MEMORY, dir=str(self.access.scratch))  # noqa: SIM115 (closed by its reader)
        Repository("dataset", self.name, place.commit).fetch(place.file, data)
        return data

    def _fetch(self, commit: str, file: HubFile) -> Path:
        """Return a verified scratch copy of a file; other workers wait for it."""
        path = self.access.scratch / f"hub-{digest_of(file)[:32]}{PurePosixPath(file.path).suffix}"
        with FileLock(path.with_name(f".{path.name}.lock")):
            # Whole if it is there; it need not be hashed for every chunk.
            return path if path.is_file() else Repository("dataset", self.name, commit).download(file, path)


def _common_folder(paths: Sequence[str]) -> str:
    return posixpath.commonpath(map(posixpath.dirname, paths))


class _Place(NamedTuple):
    """Where an image lies."""

    commit: str
    file: HubFile
    inside: list[Any] | None
    """Its place inside the file, as the file's reader has it; None: it is the file."""
    problem: str | None = None
    """Reason why it cannot be read, if any."""

    @classmethod
    def from_entry(cls, entry: Entry) -> Self:
        place = json.loads(entry.locator)
        if isinstance(place, str):
            return cls("", HubFile("", 0, ""), None, place)
        commit, *file, inside = place
        return cls(commit, HubFile(*file), inside)


def _splits(repository: Repository, requested_name: str | None) -> tuple[str | None, dict[str, list[HubFile]]]:
    """Return the name of the configuration, None if there are none, and the files of each of its splits.

    Raises UserError if there is no configuration ``requested_name``, or it is None and there are several.
    """
    files = [file for path, file in repository.files.items() if not is_hidden(path)]
    configs = {
        str(entry["config_name"]): entry
        for entry in repository.card.get("configs") or ()
        if isinstance(entry, dict) and "config_name" in entry
    }
    if not configs:
        if requested_name is not None:
            # The layout of the branch refs/convert/parquet.
            folders = sorted({file.path.partition("/")[0] for file in files if "/" in file.path})
            if requested_name not in folders:
                alternatives = f"there is {', '.join(folders[:20])}" if folders else "it has none"
                raise UserError(f"{repository.uri} has no configuration {requested_name}: {alternatives}")
            files = [file for file in files if file.path.startswith(f"{requested_name}/")]
        return requested_name, _by_name(files)
    if requested_name is not None and requested_name not in configs:
        raise UserError(f"{repository.uri} has no configuration {requested_name}: there is {', '.join(configs)}")
    default = next((name for name, entry in configs.items() if entry.get("default")), None)
    config_name = requested_name or default or ("default" if "default" in configs else None)
    if config_name is None:
        if len(configs) > 1:
            raise UserError(
                f"{repository.uri} has several configurations: choose one of {', '.join(configs)} with config="
            )
        (config_name,) = configs
    config = configs[config_name]
    folder = str(config.get("data_dir") or "").strip("/")
    files = [file for file in files if not folder or file.path.startswith(f"{folder}/")]
    if (data_files := config.get("data_files")) is None:
        return config_name, _by_name(files)
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    elif not (isinstance(data_files, list) and all(isinstance(entry, dict) for entry in data_files)):
        data_files = [{"split": "train", "path": data_files}]
    groups: dict[str, list[HubFile]] = {}
    for entry in data_files:
        patterns = entry.get("path") or ()
        group = groups.setdefault(str(entry.get("split", "train")), [])
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            full_pattern = f"{folder}/{pattern}" if folder else str(pattern)
            names = expand_braces(full_pattern.removeprefix("./"))
            group += [file for file in files if any(_matches(name, file.path) for name in names) and file not in group]
    return config_name, groups


def _matches(pattern: str, path: str) -> bool:
    """Whether a glob, in which ``**`` alone crosses folders, is for all of ``path``; without backtracking."""
    ends = {0}  # of what the signs so far may be for
    for sign in re.split(r"(\*\*/|\*\*|\*|\?)", pattern):
        match sign:
            case "**":
                ends = set(range(min(ends), len(path) + 1))
            case "**/":
                ends |= {place + 1 for place in range(min(ends), len(path)) if path[place] == "/"}
            case "*":
                ends = {place for end in ends for place in range(end, path.find("/", end) + 1 or len(path) + 1)}
            case "?":
                ends = {end + 1 for end in ends if path[end : end + 1] not in ("", "/")}
            case _:
                ends = {end + len(sign) for end in ends if path.startswith(sign, end)}
        if not ends:
            return False
    return len(path) in ends


def _by_name(files: Sequence[HubFile]) -> dict[str, list[HubFile]]:
    """Group files by the split that their folders or names tell; all are ``train`` if none does."""
    groups: dict[str, list[HubFile]] = {}
    for file in files:
        if (split := _split_of(file.path)) is not None:
            groups.setdefault(split, []).append(file)
    return {split: groups[split] for split in dict.fromkeys((*SPLITS, *groups)) if split in groups} or {
        "train": [*files]
    }


def _split_of(path: str) -> str | None:
    *folders, name = path.split("/")
    if match := NUMBERED.fullmatch(name):
        return match["split"]
    # The names of single images and tables tell none.
    for part in [*folders, *([name] if name.endswith((".parquet", *TARS)) else [])]:
        words = re.split(r"[^a-z]+", part.lower())
        if split := next((split for split, aliases in SPLITS.items() if set(aliases) & set(words)), None):
            return split
    return None
