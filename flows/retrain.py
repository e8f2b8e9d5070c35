"""Flow ``retrain``: the whole pipeline. Torch and MLflow are imported only when there is work, which is rare."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow
from prefect.runtime import flow_run
from pydantic import Field

from diffusion.common.config import Config
from diffusion.data.manifest import read_manifest
from diffusion.generation.config import UNCONDITIONAL, Conditions
from flows.checks import Request, check, require_worth_training
from flows.config import Params
from flows.datasets.checkout import CheckoutResult
from flows.datasets.sync import sync
from flows.deployment.tasks import completed_state, concurrency_slot, require_permitted, retryable_task
from flows.ingest import IngestOutcome, ingest
from flows.registry.retraining_notes import RetrainRequest
from flows.tracking.console import phase

if TYPE_CHECKING:
    from flows.promote import PromotionResult


class RetrainResult(Config):
    """Results of all steps of a retraining, or of the earlier one with the same inputs."""

    data: IngestOutcome | CheckoutResult
    run_id: str
    report: Path
    verdict: dict[str, Any]
    """Fields of ``PromotionResult``."""
    samples: dict[str, Any] | None
    """Fields of ``SamplingBatchResult``; None if there is no champion or it is a super-resolution model."""
    explained: dict[str, Any]
    """Fields of ``Explanation``."""
    start: str = ""
    """What the training began with, and why."""
    seconds: dict[str, float] = Field({})
    """Duration of each phase, in the order of their running."""
    quality: str = ""
    """KID with its interval, and the KID of real images."""
    advice: str | None = None
    """What would help: more images if the gate lacks them for its verdict, or else a longer training; None: unknown."""
    mlflow_page: str = ""
    prefect_page: str = ""
    """Addresses of the MLflow run and of this flow run."""
    skipped: str | None = None
    """Why there was nothing to do; None if there was."""


@flow(name="retrain", flow_run_name="retrain-{params.training.dataset}")
def retrain(
    params: Params,
    count: int = 64,
    seed: int = 0,
    to: str | None = None,
    conditions: Conditions = UNCONDITIONAL,
    version: str | None = None,
) -> RetrainResult:
    """Ingest, train, evaluate, promote, sample, explain; each step skips work that is done for the same inputs.

    Args:
        params: The configuration, as params.yaml has it.
        count: Number of images that the champion generates at the end.
        seed: Seed of these images.
        to: Destination, s3://BUCKET or s3://BUCKET/PREFIX; default: the standard prefix in Darkroom's bucket.
        conditions: Labels and prompts of these images.
        version: Digest of the data set version to train on, which is checked out; default: the newest version, plus
            the new images of ingest.source.
    """
    require_permitted(params)
    check("retrain", params, Request(version=version, count=count, seed=seed, to=to, conditions=conditions))
    seconds: dict[str, float] = {}
    with concurrency_slot(f"retrain-{params.training.dataset}"):
        with phase("ingest", seconds):
            checkout = sync(params, version) if version else None
            data = checkout or ingest(params, to_retrain=True)

        manifest = read_manifest(params.dataset_folder)
        request = RetrainRequest.of(params, manifest, count, seed, to, conditions)
        if (fields := request.find_earlier_result()) is not None:
            earlier = fields["verdict"]
            reason = (
                f"version {manifest.digest[:12]} of {manifest.name} was trained on with this configuration before, "
                f"which ended in models:/{earlier['version']['model']}/{earlier['version']['number']}: "
                f"{earlier['reason']}"
            )
            result = RetrainResult.model_validate(fields | {"data": data, "skipped": reason})
            return completed_state(result, f"nothing to do: {reason}", name="Skipped")

        require_worth_training(params, manifest, conditions)
        expected = request.estimate_phase_seconds()
        fields = train_and_promote(params, (count, seed, to, conditions), seconds, expected)
        verdict: PromotionResult = fields["verdict"]
        result = RetrainResult(**fields | {"data": data, "verdict": verdict.model_dump(mode="json")})
        request.write_note(result)
    return completed_state(result, f"{verdict.version.uri} is {verdict.title}: {verdict.reason}")


def train_and_promote(
    params: Params,
    samples_of: tuple[int, int, str | None, Conditions],
    seconds: dict[str, float],
    expected: dict[str, float],
) -> dict[str, Any]:
    """Run the steps after the ingest; returns the fields of ``RetrainResult`` but for the data.

    ``samples_of`` are count, seed, destination and conditions of the champion's images, ``expected`` are the seconds
    that phases take, as far as known; those that they took are added to ``seconds``.
    """
    # Imported late: torch and MLflow take seconds, which a skipped retraining saves.
    from mlflow.client import MlflowClient

    from diffusion.evaluation.reports.evaluation_report import advise_longer, describe_kid
    from flows.evaluate import evaluate
    from flows.explain import explain
    from flows.promote import last_comparison, promote
    from flows.registry.champion import require_champion
    from flows.registry.retraining_start import resolve_retraining_start
    from flows.sample import sample, samples_from_noise
    from flows.tracking.runs import run_page
    from flows.train import train

    require_champion(params)
    start = retryable_task(resolve_retraining_start)(params)
    params = start.apply(params)
    with phase("train", seconds, expected):
        training = train(params, restart="set_aside")
    with phase("evaluate", seconds, expected):
        evaluation = evaluate(params)
    with phase("promote", seconds, expected):
        verdict = promote(params)
    with phase("sample", seconds, expected):
        # There may be no champion yet, or an earlier super-resolution model.
        has_samples = verdict.champion is not None and samples_from_noise(params.champion)
        samples = sample(params, params.champion, *samples_of) if has_samples else None
    with phase("explain", seconds, expected):
        explanation = explain(params, verdict.version.uri, params.report_folder / "explain")
    comparison = last_comparison(params, verdict.version)
    return {
        "run_id": training.run_id,
        "report": params.report_folder / "report.html",
        "verdict": verdict,
        "samples": samples and samples.model_dump(mode="json"),
        "explained": explanation.model_dump(mode="json"),
        "start": start.text,
        "seconds": seconds,
        # As the gate says it, with the guidance of the version.
        "quality": describe_kid(evaluation, *((comparison.candidate, comparison.real_baseline) if comparison else ())),
        "advice": (comparison and comparison.shortage) or advise_longer(evaluation),
        "mlflow_page": run_page(MlflowClient(), training.run_id),
        "prefect_page": flow_run.ui_url or "",
    }
