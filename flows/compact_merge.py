"""Flows ``compact`` and ``merge``: versions of a data set from parts that exist, without reading a source."""

from prefect import flow

from diffusion.api import engine
from diffusion.common.config import dataset_folder
from diffusion.data.versions import compact as compaction
from diffusion.data.versions.compact import CompactionResult
from diffusion.data.versions.merge_datasets import MergeResult
from flows.config import Params
from flows.datasets.sync import announce
from flows.deployment.tasks import completed_state, retryable_task
from flows.ingest import describe, publish_change, repair
from flows.tracking.console import reporter


@flow(name="compact", flow_run_name="compact-{params.training.dataset}")
def compact(params: Params) -> CompactionResult:
    """Join runs of small shards of the data set ``training.dataset``; a version of the same content, without an event.

    The shards of earlier versions stay on the remote until gc deletes these versions.
    """

    def change(earlier: CompactionResult | None) -> CompactionResult:
        result = compact_parts(params)
        return result.model_copy(update={"changed": result.changed or (earlier is not None and earlier.changed)})

    result, version = publish_change(params, change)
    describe(params, version)
    # Nothing has to be trained again.
    announce(params, silently=True)
    return completed_state(result, result.lines()[0])


@flow(name="merge", flow_run_name="merge-{params.training.dataset}")
def merge(params: Params, others: list[str]) -> MergeResult:
    """Add the images of the data sets ``others`` to the data set ``training.dataset``, and apply its rules of curation.

    The others are brought up to date first, with all takedowns from them.
    """

    def change(earlier: MergeResult | None) -> MergeResult:
        for name in others:
            training = params.training.model_copy(update={"dataset": name})
            repair(params.model_copy(update={"training": training}), "never", to_retrain=False)
        result = merge_parts(params, others)
        if earlier is None:
            return result
        # The version made first was joined with the version of the faster process: its images are not duplicates.
        counters = {"added": earlier.added + result.added, "duplicates": earlier.duplicates}
        return result.model_copy(update=counters | {"changed": earlier.changed or result.changed})

    result, version = publish_change(params, change)
    describe(params, version)
    announce(params, silently=False)
    return completed_state(result, result.lines()[0])


@retryable_task
def compact_parts(params: Params) -> CompactionResult:
    """Join the small parts."""
    return compaction.compact(params.dataset_folder, params.ingest, reporter())


@retryable_task
def merge_parts(params: Params, others: list[str]) -> MergeResult:
    """Find duplicates, take over parts, and curate."""
    return engine.merge(params, [dataset_folder(name) for name in others], progress=reporter())
