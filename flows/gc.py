"""Flow ``gc``: set aside what nothing needs any more, and delete it after ``retention.grace_hours`` if that holds."""

from collections.abc import Iterator
from datetime import UTC, datetime

from mlflow.client import MlflowClient
from prefect import flow
from prefect.artifacts import create_table_artifact

from diffusion.common.config import Config
from flows import environment
from flows.config import Params, RetentionConfig
from flows.deployment.tasks import retryable_task
from flows.local_stack.seaweedfs import vacuum_deleted_objects
from flows.retention.dataset_items import DataSets
from flows.retention.sweeps import Runs, SamplingBatches, Sweep, SweepItem, find_references, sweep_local_files
from flows.storage.s3 import Store


class GcResult(Config):
    """All items considered, each with what is done."""

    dry_run: bool
    items: list[SweepItem]


@flow(name="gc", flow_run_name="gc")
def gc(params: Params) -> GcResult:
    """Delete what ``params.retention`` does not keep in the bucket, in MLflow and on this machine."""
    result = retryable_task(collect)(params.retention, datetime.now(UTC))
    rows = [item.model_dump(mode="json") for item in result.items if item.action != "keep"]
    create_table_artifact(rows, key="gc", description=f"{len(result.items) - len(rows)} kept")
    return result


def collect(policy: RetentionConfig, now: datetime, dry_run: bool = False) -> GcResult:
    """Collect garbage as of ``now``: batches and runs, then the data sets they need; ``dry_run`` only lists it."""
    store, client, bucket = Store(), MlflowClient(), environment.settings().bucket
    source = environment.data_source()  # raises UserError before anything is deleted
    batches = SamplingBatches(store, bucket, policy, now)
    live = find_references(client, store, bucket, *batches.read_remaining_batches())
    runs = Runs(client, live, policy, now)

    def sweeps() -> Iterator[Sweep]:
        yield batches.sweep()
        yield runs.sweep()
        yield DataSets(store, source, runs.contents() | live.contents, live.unclear, policy, now).sweep()
        yield sweep_local_files(
            environment.settings().folder / "models", runs.list_deletable_train_keys(), live.weights, policy, now
        )

    items = []
    # Each kind is listed after the kinds that refer to it were collected.
    for sweep in sweeps():
        items += sweep.items
        if not dry_run:
            sweep.act()
    if not dry_run and any(item.action == "delete" for item in items):
        vacuum_deleted_objects()
    return GcResult(dry_run=dry_run, items=items)
