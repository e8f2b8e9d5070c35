"""What the records of a data set tell, read part by part: memory grows with what is odd in the set only."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffusion.data.manifest import Manifest, Split, read_records
from diffusion.data.refusals import Refusal, standing
from diffusion.progress import Progress, silent

BINS = 32
"""Of every histogram."""
COPIED = 6
"""Pictures told of that came more than once."""
REFUSALS = 500
"""Refused entries told of one by one."""
SOURCES = 2
"""Names given as examples."""
LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""
COLUMNS = (
    "source",
    "outcome",
    "reason",
    "key",
    "split",
    "caption",
    "mode",
    "width",
    "height",
    "total",
    "squares",
    "phash",
    "near",
)
VARIABLE = re.compile(r"\S*[/\\]\S*|0x[0-9a-f]+|\b[0-9a-f]{8,}\b|\d+(?:[.,]\d+)*", re.IGNORECASE)
"""What tells two refusals for the same reason apart: paths, digests and numbers."""


@dataclass
class Tones:
    """How one figure of every picture, from 0 to ``high``, is spread in each split."""

    name: str
    high: float
    histograms: dict[Split, np.ndarray] = field(default_factory=dict)
    """(BINS,) int64: pictures in each of BINS equal steps."""
    sums: dict[Split, float] = field(default_factory=dict)

    def add(self, split: Split, values: np.ndarray) -> None:
        """Count ``values``, (n,)."""
        found, _ = np.histogram(values, BINS, (0, self.high))
        self.histograms[split] = self.histograms.get(split, np.zeros(BINS, np.int64)) + found
        self.sums[split] = self.sums.get(split, 0.0) + float(values.sum())

    def mean(self, split: Split) -> float | None:
        """Mean over the pictures of ``split``; None if it has none."""
        counted = int(self.histograms[split].sum()) if split in self.histograms else 0
        return self.sums[split] / counted if counted else None


@dataclass(frozen=True)
class Copied:
    """A kept picture that came more than once."""

    key: str
    copies: int
    """How often its pixels came again."""
    source: str
    """Where the kept one came from."""
    others: tuple[str, ...]
    """Where the first few copies came from."""


@dataclass(frozen=True)
class Reason:
    """A kind of reason for which entries were refused."""

    kind: str
    count: int
    sources: tuple[str, ...]
    """Some of them."""


@dataclass
class Survey:
    """What the records of one version tell."""

    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Kept pictures by width and height as they came."""
    captioned: int = 0
    """Kept pictures that have a caption."""
    tones: list[Tones] = field(default_factory=list)
    """Of the kept pictures as stored."""
    copied: list[Copied] = field(default_factory=list)
    """The pictures that came most often."""
    contradicted: int = 0
    """Duplicates with another label or caption than the picture that is kept."""
    hashed: int = 0
    """Kept pictures that were compared with those before them to find near-copies."""
    groups: list[list[str]] = field(default_factory=list)
    """Keys of kept near-copies of one another, two and more, largest group first."""
    refused: int = 0
    """Entries that stand refused."""
    refusals: list[Refusal] = field(default_factory=list)
    """The first of them, by name."""
    reasons: list[Reason] = field(default_factory=list)
    """Why they were refused, most frequent first."""


def kind_of(reason: str) -> str:
    """``reason`` with an ellipsis for every path, digest and number."""
    return VARIABLE.sub("…", reason)


def survey(folder: Path, manifest: Manifest, progress: Progress = silent) -> Survey:
    """Read the records of ``manifest``, a version of the data set in ``folder``.

    Raises UserError if a table is missing or damaged.
    """
    names = ("brightness", "contrast") + (("red", "green", "blue") if manifest.channels == 3 else ())
    found = Survey(tones=[Tones(name, 128.0 if name == "contrast" else 256.0) for name in names])
    copies: list[pa.ChunkedArray] = []
    edges: list[tuple[pa.Array, pa.Array]] = []
    for number, part in enumerate(manifest.parts):
        progress("records read", number, len(manifest.parts))
        table = read_records(folder, part, COLUMNS).combine_chunks()
        duplicates = table.filter(pc.field("outcome") == "duplicate")
        copies.append(duplicates["key"])
        found.contradicted += len(duplicates) - duplicates["reason"].null_count
        kept = table.filter(pc.field("outcome") == "kept").combine_chunks()
        if kept.num_rows:
            found.sizes.update(_sizes(kept))
            found.captioned += pc.sum(pc.greater(pc.utf8_length(kept["caption"]), 0)).as_py() or 0
            found.hashed += len(kept) - kept["phash"].null_count
            _add_tones(found.tones, kept, manifest.size**2)
            edges.append(_edges(kept))
    found.copied = _copied(folder, manifest, copies)
    found.groups = _groups(folder, manifest, edges)
    _add_refusals(found, folder, manifest)
    progress("records read", len(manifest.parts), len(manifest.parts))
    return found


def _sizes(kept: pa.Table) -> dict[tuple[int, int], int]:
    counted = kept.group_by(["width", "height"]).aggregate([([], "count_all")])
    columns = (counted[name].to_pylist() for name in ("width", "height", "count_all"))
    return {(width, height): count for width, height, count in zip(*columns, strict=True)}


def _add_tones(tones: Sequence[Tones], kept: pa.Table, pixels: int) -> None:
    mean, squares = (_per_channel(kept, name) / pixels for name in ("total", "squares"))
    contrast = np.sqrt(np.maximum(squares - mean**2, 0).mean(1))
    values = np.column_stack([mean @ LUMA, contrast, mean])
    splits = kept["split"].to_numpy()
    for split in ("train", "held_out"):
        for each, column in zip(tones, values[splits == split].T, strict=False):
            each.add(split, column)


def _per_channel(kept: pa.Table, name: str) -> np.ndarray:
    """A column of sums as (rows, 3) float64; those of grey pictures count for all three channels."""
    sums = np.empty((kept.num_rows, 3))
    for mode, channels in (("L", 1), ("RGB", 3)):
        chosen = pc.equal(kept["mode"], mode)
        values = pc.list_flatten(kept[name].filter(chosen)).to_numpy()
        sums[chosen.to_numpy()] = values.reshape(-1, channels)
    return sums


def _add_refusals(found: Survey, folder: Path, manifest: Manifest) -> None:
    (quarantine,) = standing([manifest], lambda part, columns: read_records(folder, part, columns), REFUSALS)
    assert quarantine is not None  # no table is missed in silence
    counts: Counter[str] = Counter()
    for reason in quarantine.reasons:
        counts[kind_of(reason.reason)] += reason.count
    sources: dict[str, list[str]] = {}
    for refusal in quarantine.samples:
        sources.setdefault(kind_of(refusal.reason), []).append(refusal.source)
    found.refused, found.refusals = quarantine.count, quarantine.samples
    found.reasons = [
        Reason(kind, count, tuple(sources.get(kind, ())[:SOURCES]))
        for kind, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    ]


def _copied(folder: Path, manifest: Manifest, copies: list[pa.ChunkedArray]) -> list[Copied]:
    counted = pc.value_counts(pa.chunked_array([chunk for each in copies for chunk in each.chunks], pa.string()))
    table = pa.table({"key": counted.field("values"), "count": counted.field("counts")})
    if not table.num_rows:
        return []
    leading = table.sort_by([("count", "descending"), ("key", "ascending")]).slice(0, COPIED).to_pylist()
    sources: dict[str, list[str]] = {row["key"]: [] for row in leading}
    kept: dict[str, str] = {}
    for part in manifest.parts:
        if part.outcomes.get("kept") or part.outcomes.get("duplicate"):
            rows = read_records(folder, part, ("source", "outcome", "key"))
            for row in rows.filter(pc.is_in(rows["key"], pa.array(list(sources)))).to_pylist():
                if row["outcome"] == "kept":
                    kept[row["key"]] = row["source"]
                elif row["outcome"] == "duplicate" and len(sources[row["key"]]) < SOURCES:
                    sources[row["key"]].append(row["source"])
    return [
        Copied(row["key"], row["count"], kept[row["key"]], tuple(sources[row["key"]]))
        for row in leading
        if row["key"] in kept
    ]


def _edges(kept: pa.Table) -> tuple[pa.Array, pa.Array]:
    """Pairs of keys that belong to one group, as two columns: each kept picture, and each group that it joined."""
    joined = kept.filter(pc.greater(pc.list_value_length(kept["near"]), 0)).combine_chunks()
    near = joined["near"].combine_chunks() if joined.num_rows else pa.array([], pa.list_(pa.string()))
    keys = joined["key"].combine_chunks() if joined.num_rows else pa.array([], pa.string())
    return keys.take(pc.list_parent_indices(near)), pc.list_flatten(near)


def _groups(folder: Path, manifest: Manifest, edges: Sequence[tuple[pa.Array, pa.Array]]) -> list[list[str]]:
    """The connected components, less what is no longer kept."""
    firsts, seconds = ([pair[side] for pair in edges] for side in (0, 1))
    names = pa.chunked_array([*firsts, *seconds], pa.string()).combine_chunks().dictionary_encode()
    if not len(names):
        return []
    codes = names.indices.to_pylist()
    root = list(range(len(names.dictionary)))

    def find(node: int) -> int:
        while root[node] != node:
            root[node] = root[root[node]]
            node = root[node]
        return node

    half = len(codes) // 2
    for one, other in zip(codes[:half], codes[half:], strict=True):
        root[find(one)] = find(other)
    members: dict[int, list[str]] = {}
    for part in manifest.parts:
        rows = read_records(folder, part, ("key", "outcome")).filter(pc.field("outcome") == "kept")
        places = pc.index_in(rows["key"], names.dictionary).drop_null().to_pylist()
        for node in places:
            members.setdefault(find(node), []).append(names.dictionary[node].as_py())
    groups = [sorted(keys) for keys in members.values() if len(keys) > 1]
    return sorted(groups, key=lambda keys: (-len(keys), keys[0]))
