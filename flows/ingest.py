"""The flow ``ingest``: pictures in, a data set recorded in DVC and pushed to S3 out."""

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from diffusion.config import Config
from diffusion.data.ingest import IngestResult, Rebuild
from diffusion.data.ingest import ingest as ingest_pictures
from flows import environment, lineage
from flows.fan_out import prefect_fan_out, task_runner
from flows.lineage import DataVersion
from flows.params import Params
from flows.progress import reporter
from flows.s3 import S3Objects
from flows.steps import step


class Ingested(Config):
    """A data set and its version."""

    result: IngestResult
    version: DataVersion


@flow(name="ingest", flow_run_name="ingest-{params.training.dataset}")
def ingest(params: Params, requeue: bool = False, rebuild: Rebuild = "never") -> Ingested:
    """Add what is new in ``ingest.source`` to the data set ``training.dataset``; record and push its version."""
    result = make_dataset.with_options(task_runner=task_runner(params.ingest))(params, requeue, rebuild)
    return Ingested(result=result, version=record(params, result))


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
def record(params: Params, result: IngestResult) -> DataVersion:
    """Commit the data set to DVC, push it to the bucket, and say on the run what was made."""
    version = lineage.record_data(params.dataset_folder, environment.data_source())
    refused = "".join(f"\n| {each.source} | {each.reason} |" for each in result.quarantined[:100])
    create_markdown_artifact(
        f"**{result.dataset}**: {result.kept} pictures, {result.duplicates} duplicates, "
        f"{result.quarantined_count} refused\n\ncontent `{result.content_digest}`\n\nDVC `{version.digest}`"
        + (f"\n\n| refused | why |\n|---|---|{refused}" if refused else ""),
        key="dataset",
    )
    return version
