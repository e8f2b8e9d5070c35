"""Hugging Face's ImageFolder: a folder of PNGs for each split, with a ``metadata.jsonl``."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from diffusion.common.files import canonical_json, make_folder, write_bytes
from diffusion.data.export.base import ExportFormat, Node, field, path_source, split_field
from diffusion.data.manifest import Split

METADATA = "metadata.jsonl"
AT_ONCE = 256
"""Images between two reports of progress."""


class ImageFolder(ExportFormat):
    """PNGs as they are stored, named by their keys; ``metadata.jsonl`` has ``file_name``, ``label`` and ``text``.

    Masks are ``KEY.mask.png``.
    """

    name = "imagefolder"
    scheme = ""

    def write(self, folder: Path, split: Split) -> Iterator[int]:
        """Write the images, and then their metadata."""
        root, lines = folder / self.splits[split], list[str]()
        unfinished, remaining = root / ".unfinished.png", self.rows.of(split)
        make_folder(root)
        while rows := list(islice(remaining, AT_ONCE)):
            for row, *pngs in self.rows.read(rows):
                path = root / f"{row.key}.png"
                for file, png in zip((path, path.with_suffix(".mask.png")), pngs, strict=True):
                    # After a power failure a file may be there without its content.
                    if png and (not file.is_file() or file.read_bytes() != png):
                        unfinished.write_bytes(png)
                        unfinished.replace(file)
                texts = {"label": row.label, "text": row.caption}
                lines.append(
                    canonical_json({"file_name": path.name} | {k: v for k, v in texts.items() if v is not None})
                )
            yield len(rows)
        unfinished.unlink(missing_ok=True)
        write_bytes(root / METADATA, "".join(f"{line}\n" for line in lines).encode())

    def patterns(self) -> dict[str, str]:
        """Return the folder of each split."""
        return {name: f"{name}/**" for name in self.splits.values()}

    def croissant(self, digests: dict[str, str]) -> tuple[list[Node], list[Node]]:
        """Describe images, and their metadata as another table, which their file names join."""
        names = "|".join(self.splits.values())
        distribution = [
            {
                "@type": "cr:FileSet",
                "@id": "image-files",
                "encodingFormat": "image/png",
                "includes": [f"{name}/{self.images}" for name in self.splits.values()],
            },
            {
                "@type": "cr:FileSet",
                "@id": "metadata-files",
                "encodingFormat": "application/jsonlines",
                "includes": [f"{name}/{METADATA}" for name in self.splits.values()],
            },
        ]

        def column(name: str) -> Node:
            return {"fileSet": {"@id": "metadata-files"}, "extract": {"column": name}}

        def image(name: str) -> Node:
            return {"fileSet": {"@id": "image-files"}, "extract": {"fileProperty": name}}

        fields = [
            field("file_name", "sc:Text", image("filename"), "Name of the file.", references=column("file_name")),
            field("image", "sc:ImageObject", image("content"), "The image."),
            split_field(path_source("image-files", rf"^.*?({names})/[^/]+$")),
        ]
        if self.manifest.class_histogram:
            fields.append(field("label", "sc:Text", column("label"), "Class of the image."))
        if self.rows.has_captions:
            fields.append(field("text", "sc:Text", column("text"), "Caption of the image."))
        return distribution, fields
