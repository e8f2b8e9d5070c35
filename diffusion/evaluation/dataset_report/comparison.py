"""The pictures that the current version of a data set adds, beside those of its parent."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from diffusion.data.dataset import Dataset
from diffusion.data.manifest import Manifest, Outcome, Part, read_records
from diffusion.data.versions import unshared
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.dataset_report.drift import Drift, drift
from diffusion.evaluation.dataset_report.gallery import PER_CLASS, Plate, pieces, sheet, thumbnails
from diffusion.evaluation.features import Extractor, make_extractor
from diffusion.evaluation.pages import counted, signed
from diffusion.progress import Progress, silent
from diffusion.random import permutation

MOST = 1000
"""Pictures compared on each side."""
FEWEST = 50
"""Pictures without which nothing is said."""
SHOWN = 2 * PER_CLASS


@dataclass(frozen=True)
class Comparison:
    """What is new in a version, and whether it looks like what was there."""

    verdict: str
    """In words no stronger than the figures allow."""
    added: int | None = None
    """Pictures that the parent lacks; None: there is no parent, or it is no longer here."""
    drift: Drift | None = None
    """None: too little to compare."""
    chances: np.ndarray | None = None
    """The KID of every random division of the pictures compared, (divisions,)."""
    newcomers: Plate | None = None
    """Some of the pictures added."""
    residents: Plate | None = None
    """Some that the parent had."""
    strangers: Plate | None = None
    """Those of the compared newcomers that are least like any of the compared residents."""


@dataclass(frozen=True)
class News:
    """What the manifests of a version and of its parent tell about the difference."""

    outcomes: Counter[Outcome]
    """Files that were read for this version, by what became of them; empty if it was made by a removal."""
    new_classes: list[str]
    lost_classes: list[str]


def news(manifest: Manifest, parent: Manifest) -> News:
    """What ``manifest`` tells that ``parent`` does not."""
    read = [] if is_removal(manifest) else unshared(manifest, parent)
    outcomes: Counter[Outcome] = Counter()
    for part in read:
        outcomes.update(part.outcomes)
    ours, theirs = set(manifest.labels), set(parent.labels)
    return News(outcomes, sorted(ours - theirs), sorted(theirs - ours))


def is_removal(manifest: Manifest) -> bool:
    """Whether this version was made by taking pictures away."""
    return manifest.change.startswith("removal")


def compare(dataset: Dataset, parent: Manifest | None, progress: Progress = silent) -> Comparison:
    """Compare what ``dataset`` adds to ``parent`` with what it has from it.

    Raises UserError if a table or a shard of the current version is missing or damaged.
    """
    manifest = dataset.manifest
    if parent is None:
        return Comparison("This is the first version: there is no parent to compare with.")
    if is_removal(manifest):
        return Comparison("This version only took pictures away: there is nothing new to compare.", added=0)
    if any(not (dataset.folder / part.records.name).is_file() for part in unshared(parent, manifest)):
        return Comparison("The parent's tables are no longer here, so what is new cannot be told from what was there.")
    newcomers, residents = divide(dataset, parent)
    chosen, others = (
        rows[permutation(0, f"dataset report/{name}", 0, len(rows))]
        for name, rows in (("added", newcomers), ("parent", residents))
    )
    some = Comparison(
        verdict=_too_few(len(chosen), len(others)),
        added=len(chosen),
        newcomers=_plate(dataset, chosen),
        residents=_plate(dataset, others),
    )
    compared = min(MOST, len(chosen), len(others) // 2)
    if compared < FEWEST:
        return some
    extractor = make_extractor(EvaluationConfig())
    features = _features(dataset, np.concatenate([chosen[:compared], others[: 2 * compared]]), extractor, progress)
    added, reference, rest = torch.split(features, compared)
    found, chances = drift(added, reference, rest, extractor.name)
    nearest = (added @ torch.cat([reference, rest]).T).amax(1)
    strangers = chosen[nearest.argsort(stable=True)[:SHOWN].numpy()]
    plate = _plate(dataset, strangers, SHOWN)
    return replace(some, verdict=verdict(found), drift=found, chances=chances, strangers=plate)


def divide(dataset: Dataset, parent: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """The rows of pictures that ``parent`` lacks, and of those that it has, each (n,) int64.

    No picture is in a data set twice, so only parts that the two versions do not share need to be compared.
    """
    fresh = {part.number for part in unshared(dataset.manifest, parent)}
    with_shards = [part.number for part in dataset.manifest.parts if part.shard is not None]
    is_new = np.isin(dataset.shards(range(len(dataset))), [n for n, part in enumerate(with_shards) if part in fresh])
    theirs = _kept_keys(dataset.folder, unshared(parent, dataset.manifest))
    candidates = np.flatnonzero(is_new)
    is_new[candidates] = ~np.asarray(pc.is_in(pa.array(dataset.keys(candidates), pa.string()), theirs))
    return np.flatnonzero(is_new), np.flatnonzero(~is_new)


def verdict(found: Drift) -> str:
    """What the figures of ``found`` say."""
    what = "differ" if found.differs else "cannot be told"
    figures = f"their KID is {signed(found.kid)}, where chance alone reaches {signed(found.kid_chance)}"
    return f"The new pictures {what} from the parent's: {figures}."


def _too_few(added: int, parent: int) -> str:
    if not added:
        return "No picture was added: there is nothing new to compare."
    if added < FEWEST:
        what = "Only 1 picture was" if added == 1 else f"Only {added} pictures were"
        return f"{what} added: too few to tell whether they differ from the parent's."
    return f"The parent had only {counted(parent, 'picture')}: too few to tell whether the new ones differ from them."


def _kept_keys(folder: Path, parts: list[Part]) -> pa.Array:
    tables = [read_records(folder, part, ("key", "outcome")).filter(pc.field("outcome") == "kept") for part in parts]
    return pa.chunked_array([chunk for table in tables for chunk in table["key"].chunks], pa.string()).combine_chunks()


def _features(dataset: Dataset, rows: np.ndarray, extractor: Extractor, progress: Progress) -> Tensor:
    found, done = [], 0
    for piece in pieces(dataset, rows):
        progress("features of new pictures and of the parent's", done, len(rows))
        found.append(extractor(piece))
        done += len(piece)
    return torch.cat(found)


def _plate(dataset: Dataset, rows: np.ndarray, columns: int = PER_CLASS) -> Plate | None:
    shown = rows[:SHOWN]
    return Plate("", len(shown), sheet(thumbnails(dataset, shown), columns)) if len(shown) else None
