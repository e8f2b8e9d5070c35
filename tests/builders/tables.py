"""Parts of data sets that have tables but no images."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from diffusion.data.ingest.config import StorageConfig
from diffusion.data.ingest.merge import write_part
from diffusion.data.manifest import RECORDS, STORED, Manifest, Part

Row = dict[str, Any]


def row_of(number: int, outcome: str = "kept", **fields: object) -> Row:
    """A record of the image with this number, or of a quarantined file."""
    row = dict.fromkeys(RECORDS.names) | {
        "source": f"{number}.png",
        "source_sha256": hashlib.sha256(f"file {number}".encode()).hexdigest(),
        "outcome": outcome,
        "mode": "L",
        "total": [1],
        "squares": [1],
    }
    key = None if outcome == "quarantined" else hashlib.sha256(str(number).encode()).hexdigest()
    split = ("held_out" if number % 3 == 0 else "train") if outcome in STORED else None
    return row | {"key": key, "split": split} | fields


def rows(outcomes: Sequence[str] = ("kept", "dropped", "duplicate", "quarantined")) -> st.SearchStrategy[Row]:
    """Records of few images with few texts, some of which JSON escapes."""
    texts = st.none() | st.sampled_from(["", "a", 'a "b"', "\\", "two\nlines", "\0\x0b\x1f\x7f/ü😀"])
    return st.builds(
        row_of,
        st.integers(0, 9),
        st.sampled_from(outcomes),
        label=texts,
        caption=texts,
        mask=st.sampled_from([None, "f0"]),
    )


def write_parts(folder: Path, parts: Iterable[Sequence[Row]]) -> list[Part]:
    """Write a part without a shard for each sequence of records."""
    return [write_part(folder, number, None, [*part], 8) for number, part in enumerate(parts)]


def manifest_of(parts: Sequence[Part]) -> Manifest:
    """A version of these parts."""
    fields = {"name": "set", "parent": None, "change": "ingest", "content_digest": "", "storage": StorageConfig(size=8)}
    return Manifest.model_validate(fields | {"parts": parts})
