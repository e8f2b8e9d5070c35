"""The flow ``retrain``: from a folder of images to a judged model in the registry and its images on S3.

It loads no torch and no MLflow before there is something to do: most of the retrainings that a schedule starts find
nothing new.
"""

from typing import TYPE_CHECKING, Any

from prefect import flow

from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.data.manifest import Manifest, read_manifest
from diffusion.generation.config import UNCONDITIONAL, Conditions
from flows.config import Params
from flows.datasets.checkout import CheckedOut
from flows.datasets.sync import sync
from flows.deployment.tasks import ended, turn
from flows.ingest import Ingested, ingest
from flows.registry.idempotency import ContactSheet, Request

if TYPE_CHECKING:
    from flows.retrain_result import Retrained

SAMPLING_BATCH = 64
"""Images printed unless told."""


class Unchanged(Config):
    """A retraining that had nothing to do."""

    skipped: str
    """Why."""
    data: Ingested | CheckedOut
    before: dict[str, Any]
    """What the retraining left behind that did the same."""


@flow(name="retrain", flow_run_name="retrain-{params.training.dataset}")
def retrain(
    params: Params,
    count: int = SAMPLING_BATCH,
    seed: int = 0,
    to: str | None = None,
    conditions: Conditions = UNCONDITIONAL,
    version: str | None = None,
) -> "Retrained | Unchanged":
    """Ingest, train, evaluate, promote, print, explain: each step skips what is done for the same inputs.

    Args:
        params: The configuration, as params.yaml has it.
        count: How many images the champion generates at the end.
        seed: Of these images.
        to: Where they go, s3://BUCKET or s3://BUCKET/PREFIX; default: the usual place in the usual bucket.
        conditions: What they are to show.
        version: Digest of the data set's version to train on, which is brought here; default: the newest, to which
            is added what is new in ingest.source.
    """
    if params.model.low_resolution is not None and (count, seed, to) != (SAMPLING_BATCH, 0, None):
        raise UserError(
            "a model with model.low_resolution enlarges images and generates none: leave --count, --seed and --to out"
        )
    with turn(f"retrain-{params.training.dataset}"):
        brought = sync(params, version) if version else None
        data = brought or ingest(params, to_retrain=True)

        manifest = read_manifest(params.dataset_folder)
        request = Request.of(params, manifest, ContactSheet(count, seed, to, conditions))
        if (before := request.done()) is not None:
            return unchanged(manifest, data, before)

        # Only now, as they load torch and MLflow: seconds that a run without anything to do does without.
        from flows.evaluate import evaluate
        from flows.explain import explain
        from flows.promote import promote
        from flows.registry.dependencies import require_promotable
        from flows.retrain_result import Retrained, require_samplable
        from flows.sample import draws, sample
        from flows.train import train

        champion = f"models:/{params.model_name}@champion"
        require_samplable(params, manifest, conditions)
        require_promotable(params)
        training = train(params, restart="if_different")
        evaluate(params)
        verdict = promote(params)
        # The champion may be an earlier model of another kind, and there may be none yet.
        printing = verdict.champion is not None and draws(champion)
        samples = sample(params, champion, count, seed, to, conditions) if printing else None
        explained = explain(params, verdict.version.uri, params.report_folder / "explain")

        done = Retrained(
            data=data,
            run_id=training.run_id,
            report=params.report_folder / "report.html",
            verdict=verdict,
            samples=samples,
            explained=explained,
        )
        request.note(done)
    return ended(done, done.told)


def unchanged(manifest: Manifest, data: Ingested | CheckedOut, before: dict[str, Any]) -> Unchanged:
    """The end of a retraining on the data set ``manifest`` that was done ``before``."""
    verdict = before["verdict"]
    why = (
        f"version {manifest.digest[:12]} of {manifest.name} was trained on with this configuration before, which ended "
        f"in models:/{verdict['version']['model']}/{verdict['version']['number']}: {verdict['reason']}"
    )
    return ended(Unchanged(skipped=why, data=data, before=before), f"nothing to do: {why}", name="Skipped")
