"""The flow ``retrain``: from a folder of pictures to a judged model in the registry and its prints on S3."""

from pathlib import Path

from prefect import flow

from diffusion.config import Config
from diffusion.config_sampling import ANYTHING, Asked
from diffusion.data.manifest import read_manifest
from diffusion.errors import UserError
from diffusion.evaluation.judge import require_enough
from diffusion.model import classes_of
from diffusion.sampling import require_effect, require_read_whole
from flows.aliases import CHAMPION
from flows.evaluate import evaluate
from flows.explain import Explained, explain
from flows.ingest import Ingested, ingest
from flows.params import Params
from flows.promote import Verdict, promote
from flows.sample import Prints, draws, sample
from flows.train import train

PRINTS = 64
"""Pictures printed unless told."""


class Retrained(Config):
    """Everything one retraining left behind."""

    data: Ingested
    run_id: str
    report: Path
    verdict: Verdict
    prints: Prints | None
    """None if the champion only enlarges pictures, or there is none."""
    explained: Explained


@flow(name="retrain", flow_run_name="retrain-{params.training.dataset}")
def retrain(
    params: Params, count: int = PRINTS, seed: int = 0, to: str | None = None, asked: Asked = ANYTHING
) -> Retrained:
    """Ingest, train, evaluate, promote, print, explain: each step skips what is done for the same inputs."""
    champion = f"models:/{params.model_name}@{CHAMPION}"
    if params.model.low_resolution is not None and (count, seed, to) != (PRINTS, 0, None):
        raise UserError(
            "a model with model.low_resolution enlarges pictures and prints none: leave --count, --seed and --to out"
        )

    data = ingest(params)
    require_enough(params.dataset_folder)
    classes = classes_of(params.model, read_manifest(params.dataset_folder).class_histogram)
    require_effect(classes, params.model.text, params.sampling, asked)
    require_read_whole(asked)
    training = train(params, restart="if_different")
    evaluate(params)
    verdict = promote(params)
    # The champion may be an earlier model of another kind, and there may be none yet.
    printing = verdict.champion is not None and draws(champion)
    prints = sample(params, champion, count, seed, to, asked) if printing else None
    explained = explain(params, verdict.version.uri, params.report_folder / "explain")

    return Retrained(
        data=data,
        run_id=training.run_id,
        report=params.report_folder / "report.html",
        verdict=verdict,
        prints=prints,
        explained=explained,
    )
