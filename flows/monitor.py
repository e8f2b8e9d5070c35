"""Flow ``monitor``: re-evaluate the champion on the current held-out images, test for drift, and request retraining.

If the held-out images that the champion's training version lacks differ from those it has
(``diffusion.evaluation.drift``), a Prefect event starts the deployment of ``retrain``.
"""

import math
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.events import Event

from diffusion.common.config import Config
from diffusion.common.files import digest_of
from diffusion.data.manifest import read_manifest, versions
from flows.config import Params
from flows.datasets.dvc import StoredFiles
from flows.datasets.sync import sync
from flows.deployment.tasks import artifact_key, completed_state, emit, require_permitted, retryable_task
from flows.environment import data_source
from flows.ingest import require_shards
from flows.tracking.console import reporter

DRIFTED = "darkroom.model.drifted"
MONITORED = "darkroom.monitored"  # tag of a version: digest of data, weights and settings of its last monitoring


class MonitorResult(Config):
    """Result of monitoring a champion."""

    model: str
    content_digest: str
    figures: dict[str, float]
    """Current metrics; empty if it was monitored before with the same data and settings."""
    drift: dict[str, Any] | None = None
    """Fields of ``DataDrift``; None: too few held-out images that its training version lacks, or has."""
    drifted: bool = False
    """Whether they differ, and a retraining is requested."""
    summary: str
    skipped: bool


@flow(name="monitor", flow_run_name="monitor-{params.training.dataset}")
def monitor(params: Params) -> MonitorResult:
    """Re-evaluate the champion on the newest held-out images, test for drift, and request a retraining if there is."""
    require_permitted(params)
    sync(params, None)
    result = evaluate_champion(params)
    state = "Skipped" if result.skipped else "Drifted" if result.drifted else "Completed"
    return completed_state(result, result.summary, state)


@retryable_task
def evaluate_champion(params: Params) -> MonitorResult:
    """Evaluate the champion, unless done before with the same data and settings, and test for drift."""
    # Slow imports, not needed by a deployment that only reads the signatures in this module.
    from mlflow.client import MlflowClient

    from diffusion.evaluation.comparison import evaluate_model
    from diffusion.evaluation.drift import compare_features, find_new_images, level_of_test
    from flows.registry import model_versions
    from flows.registry.aliases import read_verified_history
    from flows.registry.ledger import Ledger
    from flows.tracking.runs import RunTracker, read_run_manifest

    client, content = MlflowClient(), read_manifest(params.dataset_folder).content_digest
    version = model_versions.resolve(client, params.champion)
    entry = read_verified_history(client, Ledger.of(version.model)).find_newest_entry(version.number)
    before = entry.evidence.figures if entry and entry.evidence else {}
    conditions = [params.evaluation.model_dump(mode="json"), params.sampling.model_dump(mode="json")]
    key = digest_of([content, version.weights_sha256, *conditions])
    fields = {"model": version.uri, "content_digest": content}
    if version.tags.get(MONITORED) == key:
        summary = f"nothing to do: {version.uri} was compared with these images of {params.training.dataset} before"
        return MonitorResult(**fields, figures={}, summary=summary, skipped=True)

    require_shards(params)
    weights = model_versions.cached_weights(version)
    data, folder = params.dataset_folder, params.report_folder
    evaluation, evaluator = evaluate_model(weights, data, params.evaluation, params.sampling, folder, reporter())
    figures = {name: value for name, value in evaluation.metrics().items() if math.isfinite(value)}
    trained = read_run_manifest(client, version.run_id)
    line = [ancestor.digest for ancestor in versions(data)]
    newer = line.index(trained.digest) if trained is not None and trained.digest in line else len(line)
    level = level_of_test(newer, params.monitor.false_alarms)
    drift = None
    if trained is not None:
        with TemporaryDirectory() as scratch:
            files = StoredFiles(trained.name, data_source(), version.tags.get("darkroom.dvc_digest"))
            lookup, real = files.remote_lookup([trained], Path(scratch)), evaluator.real
            is_new = find_new_images(real.dataset, real.compared, trained, lookup)
        drift = compare_features(real.reference.features, is_new, level)
    metrics = {f"monitor/{name}": value for name, value in figures.items()}
    if drift is not None:
        metrics |= {"monitor/images_p_value": drift.p_value, "monitor/images_kid": drift.kid}
    RunTracker(client, version.run_id).log_metrics(metrics, int(time.time()))
    now, then = ({name: f"{value:.4g}" for name, value in scores.items()} for scores in (figures, before))
    rows = [{"metric": name, "now": now[name], "at promotion": then.get(name, "")} for name in sorted(now)]
    kid = f"kid_{evaluator.conditions.extractor}"
    words = "too few new held-out images to compare with older ones" if drift is None else str(drift)
    summary = f"{version.uri}: {kid} {now.get(kid, 'unknown')}, {then.get(kid, 'unknown')} at promotion; {words}"
    create_table_artifact(rows, key=artifact_key("monitor", params.training.dataset), description=summary)
    result = MonitorResult(
        **fields,
        figures=figures,
        drift=drift and drift.model_dump(),
        drifted=drift is not None and drift.differs,
        summary=summary,
        skipped=False,
    )
    # Before the tag: killed and repeated, the same event is emitted again.
    if result.drifted:
        emit(make_drift_event(result, version.model, version.weights_sha256))
    client.set_model_version_tag(version.model, str(version.number), MONITORED, key)
    return result


def make_drift_event(result: MonitorResult, model: str, weights_sha256: str) -> Event:
    """Prefect event that requests a retraining, one for the same images and champion."""
    return Event(
        event=DRIFTED,
        id=uuid5(NAMESPACE_URL, f"{DRIFTED}:{model}/{result.content_digest}/{weights_sha256}"),
        resource={"prefect.resource.id": f"darkroom.model.{model}", "prefect.resource.name": model},
        payload={"version": result.model, "content_digest": result.content_digest, "text": result.summary},
    )
