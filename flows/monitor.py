"""Flow ``monitor``: re-evaluate the champion on the current held-out images, test for drift, and request retraining.

Two questions, each with half of ``monitor.false_alarms``: is the champion's KID worse than at its promotion, and do the
images that its training version lacks differ from those it learned, in any of the tests of
``diffusion.evaluation.drift``? A drift alarm (``flows.registry.alarms``) is
committed to S3, within the limits; its event starts the deployment of ``retrain``.
"""

import math
import time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from statistics import NormalDist
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
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
from flows.registry.alarms import Alarm, Alarms, Cause, NumberedAlarm, RetrainingHold
from flows.registry.ledger import who
from flows.tracking.console import reporter

if TYPE_CHECKING:
    from diffusion.data.manifest import Manifest
    from diffusion.evaluation.drift import DataDrift
    from flows.registry.model_versions import Version

DRIFTED = "darkroom.model.drifted"
MONITORED = "darkroom.monitored"  # tag of a version: digest of data, weights and settings of its last monitoring
SURELY = 3
"""Standard errors by which KID must at least be worse: at its promotion, a champion's KID is better by chance, too."""


class MonitorResult(Config):
    """Result of monitoring a champion."""

    model: str
    content_digest: str
    key: str
    """Digest of data, weights and settings."""
    figures: dict[str, float]
    """Current metrics; empty if it was monitored before with the same data and settings."""
    before: dict[str, float]
    data: dict[str, Any] | None = None
    """Fields of ``DataDrift``: the images that its training version lacks beside those it learned; None: too few."""
    causes: tuple[Cause, ...] = ()
    """Why a retraining is due; empty without significant drift."""
    alarm: NumberedAlarm | None = None
    """Drift alarm that requests the retraining."""
    held: RetrainingHold | None = None
    """Why no retraining is requested although it is due."""
    summary: str
    skipped: bool

    @property
    def state(self) -> str:
        """Name of the final state of the flow run; Held is a failure, so that a person looks at it."""
        if self.held is not None and self.held.limit == "week":
            return "Held"
        return "Skipped" if self.skipped else "Drifted" if self.causes else "Completed"


@flow(name="monitor", flow_run_name="monitor-{params.training.dataset}")
def monitor(params: Params) -> MonitorResult:
    """Re-evaluate the champion on the newest held-out images, test for drift, and request a retraining if there is."""
    require_permitted(params)
    sync(params, None)
    result = evaluate_champion(params)
    if not result.skipped:
        result = conclude(params, result)
    return completed_state(result, result.summary, result.state, failed=result.state == "Held")


@retryable_task
def evaluate_champion(params: Params) -> MonitorResult:
    """Evaluate the champion, unless done before with the same data and settings, and compare with its promotion."""
    # Slow imports, not needed by a deployment that only reads the signatures in this module.
    from mlflow.client import MlflowClient

    from diffusion.evaluation.comparison import evaluate_model
    from diffusion.evaluation.drift import level_of_test
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
    fields = {"model": version.uri, "content_digest": content, "key": key, "before": before}
    if version.tags.get(MONITORED) == key:
        summary = f"nothing to do: {version.uri} was compared with these images of {params.training.dataset} before"
        return MonitorResult(**fields, figures={}, summary=summary, skipped=True)

    require_shards(params)
    weights = model_versions.cached_weights(version)
    data, folder = params.dataset_folder, params.report_folder
    evaluation, extractor = evaluate_model(weights, data, params.evaluation, params.sampling, folder, reporter())
    figures = {name: value for name, value in evaluation.metrics().items() if math.isfinite(value)}
    training_data = read_run_manifest(client, version.run_id)
    line = [ancestor.digest for ancestor in versions(data)]
    position = (
        line.index(training_data.digest) if training_data is not None and training_data.digest in line else len(line)
    )
    level = level_of_test(position, params.monitor.false_alarms / 2)
    quality, is_worse = compare_kid(extractor, figures, before, level)
    drift = None if training_data is None else compare_data(params, version, training_data, level)
    tests = drift.tests if drift is not None else ()
    metrics = {f"monitor/{name}": value for name, value in figures.items()}
    metrics |= {f"monitor/{test.name}_p_value": test.p_value for test in tests}
    metrics |= {f"monitor/{test.name}_kid": test.kid for test in tests if test.kid is not None}
    RunTracker(client, version.run_id).log_metrics(metrics, int(time.time()))
    now, then = ({name: f"{value:.4g}" for name, value in scores.items()} for scores in (figures, before))
    rows = [{"metric": name, "now": now[name], "at promotion": then.get(name, "")} for name in sorted(now)]
    rows += [{"metric": f"p of {test.name}", "now": test.description, "at promotion": ""} for test in tests]
    summary = f"{version.uri}: {quality}; {describe_data(drift)}"
    create_table_artifact(rows, key=artifact_key("monitor", params.training.dataset), description=summary)
    return MonitorResult(
        **fields,
        figures=figures,
        data=drift and drift.model_dump(),
        causes=(*(["quality"] if is_worse else ()), *(test.name for test in tests if test.differs)),
        summary=summary,
        skipped=False,
    )


def compare_data(params: Params, version: "Version", training_data: "Manifest", level: float) -> "DataDrift | None":
    """Compare the images that ``training_data`` lacks with its own; None if there are too few."""
    from diffusion.data.dataset import Dataset
    from diffusion.evaluation.drift import compare_with_training

    folder = params.dataset_folder
    with TemporaryDirectory() as scratch, closing(Dataset.open(folder, cache_bytes=0)) as dataset:
        files = StoredFiles(training_data.name, data_source(), version.tags.get("darkroom.dvc_digest"))
        lookup = files.remote_lookup([training_data], Path(scratch))
        return compare_with_training(dataset, training_data, params.evaluation, level, lookup, reporter())


def compare_kid(
    extractor: str, now: dict[str, float], before: dict[str, float], level: float = 1.0
) -> tuple[str, bool]:
    """Compare KID on the features of ``extractor``; returns a summary, and whether it is significantly worse.

    ``level``: probability that it is called worse by chance; SURELY standard errors are required at any level.
    """
    kid, se = f"kid_{extractor}", f"kid_se_{extractor}"
    if kid not in now or se not in now:
        return f"there is no {kid} of this kind of model", False
    text = f"{kid} {now[kid]:.4g} ± {now[se]:.2g}"
    if kid not in before or se not in before:
        return f"{text}; it was not evaluated with it before", False
    errors = max(SURELY, NormalDist().inv_cdf(1 - level) if level < 1 else 0)
    is_worse = now[kid] - before[kid] > errors * math.hypot(now[se], before[se])
    verdict = "significantly worse" if is_worse else "not significantly worse"
    return f"{text}, {before[kid]:.4g} ± {before[se]:.2g} at promotion: {verdict}", is_worse


def describe_data(drift: "DataDrift | None") -> str:
    """Describe the comparison of images: the tests that found a difference, or else the most significant one."""
    if drift is None:
        return "too few new images to compare with those it learned"
    found = [test for test in drift.tests if test.differs]
    verdict = "differ from" if found else "show no difference from"
    details = ", ".join(test.description for test in found or [min(drift.tests, key=lambda test: test.p_value)])
    return f"{drift.added:,} new images {verdict} those it learned: {details}"


@retryable_task
def conclude(params: Params, result: MonitorResult) -> MonitorResult:
    """Raise an alarm if ``result`` has a cause and the limits allow it, and emit its event, once.

    Killed and repeated it finds the alarm by its key. A result that is held is looked at again by the next run.
    """
    from mlflow.client import MlflowClient

    from flows.registry.model_versions import resolve

    if result.causes and params.monitor.retrainings_per_week:
        alarms = Alarms.of(params.model_name)
        alarm = Alarm(
            model=params.model_name,
            key=result.key,
            when=datetime.now(UTC).replace(microsecond=0),
            who=who(),
            version=result.model,
            dataset=params.training.dataset,
            content_digest=result.content_digest,
            causes=result.causes,
            reason=result.summary[:1000],
        )
        answer = alarms.request(alarm, params.monitor)
        if isinstance(answer, RetrainingHold):
            summary = f"no retraining, {answer.words}; {result.summary}"
            result = result.model_copy(update={"held": answer, "summary": summary})
        else:
            if not alarms.is_announced(answer):
                emit(make_drift_event(answer, alarms))
                alarms.mark_announced(answer)
            summary = f"retraining requested by alarm {answer.number}; {result.summary}"
            result = result.model_copy(update={"alarm": answer, "summary": summary})
    if result.held is None:
        version = resolve(client := MlflowClient(), result.model)
        client.set_model_version_tag(version.model, str(version.number), MONITORED, result.key)
    return result


def make_drift_event(alarm: NumberedAlarm, alarms: Alarms) -> Event:
    """Prefect event of an alarm."""
    from flows.tracking.runs import version_page

    page = version_page(alarm.model, int(alarm.version.rpartition("/")[2]))
    payload = alarm.model_dump(mode="json", exclude={"format_version", "model", "who"})
    payload["text"] = f"{alarm.version} drifted, and a retraining is requested: {alarm.reason}\n{page}"
    return Event(
        event=DRIFTED,
        id=uuid5(NAMESPACE_URL, f"{DRIFTED}:{alarms.place}/{alarm.number}/{alarm.key}"),
        resource={"prefect.resource.id": f"darkroom.model.{alarm.model}", "prefect.resource.name": alarm.model},
        payload=payload | {"alarm": alarm.number},
    )
