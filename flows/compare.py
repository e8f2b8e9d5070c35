"""Flow ``compare``: train each model family on the same images with the same budget, and rank them in a report."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from diffusion.evaluation.ranking import RANKING, Ranking
from diffusion.evaluation.reports.ranking_report import findings
from diffusion.models.config import FAMILIES
from flows.config import Params
from flows.deployment.tasks import retryable_task
from flows.evaluate import tracker_of
from flows.tracking.progress_reporter import reporter
from flows.train import train
from flows.variants import RankingResult, family_variants, rank_variants


@flow(name="compare", flow_run_name="compare-{params.training.dataset}")
def compare(params: Params, families: Sequence[str] = tuple(FAMILIES), restart: bool = False) -> RankingResult:
    """Train the families one after the other and rank them by their samples.

    Each training is resumable, and is the same run as that of ``train``. ``restart`` discards runs of other settings
    in the families' folders.
    """
    variants = family_variants(params, families)
    trained = {name: train(each, "if_different" if restart else "never") for name, each in variants.items()}
    ranking, page = rank(variants)
    models = [each.model_copy(update={"run_id": trained[each.name].run_id}) for each in ranking.models]
    report(variants, ranking, page)
    return RankingResult(ranking=ranking.model_copy(update={"models": models}), report=page)


@retryable_task
def rank(variants: Mapping[str, Params]) -> tuple[Ranking, Path]:
    """Sample from each model, rank them, and write the report; samples are cached."""
    return rank_variants(variants, reporter())


@retryable_task
def report(variants: Mapping[str, Params], ranking: Ranking, page: Path) -> None:
    """Log the report to the MLflow run of each training, and its findings to this flow run."""
    for params in variants.values():
        tracker = tracker_of(params)
        for path in (page, page.parent / RANKING):
            tracker.log_file(path, "evaluation")
    create_markdown_artifact("\n\n".join(findings(ranking)), key="comparison")
