"""The flow ``ingest``: images in, a data set recorded in DVC, pushed to S3 and described on a page out.

It loads no torch: most of the ingests that a schedule starts find nothing new.
"""

import logging
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from diffusion.common.config import Config
from diffusion.data.ingest.ingest import IngestResult, Rebuild
from diffusion.data.ingest.ingest import ingest as ingest_images
from diffusion.data.manifest import read_manifest
from flows.config import Params
from flows.datasets import lineage
from flows.datasets.catalog import Catalogue
from flows.datasets.checkout import forget_choice
from flows.datasets.lineage import DataVersion
from flows.datasets.s3_source import S3Objects
from flows.datasets.sync import announce, bring_up_to_date, publish
from flows.deployment.tasks import ended, prefect_fan_out, step, task_runner
from flows.environment import data_source, settings
from flows.storage.s3 import Store
from flows.tracking.progress_reporter import reporter

logger = logging.getLogger(__name__)


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
    mend(params, rebuild, to_retrain)
    make = make_dataset.with_options(task_runner=task_runner(params.ingest))
    result = make(params, requeue, rebuild)
    while (version := record(params)) is None:
        # Somebody was faster: what this ingest added is added to their version, which nothing has to be read for.
        mend(params, "never", to_retrain)
        result = merge_results(result, make(params, requeue=False, rebuild="never"))
    report = describe(params, version)
    announce(params, to_retrain)
    words = f"{result.added:,} new" if result.changed else "nothing new"
    return ended(
        Ingested(result=result, version=version, report=report),
        f"{params.training.dataset}: {result.kept:,} images, {words}; version {result.digest[:12]}",
    )


@step
def mend(params: Params, rebuild: Rebuild, to_retrain: bool) -> None:
    """Make the data set here whole, go on from the newest version anywhere, and apply takedowns of other machines.

    Raises UserError for a server on which two ingests could overwrite each other.
    """
    Store().require_conditional_puts(settings().bucket, "datasets")
    folder, source = params.dataset_folder, data_source()
    for name in lineage.restore_data(folder, source):
        logger.warning("%s was missing or damaged, and is whole again", folder / name)
    if to_retrain:
        # What a person went back to here is no matter of a schedule.
        forget_choice(folder)
    bring_up_to_date(folder, source, params.ingest, reporter(), anew=rebuild == "always")


def merge_results(first: IngestResult, again: IngestResult) -> IngestResult:
    """The data set as it stands after ``again``, with what the ``first`` ingest read and added."""
    names = ("listed", "read", "added", "removed", "relabelled", "passed_over")
    return again.model_copy(
        update={name: getattr(first, name) for name in names} | {"changed": first.changed or again.changed}
    )


@flow(name="make dataset")
def make_dataset(params: Params, requeue: bool, rebuild: Rebuild) -> IngestResult:
    """Images to shards and manifest; each shard is a task of its own."""
    return ingest_images(
        params.dataset_folder,
        params.ingest,
        reporter(),
        requeue=requeue,
        rebuild=rebuild,
        objects=S3Objects(),
        fan_out=prefect_fan_out(params.ingest),
    )


@step
def record(params: Params) -> DataVersion | None:
    """Commit the data set to DVC, push it, and make it the newest version in the catalogue; None: see ``publish``."""
    return publish(params.dataset_folder, data_source())


@step
def describe(params: Params, version: DataVersion) -> Path:
    """Make the page on this version, and say on the run what is in it; returns where the page lies."""
    from flows.dataset_page import make_dataset_page

    page = make_dataset_page(params)
    recorded = Catalogue.of(params.training.dataset, data_source())
    place = recorded.publish_page(read_manifest(params.dataset_folder).digest, page.html.read_bytes())
    create_markdown_artifact(
        f"{page.summary.markdown()}\nDVC `{version.digest}`, page `{place}`",
        key="dataset",
        description=page.summary.verdict,
    )
    return page.html
