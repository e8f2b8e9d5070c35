"""Purge: copies of images that were taken down, cleared from caches and remotes."""

import hashlib
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from dvc.exceptions import NotDvcRepoError
from dvc.repo import Repo
from filelock import FileLock
from pydantic import ValidationError

from diffusion.checkpoints import read_model_header
from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.data.manifest import Manifest, manifest_bytes, work_folder
from diffusion.evaluation.evaluator import CACHE
from diffusion.evaluation.ranking import RANKING, Ranking
from diffusion.evaluation.reports.comparison_report import PAGE as COMPARISON_PAGE
from diffusion.evaluation.reports.ranking_report import PAGE
from diffusion.evaluation.results import Evaluation
from flows.datasets.dvc import Cache, Depot, Listing, Remote
from flows.storage.s3 import DELETED_AT_ONCE

WORK_FILES = ("chunks", "scratch", "plan.sqlite", "index.sqlite", "index.sqlite-shm", "index.sqlite-wal", "captions")
"""What ingests and trainings keep in the work folder; the next one makes it anew."""


class Purged(Config):
    """What was cleared."""

    dvc_objects: list[str]
    """Names of objects in DVC's cache or on its remote."""
    files: list[str]
    """Files and folders on this machine."""
    artifacts: list[str]
    """Files on MLflow's runs in which images of the data set could be seen."""


@dataclass(frozen=True)
class UnreferencedObjects:
    """Objects of DVC that nothing needs any more, wherever they lie."""

    depots: list[Depot]
    files: list[str]
    """Names of files, by MD5."""
    listings: list[str]
    """Names of the folders that held them."""

    @property
    def names(self) -> list[str]:
        """All of them."""
        return sorted({*self.files, *self.listings})

    def delete(self, still: Callable[[], bool] = lambda: True) -> bool:
        """Delete them as long as ``still`` says so, which is asked before each request; returns whether all are gone.

        Listings go last, so that whoever finds this unfinished can finish it.
        """
        for names in (self.files, self.listings):
            for first in range(0, len(names), DELETED_AT_ONCE):
                for depot in self.depots:
                    if not still():
                        return False
                    depot.delete(names[first : first + DELETED_AT_ONCE])
        return True


def unreferenced_objects(held: Iterable[Manifest], others: Iterable[Manifest], source: str) -> UnreferencedObjects:
    """What in DVC's cache and on the remote ``source`` belongs to the versions ``held`` and to nothing else.

    ``others`` are the data set's versions that stay. What any other folder that DVC knows here or there needs stays as
    well, whatever data set it is of.
    """
    depots: list[Depot] = [Remote.at(source)]
    cache = Cache.here()
    if cache is not None:
        depots.append(cache)
    going = {hashlib.md5(manifest_bytes(each), usedforsecurity=False).hexdigest() for each in held}
    listings: dict[str, Listing] = {name: listing for depot in depots for name, listing in depot.listings()}
    doomed = {name: listing for name, listing in listings.items() if listing.get("manifest.json") in going}
    staying = {entry.name for each in others for entry in each.files}
    needed = {md5 for name, listing in listings.items() if name not in doomed for md5 in listing.values()}
    needed |= _single_files()
    files = {
        md5 for listing in doomed.values() for path, md5 in listing.items() if md5 not in needed and path not in staying
    }
    return UnreferencedObjects(depots, sorted(files), sorted(doomed))


def purge_dvc(held: Iterable[Manifest], others: Iterable[Manifest], source: str) -> list[str]:
    """Delete what ``unreferenced_objects`` finds; returns the names of what was deleted."""
    doomed = unreferenced_objects(held, others, source)
    doomed.delete()
    return doomed.names


def purge_files(folder: Path, held: Iterable[Manifest], others: Iterable[Manifest], reports: Path) -> list[str]:
    """Delete what this machine keeps of the versions ``held`` beside the data set in ``folder``.

    That is what ingests and trainings keep in the work folder, shards fetched for training, remembered judgements, and
    pages and grids in the folder ``reports`` in which images of those versions can be seen. Takes turns with ingests.
    """
    held = list(held)
    staying = {shard.sha256 for each in others for shard in each.shards}
    going = {shard.sha256 for each in held for shard in each.shards} - staying
    # Those that a killed training had half fetched, too.
    found = [path for sha256 in sorted(going) for path in sorted((folder.parent / ".shards").glob(f"{sha256}.*"))]
    found += [reports / name for name in (CACHE, "explain")]
    found += [path for each in held for path in sorted((reports / "dataset").glob(f"{each.digest[:16]}.*"))]
    judged = reports / "evaluation.json"
    if judged.is_file():
        try:
            shown = {Evaluation.read(judged).conditions.content_digest}
        except UserError:  # of another version of Darkroom: what its pages show nobody can say
            shown = {each.content_digest for each in held}
        if shown & {each.content_digest for each in held}:
            found += [reports / name for name in ("report.html", COMPARISON_PAGE, "grids")]
    compared = reports / RANKING
    if compared.is_file():
        try:
            shown = {Ranking.model_validate_json(compared.read_bytes()).conditions.content_digest}
        except ValidationError:  # the same
            shown = {each.content_digest for each in held}
        if shown & {each.content_digest for each in held}:
            found.append(reports / PAGE)
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
    """Delete the sample grids in the folder ``run`` of a training if real images of the versions ``held`` show there.

    That is so where a model draws images large that it is shown small, or gives back what it is shown.
    """
    final, samples = run / "final.safetensors", run / "samples"
    if not (final.is_file() and samples.is_dir()):
        return []
    header = read_model_header(final)
    shows = header.model.low_resolution is not None or header.model.judged == "reconstructed"
    if not shows or header.content_digest not in {each.content_digest for each in held}:
        return []
    shutil.rmtree(samples)
    return [str(samples)]


def _single_files() -> set[str]:
    """The MD5s of files that the repository around the working folder tracks one by one."""
    try:
        with Repo() as repo:
            return {output.hash_info.value for output in repo.index.outs if output.hash_info}
    except NotDvcRepoError:
        return set()
