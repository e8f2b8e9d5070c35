"""The flow ``compare``: each family trained for as long on the same pictures, and all of them judged side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from diffusion.config import Config
from diffusion.evaluation.comparison import COMPARISON, Comparison
from diffusion.evaluation.comparison_page import PAGE, findings
from diffusion.models.config import FAMILIES
from flows.evaluate import tracker_of
from flows.families import contestants, judged, report_folder
from flows.params import Params
from flows.progress import reporter
from flows.steps import step
from flows.train import train


class Compared(Config):
    """What a comparison found, and where."""

    comparison: Comparison
    report: Path
    run_ids: dict[str, str]
    """The training of each family in MLflow."""


@flow(name="compare", flow_run_name="compare-{params.training.dataset}")
def compare(params: Params, families: Sequence[str] = tuple(FAMILIES), restart: bool = False) -> Compared:
    """Train each family as ``params`` say, one after the other, and judge what they draw.

    Each training is the run that ``train`` makes, and goes on where it was stopped; ``restart``: throw away those of
    other settings that lie in their folders.
    """
    entrants = contestants(params, families)
    trained = {name: train(each, "if_different" if restart else "never") for name, each in entrants.items()}
    comparison = judge(entrants)
    report(entrants, comparison)
    page = report_folder(entrants) / PAGE
    return Compared(comparison=comparison, report=page, run_ids={name: each.run_id for name, each in trained.items()})


@step
def judge(entrants: Mapping[str, Params]) -> Comparison:
    """Draw with each, compare, and write the page; what was drawn before is remembered."""
    return judged(entrants, reporter())


@step
def report(entrants: Mapping[str, Params], comparison: Comparison) -> None:
    """Put the page on the MLflow run of each training, and what it says on this one."""
    for params in entrants.values():
        tracker = tracker_of(params)
        for name in (PAGE, COMPARISON):
            tracker.log_file(report_folder(entrants) / name, "evaluation")
    create_markdown_artifact("\n\n".join(findings(comparison)), key="comparison")
