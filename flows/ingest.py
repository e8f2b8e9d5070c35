"""Flow ``ingest``: add images to a data set, record, push and describe it; without torch, as most find none."""

import logging
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from filelock import FileLock
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from pydantic import ValidationError

from diffusion.api import engine
from diffusion.common.config import Config
from diffusion.common.escaping import pluralize
from diffusion.common.files import make_folder, write_json
from diffusion.data.ingest.ingest import IngestResult, Rebuild
from diffusion.data.manifest import read_manifest, work_folder
from diffusion.data.shards import missing_shards
from flows.config import Params
from flows.datasets import dvc
from flows.datasets.catalog import Catalog, mark_push
from flows.datasets.checkout import unpin
from flows.datasets.dvc import DataVersion
from flows.datasets.remote_shards import RemoteShards
from flows.datasets.sync import announce, bring_up_to_date, fetch_shards, publish
from flows.deployment.tasks import (
    artifact_key,
    completed_state,
    require_permitted,
    retryable_task,
)
from flows.environment import data_source, settings
from flows.storage.s3 import S3Objects, Store
from flows.tracking.console import reporter

if TYPE_CHECKING:
    from diffusion.evaluation.reports.dataset_summary import DatasetSummary

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class IngestOutcome(Config):
    """Data set after an ingest, with its version."""

    result: IngestResult
    version: DataVersion
    report: Path


@flow(name="ingest", flow_run_name="ingest-{params.training.dataset}")
def ingest(
    params: Params, requeue: bool = False, rebuild: Rebuild = "never", to_retrain: bool = False
) -> IngestOutcome:
    """Add the new images of ``ingest.source`` to the data set ``training.dataset``; record and push it, write its page.

    A new version emits an event, unless the caller will retrain on it anyway (``to_retrain``).
    """
    require_permitted(params)

    def change(earlier: IngestResult | None) -> IngestResult:
        path = params.dataset_folder / "manifest.json"
        before = read_manifest(params.dataset_folder).digest if path.is_file() else None
        if earlier is None:
            return make_dataset(params, before, requeue, rebuild)
        # Add the new images to the version of the faster process, without reading them again.
        rerun = make_dataset(params, before)
        counts = {"listed", "read", "added", "removed", "relabelled", "passed_over"}
        fields = counts | {"remasked", "source", "captions", "captions_found"}
        counters = {name: getattr(earlier, name) for name in fields}
        return rerun.model_copy(update=counters | {"changed": earlier.changed or rerun.changed})

    # Shards are on the remote before a version names them.
    with mark_push(params.training.dataset, data_source()) if needs_no_shards(params) else nullcontext():
        result, version = publish_change(params, change, rebuild, to_retrain, needs_no_shards(params))
    report = describe(params, version)
    announce(params, to_retrain)
    summary = f"{result.added:,} new" if result.changed else "nothing new"
    return completed_state(
        IngestOutcome(result=result, version=version, report=report),
        f"{params.training.dataset}: {pluralize(result.kept, 'image')}, {summary}; version {result.digest[:12]}",
    )


def publish_change(
    params: Params,
    change: Callable[[Result | None], Result],
    rebuild: Rebuild = "never",
    to_retrain: bool = False,
    without_shards: bool = False,
) -> tuple[Result, DataVersion]:
    """Repair the local data set, change it, and publish the version made, until no other process is faster.

    ``change`` is called with its own result of the time before, None at first. ``without_shards``: it needs none here.
    """
    result = None
    while True:
        repair(params, rebuild if result is None else "never", to_retrain, without_shards)
        result = change(result)
        # A DVC commit and push; None if another process was faster.
        if (version := retryable_task(publish)(params.dataset_folder, data_source())) is not None:
            return result, version


@retryable_task
def repair(params: Params, rebuild: Rebuild, to_retrain: bool, without_shards: bool = False) -> None:
    """Repair the local data set, fast-forward it to the newest published version, and apply takedowns.

    Raises UserError for an S3 server without conditional writes, on which two ingests could overwrite each other.
    """
    Store().require_conditional_puts(settings().bucket, "datasets")
    folder, source = params.dataset_folder, data_source()
    for name in dvc.restore_data(folder, source, without_shards):
        logger.warning("%s was missing or damaged, and is whole again", folder / name)
    if to_retrain:
        # A scheduled retraining ignores a manual checkout of an older version.
        unpin(folder)
    bring_up_to_date(folder, source, params.ingest, reporter(), rebuild == "always", without_shards)


@retryable_task
def make_dataset(params: Params, before: str | None, requeue: bool = False, rebuild: Rebuild = "never") -> IngestResult:
    """Write shards and manifest of the version after ``before``, then apply the rules of curation."""
    path = params.dataset_folder / "manifest.json"
    if path.is_file() and read_manifest(params.dataset_folder).digest != before:
        # A retry after an error of curation or captioner: the images are read.
        requeue, rebuild = False, "never"
    result = engine.ingest(
        params,
        rebuild=rebuild,
        requeue=requeue,
        objects=S3Objects(),
        progress=reporter(),
        remote=remote_shards(params) if needs_no_shards(params) else None,
    )
    return result.model_copy(update={"changed": result.changed or result.digest != before})


def needs_no_shards(params: Params) -> bool:
    """Whether work on a data set leaves its shards on the remote, as workers on Ray read and write them there."""
    return params.ingest.runner == "ray"


def remote_shards(params: Params) -> RemoteShards:
    """Shards of the data set ``training.dataset`` on DVC's remote."""
    return RemoteShards(params.dataset_folder, data_source())


def require_shards(params: Params) -> None:
    """Fetch the shards of the data set that are on the remote alone, for work that reads images in any order.

    Locks out ingests while it fetches. Raises UserError if one is not on the remote, or is damaged there.
    """
    folder = params.dataset_folder
    if missing_shards(folder, read_manifest(folder)):
        make_folder(work_folder(folder))
        with FileLock(work_folder(folder) / "lock"):
            fetch_shards(folder, data_source())


@retryable_task
def describe(params: Params, version: DataVersion) -> Path:
    """Write and publish the report page of this version, with a summary on the flow run; returns its path."""
    page, summary = dataset_page(params)
    catalog = Catalog.of(params.training.dataset, data_source())
    place = catalog.publish_page(read_manifest(params.dataset_folder).digest, page.read_bytes())
    text = f"{summary.markdown()}\nDVC `{version.digest}`, page `{place}`"
    description = f"{summary.kept:,} images"
    create_markdown_artifact(text, key=artifact_key("dataset", params.training.dataset), description=description)
    return page


def dataset_page(params: Params) -> "tuple[Path, DatasetSummary]":
    """Report page of the current version, written unless ``find_page`` finds it, and the summary beside it."""
    from diffusion.evaluation.reports.dataset_report import write_dataset_report

    page, summary = find_page(params)
    if summary is None:
        summary = write_dataset_report(params.dataset_folder, page, reporter(), remote_shards(params))
        write_json(page.with_suffix(".json"), summary.model_dump(mode="json"))
    return page, summary


def find_page(params: Params) -> "tuple[Path, DatasetSummary | None]":
    """Path of the report page of the current version, and its summary; None without a page of this Darkroom."""
    from diffusion.evaluation.reports.dataset_summary import DatasetSummary

    page = params.dataset_report_folder / "dataset" / f"{read_manifest(params.dataset_folder).digest[:16]}.html"
    if page.is_file():
        with suppress(FileNotFoundError, ValidationError):
            return page, DatasetSummary.model_validate_json(page.with_suffix(".json").read_bytes())
    return page, None
