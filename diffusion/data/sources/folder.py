"""A folder of images, by the conventions of Hugging Face's ImageFolder."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from diffusion.common.errors import UserError
from diffusion.data.sources.base import Access, Entry, Payload
from diffusion.data.sources.conventions import (
    METADATA_FILES,
    described,
    extension,
    folder_label,
    is_image,
    records,
    sane,
)
from diffusion.data.sources.local_files import open_text, read_file, stamp, stamp_if_there


@dataclass(frozen=True)
class Folder:
    """The images below ``root``.

    With a ``metadata.csv`` or ``metadata.jsonl`` in ``root``, exactly the files that it names
    (``file_name``, and optionally ``label`` and ``text`` or ``caption``). Without one, every file with
    an image's extension that is not hidden; its label is the name of its folder if the set has
    several such folders and none of its images lies in ``root``. Links are followed.
    """

    root: Path
    access: Access
    in_order = False

    def entries(self) -> Iterator[Entry]:
        """Yield all images in the folder's order; raises UserError for unreadable metadata."""
        found = [name for name in METADATA_FILES if (self.root / name).is_file()]
        if len(found) > 1:
            raise UserError(f"{self.root} has both {' and '.join(METADATA_FILES)}: keep one of them")
        return self._described(self.root / found[0]) if found else self._walked()

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield their bytes."""
        for entry in entries:
            yield read_file(self.root / json.loads(entry.locator), self.access.config.max_bytes)

    def _walked(self) -> Iterator[Entry]:
        labelled = _is_labelled(self.root)
        for name, file in _walk(self.root, self.access.passed_over):
            label = sane(folder_label(name)) if labelled else None
            try:
                known = stamp(file.stat())
            except OSError:  # a broken link, or deleted meanwhile: reading reports it
                known = ""
            yield Entry(sane(name), json.dumps(name), known, label)

    def _described(self, metadata: Path) -> Iterator[Entry]:
        with open_text(metadata) as lines:
            for each in described(records(lines, metadata.name, str(metadata)), str(metadata)):
                known = stamp_if_there(self.root / each.name)
                yield Entry(each.name, json.dumps(each.name), known, each.label, each.caption)


def _is_labelled(root: Path) -> bool:
    """Return whether the images are in several folders, and none in ``root``; stops as early as possible."""
    with _scanned(root) as children:
        if any(is_image(child.name) and not _is_folder(child) for child in children):
            return False
    folders = set()
    for name, _ in _walk(root, Counter()):
        folders.add(name.rpartition("/")[0])
        if len(folders) > 1:
            return True
    return False


def _walk(root: Path, passed_over: Counter[str]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield the relative names of the images below ``root``, each file once, however links lead to it.

    Counts the extensions of other files in ``passed_over``.
    """
    top = _real(root)

    def walk(folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[tuple[str, os.DirEntry[str]]]:
        with _scanned(folder) as children:
            for child in children:
                name = f"{prefix}{child.name}"
                if child.name.startswith("."):
                    continue
                if not _is_folder(child):
                    if is_image(child.name):
                        yield name, child
                    else:
                        passed_over[extension(child.name)] += 1
                    continue
                real = _real(child.path) if child.is_symlink() else f"{above[-1]}/{child.name}"
                if real in above or (real != f"{top}/{name}" and _is_visible(real, top)):
                    continue
                yield from walk(child.path, f"{name}/", (*above, real))

    return walk(str(root), "", (top,))


def _real(path: Path | str) -> str:
    return os.path.realpath(path).rstrip("/")


def _is_visible(path: str, top: str) -> bool:
    """Return whether a walk from ``top`` reaches ``path`` without following links."""
    return path.startswith(f"{top}/") and "/." not in path[len(top) :]


def _is_folder(child: os.DirEntry[str]) -> bool:
    try:
        return child.is_dir()
    except OSError:  # a link to itself, say
        return False


def _scanned(folder: Path | str) -> AbstractContextManager[Iterator[os.DirEntry[str]]]:
    try:
        return os.scandir(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): mend its permissions or take it away") from error
