"""The flow ``gc``: what nothing needs any more goes, in two steps with a grace between them.

What registered versions, the ledgers and kept sampling batches lead to stays, whatever its age. What goes is first set
aside, so that nothing leads to it, and its content goes when ``retention.grace_hours`` have passed; then everything is
looked at once more. Killed at any moment and given again, it ends the same.
"""

from collections.abc import Iterator
from datetime import UTC, datetime

from mlflow.client import MlflowClient
from prefect import flow
from prefect.artifacts import create_table_artifact

from diffusion.common.config import Config
from flows import environment
from flows.config import Params, RetentionConfig
from flows.deployment.tasks import step
from flows.local_stack.discovery import vacuum_deleted_objects
from flows.retention.batch_items import SamplingBatches
from flows.retention.dataset_items import DataSets
from flows.retention.policy import Item, Sweep
from flows.retention.run_items import LocalFiles, Runs, find_references
from flows.storage.s3 import Store


class Collected(Config):
    """What was looked at, and what became of it."""

    dry_run: bool
    items: list[Item]


@flow(name="gc", flow_run_name="gc")
def gc(params: Params) -> Collected:
    """Take away what ``params.retention`` lets go in the bucket, in MLflow and on this machine."""
    done = collected(params)
    create_table_artifact(
        [item.model_dump(mode="json") for item in done.items if item.fate != "stays"],
        key="gc",
        description=f"{sum(item.fate == 'stays' for item in done.items)} stay",
    )
    return done


@step
def collected(params: Params) -> Collected:
    """Look at everything, then act: first sampling batches and runs, which lead to data, then that."""
    return collect(params.retention, datetime.now(UTC))


def collect(policy: RetentionConfig, now: datetime, dry_run: bool = False) -> Collected:
    """Do what the flow does as if it were ``now``; ``dry_run`` only looks."""
    items = []
    for sweep in sweeps(policy, now):
        items += sweep.items
        if not dry_run:
            sweep.act()
    if not dry_run and any(item.fate == "goes" for item in items):
        vacuum_deleted_objects()
    return Collected(dry_run=dry_run, items=items)


def sweeps(policy: RetentionConfig, now: datetime) -> Iterator[Sweep]:
    """One kind after the other, each before what it leads to."""
    store, client, source = Store(), MlflowClient(), environment.data_source()
    bucket = environment.settings().bucket
    batches = SamplingBatches(store, bucket, policy, now)
    live = find_references(client, store, bucket, *batches.remaining())
    runs = Runs(client, live, policy, now)
    yield batches.sweep()
    yield runs.sweep()
    yield DataSets(store, source, runs.contents() | live.contents, live.unclear, policy, now).sweep()
    yield LocalFiles(environment.settings().folder / "models", runs.gone(), live.weights, policy, now).sweep()
