"""Flows ``sweep`` and ``compare``: train several models on the same data and rank them in one report.

Each combination of a sweep is an ordinary training and evaluation in a folder of its own, and is skipped if it is
finished; its MLflow run is a child of the sweep's. A comparison trains each model family with the same budget.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow.client import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from pydantic import JsonValue

from diffusion.api import engine
from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.files import digest_of
from diffusion.common.image_grids import make_grid, png_bytes
from diffusion.common.progress import Progress
from diffusion.data.manifest import read_manifest
from diffusion.evaluation.evaluate import REAL_GRID, grid_name
from diffusion.evaluation.ranking import RANKING, Ranking, rank_evaluations, rank_models
from diffusion.evaluation.reports.ranking_report import (
    RANKING_PAGE,
    RankingPage,
    describe_ranking,
    training_charts,
)
from diffusion.evaluation.results import Evaluation
from flows.config import SECTIONS, SWEEPS, Combination, Params, combinations, family_variants, format_settings
from flows.deployment.tasks import artifact_key, retryable_task
from flows.evaluate import evaluate
from flows.ingest import require_shards
from flows.registry.takedown_marks import EVALUATED_ON, join_takedown_names, require_current
from flows.tracking.console import phase, reporter
from flows.tracking.runs import SWEEP, RunTracker, find_or_create_run
from flows.train import train

logger = logging.getLogger(__name__)


class RankingResult(Config):
    """Ranking of several trainings, with its report."""

    ranking: Ranking
    report: Path
    run_id: str | None = None
    """MLflow parent run of a sweep."""


@flow(name="sweep", flow_run_name="sweep-{params.training.dataset}")
def sweep(params: Params, over: dict[str, list[JsonValue]], options: Sequence[str] = ()) -> RankingResult:
    """Train and evaluate every combination of the values in ``over``, by dotted key, and rank them.

    ``options`` of the command line are those by which it got ``params``; the command that the report suggests has them
    as well. Raises UserError if two combinations are the same training, as the default of a field and its value.
    """
    points = combinations(params, over)
    parent = begin(params, over)
    runs: list[str] = []
    evaluations: list[Evaluation] = []
    seconds: dict[str, float] = {}
    for number, point in enumerate(points, start=1):
        words = format_settings(point.settings)
        logger.info("combination %d of %d: %s", number, len(points), words)
        with phase(words, seconds):
            run_id = train(point.params, restart="if_different").run_id
            if run_id in runs:
                raise UserError(
                    f"--over with {format_settings(point.settings)} is the same training as with "
                    f"{format_settings(points[runs.index(run_id)].settings)}: leave one of them out"
                )
            runs.append(run_id)
            MlflowClient().set_tag(runs[-1], MLFLOW_PARENT_RUN_ID, parent)
            evaluations.append(evaluate(point.params, point.folder))
    return rank(params, parent, points, runs, evaluations, options)


@retryable_task
def begin(params: Params, over: dict[str, list[JsonValue]]) -> str:
    """Find or create the parent run of the sweep, identified by its settings and data; returns its ID."""
    client, experiment = MlflowClient(), params.model_name
    sections = {name: getattr(params, name).model_dump(mode="json") for name in SECTIONS}
    key = digest_of([sections, over, read_manifest(params.dataset_folder).content_digest])
    run = find_or_create_run(client, experiment, SWEEP, key, f"sweep-{key[:8]}")
    for name, values in over.items():
        client.log_param(run.info.run_id, name, ", ".join(map(str, values)))
    client.update_run(run.info.run_id, status="RUNNING")
    return str(run.info.run_id)


@retryable_task
def rank(
    params: Params,
    parent: str,
    points: list[Combination],
    runs: list[str],
    evaluations: list[Evaluation],
    options: Sequence[str],
) -> RankingResult:
    """Rank all combinations; write the report and log it to the sweep's run; ``options`` as in ``sweep``."""
    ranking = rank_evaluations(evaluations, [point.settings for point in points], runs)
    places = dict(zip(runs, zip(points, evaluations, strict=True), strict=True))
    rows = [(model.name, *places[model.run_id]) for model in ranking.models if model.run_id is not None]
    page = params.report_folder / SWEEPS / f"{parent}.html"
    grids = {
        name: (point.folder / "grids" / grid_name(evaluation.best)).read_bytes() for name, point, evaluation in rows
    }
    losses = [point.params.run_folder / "losses.csv" for _, point, _ in rows]
    charts = training_charts(list(grids), [evaluation for *_, evaluation in rows], losses)
    real = (points[0].folder / "grids" / REAL_GRID).read_bytes()
    RankingPage(ranking, grids, real, charts, options).write(page)
    tracker = RunTracker(MlflowClient(), parent)
    # The page shows held-out images, which a takedown must find.
    tags = tracker.client.get_run(parent).data.tags
    content_digest = ranking.conditions.content_digest
    tracker.tag({EVALUATED_ON: join_takedown_names(tags.get(EVALUATED_ON), content_digest)})
    require_current(params.dataset_folder)
    tracker.client.log_text(parent, page.read_text(), "sweep.html")
    tracker.finish()
    values = [f"{model.value:.4g} ± {model.error:.2g}" for model in ranking.models]
    settings = [format_settings(model.settings) for model in ranking.models]
    create_table_artifact(
        {"settings": settings, ranking.metric: values}, key=artifact_key("sweep", params.training.dataset)
    )
    return RankingResult(ranking=ranking, report=page, run_id=parent)


@flow(name="compare", flow_run_name="compare-{params.training.dataset}")
def compare(params: Params, families: Sequence[str] = (), restart: bool = False) -> RankingResult:
    """Train the families one after the other and rank them by their samples.

    Without ``families``, all that train from scratch. Each training is resumable, and is the same run that ``train``
    makes. ``restart`` discards runs of other settings in the families' folders.
    """
    variants = family_variants(params, families)
    trainings, seconds = {}, dict[str, float]()
    for name, variant in variants.items():
        with phase(name, seconds):
            trainings[name] = train(variant, "if_different" if restart else "never")
    retryable_task(require_shards)(params)
    result = retryable_task(rank_variants)(variants, reporter())
    log_report([training.run_id for training in trainings.values()], result.report)
    create_markdown_artifact(
        "\n\n".join(describe_ranking(result.ranking)), key=artifact_key("comparison", params.training.dataset)
    )
    models = [model.model_copy(update={"run_id": trainings[model.name].run_id}) for model in result.ranking.models]
    return result.model_copy(update={"ranking": result.ranking.model_copy(update={"models": models})})


@retryable_task
def log_report(run_ids: Sequence[str], page: Path) -> None:
    """Log the report to the MLflow run of each training."""
    for run_id in run_ids:
        for path in (page, page.parent / RANKING):
            RunTracker(MlflowClient(), run_id).log_file(path, "evaluation")


def compare_here(variants: Mapping[str, Params], restart: bool, progress: Progress) -> RankingResult:
    """Train and rank the families as ``compare`` does, without servers."""
    for name, variant in variants.items():
        with phase(name, {}):
            engine.train(variant, restart="if_different" if restart else "never", progress=progress)
    return rank_variants(variants, progress)


def rank_variants(variants: Mapping[str, Params], progress: Progress) -> RankingResult:
    """Rank the final models by their samples, which are cached, and write the report."""
    params = next(iter(variants.values()))
    folder = Path("reports") / params.training.dataset
    models = {name: (variant.run_folder / "final.safetensors", variant.sampling) for name, variant in variants.items()}
    ranking, images = rank_models(params.dataset_folder, models, params.evaluation, folder, progress)
    sheets = {name: png_bytes(make_grid(samples, columns=8)) for name, samples in images.items()}
    RankingPage(ranking, sheets, sheets.pop("real")).write(folder / RANKING_PAGE)
    return RankingResult(ranking=ranking, report=folder / RANKING_PAGE)
