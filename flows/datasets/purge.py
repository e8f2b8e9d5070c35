"""Purge: deletion of copies of images that were taken down from caches and remotes."""

import hashlib
import shutil
from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from dvc.exceptions import NotDvcRepoError
from filelock import FileLock
from pydantic import ValidationError

from diffusion.checkpoints import read_model_header
from diffusion.common.config import Config
from diffusion.data.manifest import Manifest, manifest_bytes, work_folder
from diffusion.evaluation.evaluator import CACHE
from diffusion.evaluation.ranking import RANKING, Ranking
from diffusion.evaluation.reports.comparison_report import COMPARISON_PAGE
from diffusion.evaluation.reports.ranking_report import RANKING_PAGE
from diffusion.evaluation.results import Evaluation
from diffusion.training.trackers import TRACKERS
from flows.config import SWEEPS
from flows.datasets.dvc import Cache, Listing, Remote, open_repository
from flows.datasets.published import find_strays, read_published, write_published
from flows.datasets.remote_shards import STAGING
from flows.storage.s3 import MAX_DELETED, Location, Store

WORK_FILES = (
    *("chunks", "scratch", "encodings", "measures", "tables", "digest"),
    *("plan.sqlite", "index.sqlite", "index.sqlite-shm", "index.sqlite-wal"),
)
"""Files of ingest and training in the work folder, which are created again when needed."""


class PurgeResult(Config):
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
            for start in range(0, len(names), MAX_DELETED):
                for depot in self.depots:
                    if not still():
                        return False
                    depot.delete(names[start : start + MAX_DELETED])
        return True


def unreferenced_objects(versions: Iterable[Manifest], others: Iterable[Manifest], source: str) -> UnreferencedObjects:
    """Find objects in DVC's cache and on the remote ``source`` that only ``versions`` need.

    ``others`` are the data set's versions that stay. Objects that any other folder in DVC needs stay as well.
    """
    cache = Cache.from_working_folder()
    depots: list[Cache | Remote] = [Remote.from_url(source), *([cache] if cache else [])]
    manifest_md5s = {hashlib.md5(manifest_bytes(version), usedforsecurity=False).hexdigest() for version in versions}
    listings: dict[str, Listing] = {name: listing for depot in depots for name, listing in depot.listings()}
    doomed_listings = {
        name: listing for name, listing in listings.items() if listing.get("manifest.json") in manifest_md5s
    }
    retained_paths = {entry.name for version in others for entry in version.files}
    needed_md5s = {md5 for name, listing in listings.items() if name not in doomed_listings for md5 in listing.values()}
    with suppress(NotDvcRepoError), open_repository() as repo:
        # Files that the repository around the working folder tracks individually.
        needed_md5s |= {output.hash_info.value for output in repo.index.outs if output.hash_info}
    files = {
        md5
        for listing in doomed_listings.values()
        for path, md5 in listing.items()
        if md5 not in needed_md5s and path not in retained_paths
    }
    return UnreferencedObjects(depots, sorted(files), sorted(doomed_listings))


def purge_dvc(versions: Iterable[Manifest], others: Iterable[Manifest], source: str) -> list[str]:
    """Delete the objects that ``unreferenced_objects`` finds; returns their names."""
    objects = unreferenced_objects(versions, others, source)
    objects.delete()
    return sorted({*objects.files, *objects.listings})


def purge_staged(folder: Path, source: str) -> list[str]:
    """Delete staged chunks of the data set in ``folder``, and shards of this machine that no version has.

    Returns their names. Locks out ingests of this machine; one elsewhere prepares its chunks again.
    """
    store, bucket = Store(), Location.parse(source).bucket
    with FileLock(work_folder(folder) / "lock"):
        keys = sorted(
            store.list_keys(bucket, f"{STAGING}/{folder.name}/"), key=lambda key: not key.endswith(".parquet")
        )
        store.delete_many(bucket, keys)
        cache, remote = Cache.from_working_folder(), Remote.from_url(source)
        strays = find_strays(folder, chain(cache.listings() if cache else (), remote.listings()))
        remote.delete(strays.values())
        write_published(folder, {name: md5 for name, md5 in read_published(folder).items() if name not in strays})
        return [*keys, *strays.values()]


def purge_files(folder: Path, versions: Iterable[Manifest], others: Iterable[Manifest], reports: Path) -> list[str]:
    """Delete this machine's copies of ``versions`` outside of the data set in ``folder``; returns the paths.

    These are work files, fetched shards, cached evaluations, and pages and grids in ``reports``. Locks out ingests.
    """
    versions = list(versions)
    retained_shards = {shard.sha256 for version in others for shard in version.shards}
    shards = {shard.sha256 for version in versions for shard in version.shards} - retained_shards
    # Including partial files of a killed training.
    paths = [path for sha256 in sorted(shards) for path in sorted((folder.parent / ".shards").glob(f"{sha256}.*"))]
    paths += [reports / name for name in (CACHE, "explain")]
    paths += [path for version in versions for path in sorted((reports / "dataset").glob(f"{version.digest[:16]}.*"))]
    contents = {version.content_digest for version in versions}
    for name, report_type, pages in (
        ("evaluation.json", Evaluation, ("report.html", COMPARISON_PAGE, "grids")),
        (RANKING, Ranking, (RANKING_PAGE,)),
    ):
        if (reports / name).is_file() and _may_show(reports / name, report_type, contents):
            paths += [reports / page for page in pages]
    # The page of a sweep shows the images that its combinations were evaluated on.
    if any(_may_show(path, Evaluation, contents) for path in (reports / SWEEPS).glob("*/evaluation.json")):
        paths += sorted((reports / SWEEPS).glob("*.html"))
    with FileLock(work_folder(folder) / "lock"):
        paths += [work_folder(folder) / name for name in WORK_FILES]
        paths = [path for path in paths if path.exists()]
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    return [str(path) for path in paths]


def _may_show(path: Path, report_type: type[Evaluation] | type[Ranking], contents: Container[str]) -> bool:
    """Whether pages beside ``path`` may show images of versions with these ``contents``."""
    try:
        return report_type.model_validate_json(path.read_bytes()).conditions.content_digest in contents
    except ValidationError:  # of another version of Darkroom
        return True


def purge_samples(run: Path, versions: Iterable[Manifest]) -> list[str]:
    """Delete the run's sample grids if they show real images of ``versions``, as the grids of autoencoders do.

    The files of its trackers, which have the same grids, go with them.
    """
    final, folders = run / "final.safetensors", [each for each in (run / TRACKERS, run / "samples") if each.is_dir()]
    if not (final.is_file() and folders):
        return []
    header = read_model_header(final)
    has_real_images = header.model.low_resolution is not None or header.model.evaluated_by == "reconstructions"
    if not has_real_images or header.content_digest not in {version.content_digest for version in versions}:
        return []
    for folder in folders:
        shutil.rmtree(folder)
    return list(map(str, folders))
