"""Tables of the lists of a data set: which images to drop or to relabel, by key and by the digest of their file."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion.common.errors import ConflictError
from diffusion.common.files import sha256_bytes, write_bytes
from diffusion.data.manifest import FileEntry, ImageList, Manifest, find_intact

SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "source_sha256", "text")])


@dataclass(frozen=True)
class ListedImages:
    """A list with its images: for each key the digest of its file as it came, and the reason or the label."""

    about: ImageList
    images: Mapping[str, tuple[str, str]]
    data: bytes
    """Bytes of the table."""

    @classmethod
    def make(
        cls,
        name: str,
        kind: Literal["drop", "label"],
        date: str,
        unmatched: int,
        images: Mapping[str, tuple[str, str]],
    ) -> "ListedImages":
        """Make a list; equal images give an equal table."""
        rows = [dict(zip(SCHEMA.names, (key, *images[key]), strict=True)) for key in sorted(images)]
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), buffer := io.BytesIO(), compression="zstd")
        data = buffer.getvalue()
        table = FileEntry(
            name=f"records/list-{sha256_bytes(data)[:16]}.parquet", sha256=sha256_bytes(data), bytes=len(data)
        )
        about = ImageList(name=name, kind=kind, table=table, date=date, images=len(rows), unmatched=unmatched)
        return cls(about, images, data)

    def texts(self) -> dict[str, str]:
        """Return reason or label by key, and by digest: after a rebuild the same file may have another key."""
        by_digest = {digest: text for digest, text in self.images.values() if digest}
        return by_digest | {key: text for key, (_, text) in self.images.items()}

    def write(self, folder: Path) -> None:
        """Write the table into the data set in ``folder``."""
        write_bytes(folder / self.about.table.name, self.data)


def read_list(folder: Path, about: ImageList) -> ListedImages:
    """Read a list of the data set in ``folder``; raises UserError if its table is missing or damaged."""
    data = find_intact(folder, about.table).read_bytes()
    columns = pq.read_table(io.BytesIO(data), schema=SCHEMA).to_pydict().values()
    return ListedImages(about, {key: (digest, text) for key, digest, text in zip(*columns, strict=True)}, data)


def read_lists(folder: Path, manifest: Manifest) -> list[ListedImages]:
    """Read the lists of a version in ``folder``, in their order; raises UserError as ``read_list`` does."""
    return [read_list(folder, about) for about in manifest.lists or ()]


def forget_images(
    folder: Path, lists: Iterable[ImageList] | None, is_removed: Callable[[str, str], bool]
) -> list[ImageList] | None:
    """Write ``lists`` without the images whose key and digest ``is_removed`` accepts, where any has one; returns all.

    What a takedown left of a list counts as the list that was recorded.
    """
    remaining = []
    for about in lists or ():
        before = read_list(folder, about)
        images = {key: image for key, image in before.images.items() if not is_removed(key, image[0])}
        if len(images) < len(before.images):
            after = ListedImages.make(about.name, about.kind, about.date, about.unmatched, images)
            after.write(folder)
            about = after.about.model_copy(update={"recorded": about.recorded or about.table.sha256})
        remaining.append(about)
    return remaining or None


def unite_lists(
    dataset: str,
    remote_lists: Sequence[ImageList] | None,
    local_lists: Sequence[ImageList] | None,
    base_lists: Sequence[ImageList] | None,
) -> list[ImageList]:
    """Return the remote lists of ``dataset`` with what was recorded and withdrawn here since the common ancestor's.

    Of a list that one side changed and the other withdrew, the change counts. Raises ConflictError if both recorded
    different lists under one name.
    """
    sides = [{each.name: each for each in lists or ()} for lists in (remote_lists, local_lists, base_lists)]
    united = []
    for name in dict.fromkeys((*sides[0], *sides[1])):
        remote, local, base = (side.get(name) for side in sides)
        remote_id, local_id, base_id = (each and each.identity for each in (remote, local, base))
        if local_id == base_id:
            united.append(remote)
        elif remote_id in (base_id, None):
            united.append(local)
        elif local_id in (remote_id, None):
            united.append(remote)
        else:
            raise ConflictError(
                f"another process recorded another list {name}: `darkroom data curate --withdraw {name} --local "
                f"--dataset {dataset}` withdraws the one here; to apply both, record it with another --name then"
            )
    return list(filter(None, united))
