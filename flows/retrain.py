"""Flow ``retrain``: the whole pipeline; imports torch and MLflow only when there is work, as mostly there is none."""

import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from pydantic import AliasPath, BaseModel, Field, ValidationError

from diffusion.common.config import Config, PlainName
from diffusion.common.errors import ConflictError, UserError
from diffusion.common.escaping import escape_markdown
from diffusion.common.files import digest_of
from diffusion.data.manifest import Manifest, read_manifest
from diffusion.generation.config import UNCONDITIONAL, Conditions
from flows.config import Params, registered_autoencoder
from flows.datasets.checkout import CheckoutResult
from flows.datasets.sync import sync
from flows.deployment.tasks import artifact_key, completed_state, concurrency_slot, require_permitted
from flows.environment import settings
from flows.ingest import IngestOutcome, ingest
from flows.registry.alarms import Alarms
from flows.registry.ledger import Ledger
from flows.storage.s3 import MissingObjectError, Store
from flows.storage.tags import VersionNumber
from flows.tracking.console import phase

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
    seconds: dict[str, float] = Field({})
    """Duration of each phase, in the order of their running."""
    quality: str = ""
    """KID with its interval, and that of real images."""
    advice: str | None = None
    """What would help: more images if the gate lacks them for its verdict, or else a longer training; None: unknown."""
    mlflow_page: str = ""
    prefect_page: str = ""
    """Addresses of the MLflow run and of this flow run."""
    drift: str | None = None
    """Drift alarm that requested it."""
    skipped: str | None = None
    """Why there was nothing to do; None if there was."""


class Note(BaseModel):
    """Fields of a note, a ``RetrainResult`` in JSON, that ``retrain`` reads."""

    model: PlainName = Field(validation_alias=AliasPath("verdict", "version", "model"))
    number: VersionNumber = Field(validation_alias=AliasPath("verdict", "version", "number"))
    reason: str = Field(validation_alias=AliasPath("verdict", "reason"))
    seconds: dict[str, float] = {}


@dataclass(frozen=True)
class Request:
    """Retraining request, done once: a note on S3, ``retrained/MODEL/<key>.json``, is written last.

    ``key`` is the digest of the data set's content, the configuration except for the source of images, the contact
    sheet, and the autoencoder if its alias names it. Machine, code and champion do not count as changes.
    """

    model: str
    key: str

    @classmethod
    def of(
        cls, params: Params, version: Manifest, count: int, seed: int, to: str | None, conditions: Conditions
    ) -> "Request":
        """Request to retrain on ``version``; the other arguments are those of ``sample`` for the contact sheet."""
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
            note = Store().get(*self._note, most=2**24)
            Note.model_validate_json(note)
        except MissingObjectError:
            return None
        except (ValidationError, UserError):
            # Each step finds its earlier results by itself.
            logger.warning(
                "s3://%s/%s is no note of a retraining, so that this one is done again: delete it", *self._note
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
            seconds = Note.model_validate_json(store.get(bucket, note.key, most=2**24)).seconds
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
    alarm: int | None = None,
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
        alarm: Number of the drift alarm that requests it, which one run answers.
    """
    require_permitted(params)
    if params.model.low_resolution is not None and (count, seed, to) != (64, 0, None):
        raise UserError("a model with model.low_resolution only upscales images: leave --count, --seed and --to out")
    seconds: dict[str, float] = {}
    drift = None if alarm is None else answer_alarm(params, alarm)
    with concurrency_slot(f"retrain-{params.training.dataset}"):
        with phase("ingest", seconds):
            checkout = sync(params, version) if version else None
            data = checkout or ingest(params, to_retrain=True)

        manifest = read_manifest(params.dataset_folder)
        request = Request.of(params, manifest, count, seed, to, conditions)
        if (fields := request.find_earlier_result()) is not None:
            verdict_fields = fields["verdict"]
            model_version = verdict_fields["version"]
            reason = (
                f"version {manifest.digest[:12]} of {manifest.name} was trained on with this configuration before, "
                f"which ended in models:/{model_version['model']}/{model_version['number']}: {verdict_fields['reason']}"
            )
            result = RetrainResult.model_validate(fields | {"data": data, "skipped": reason, "drift": drift})
            return completed_state(result, f"nothing to do: {reason}", name="Skipped")

        # Imported late: torch and MLflow take seconds, which a skipped retraining saves.
        from mlflow.client import MlflowClient

        from diffusion.evaluation.config import require_enough
        from diffusion.evaluation.evaluate import advise_longer, describe_kid
        from diffusion.generation.config import check_conditions
        from diffusion.generation.generate import check_prompts
        from diffusion.models.config import classes_of
        from flows.evaluate import evaluate
        from flows.promote import last_comparison, promote
        from flows.registry.dependencies import require_promotable_dependencies
        from flows.sample import explain, sample, samples_from_noise
        from flows.tracking.runs import run_page
        from flows.train import train

        # Before hours of training: can the model be evaluated, promoted, and sampled under these conditions?
        require_enough(manifest)
        classes = classes_of(params.model, manifest.class_histogram)
        check_conditions(classes, params.model.text, params.sampling, conditions)
        if params.model.family != "diffusers":  # which has a tokenizer of its own
            check_prompts(conditions)
        require_promotable_dependencies(params)

        expected = request.estimate_phase_seconds()
        with phase("train", seconds, expected):
            training = train(params, restart="set_aside", drift=drift)
        with phase("evaluate", seconds, expected):
            evaluation = evaluate(params)
        with phase("promote", seconds, expected):
            verdict = promote(params)
        with phase("sample", seconds, expected):
            # There may be no champion yet, or an earlier super-resolution model.
            has_samples = verdict.champion is not None and samples_from_noise(params.champion)
            samples = sample(params, params.champion, count, seed, to, conditions) if has_samples else None
        with phase("explain", seconds, expected):
            explanation = explain(params, verdict.version.uri, params.report_folder / "explain")
        comparison = last_comparison(params, verdict.version)

        result = RetrainResult(
            data=data,
            run_id=training.run_id,
            report=params.report_folder / "report.html",
            verdict=verdict.model_dump(mode="json"),
            samples=samples and samples.model_dump(mode="json"),
            explained=explanation.model_dump(mode="json"),
            seconds=seconds,
            # As the gate says it, with the guidance of the version.
            quality=describe_kid(evaluation, *((comparison.candidate, comparison.real_baseline) if comparison else ())),
            advice=(comparison and comparison.shortage) or advise_longer(evaluation),
            mlflow_page=run_page(MlflowClient(), training.run_id),
            prefect_page=flow_run.ui_url or "",
            drift=drift,
        )
        request.write_note(result)
    suffix = f"; trained for drift {drift}" if drift else ""
    return completed_state(result, f"{verdict.version.uri} is {verdict.title}: {verdict.reason}{suffix}")


def answer_alarm(params: Params, number: int) -> str:
    """Record that this flow run answers a drift alarm, and show why; returns the alarm in words.

    Raises ConflictError if another flow run answers it: an event may come twice.
    """
    alarms = Alarms.of(params.model_name)
    alarm, ours = alarms.read(number), str(flow_run.id)
    if (run_id := alarms.answer(alarm, ours)) != ours:
        raise ConflictError(f"{alarm} is answered by flow run {run_id}: run `darkroom retrain` to retrain all the same")
    logger.warning("retraining for drift %s", alarm)
    key = artifact_key("drift", params.model_name)
    create_markdown_artifact(f"**Drift {escape_markdown(str(alarm))}**", key=key, description=str(alarm))
    return str(alarm)
