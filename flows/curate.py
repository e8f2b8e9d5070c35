"""Flow ``curate``: apply the rules of curation to a data set, record, push and describe the version made so."""

from pathlib import Path

from prefect import flow

from diffusion.api import engine
from diffusion.common.config import Config
from diffusion.curation.curate import CurationResult
from diffusion.curation.lists import ListChange
from flows.config import Params
from flows.datasets.dvc import DataVersion
from flows.datasets.sync import announce
from flows.deployment.tasks import completed_state, retryable_task
from flows.ingest import describe, needs_no_shards, publish_change, remote_shards
from flows.tracking.console import reporter


class CurationOutcome(Config):
    """Data set after its curation, with its version."""

    result: CurationResult
    version: DataVersion
    report: Path


@flow(name="curate", flow_run_name="curate-{params.training.dataset}")
def curate(params: Params, list_change: ListChange | None = None) -> CurationOutcome:
    """Apply the rules of ``curation`` to the data set ``training.dataset``; record and push it, write its page.

    ``list_change``: a list to record first, or to withdraw. A new version emits an event, on which ``retrain`` may be
    deployed.
    """

    def change(earlier: CurationResult | None) -> CurationResult:
        result = curate_images(params, list_change)
        if earlier is None:
            return result
        # The images that a faster process added are curated, too.
        counters = {name: getattr(earlier, name) + getattr(result, name) for name in ("newly_dropped", "restored")}
        return result.model_copy(update=counters | {"changed": earlier.changed or result.changed})

    result, version = publish_change(params, change, without_shards=needs_no_shards(params))
    report = describe(params, version)
    announce(params, silently=False)
    return completed_state(
        CurationOutcome(result=result, version=version, report=report),
        f"{params.training.dataset}: {result.kept:,} images, {result.dropped:,} dropped; version {result.digest[:12]}",
    )


@retryable_task
def curate_images(params: Params, change: ListChange | None = None) -> CurationResult:
    """Measure the images, decide and write the manifest."""
    remote = remote_shards(params) if needs_no_shards(params) else None
    return engine.curate(params, change=change, progress=reporter(), remote=remote)
