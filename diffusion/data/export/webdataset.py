"""WebDataset: tars whose members of one key are a sample."""

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffusion.common.files import canonical_json, write_bytes
from diffusion.data.export.base import ExportFormat, Node, Row, field, split_field, write_files
from diffusion.data.manifest import Split


class WebDatasetShards(ExportFormat):
    """Members ``KEY.png``, ``KEY.json`` (``label``, ``caption``), ``KEY.txt``, the caption, and ``KEY.mask.png``."""

    name = "webdataset"
    scheme = "wds:"

    def write(self, folder: Path, split: Split) -> Iterator[int]:
        """Write the shards, and then a table of what is in them."""
        name = self.splits[split]

        def write(path: Path, rows: Sequence[Row]) -> None:
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for row, png, mask in self.rows.read(rows):
                    _add(tar, f"{row.key}.png", bytes(png))
                    if mask:
                        _add(tar, f"{row.key}.mask.png", bytes(mask))
                    _add(tar, f"{row.key}.json", canonical_json(_texts(row)).encode())
                    if row.caption is not None:
                        _add(tar, f"{row.key}.txt", row.caption.encode())

        def shard(number: int, count: int) -> Path:
            return folder / f"{name}-{number:05d}-of-{count:05d}.tar"

        yield from write_files(self.rows, split, shard, write)
        lines = (canonical_json({"key": row.key, "split": name} | _texts(row)) for row in self.rows.of(split))
        write_bytes(folder / f"{name}-metadata.jsonl", "".join(f"{line}\n" for line in lines).encode())

    def patterns(self) -> dict[str, str]:
        """Return the shards of each split."""
        return {name: f"{name}-*.tar" for name in self.splits.values()}

    def croissant(self, digests: dict[str, str]) -> tuple[list[Node], list[Node]]:
        """Describe the shards, and their members, which keys join."""
        shards = [name for name in sorted(digests) if name.endswith(".tar")]
        distribution: list[Node] = [
            {
                "@type": "cr:FileObject",
                "@id": name,
                "contentUrl": name,
                "encodingFormat": "application/x-tar",
                "sha256": digests[name],
            }
            for name in shards
        ]
        distribution += [
            {
                "@type": "cr:FileSet",
                "@id": "image-files",
                "containedIn": [{"@id": name} for name in shards],
                "encodingFormat": "image/png",
                "includes": [self.images],
            },
            {
                "@type": "cr:FileSet",
                "@id": "metadata-files",
                "encodingFormat": "application/jsonlines",
                "includes": ["*-metadata.jsonl"],
            },
        ]

        def image(name: str, **more: Node) -> Node:
            return {"fileSet": {"@id": "image-files"}, "extract": {"fileProperty": name}, **more}

        def column(name: str) -> Node:
            return {"fileSet": {"@id": "metadata-files"}, "extract": {"column": name}}

        key = image("filename", transform={"regex": r"^.*?([0-9a-f]{64})(?:\.\w+)?$"})
        fields = [
            field("key", "sc:Text", key, "SHA-256 of the pixels.", references=column("key")),
            field("image", "sc:ImageObject", image("content"), "The image."),
            split_field(column("split")),
        ]
        if self.manifest.labels:
            fields.append(field("label", "sc:Text", column("label"), "Class of the image."))
        if self.rows.has_captions:
            fields.append(field("text", "sc:Text", column("caption"), "Caption of the image."))
        return distribution, fields


def _texts(row: Row) -> dict[str, str]:
    return {name: text for name in ("label", "caption") if (text := getattr(row, name)) is not None}


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
