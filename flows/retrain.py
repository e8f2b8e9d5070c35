"""Flow ``retrain``: the whole pipeline, once for the same request, of which a note on S3 is left.

Torch and MLflow are imported only when there is work, which is rare.
"""

import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow
from prefect.runtime import flow_run
from pydantic import AliasPath, BaseModel, Field, ValidationError

from diffusion.common.config import Config, PlainName
from diffusion.common.errors import ConflictError, UserError
from diffusion.common.files import digest_of
from diffusion.data.manifest import Manifest, read_manifest
from diffusion.generation.config import UNCONDITIONAL, Conditions
from flows.checks import Request, check, require_worth_training
from flows.config import Params, registered_autoencoder
from flows.datasets.checkout import CheckoutResult
from flows.datasets.sync import sync
from flows.deployment.tasks import completed_state, concurrency_slot, require_permitted, retryable_task
from flows.environment import settings
from flows.ingest import IngestOutcome, ingest
from flows.registry.ledger import Ledger
from flows.storage.s3 import Store
from flows.storage.s3_errors import MissingObjectError
from flows.storage.tags import VersionNumber
from flows.tracking.console import phase

if TYPE_CHECKING:
    from flows.promote import PromotionResult

logger = logging.getLogger(__name__)


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


class Note(BaseModel):
    """Fields of a note, a ``RetrainResult`` in JSON, that ``retrain`` reads."""

    model: PlainName = Field(validation_alias=AliasPath("verdict", "version", "model"))
    number: VersionNumber = Field(validation_alias=AliasPath("verdict", "version", "number"))
    reason: str = Field(validation_alias=AliasPath("verdict", "reason"))
    seconds: dict[str, float] = {}


@dataclass(frozen=True)
class RetrainRequest:
    """Retraining request, done once: a note on S3, ``retrained/MODEL/<key>.json``, is written last.

    ``key`` is the digest of the data set's content, the configuration except for the source of images, the contact
    sheet, and the autoencoder if its alias names it. Machine, code and champion do not count as changes.
    """

    model: str
    key: str

    @classmethod
    def of(
        cls, params: Params, version: Manifest, count: int, seed: int, to: str | None, conditions: Conditions
    ) -> "RetrainRequest":
        """Request to retrain on ``version``; the other arguments are for ``sample``, which makes the contact sheet."""
        uri = registered_autoencoder(params)
        champion = None
        if uri is not None and uri.endswith("@champion"):
            head = Ledger.of(uri.removeprefix("models:/").removesuffix("@champion")).head()
            champion = head.alias_numbers.champion if head else None
        parts = {
            "content": version.content_digest,
            # Windowed training order depends on the layout of the shards.
            "layout": version.layout_digest if params.training.window is not None else None,
            "params": params.model_dump(mode="json", exclude={"ingest", "curation", "retention", "monitor"}),
            "autoencoder": champion,
            "samples": [count, seed, to, conditions.model_dump(mode="json")],
        }
        return cls(params.model_name, digest_of(parts))

    @property
    def _note(self) -> tuple[str, str]:
        return settings().bucket, f"retrained/{self.model}/{self.key}.json"

    def find_earlier_result(self) -> dict[str, Any] | None:
        """Result of an earlier retraining with the same key; None if there is none."""
        try:
            note = Store().get(*self._note, max_bytes=2**24)
            Note.model_validate_json(note)
        except MissingObjectError:
            return None
        except (ValidationError, UserError):
            # Each step finds its earlier results by itself.
            logger.warning(
                "s3://%s/%s is not the note of a retraining, so this one is done again: delete it", *self._note
            )
            return None
        return dict(json.loads(note))

    def estimate_phase_seconds(self) -> dict[str, float]:
        """Seconds of the phases after training, as in the newest retraining of the model; empty if there is none."""
        bucket, store = settings().bucket, Store()
        notes = store.list_objects(bucket, f"retrained/{self.model}/")
        if (note := max(notes, key=lambda entry: entry.written, default=None)) is None:
            return {}
        try:
            seconds = Note.model_validate_json(store.get(bucket, note.key, max_bytes=2**24)).seconds
        except (MissingObjectError, ValidationError, UserError):
            return {}
        # That of the training is measured as it goes.
        return {name: duration for name, duration in seconds.items() if name not in ("ingest", "train")}

    def write_note(self, result: Config) -> None:
        """Write the note that the request is done."""
        # Another machine may have finished the same request with another result.
        with suppress(ConflictError):
            Store().put_once(*self._note, result.model_dump_json().encode(), content_type="application/json")


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
