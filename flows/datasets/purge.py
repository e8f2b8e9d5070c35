"""Purge: deletion of copies of images that were taken down from caches and remotes."""

import hashlib
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dvc.exceptions import NotDvcRepoError
from dvc.repo import Repo
from filelock import FileLock
from pydantic import ValidationError

from diffusion.checkpoints import read_model_header
from diffusion.common.config import Config
from diffusion.data.manifest import Manifest, manifest_bytes, work_folder
from diffusion.evaluation.evaluator import CACHE
from diffusion.evaluation.ranking import RANKING, Ranking
from diffusion.evaluation.reports.comparison_report import PAGE as COMPARISON_PAGE
from diffusion.evaluation.reports.ranking_report import PAGE
from diffusion.evaluation.results import Evaluation
from flows.datasets.dvc import Cache, Listing, Remote
from flows.storage.s3 import DELETED_AT_ONCE

WORK_FILES = (
    *("chunks", "scratch", "encodings", "measures", "tables", "ranges"),
    *("plan.sqlite", "index.sqlite", "index.sqlite-shm", "index.sqlite-wal"),
)
"""Files of ingest and training in the work folder, which are created again when needed."""


class Purged(Config):
    """Deleted copies."""

    dvc_objects: list[str]
    files: list[str]
    artifacts: list[str]


@dataclass(frozen=True)
class UnreferencedObjects:
    """DVC objects that no version needs any more, in all stores."""

    depots: list[Cache | Remote]
    files: list[str]
    listings: list[str]

    def delete(self, still: Callable[[], bool] = lambda: True) -> bool:
        """Delete them, listings last, while ``still`` holds before each request; returns whether all are deleted."""
        for names in (self.files, self.listings):
            for first in range(0, len(names), DELETED_AT_ONCE):
                for depot in self.depots:
                    if not still():
                        return False
                    depot.delete(names[first : first + DELETED_AT_ONCE])
        return True


def unreferenced_objects(held: Iterable[Manifest], others: Iterable[Manifest], source: str) -> UnreferencedObjects:
    """Find objects in DVC's cache and on the remote ``source`` that only the versions ``held`` need.

    ``others`` are the data set's versions that stay. Objects that any other folder in DVC needs stay as well.
    """
    cache = Cache.here()
    depots: list[Cache | Remote] = [Remote.at(source), *([cache] if cache else [])]
    going = {hashlib.md5(manifest_bytes(each), usedforsecurity=False).hexdigest() for each in held}
    listings: dict[str, Listing] = {name: listing for depot in depots for name, listing in depot.listings()}
    doomed = {name: listing for name, listing in listings.items() if listing.get("manifest.json") in going}
    staying = {entry.name for each in others for entry in each.files}
    needed = {md5 for name, listing in listings.items() if name not in doomed for md5 in listing.values()}
    with suppress(NotDvcRepoError), Repo() as repo:
        # Files that the repository around the working folder tracks individually.
        needed |= {output.hash_info.value for output in repo.index.outs if output.hash_info}
    files = {
        md5 for listing in doomed.values() for path, md5 in listing.items() if md5 not in needed and path not in staying
    }
    return UnreferencedObjects(depots, sorted(files), sorted(doomed))


def purge_dvc(held: Iterable[Manifest], others: Iterable[Manifest], source: str) -> list[str]:
    """Delete the objects that ``unreferenced_objects`` finds; returns their names."""
    doomed = unreferenced_objects(held, others, source)
    doomed.delete()
    return sorted({*doomed.files, *doomed.listings})


def purge_files(folder: Path, held: Iterable[Manifest], others: Iterable[Manifest], reports: Path) -> list[str]:
    """Delete this machine's copies of the versions ``held`` outside of the data set in ``folder``; returns the paths.

    These are work files, fetched shards, cached evaluations, and pages and grids in ``reports``. Locks out ingests.
    """
    held = list(held)
    staying = {shard.sha256 for each in others for shard in each.shards}
    going = {shard.sha256 for each in held for shard in each.shards} - staying
    # Including partial files of a killed training.
    found = [path for sha256 in sorted(going) for path in sorted((folder.parent / ".shards").glob(f"{sha256}.*"))]
    found += [reports / name for name in (CACHE, "explain")]
    found += [path for each in held for path in sorted((reports / "dataset").glob(f"{each.digest[:16]}.*"))]
    contents = {each.content_digest for each in held}
    for name, evaluated, pages in (
        ("evaluation.json", Evaluation, ("report.html", COMPARISON_PAGE, "grids")),
        (RANKING, Ranking, (PAGE,)),
    ):
        if (reports / name).is_file():
            shown = None
            # Pages of another version of Darkroom may show any images.
            with suppress(ValidationError):
                shown = evaluated.model_validate_json((reports / name).read_bytes()).conditions.content_digest
            if shown is None or shown in contents:
                found += [reports / page for page in pages]
    with FileLock(work_folder(folder) / "lock"):
        found += [work_folder(folder) / name for name in WORK_FILES]
        found = [path for path in found if path.exists()]
        for path in found:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    return [str(path) for path in found]


def purge_samples(run: Path, held: Iterable[Manifest]) -> list[str]:
    """Delete the run's sample grids if they show real images of ``held``, as those of autoencoders do."""
    final, samples = run / "final.safetensors", run / "samples"
    if not (final.is_file() and samples.is_dir()):
        return []
    header = read_model_header(final)
    shows = header.model.low_resolution is not None or header.model.evaluated_by == "reconstructions"
    if not shows or header.content_digest not in {each.content_digest for each in held}:
        return []
    shutil.rmtree(samples)
    return [str(samples)]
