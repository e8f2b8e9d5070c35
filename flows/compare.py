"""Flow ``compare``: train each model family on the same images with the same budget, and rank them in a report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.client import MlflowClient
from prefect import flow
from prefect.artifacts import create_markdown_artifact

from diffusion.common.errors import UserError
from diffusion.common.image_grids import grid, png_bytes
from diffusion.common.progress import Progress
from diffusion.evaluation.ranking import RANKING, Ranking, rank_models
from diffusion.evaluation.reports.ranking_report import PAGE, findings, write_ranking_report
from diffusion.models.config import FAMILIES
from flows.config import Params
from flows.deployment.tasks import retryable_task
from flows.evaluate import RankingResult
from flows.tracking.console import reporter
from flows.tracking.runs import RunTracker
from flows.train import train

SHARED: Mapping[str, set[str]] = {
    "training": {
        *("dataset", "images", "minutes", "flip", "seed", "precision", "device", "compile", "checkpoints", "keep"),
        *("cpu_threads", "workers", "prefetch", "cache_bytes", "stream_bytes", "window"),
    },
    "sampling": {"compute_batch", "precision", "device"},
}
"""Settings shared by all families: data, budget and compute; the rest has each family's defaults."""


@flow(name="compare", flow_run_name="compare-{params.training.dataset}")
def compare(params: Params, families: Sequence[str] = tuple(FAMILIES), restart: bool = False) -> RankingResult:
    """Train the families one after the other and rank them by their samples.

    Each training is resumable, and is the same run as that of ``train``. ``restart`` discards runs of other settings
    in the families' folders.
    """
    variants = family_variants(params, families)
    trained = {name: train(each, "if_different" if restart else "never") for name, each in variants.items()}
    ranking, page = retryable_task(rank_variants)(variants, reporter())
    models = [each.model_copy(update={"run_id": trained[each.name].run_id}) for each in ranking.models]
    report([each.run_id for each in trained.values()], page)
    create_markdown_artifact("\n\n".join(findings(ranking)), key="comparison")
    return RankingResult(ranking=ranking.model_copy(update={"models": models}), report=page)


@retryable_task
def report(run_ids: Sequence[str], page: Path) -> None:
    """Log the report to the MLflow run of each training."""
    for run_id in run_ids:
        for path in (page, page.parent / RANKING):
            RunTracker(MlflowClient(), run_id).log_file(path, "evaluation")


def family_variants(params: Params, names: Sequence[str]) -> dict[str, Params]:
    """Configurations of the families in ``names``, by name.

    The family of ``params`` keeps ``params``; the others have their own defaults with the same images, budget and
    evaluation. Raises UserError for an unknown or repeated family, and for settings that families cannot share.
    """
    if unknown := [family for family in names if family not in FAMILIES]:
        raise UserError(f"there is no family {unknown[0]!r}: there is {', '.join(FAMILIES)}")
    if len(set(names)) < max(2, len(names)):
        raise UserError(f"--family {' --family '.join(names)}: name two families or more, each once")
    for field, value in (("training.output", params.training.output), ("registry.model", params.registry.model)):
        if value is not None:
            raise UserError(f"{field} = {value} is one place, and each family needs its own: leave it out")
    if params.model.low_resolution is not None:
        raise UserError("model.low_resolution makes a super-resolution model, and `compare` ranks generative ones")
    shared: dict[str, Any] = {name: getattr(params, name).model_dump(include=SHARED[name]) for name in SHARED}
    shared |= {"ingest": params.ingest.model_dump(), "evaluation": params.evaluation.model_dump(exclude={"ema_stds"})}
    return {
        name: params if name == params.model.family else Params.model_validate(shared | {"model": {"family": name}})
        for name in names
    }


def rank_variants(variants: Mapping[str, Params], progress: Progress) -> tuple[Ranking, Path]:
    """Rank the final models by their samples, which are cached; returns the ranking and its report."""
    params = next(iter(variants.values()))
    folder = Path("reports") / params.training.dataset
    models = {name: (each.run_folder / "final.safetensors", each.sampling) for name, each in variants.items()}
    ranking, images = rank_models(params.dataset_folder, models, params.evaluation, folder, progress)
    sheets = {name: png_bytes(grid(each, columns=8)) for name, each in images.items()}
    write_ranking_report(folder / PAGE, ranking, sheets, sheets.pop("real"))
    return ranking, folder / PAGE
