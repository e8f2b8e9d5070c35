"""A folder of images, by the conventions of Hugging Face's ImageFolder."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from diffusion.common.errors import UserError
from diffusion.data.sources.base import Access, Entry, Payload
from diffusion.data.sources.conventions import METADATA_FILES, both_tables, described, list_images, printable
from diffusion.data.sources.local_files import open_text, read_file, stamp_if_there


@dataclass(frozen=True)
class Folder:
    """The images below ``root``, as ``list_images`` finds them. Links are followed."""

    root: Path
    access: Access
    in_order = False

    def entries(self) -> Iterator[Entry]:
        """Yield all images in the folder's order; raises UserError for unreadable metadata."""
        tables = [self.root / name for name in METADATA_FILES if (self.root / name).is_file()]
        if len(tables) > 1:
            raise both_tables(str(self.root))
        if tables:
            with open_text(tables[0]) as lines:
                for name, label, caption in described(lines, str(tables[0])):
                    yield Entry(name, json.dumps(name), stamp_if_there(self.root / name), label, caption)
        else:
            yield from list_images(self._files(), str(self.root), self._table, self.access.passed_over)

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield their bytes."""
        for entry in entries:
            yield read_file(self.root / json.loads(entry.locator), self.access.config.max_bytes)

    def _table(self, locator: str, _: str) -> AbstractContextManager[TextIO]:
        return open_text(self.root / json.loads(locator))

    def _files(self) -> Iterator[tuple[str, str, str]]:
        for name in _walk(str(self.root), "", (_real(self.root),)):
            yield printable(name), json.dumps(name), stamp_if_there(self.root / name)


def _walk(folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    """Yield the relative names of the visible files below ``folder``, each file once, however links lead to it.

    ``above``: the real paths of the folders that lead to it, from the root to itself.
    """
    try:
        children = os.scandir(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): mend its permissions or take it away") from error
    with children:
        for child in children:
            name, is_folder = f"{prefix}{child.name}", False
            if child.name.startswith("."):
                continue
            with suppress(OSError):  # a link to itself, say
                is_folder = child.is_dir()
            if not is_folder:
                yield name
                continue
            real, top = _real(child.path) if child.is_symlink() else f"{above[-1]}/{child.name}", above[0]
            # A folder that a walk from the root reaches without following links is read there.
            elsewhere = real != f"{top}/{name}" and real.startswith(f"{top}/") and "/." not in real[len(top) :]
            if real not in above and not elsewhere:
                yield from _walk(child.path, f"{name}/", (*above, real))


def _real(path: Path | str) -> str:
    return os.path.realpath(path).rstrip("/")
