"""Flow ``takedown``: remove images from a data set permanently, and mark what derives from them."""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from diffusion.common.config import Config, dataset_folder
from diffusion.common.errors import UserError
from diffusion.common.escaping import escape_markdown
from diffusion.data.manifest import Manifest, read_manifest
from diffusion.data.versions import takedown as images
from diffusion.data.versions.takedown_records import (
    AffectedVersions,
    Removal,
    Selection,
    find_affected_versions,
    find_held_keys,
)
from diffusion.data.versions.versions import known_versions
from flows import environment
from flows.config import Params
from flows.datasets import dvc
from flows.datasets.catalog import Catalog, Heads
from flows.datasets.checkout import read_pin, unpin
from flows.datasets.dvc import DataVersion, StoredFiles
from flows.datasets.purge import PurgeResult, purge_dvc, purge_files, purge_samples, purge_staged
from flows.datasets.sync import announce, bring_up_to_date, publish
from flows.deployment.tasks import artifact_key, retryable_task
from flows.local_stack.seaweedfs import vacuum_deleted_objects
from flows.registry.takedown_marks import DerivedArtifacts, clear_images, find_derived, mark
from flows.tracking.console import reporter

logger = logging.getLogger(__name__)


class TakedownResult(Config):
    """A completed takedown."""

    name: str
    removal: Removal
    version: DataVersion
    held: list[str]
    """Digests of the versions that held the images."""
    unknown: list[str]
    """Digests of versions whose contents are no longer known."""
    derived: DerivedArtifacts
    elsewhere: dict[str, list[str]]
    """Keys of these images in other data sets, here or the newest on S3, by name: they were not taken down there."""
    elsewhere_unclear: list[str]
    """Other data sets with tables that could not be read."""
    purged: PurgeResult | None

    def lines(self) -> list[str]:
        """Describe the takedown, and what derives from the images."""
        removal, derived, purge = self.removal, self.derived, self.purged
        lines = [
            f"{removal.images:,} images taken down from {removal.dataset} (takedown {self.name}"
            + (", done before)" if removal.already else ")"),
            f"version    {removal.version[:12]}, content {removal.content_digest}",
            f"held by    {', '.join(digest[:12] for digest in self.held) or 'no known version'}",
            *(f"unclear    version {digest[:12]}: its tables are gone" for digest in self.unknown),
            *(
                f"with them  {key}, which curation had dropped as a near-duplicate"
                for key in removal.dropped_copies or ()
            ),
            *(f"similar    {key} stays" for key in removal.near_copies),
            *(f"run        {run.run_id} ({run.name})" for run in derived.runs),
            *(f"model      {model.uri}" + "".join(f" @{alias}" for alias in model.aliases) for model in derived.models),
            *(f"samples    {uri}" for uri in derived.samples),
            *(f"unclear    run {run_id}: its version of the data set is not known" for run_id in derived.unclear_runs),
        ]
        for name, keys in self.elsewhere.items():
            key_text = " ".join(key[:16] for key in keys[:20]) + (" …" if len(keys) > 20 else "")
            lines.append(
                f"also in    {name}, {len(keys):,} images: darkroom data remove {key_text} --dataset {name} --reason …"
            )
        lines += [f"unclear    data set {name}: not all its tables can be read" for name in self.elsewhere_unclear]
        if purge:
            objects, files, artifacts = map(len, (purge.dvc_objects, purge.files, purge.artifacts))
            lines.append(f"purged     {objects:,} DVC objects, {files:,} files, {artifacts:,} artifacts")
        return lines


@flow(name="takedown", flow_run_name="takedown-{params.training.dataset}")
def takedown(params: Params, selection: Selection, reason: str, purge: bool = False) -> TakedownResult:
    """Remove the images of ``selection`` from the data set ``training.dataset``, and mark what derives from them.

    Runs and model versions get the tag ``darkroom.takedown`` and a note. Sampling batches are listed and kept.
    Other data sets that hold them are named and stay as they are. ``purge`` clears caches, remote copies and pages of
    the versions that held the images.
    """
    removal = remove(params, selection, reason)
    version = record(params, removal)
    announce(params, silently=False)
    versions, affected_versions, derived = mark_derived(params, removal)
    fields = {"name": removal.name, "removal": removal, "version": version, "derived": derived}
    copies, unclear_datasets = find_elsewhere(params, removal)
    fields |= {"elsewhere": copies, "elsewhere_unclear": unclear_datasets}
    purge_result = clear(params, versions, affected_versions, derived) if purge else None
    result = TakedownResult(
        **fields, held=affected_versions.held, unknown=affected_versions.unknown, purged=purge_result
    )
    items = [f"- {escape_markdown(line)}" for line in (f"reason {removal.reason}", *result.lines())]
    create_markdown_artifact(
        "\n".join(items), key=artifact_key("takedown", params.training.dataset), description=f"takedown {result.name}"
    )
    return result


@retryable_task
def remove(params: Params, selection: Selection, reason: str) -> Removal:
    """Create the version without the images, based on the newest version or on a manual checkout."""
    folder, source = params.dataset_folder, environment.data_source()
    dvc.restore_data(folder, source)
    if read_pin(folder) is None:
        bring_up_to_date(folder, source, params.ingest, reporter())
    return images.remove(folder, selection, reason, reporter())


@retryable_task
def record(params: Params, removal: Removal) -> DataVersion:
    """Publish the takedown record, then the newest version without the images."""
    folder, source = params.dataset_folder, environment.data_source()
    # First, so that later publications and promotions are checked against it, and earlier ones can be found:
    # see ``flows.datasets.sync.publish`` and ``flows.promote.record``.
    Catalog.of(params.training.dataset, source).publish_removal(removal)
    # Images removed from an older version are removed from the newest one as well.
    unpin(folder)
    while True:
        bring_up_to_date(folder, source, params.ingest, reporter())
        if (version := publish(folder, source)) is not None:
            return version


@retryable_task
def mark_derived(params: Params, removal: Removal) -> tuple[dict[str, Manifest], AffectedVersions, DerivedArtifacts]:
    """Find all versions of the data set, those that held the images, and what derives from them; mark it in MLflow."""
    folder, source = params.dataset_folder, environment.data_source()
    catalog = Catalog.of(folder.name, source)
    # Versions that gc removed from the catalog still have files on the remote for a while.
    versions = catalog.versions(retired=True) | known_versions(folder) | catalog.versions()
    with TemporaryDirectory() as scratch:
        lookup = StoredFiles(folder.name, source).remote_lookup(versions.values(), Path(scratch))
        affected_versions = find_affected_versions(folder, removal, versions.values(), lookup)
    contents = {versions[digest].content_digest for digest in affected_versions.held}
    other_contents = {
        versions[digest].content_digest
        for digest in versions.keys() - {*affected_versions.held, *affected_versions.unknown}
    }
    # Versions of equal content hold the same images.
    derived = find_derived(
        folder.name, contents - other_contents, contents | other_contents, environment.settings().bucket
    )
    mark([run.run_id for run in derived.runs], [model.uri for model in derived.models], removal)
    return versions, affected_versions, derived


@retryable_task
def find_elsewhere(params: Params, removal: Removal) -> tuple[dict[str, list[str]], list[str]]:
    """Find the images of ``removal`` in other data sets: their keys by data set, and those that cannot be searched."""
    own_folder, source = params.dataset_folder, environment.data_source()
    local = {path.parent.name for path in own_folder.parent.glob("*/manifest.json")}
    copies, unclear_datasets = dict[str, list[str]](), list[str]()
    for name in sorted({*local, *Catalog.names(source)} - {own_folder.name}):
        try:
            folder, catalog = dataset_folder(name), Catalog.of(name, source)
            head = Heads(catalog).newest()
            versions = [catalog.version(head)] if head else []
            versions += [read_manifest(folder)] if name in local else []
            keys, whole = set[str](), True
            with TemporaryDirectory() as scratch:
                for version in {manifest.digest: manifest for manifest in versions if manifest}.values():
                    lookup = StoredFiles(name, source).remote_lookup([version], Path(scratch))
                    version_keys, complete = find_held_keys(folder, removal, version, lookup)
                    keys, whole = keys | set(version_keys), whole and complete
        except UserError as error:
            logger.warning("%s", error)
            unclear_datasets.append(name)
            continue
        copies |= {name: sorted(keys)} if keys else {}
        unclear_datasets += [] if whole else [name]
    return copies, unclear_datasets


@retryable_task
def clear(
    params: Params, versions: dict[str, Manifest], affected_versions: AffectedVersions, derived: DerivedArtifacts
) -> PurgeResult:
    """Delete files that only the affected versions need, and files that show their images."""
    folder = params.dataset_folder
    held_versions = [versions[digest] for digest in affected_versions.held]
    other_versions = [version for digest, version in versions.items() if digest not in affected_versions.held]
    Catalog.of(folder.name, environment.data_source()).delete_pages(affected_versions.held)
    objects, files = purge_dvc(held_versions, other_versions, environment.data_source()), list[str]()
    objects += purge_staged(folder, environment.data_source())
    for reports in params.report_folders:
        files += purge_files(folder, held_versions, other_versions, reports)
    for run in params.run_folders:
        files += purge_samples(run, held_versions)
    result = PurgeResult(dvc_objects=objects, files=files, artifacts=clear_images(derived))
    vacuum_deleted_objects()
    return result
