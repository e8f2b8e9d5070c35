"""The flow ``sweep``: the same data, trained on with every combination of some settings, compared on one page.

Each combination is a training and an evaluation like any other, in a folder of its own, and its run in MLflow is a
child of the sweep's. What is done is left, so the same command goes on after a kill, and one that tries more keeps what
is there.
"""

from pathlib import Path

from mlflow.client import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from pydantic import JsonValue

from diffusion.config import Config
from diffusion.data.manifest import read_manifest
from diffusion.escaping import escape_markdown
from diffusion.evaluation.results import Evaluation
from diffusion.evaluation.sweep_page import Tried, ranked, write_sweep_page
from diffusion.files import digest_of
from flows.combinations import SECTIONS, Combination, combinations, words_of
from flows.evaluate import evaluate
from flows.params import Params
from flows.steps import step
from flows.tracking import SWEEP, RunTracker, one_run
from flows.train import train

PAGE = "sweep.html"
"""Among the artifacts of a sweep's run."""


class Point(Config):
    """A combination that was tried."""

    settings: dict[str, JsonValue]
    run_id: str
    output: Path
    merit: str
    """The figure that they are compared by, such as kid_efflite0."""
    value: float
    error: float


class Swept(Config):
    """All combinations, the best first."""

    run_id: str
    """The parent of their runs in MLflow."""
    page: Path
    points: list[Point]


@flow(name="sweep", flow_run_name="sweep-{params.training.dataset}")
def sweep(params: Params, over: dict[str, list[JsonValue]]) -> Swept:
    """Train and evaluate with every combination of the values that ``over`` gives to dotted keys, and compare them."""
    points = combinations(params, over)
    parent = begin(params, over)
    runs: list[str] = []
    evaluations: list[Evaluation] = []
    for point in points:
        runs.append(train(point.params, restart="if_different").run_id)
        adopt(parent, runs[-1])
        evaluations.append(evaluate(point.params, point.folder))
    return compare(params, parent, points, runs, evaluations)


@step
def begin(params: Params, over: dict[str, list[JsonValue]]) -> str:
    """The sweep's own run, which is found again by what is to be tried on which data."""
    client, experiment = MlflowClient(), params.model_name
    same = {name: getattr(params, name).model_dump(mode="json") for name in SECTIONS}
    key = digest_of([same, over, read_manifest(params.dataset_folder).content_digest])
    run = one_run(client, experiment, SWEEP, key, f"sweep-{key[:8]}")
    for name, values in over.items():
        client.log_param(run.info.run_id, name, ", ".join(map(str, values)))
    client.update_run(run.info.run_id, status="RUNNING")
    return str(run.info.run_id)


@step
def adopt(parent: str, run_id: str) -> None:
    """Make a run a child of the sweep's."""
    MlflowClient().set_tag(run_id, MLFLOW_PARENT_RUN_ID, parent)


@step
def compare(
    params: Params, parent: str, points: list[Combination], runs: list[str], evaluations: list[Evaluation]
) -> Swept:
    """Write the page that compares all of them, here and to the sweep's run."""
    tried = [
        Tried(
            settings=point.settings,
            evaluation=evaluation,
            losses=point.params.run_folder / "losses.csv",
            drawn=(point.folder / "grids" / _grid_of(evaluation)).read_bytes(),
            run_id=run_id,
            output=str(point.params.run_folder),
        )
        for point, run_id, evaluation in zip(points, runs, evaluations, strict=True)
    ]
    page = params.report_folder / "sweeps" / f"{parent}.html"
    write_sweep_page(page, params.training.dataset, tried)
    tracker = RunTracker(MlflowClient(), parent)
    tracker.client.log_text(parent, page.read_text(), PAGE)
    tracker.finish()
    done = Swept(run_id=parent, page=page, points=[_point(each) for each in ranked(tried)])
    lines = [
        f"| {escape_markdown(words_of(each.settings))} | {each.value:.4g} ± {each.error:.2g} |" for each in done.points
    ]
    create_markdown_artifact("\n".join([f"| settings | {done.points[0].merit} |", "|---|---|", *lines]), key="sweep")
    return done


def _point(tried: Tried) -> Point:
    merit = tried.evaluation.best.merit
    return Point(
        settings=dict(tried.settings),
        run_id=tried.run_id,
        output=Path(tried.output),
        merit=merit.name,
        value=merit.value,
        error=merit.error,
    )


def _grid_of(evaluation: Evaluation) -> str:
    return f"{evaluation.best.images:010d}-{evaluation.best.sha256[:8]}.png"
