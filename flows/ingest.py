"""The flow ``ingest``: pictures in, a data set recorded in DVC and pushed to S3 out."""

from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from diffusion.config import Config
from diffusion.data.ingest import IngestResult
from diffusion.data.ingest import ingest as ingest_pictures
from flows import environment, lineage
from flows.lineage import DataVersion
from flows.params import Params
from flows.progress import reporter
from flows.steps import step


class Ingested(Config):
    """A data set and its version."""

    result: IngestResult
    version: DataVersion


@flow(name="ingest", flow_run_name="ingest-{params.training.dataset}")
def ingest(params: Params) -> Ingested:
    """Make the data set ``training.dataset`` from ``ingest.source``, and record and push its version."""
    result = make_dataset(params)
    return Ingested(result=result, version=record(params, result))


@step
def make_dataset(params: Params) -> IngestResult:
    """Pictures to shards and manifest; the same pictures give the same bytes."""
    return ingest_pictures(Path(params.ingest.source), params.dataset_folder, params.ingest, reporter())


@step
def record(params: Params, result: IngestResult) -> DataVersion:
    """Commit the data set to DVC, push it to the bucket, and say on the run what was made."""
    version = lineage.record_data(params.dataset_folder, environment.data_source())
    refused = "".join(f"\n| {each.source} | {each.reason} |" for each in result.quarantined[:100])
    create_markdown_artifact(
        f"**{result.dataset}**: {result.kept} pictures, {result.duplicates} duplicates, "
        f"{len(result.quarantined)} refused\n\ncontent `{result.content_digest}`\n\nDVC `{version.digest}`"
        + (f"\n\n| refused | why |\n|---|---|{refused}" if refused else ""),
        key="dataset",
    )
    return version
