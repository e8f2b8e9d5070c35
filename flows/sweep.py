"""Flow ``sweep``: grid search over settings on the same data, ranked in one report.

Each combination is an ordinary training and evaluation in a separate folder; its MLflow run is a child of the sweep's
run. Finished combinations are skipped, so a sweep can be resumed and extended.
"""

from mlflow.client import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from pydantic import JsonValue

from diffusion.common.escaping import escape_markdown
from diffusion.common.files import digest_of
from diffusion.data.manifest import read_manifest
from diffusion.evaluation.evaluate import REAL_GRID, grid_name
from diffusion.evaluation.ranking import rank_evaluations
from diffusion.evaluation.reports.ranking_report import training_charts, write_ranking_report
from diffusion.evaluation.results import Evaluation
from flows.config import Params
from flows.deployment.tasks import retryable_task
from flows.evaluate import evaluate
from flows.tracking.runs import SWEEP, RunTracker, one_run
from flows.train import train
from flows.variants import SECTIONS, Combination, RankingResult, combinations, words_of

PAGE = "sweep.html"
"""Name of the report among the artifacts of the sweep's run."""


@flow(name="sweep", flow_run_name="sweep-{params.training.dataset}")
def sweep(params: Params, over: dict[str, list[JsonValue]]) -> RankingResult:
    """Train and evaluate every combination of the values in ``over``, by dotted key, and rank them."""
    points = combinations(params, over)
    parent = begin(params, over)
    runs: list[str] = []
    evaluations: list[Evaluation] = []
    for point in points:
        runs.append(train(point.params, restart="if_different").run_id)
        adopt(parent, runs[-1])
        evaluations.append(evaluate(point.params, point.folder))
    return rank(params, parent, points, runs, evaluations)


@retryable_task
def begin(params: Params, over: dict[str, list[JsonValue]]) -> str:
    """Find or create the parent run of the sweep, identified by its settings and data; returns its ID."""
    client, experiment = MlflowClient(), params.model_name
    same = {name: getattr(params, name).model_dump(mode="json") for name in SECTIONS}
    key = digest_of([same, over, read_manifest(params.dataset_folder).content_digest])
    run = one_run(client, experiment, SWEEP, key, f"sweep-{key[:8]}")
    for name, values in over.items():
        client.log_param(run.info.run_id, name, ", ".join(map(str, values)))
    client.update_run(run.info.run_id, status="RUNNING")
    return str(run.info.run_id)


@retryable_task
def adopt(parent: str, run_id: str) -> None:
    """Make a run a child of the sweep's run."""
    MlflowClient().set_tag(run_id, MLFLOW_PARENT_RUN_ID, parent)


@retryable_task
def rank(
    params: Params, parent: str, points: list[Combination], runs: list[str], evaluations: list[Evaluation]
) -> RankingResult:
    """Rank all combinations; write the report and log it to the sweep's run."""
    ranking = rank_evaluations(evaluations, [each.settings for each in points], runs)
    places = dict(zip(runs, zip(points, evaluations, strict=True), strict=True))
    ordered = {each.name: places[each.run_id] for each in ranking.models if each.run_id is not None}
    page = params.report_folder / "sweeps" / f"{parent}.html"
    write_ranking_report(
        page,
        ranking,
        {name: (point.folder / "grids" / grid_name(each.best)).read_bytes() for name, (point, each) in ordered.items()},
        (points[0].folder / "grids" / REAL_GRID).read_bytes(),
        training_charts(
            list(ordered),
            [each for _, each in ordered.values()],
            [point.params.run_folder / "losses.csv" for point, _ in ordered.values()],
        ),
    )
    tracker = RunTracker(MlflowClient(), parent)
    tracker.client.log_text(parent, page.read_text(), PAGE)
    tracker.finish()
    lines = [
        f"| {escape_markdown(words_of(each.settings))} | {each.value:.4g} ± {each.error:.2g} |"
        for each in ranking.models
    ]
    create_markdown_artifact("\n".join([f"| settings | {ranking.metric} |", "|---|---|", *lines]), key="sweep")
    return RankingResult(ranking=ranking, report=page, run_id=parent)
