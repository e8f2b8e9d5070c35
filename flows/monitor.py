"""Flow ``monitor``: re-evaluate the champion on the current held-out images of a data set."""

import math
import time

from prefect import flow
from prefect.artifacts import create_table_artifact

from diffusion.common.config import Config
from diffusion.common.files import digest_of
from diffusion.data.manifest import read_manifest
from flows.config import Params
from flows.datasets.sync import sync
from flows.deployment.tasks import artifact_key, completed_state, retryable_task
from flows.tracking.console import reporter

MONITORED = "darkroom.monitored"  # tag of a version: digest of data, weights and settings of its last monitoring
SURELY = 3  # standard errors by which a metric must change to count as drift; happens by chance once in 370 times


class MonitorResult(Config):
    """Result of monitoring a champion."""

    model: str
    content_digest: str
    figures: dict[str, float]
    """Current metrics; empty if it was monitored before with the same data and settings."""
    before: dict[str, float]
    drifted: bool
    """Whether KID is significantly worse than at promotion."""
    summary: str
    skipped: bool


@flow(name="monitor", flow_run_name="monitor-{params.training.dataset}")
def monitor(params: Params) -> MonitorResult:
    """Re-evaluate the champion on the newest held-out images, and log the metrics to its MLflow run."""
    sync(params, None)
    result = evaluate_champion(params)
    name = "Skipped" if result.skipped else "Drifted" if result.drifted else "Completed"
    return completed_state(result, result.summary, name)


@retryable_task
def evaluate_champion(params: Params) -> MonitorResult:
    """Evaluate the champion, unless done before with the same data and settings, and compare with its promotion."""
    # Slow imports, not needed by a deployment that only reads the signatures in this module.
    from mlflow.client import MlflowClient

    from diffusion.evaluation.comparison import evaluate_model
    from flows.registry import model_versions
    from flows.registry.aliases import verified
    from flows.registry.ledger import Ledger
    from flows.tracking.runs import RunTracker

    client, content = MlflowClient(), read_manifest(params.dataset_folder).content_digest
    version = model_versions.resolve(client, params.champion)
    entry = verified(client, Ledger.of(version.model)).about(version.number)
    before = entry.evidence.figures if entry and entry.evidence else {}
    conditions = [params.evaluation.model_dump(mode="json"), params.sampling.model_dump(mode="json")]
    key = digest_of([content, version.weights_sha256, *conditions])
    about = {"model": version.uri, "content_digest": content, "before": before}
    if version.tags.get(MONITORED) == key:
        summary = f"nothing to do: {version.uri} was compared with these images of {params.training.dataset} before"
        return MonitorResult(**about, figures={}, drifted=False, summary=summary, skipped=True)

    weights = model_versions.cached_weights(version)
    data, folder = params.dataset_folder, params.report_folder
    evaluated, extractor = evaluate_model(weights, data, params.evaluation, params.sampling, folder, reporter())
    figures = {name: value for name, value in evaluated.metrics().items() if math.isfinite(value)}
    summary, drifted = compare_kid(extractor, figures, before)
    logged = {f"monitor/{name}": value for name, value in figures.items()}
    RunTracker(client, version.run_id).log_metrics(logged, int(time.time()))
    now, then = ({name: f"{value:.4g}" for name, value in each.items()} for each in (figures, before))
    rows = [{"metric": name, "now": now[name], "at promotion": then.get(name, "")} for name in sorted(now)]
    create_table_artifact(
        rows, key=artifact_key("monitor", params.training.dataset), description=f"{version.uri}: {summary}"
    )
    client.set_model_version_tag(version.model, str(version.number), MONITORED, key)
    return MonitorResult(**about, figures=figures, drifted=drifted, summary=f"{version.uri}: {summary}", skipped=False)


def compare_kid(extractor: str, now: dict[str, float], before: dict[str, float]) -> tuple[str, bool]:
    """Compare KID on the features of ``extractor``; returns a summary, and whether it is significantly worse."""
    kid, se = f"kid_{extractor}", f"kid_se_{extractor}"
    words = f"{kid} {now[kid]:.4g} ± {now[se]:.2g}"
    if kid not in before or se not in before:
        return f"{words}; it was not evaluated with it before", False
    drifted = now[kid] - before[kid] > SURELY * math.hypot(now[se], before[se])
    verdict = "significantly worse" if drifted else "not significantly worse"
    return f"{words}, {before[kid]:.4g} ± {before[se]:.2g} at promotion: {verdict}", drifted
