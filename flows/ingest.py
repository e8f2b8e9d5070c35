"""The flow ``ingest``: pictures in, a data set recorded in DVC, pushed to S3 and described on a page out.

It loads no torch: most of the ingests that a schedule starts find nothing new.
"""

from pathlib import Path

from filelock import FileLock
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.logging import get_run_logger

from diffusion.config import Config
from diffusion.data.ingest import IngestResult, Rebuild, work_folder
from diffusion.data.ingest import ingest as ingest_pictures
from flows import catalogue, lineage
from flows.announce import announce
from flows.environment import data_source, settings
from flows.fan_out import prefect_fan_out, task_runner
from flows.lineage import DataVersion
from flows.params import Params
from flows.progress import reporter
from flows.s3 import Store
from flows.s3_objects import S3Objects
from flows.steps import ended, step


class Ingested(Config):
    """A data set and its version."""

    result: IngestResult
    version: DataVersion
    report: Path
    """The page on it."""


@flow(name="ingest", flow_run_name="ingest-{params.training.dataset}")
def ingest(params: Params, requeue: bool = False, rebuild: Rebuild = "never", to_retrain: bool = False) -> Ingested:
    """Add what is new in ``ingest.source`` to the data set ``training.dataset``; record, push and describe it.

    A new version is announced by an event, but not if whoever asks is ``to_retrain`` on it anyway.
    """
    mend(params)
    result = make_dataset.with_options(task_runner=task_runner(params.ingest))(params, requeue, rebuild)
    version = record(params)
    report = describe(params, version)
    announce(params, to_retrain)
    words = f"{result.added:,} new" if result.changed else "nothing new"
    return ended(
        Ingested(result=result, version=version, report=report),
        f"{params.training.dataset}: {result.kept:,} pictures, {words}; version {result.digest[:12]}",
    )


@step
def mend(params: Params) -> None:
    """Get back from DVC what is missing or damaged of the data set that is there, and hear of takedowns elsewhere.

    Raises UserError for a server on which two ingests could overwrite each other.
    """
    Store().require_conditional_puts(settings().bucket, "datasets")
    log = get_run_logger()
    for name in lineage.restore_data(params.dataset_folder, data_source()):
        log.warning("%s was missing or damaged, and is whole again", params.dataset_folder / name)
    for removal in catalogue.learn_removals(params.dataset_folder, data_source()):
        log.warning(
            "this version holds pictures taken down since (%s): darkroom data checkout %s --dataset %s",
            removal.reason,
            removal.version[:12],
            params.training.dataset,
        )


@flow(name="make dataset")
def make_dataset(params: Params, requeue: bool, rebuild: Rebuild) -> IngestResult:
    """Pictures to shards and manifest; each shard is a task of its own."""
    return ingest_pictures(
        params.dataset_folder,
        params.ingest,
        reporter(),
        requeue=requeue,
        rebuild=rebuild,
        objects=S3Objects(),
        fan_out=prefect_fan_out(params.ingest),
    )


@step
def record(params: Params) -> DataVersion:
    """Commit the data set to DVC, push it to the bucket, and enter its version in the catalogue there."""
    # Otherwise another ingest could put its version in place while the files of this one are pushed.
    turn = FileLock(work_folder(params.dataset_folder) / "lock")
    with turn, catalogue.pushing(params.training.dataset, data_source()):
        version = lineage.record_data(params.dataset_folder, data_source())
        catalogue.publish(params.dataset_folder, version.digest, data_source())
    return version


@step
def describe(params: Params, version: DataVersion) -> Path:
    """Make the page on this version, and say on the run what is in it; returns where the page lies."""
    from flows.dataset_page import dataset_page

    page = dataset_page(params)
    place = catalogue.publish_page(params.dataset_folder, page.html, data_source())
    create_markdown_artifact(
        f"{page.summary.markdown()}\nDVC `{version.digest}`, page `{place}`",
        key="dataset",
        description=page.summary.verdict,
    )
    return page.html
