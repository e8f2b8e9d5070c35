"""The flow ``takedown``: images leave a data set for good, and what was made from them is named and marked."""

from pathlib import Path
from tempfile import TemporaryDirectory

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from diffusion.common.config import Config
from diffusion.common.escaping import escape_markdown
from diffusion.data.manifest import Manifest
from diffusion.data.versions import takedown as images
from diffusion.data.versions.takedown_records import Holders, Removal, Selection, holders
from diffusion.data.versions.versions import known_versions
from flows import environment
from flows.config import Params
from flows.datasets import lineage
from flows.datasets.catalog import Catalogue
from flows.datasets.checkout import choice, forget_choice
from flows.datasets.dvc import KeptFiles
from flows.datasets.lineage import DataVersion
from flows.datasets.purge import Purged, purge_dvc, purge_files, purge_samples
from flows.datasets.sync import announce, bring_up_to_date, publish
from flows.deployment.tasks import step
from flows.local_stack.discovery import vacuum_deleted_objects
from flows.registry.takedown_marks import Derived, clear_images, find_derived, mark
from flows.tracking.progress_reporter import reporter


class TakenDown(Config):
    """A takedown that is done."""

    name: str
    """What it is called in tags and in the catalogue."""
    removal: Removal
    version: DataVersion
    """The data set as DVC knows it now."""
    held: list[str]
    """Digests of the versions that held the images."""
    unknown: list[str]
    """Those of which that can no longer be told."""
    derived: Derived
    purged: Purged | None


@flow(name="takedown", flow_run_name="takedown-{params.training.dataset}")
def takedown(params: Params, selection: Selection, reason: str, purge: bool = False) -> TakenDown:
    """Remove what ``selection`` means from the data set ``training.dataset``; name and mark what was made from it.

    Runs and model versions get the tag ``darkroom.takedown`` and a note. Generated images are named, and stay: they are
    other images. ``purge`` clears caches, remote copies and pages that show images of the versions that held them.
    Killed at any moment and given again, it ends the same.
    """
    removal = remove(params, selection, reason)
    version = record(params, removal)
    announce(params, silently=False)
    versions, found = look_up(params, removal)
    derived = name_and_mark(params, removal, versions, found)
    purged = clear(params, versions, found, derived) if purge else None
    done = TakenDown(
        name=removal.name,
        removal=removal,
        version=version,
        held=found.held,
        unknown=found.unknown,
        derived=derived,
        purged=purged,
    )
    report(done)
    return done


@step
def remove(params: Params, selection: Selection, reason: str) -> Removal:
    """Make the version without the images, of the newest there is unless a person went back to another one."""
    folder, source = params.dataset_folder, environment.data_source()
    lineage.restore_data(folder, source)
    if choice(folder) is None:
        bring_up_to_date(folder, source, params.ingest, reporter())
    return images.remove(folder, selection, reason, reporter())


@step
def record(params: Params, removal: Removal) -> DataVersion:
    """Let other machines know of what was taken down, then publish the newest version without it."""
    folder, source = params.dataset_folder, environment.data_source()
    # First, so that whatever is published or promoted from here on is checked against it, and what was before is there
    # to be found: see ``flows.datasets.sync.publish`` and ``flows.promote.record``.
    Catalogue.of(params.training.dataset, source).publish_removal(removal)
    # Images that leave an older version leave the newest one as well, which stays what it is otherwise.
    forget_choice(folder)
    while True:
        bring_up_to_date(folder, source, params.ingest, reporter())
        if (version := publish(folder, source)) is not None:
            return version


@step
def look_up(params: Params, removal: Removal) -> tuple[dict[str, Manifest], Holders]:
    """All versions of the data set, and which of them held the images."""
    folder, source = params.dataset_folder, environment.data_source()
    recorded = Catalogue.of(folder.name, source)
    # What gc took out of the catalogue has its files on the remote for a while yet.
    versions = recorded.retired() | known_versions(folder) | recorded.versions()
    with TemporaryDirectory() as scratch:
        elsewhere = KeptFiles(folder.name, source).elsewhere(versions.values(), Path(scratch))
        return versions, holders(folder, removal, versions.values(), elsewhere)


@step
def name_and_mark(params: Params, removal: Removal, versions: dict[str, Manifest], found: Holders) -> Derived:
    """Find what was made from the versions that held the images, and mark it in MLflow."""
    contents = {versions[digest].content_digest for digest in found.held}
    others = {each.content_digest for digest, each in versions.items() if digest not in {*found.held, *found.unknown}}
    bucket = environment.settings().bucket
    # Versions of equal content hold the same images, whatever their tables tell besides.
    derived = find_derived(params.training.dataset, contents - others, contents | others, bucket)
    mark([run.run_id for run in derived.runs], [model.uri for model in derived.models], removal)
    return derived


@step
def clear(params: Params, versions: dict[str, Manifest], found: Holders, derived: Derived) -> Purged:
    """Clear what only the versions that held the images need, and what shows images of them."""
    folder = params.dataset_folder
    held = [versions[digest] for digest in found.held]
    others = [each for digest, each in versions.items() if digest not in found.held]
    Catalogue.of(folder.name, environment.data_source()).delete_pages(found.held)
    purged = Purged(
        dvc_objects=purge_dvc(held, others, environment.data_source()),
        files=[
            *(path for reports in params.report_folders for path in purge_files(folder, held, others, reports)),
            *(path for reports in params.report_folders for path in purge_samples(Path("runs", reports.name), held)),
        ],
        artifacts=clear_images(derived),
    )
    vacuum_deleted_objects()
    return purged


@step
def report(done: TakenDown) -> None:
    """Say on the run what was done."""
    derived = done.derived
    named = [
        *(f"| run | {run.run_id} | {escape_markdown(run.name)} |" for run in derived.runs),
        *(f"| model | {model.uri} | {escape_markdown(', '.join(model.aliases))} |" for model in derived.models),
        *(f"| samples | {escape_markdown(uri)} | |" for uri in derived.samples),
        *(f"| perhaps | run {run_id} | its version of the data set is not known |" for run_id in derived.unclear_runs),
        *(f"| perhaps | version {digest[:12]} | its tables are gone |" for digest in done.unknown),
    ]
    reason = escape_markdown(done.removal.reason)
    create_markdown_artifact(
        f"**{done.removal.dataset}**: {done.removal.images} images taken down ({reason}), "
        f"takedown `{done.name}`, version `{done.removal.version[:12]}`, DVC `{done.version.digest}`\n\n"
        + "\n".join(["| made from them | what | |", "|---|---|---|", *named]),
        key="takedown",
    )
