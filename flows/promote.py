"""The flow ``promote``: the best checkpoint becomes a registered version, and champion if it is better."""

import math
from pathlib import Path

from mlflow.client import MlflowClient
from prefect import flow
from prefect.artifacts import create_markdown_artifact

from diffusion.config import Config
from diffusion.data.manifest import read_manifest
from diffusion.errors import UserError
from diffusion.evaluation.evaluate import evaluate_one
from diffusion.evaluation.results import Evaluation, Judged
from diffusion.files import sha256_file
from diffusion.model import export, read_header
from diffusion.training.post_hoc import AVERAGES
from flows import registry
from flows.derived import TAKEDOWN, takedowns
from flows.environment import settings
from flows.evaluate import tracker_of
from flows.params import Params
from flows.progress import reporter
from flows.registry import CHALLENGER, CHAMPION, Version
from flows.steps import step
from flows.tracking import AUTOENCODER


class Verdict(Config):
    """What became of a version, and why."""

    version: Version
    promoted: bool
    reason: str


@flow(name="promote", flow_run_name="promote-{params.training.dataset}")
def promote(params: Params) -> Verdict:
    """Register the best checkpoint and let the gate decide between it and the champion."""
    evaluation = read_evaluation(params.report_folder)
    version = register(params, evaluation)
    return decide(params, evaluation, version)


def read_evaluation(folder: Path) -> Evaluation:
    """What ``evaluate`` found; raises UserError if it has not run."""
    path = folder / "evaluation.json"
    if not path.is_file():
        raise UserError(f"no evaluation in {folder}: run `darkroom evaluate` first")
    return Evaluation.model_validate_json(path.read_bytes())


@step
def register(params: Params, evaluation: Evaluation) -> Version:
    """Make the best checkpoint's averaged weights a version, tagged with everything that leads back."""
    _require_current(params, evaluation)
    tracker = tracker_of(params)
    weights = params.run_folder / "weights.safetensors"
    export(Path(evaluation.best.file), weights)
    run = tracker.client.get_run(tracker.run_id)
    tags = {
        name: run.data.tags.get(name)
        for name in (
            "darkroom.content_digest",
            "darkroom.dvc_digest",
            "darkroom.dataset",
            "darkroom.git_dirty",
            TAKEDOWN,
            AUTOENCODER,
        )
    } | {
        "darkroom.run_id": tracker.run_id,
        "darkroom.git_commit": run.data.tags.get("mlflow.source.git.commit"),
        "darkroom.images": evaluation.best.images,
        "darkroom.train_key": read_header(weights)["train_key"],
    }
    return registry.register(params.model_name, tracker.run_id, weights, params.sampling, tags, evaluation.best.images)


def _require_current(params: Params, evaluation: Evaluation) -> None:
    """Raise UserError unless ``evaluation`` judged what lies there now, as it would be judged now."""
    best, conditions = Path(evaluation.best.file), evaluation.conditions
    same = (
        best.parent in (params.run_folder / "checkpoints", params.report_folder / AVERAGES)
        and best.is_file()
        and sha256_file(best) == evaluation.best.sha256
        and conditions.evaluation == params.evaluation
        and conditions.sampling == params.sampling
        and conditions.content_digest == read_manifest(params.dataset_folder).content_digest
    )
    if not same:
        raise UserError(
            f"{params.report_folder} judges another training, data set or configuration than {params.run_folder} "
            "has now: run `darkroom evaluate` again, with the same settings as promote"
        )


@step
def decide(params: Params, evaluation: Evaluation, version: Version) -> Verdict:
    """Give ``version`` the alias champion if there is none or it is better; otherwise challenger."""
    client = MlflowClient()
    holder = registry.champion(client, params.model_name)
    if holder is None:
        verdict = Verdict(version=version, promoted=True, reason="first version: there was no champion")
    elif holder.number == version.number:
        verdict = Verdict(version=version, promoted=True, reason="it is the champion already")
    else:
        verdict = _compare(params, evaluation, version, holder)
    _record(client, verdict, evaluation)
    return verdict


def _compare(params: Params, evaluation: Evaluation, version: Version, holder: Version) -> Verdict:
    """Both on the same held-out pictures with the same seeds: to win, merit must be better by more than its error."""
    weights = registry.fetch_weights(holder, settings().folder / "models")
    try:
        champion = evaluate_one(
            weights,
            params.dataset_folder,
            params.evaluation,
            params.sampling,
            params.report_folder,
            reporter(),
            evaluation.conditions.low_resolution,
        )
    except UserError as error:
        reason = f"champion {holder.number} cannot be judged beside it: {error}"
        return Verdict(version=version, promoted=False, reason=reason)
    ours, theirs = evaluation.best.merit, champion.merit
    uncertainty = math.hypot(ours.error, theirs.error)
    better = ours.name == theirs.name and ours.rank - theirs.rank > uncertainty
    word = "higher" if ours.sign > 0 else "lower"
    reason = (
        f"version {version.number} {_in_figures(evaluation.best)}, champion {holder.number} "
        f"{_in_figures(champion)}, on {champion.scores.reference} held-out pictures of data set version "
        f"{evaluation.conditions.content_digest[:12]}: {'' if better else 'not '}{word} by more than the "
        f"standard error of the difference, {uncertainty:.5f}"
    )
    return Verdict(version=version, promoted=better, reason=reason)


def _in_figures(judged: Judged) -> str:
    merit = judged.merit
    return f"has {merit.name} {merit.value:.5f} ± {merit.error:.5f} (n = {merit.count})"


def _record(client: MlflowClient, verdict: Verdict, evaluation: Evaluation) -> None:
    """Scores and reason on the version first, the alias last: an alias never lacks its reason."""
    version = verdict.version
    name, number = version.model, str(version.number)
    for tag, value in evaluation.metrics().items():
        client.set_model_version_tag(name, number, tag, f"{value:.6g}")
    client.set_model_version_tag(name, number, "darkroom.eval_key", evaluation.eval_key)
    if verdict.reason != "it is the champion already":
        client.set_model_version_tag(name, number, "darkroom.gate", verdict.reason)
        description = "\n\n".join(filter(None, (verdict.reason, takedowns(version))))
        client.update_model_version(name, number, description=description)
        client.set_registered_model_alias(name, CHAMPION if verdict.promoted else CHALLENGER, number)
        if verdict.promoted and number == client.get_registered_model(name).aliases.get(CHALLENGER):
            client.delete_registered_model_alias(name, CHALLENGER)
    create_markdown_artifact(
        f"**{version.uri}** is {'champion' if verdict.promoted else 'challenger'}: {verdict.reason}",
        key="verdict",
    )
