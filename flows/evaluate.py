"""Flow ``evaluate``: score the checkpoints of a run, or a registered version, and log the report to its MLflow run.

It can run beside a training: it reads checkpoints, which are written atomically, and writes to the report folder.
"""

from pathlib import Path

from mlflow.client import MlflowClient
from prefect import flow
from prefect.artifacts import create_table_artifact

from diffusion.api import engine
from diffusion.checkpoints import read_model_header
from diffusion.common.errors import UserError
from diffusion.common.escaping import escape_markdown
from diffusion.evaluation.reports.evaluation_report import findings
from diffusion.evaluation.reports.html import format_plain
from diffusion.evaluation.results import Evaluation
from diffusion.training.checkpointing import Checkpoints
from flows.config import Params
from flows.deployment.tasks import artifact_key, retryable_task
from flows.ingest import require_shards
from flows.registry import model_versions
from flows.registry.champion import require_champion
from flows.registry.model_versions import Version
from flows.registry.takedown_marks import EVALUATED_ON, join_takedown_names, require_current, warn_of_takedown
from flows.tracking.console import reporter
from flows.tracking.json_logs import RUN_ID
from flows.tracking.runs import TRAIN_KEY, RunTracker, find_run, log_evaluation, run_page


@flow(name="evaluate", flow_run_name="evaluate-{params.training.dataset}")
def evaluate(params: Params, folder: Path | None = None, model: str | None = None) -> Evaluation:
    """Evaluate every checkpoint, or the registered version ``model`` alone, against the held-out images.

    Reports to ``folder``, by default the folder of the data set, or of the version.
    """
    params, version = (params, None) if model is None else fetch_version(params, model)
    require_champion(params)
    folder = folder or report_folder(params, version)
    evaluation = evaluate_models(params, folder, version)
    report(params, evaluation, folder, version)
    return evaluation


@retryable_task
def fetch_version(params: Params, model: str) -> tuple[Params, Version]:
    """Fetch the version that ``model`` names; also returns the configuration to evaluate and promote it with."""
    version = model_versions.resolve(MlflowClient(), model)
    warn_of_takedown(version)
    header = read_model_header(model_versions.cached_weights(version))
    return params.adapt_to_version(header.model, version.model), version


def report_folder(params: Params, version: Version | None) -> Path:
    """Folder for the evaluation of ``version``, or of the training."""
    return params.report_folder if version is None else params.model_report_folder(version.weights_sha256)


@retryable_task
def evaluate_models(params: Params, folder: Path, version: Version | None) -> Evaluation:
    """Score the checkpoints, or the ``version``; results under the same conditions are cached."""
    require_current(params.dataset_folder)
    require_shards(params)
    weights = None if version is None else model_versions.cached_weights(version)
    return engine.evaluate(params, weights, output=folder, progress=reporter())


@retryable_task
def report(params: Params, evaluation: Evaluation, folder: Path, version: Version | None) -> None:
    """Log evaluated models, report page and grids to the MLflow run, and a summary to this flow run."""
    if version is None:
        tracker = find_tracker(params)
    else:
        tracker = RunTracker(MlflowClient(), version.run_id)
        RUN_ID.set(tracker.run_id)
        # Its pages show held-out images, which a takedown must find.
        tags = tracker.client.get_run(tracker.run_id).data.tags
        tracker.tag({EVALUATED_ON: join_takedown_names(tags.get(EVALUATED_ON), evaluation.conditions.content_digest)})
    require_current(params.dataset_folder)
    log_evaluation(tracker, evaluation)
    for path in (folder / "report.html", folder / "evaluation.json", *sorted(folder.glob("grids/*.png"))):
        tracker.log_file(path, "evaluation" if path.parent == folder else "evaluation/grids")
    pages = [run_page(tracker.client, tracker.run_id, artifact) for artifact in ("evaluation/report.html", None)]
    tried = [] if evaluation.guidance is None else evaluation.guidance.scores
    guidance_scores = {f"KID, guidance {entry.sampling.guidance_text}": entry.kid for entry in tried}
    rows = [
        {"metric": name, "value": format_plain(value)}
        for name, value in (evaluation.metrics() | guidance_scores).items()
    ]
    text = " ".join(escape_markdown(line) for line in findings(evaluation))
    description = f"{text}\n\n[Report]({pages[0]}) · [MLflow run]({pages[1]})"
    create_table_artifact(rows, key=artifact_key("evaluation", params.training.dataset), description=description)


def find_tracker(params: Params) -> RunTracker:
    """Tracker of the MLflow run of the training in ``params.run_folder``; raises UserError if there is none."""
    if (checkpoint := next(Checkpoints(params.run_folder / "checkpoints").iterate_whole(), None)) is None:
        raise UserError(f"no checkpoint in {params.run_folder}: run `darkroom train` first")
    client = MlflowClient()
    if (run := find_run(client, params.model_name, TRAIN_KEY, checkpoint[1]["train_key"])) is None:
        raise UserError(
            f"the run in {params.run_folder} is not in MLflow's experiment {params.model_name}: "
            "run `darkroom train` with the same configuration to record it"
        )
    RUN_ID.set(run.info.run_id)
    return RunTracker(client, run.info.run_id)
