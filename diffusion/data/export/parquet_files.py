"""Parquet files as Hugging Face's ``datasets`` writes them, whose viewer and loaders know the types of the columns."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion.data.export.base import ExportFormat, Node, Row, field, path_source, split_field, write_files
from diffusion.data.manifest import Split
from diffusion.data.sources.mask_files import MASK_COLUMN

ROWS_AT_ONCE = 100
"""Rows of a row group, of which a reader holds all at once."""
ROWS_PER_PAGE = 16
"""Rows between which a page may end: a reader holds a page at once, too."""


class ParquetFiles(ExportFormat):
    """Columns ``image`` ({bytes, path}), and ``label``, ``text`` and ``mask`` if images have them."""

    name = "parquet"
    scheme = "parquet:"

    @property
    def schema(self) -> pa.Schema:
        """Return the columns, with the features by which ``datasets`` reads them."""
        classes, features = self.manifest.labels, {"image": {"_type": "Image"}}
        fields = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
        if classes:
            fields.append(("label", pa.int64()))
            features["label"] = {"names": classes, "_type": "ClassLabel"}  # type: ignore[dict-item]
        if self.rows.has_captions:
            fields.append(("text", pa.string()))
            features["text"] = {"dtype": "string", "_type": "Value"}
        if self.manifest.masks:
            fields.append((MASK_COLUMN, fields[0][1]))
            features[MASK_COLUMN] = features["image"]
        return pa.schema(fields, {b"huggingface": json.dumps({"info": {"features": features}}).encode()})

    def write(self, folder: Path, split: Split) -> Iterator[int]:
        """Write the files."""
        schema, numbers = self.schema, {name: number for number, name in enumerate(self.manifest.labels)}

        def write(path: Path, rows: Sequence[Row]) -> None:
            # Images are compressed already, and in a dictionary they would lie in memory together.
            with pq.ParquetWriter(
                path, schema, compression="none", use_dictionary=False, write_batch_size=ROWS_PER_PAGE
            ) as writer:
                for start in range(0, len(rows), ROWS_AT_ONCE):
                    records = [
                        {
                            "image": {"bytes": bytes(png), "path": f"{row.key}.png"},
                            "label": None if row.label is None else numbers[row.label],
                            "text": row.caption,
                            MASK_COLUMN: {"bytes": bytes(mask), "path": f"{row.key}.mask.png"} if mask else None,
                        }
                        for row, png, mask in self.rows.read(rows[start : start + ROWS_AT_ONCE])
                    ]
                    writer.write_table(pa.Table.from_pylist(records, schema))

        def name(number: int, count: int) -> Path:
            return folder / "data" / f"{self.splits[split]}-{number:05d}-of-{count:05d}.parquet"

        return write_files(self.rows, split, name, write)

    def patterns(self) -> dict[str, str]:
        """Return the files of each split."""
        return {name: f"data/{name}-*" for name in self.splits.values()}

    def croissant(self, digests: dict[str, str]) -> tuple[list[Node], list[Node]]:
        """Describe the files, and their columns."""
        files = "parquet-files"
        distribution = [
            {
                "@type": "cr:FileSet",
                "@id": files,
                "encodingFormat": "application/x-parquet",
                "includes": ["data/*.parquet"],
            }
        ]

        def column(name: str, **more: Node) -> Node:
            return {"fileSet": {"@id": files}, "extract": {"column": name}, **more}

        fields = [
            field("image", "sc:ImageObject", column("image", transform={"jsonPath": "bytes"}), "The image."),
            split_field(path_source(files, r"^.*?([a-z]+)-\d+-of-\d+\.parquet$")),
        ]
        if self.manifest.labels:
            names = ", ".join(f"{number}: {name}" for number, name in enumerate(self.manifest.labels))
            fields.append(field("label", "sc:Integer", column("label"), f"Class of the image, {names}."[:5000]))
        if self.rows.has_captions:
            fields.append(field("text", "sc:Text", column("text"), "Caption of the image."))
        if self.manifest.masks:
            place = column(MASK_COLUMN, transform={"jsonPath": "bytes"})
            fields.append(field(MASK_COLUMN, "sc:ImageObject", place, "Weight of each pixel, in grey; null: all 1."))
        return distribution, fields
