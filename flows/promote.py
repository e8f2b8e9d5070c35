"""Flow ``promote``: register the best checkpoint, or take a version, and make it champion if it is better.

Appending the verdict to the ledger is the commit; MLflow's tags and aliases follow it. A repeated command finds the
entry, or resumes the comparison.
"""

import logging
import math
from pathlib import Path
from uuid import UUID

from mlflow.client import MlflowClient
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.events import Event
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run
from pydantic import Field, ValidationError

from diffusion.checkpoints import export, read_model_header
from diffusion.common.config import Config
from diffusion.common.errors import ConflictError, UserError
from diffusion.common.escaping import escape_markdown
from diffusion.common.files import sha256_file
from diffusion.common.model_files import read_header
from diffusion.data.manifest import read_manifest
from diffusion.evaluation.comparison import COMPARISON, ChampionComparison, compare_with_champion
from diffusion.evaluation.reports.comparison_report import COMPARISON_PAGE, ComparisonPage, write_verdict
from diffusion.evaluation.results import Evaluation
from diffusion.training.ema import SNAPSHOTS
from flows.checks.images import require_evaluation
from flows.config import Params
from flows.deployment.tasks import artifact_key, emit, retryable_task
from flows.evaluate import fetch_version, find_tracker, report_folder
from flows.ingest import require_shards
from flows.registry import model_card, model_versions
from flows.registry.aliases import append, project, read_verified_history
from flows.registry.champion import champion_problem, require_champion
from flows.registry.ledger import Approval, Evidence, GateWord, History, Ledger, LedgerEntry
from flows.registry.takedown_marks import (
    ANCESTORS,
    TAKEDOWN,
    ancestors_tag,
    describe_takedowns,
    reload_with_takedowns,
    require_current,
    warn_of_takedown,
)
from flows.storage.tags import parse_tags
from flows.tracking.console import reporter
from flows.tracking.runs import (
    AUTOENCODER,
    EVAL_KEY,
    START,
    WARM_START,
    RunTracker,
    run_page,
    version_artifact,
    version_page,
)

WAITING = "darkroom.model.waiting"
"""Event of a run that waits for a person to approve a promotion."""
UNCOMMITTED = ", with changes that were not committed"


class GateResult(Config):
    """Result of the gate for a version against the champion."""

    champion: int | None
    """Champion it was compared with; the version itself if it is champion already."""
    evidence: Evidence | None
    comparison: ChampionComparison | None = None


class PromotionResult(Config):
    """Outcome of a promotion."""

    version: model_versions.Version
    promoted: bool
    verdict: GateWord
    """``hold`` if the gate would promote it and a person did not approve."""
    reason: str
    champion: int | None
    entry: int
    comparison_page: Path | None = None
    """Page that shows both sides, each rule and its figures, on this machine; None without a comparison."""

    @property
    def title(self) -> str:
        """Status of the version in a word."""
        return "champion" if self.promoted else {"hold": "held", "reject": "rejected"}.get(self.verdict, "")


class ApprovalForm(RunInput):
    """Form in Prefect's UI for the approval of a promotion."""

    approved: bool
    by: str = Field(min_length=1)
    """Your name, recorded in the ledger."""
    note: str = ""


@flow(name="promote", flow_run_name="promote-{params.training.dataset}")
def promote(params: Params, model: str | None = None) -> PromotionResult:
    """Promote the best checkpoint, which is registered first, or the version ``model``, if the gate prefers it."""
    params, version = (params, None) if model is None else fetch_version(params, model)
    folder = report_folder(params, version)
    require_evaluation(folder, model)
    evaluation = Evaluation.read(folder / "evaluation.json")
    require_champion(params)
    if version is None:
        version = register(params, evaluation)
    elif evaluation.best.sha256 != version.weights_sha256 or not _is_current(params, evaluation):
        raise UserError(
            f"{folder} evaluates {version.uri} with other data or settings: run `darkroom evaluate --model "
            f"{version.uri}` first, with the same settings as promote"
        )
    version = require_promotable(version)
    result = apply_gate(params, evaluation, version, folder)
    approval = request_approval(version, result) if params.registry.approval else None
    return record(params, evaluation, version, result, approval, folder)


@retryable_task
def register(params: Params, evaluation: Evaluation) -> model_versions.Version:
    """Register the EMA weights of the best checkpoint as a version; raises UserError for an outdated ``evaluation``."""
    best = Path(evaluation.best.file)
    is_here = best.parent in (params.run_folder / "checkpoints", params.report_folder / SNAPSHOTS) and best.is_file()
    if not is_here or sha256_file(best) != evaluation.best.sha256 or not _is_current(params, evaluation):
        raise UserError(
            f"{params.report_folder} evaluates another training, data set or configuration than {params.run_folder} "
            "has now: run `darkroom evaluate` again, with the same settings as promote"
        )
    require_current(params.dataset_folder)
    tracker = find_tracker(params)
    weights = params.run_folder / "weights.safetensors"
    export(best, weights, evaluation.sampling if evaluation.guidance else None)
    run = tracker.client.get_run(tracker.run_id)
    parse_tags(run.data.tags, f"run {tracker.run_id}")
    digests = ("darkroom.content_digest", "darkroom.dvc_digest", "darkroom.dataset")
    commit, is_dirty = (run.data.tags.get(name) for name in ("mlflow.source.git.commit", "darkroom.git_dirty"))
    # Few: they head the version's page in MLflow. ``record`` logs all else as an artifact.
    base_tags = model_versions.base_tags(tracker.client, weights, run.data.tags.get(START))
    # Training may have begun with a file, of a version.
    tracker.tag({START: base_tags.get(START)})
    names = (*digests, TAKEDOWN, AUTOENCODER, WARM_START)
    tags = {name: run.data.tags.get(name) for name in names} | base_tags
    parents = base_tags.get(START), run.data.tags.get(AUTOENCODER)
    tags[ANCESTORS] = ancestors_tag(tracker.client, parents)
    tags |= {
        "darkroom.git_commit": f"{commit}{UNCOMMITTED}" if commit and is_dirty == "True" else commit,
        "darkroom.guidance": evaluation.sampling.guidance_text if evaluation.sampling.is_guided else None,
        EVAL_KEY: evaluation.eval_key,
    }
    model, run_id, images = params.model_name, tracker.run_id, evaluation.best.images
    checkpoint = best if params.may_continue else None
    version = model_versions.register(model, run_id, weights, params.sampling, tags, images, checkpoint)
    data, header = read_manifest(params.dataset_folder), read_model_header(weights)
    model_card.write(tracker.client, header, evaluation, data, version, None)
    return version


def _is_current(params: Params, evaluation: Evaluation) -> bool:
    """Whether ``evaluation`` was made with the data and the settings of ``params``."""
    conditions, content = evaluation.conditions, read_manifest(params.dataset_folder).content_digest
    made_with = conditions.evaluation, conditions.sampling, conditions.content_digest
    choice, gate = evaluation.guidance, params.gate
    same_rules = choice is None or (choice.confidence, choice.max_recall_loss) == (gate.confidence, gate.recall_loss)
    return same_rules and made_with == (params.evaluation, params.sampling, content)


@retryable_task
def require_promotable(version: model_versions.Version) -> model_versions.Version:
    """Reload ``version`` from MLflow; raises UserError if some of its training images were taken down."""
    if message := describe_takedowns(version := reload_with_takedowns(version)):
        raise UserError(message)
    return version


@retryable_task
def apply_gate(params: Params, evaluation: Evaluation, version: model_versions.Version, folder: Path) -> GateResult:
    """Apply the gate to ``version`` and the champion; a first version must still pass the memorization check.

    The page on the comparison lies in ``folder``, beside the report on the version.
    """
    client = MlflowClient()
    history = read_verified_history(client, Ledger.of(version.model))
    history.require_same(version.number, version.weights_sha256)
    champion = history.alias_numbers.champion
    if problem := champion_problem(client, history):
        raise UserError(problem)
    if champion == version.number:
        return GateResult(champion=champion, evidence=None, comparison=last_comparison(params, version))
    if entry := history.manual_demotion(version.number):
        reason = f"a person decided against it: {entry}; `darkroom promote --to {version.number}` makes it champion"
        # JSON has finite numbers alone.
        figures = {name: value for name, value in evaluation.metrics().items() if math.isfinite(value)}
        evidence = Evidence(verdict="hold", reason=reason, figures=figures, eval_key=evaluation.eval_key)
        return GateResult(champion=champion, evidence=evidence, comparison=last_comparison(params, version))
    champion_weights = None
    if champion is not None:
        champion_weights = model_versions.cached_weights(model_versions.get_version(client, version.model, champion))
    require_shards(params)
    data, cache = params.dataset_folder, params.report_folder
    settings = params.evaluation, params.sampling, params.gate, cache, reporter(), evaluation.choosing_samples
    comparison, grids = compare_with_champion(model_versions.cached_weights(version), champion_weights, data, *settings)
    names = f"version {version.number}", None if champion is None else f"version {champion}"
    ComparisonPage(comparison, grids, version.model, params.training.dataset, *names).write(folder / COMPARISON_PAGE)
    for path in (cache / COMPARISON, folder / COMPARISON_PAGE):
        RunTracker(client, version.run_id).log_file(path, "evaluation")
    evidence = Evidence(
        verdict=comparison.decision.verdict.value,
        reason=comparison.reason,
        figures={name: value for name, value in comparison.metrics().items() if math.isfinite(value)},
        eval_key=comparison.key,
        gate=params.gate.model_dump(mode="json"),
    )
    return GateResult(champion=champion, evidence=evidence, comparison=comparison)


def last_comparison(params: Params, version: model_versions.Version) -> ChampionComparison | None:
    """Comparison in the report folder; None if there is none or ``version`` was not its candidate."""
    try:
        comparison = ChampionComparison.model_validate_json((params.report_folder / COMPARISON).read_bytes())
    except (FileNotFoundError, ValidationError):  # written by another version of Darkroom
        return None
    return comparison if comparison.candidate.sha256 == version.weights_sha256 else None


def request_approval(version: model_versions.Version, result: GateResult) -> Approval | None:
    """Pause the flow until a person approves the promotion in Prefect's UI; None if the gate does not promote."""
    if (evidence := result.evidence) is None or evidence.verdict != "promote":
        return None
    waiting = f"{version.uri} waits for approval: {flow_run.ui_url}"
    logging.getLogger(__name__).info("%s (log in first: `darkroom open prefect` says where the password is)", waiting)
    with get_client(sync_client=True) as client:
        root = client.read_flow_run(flow_run.root_flow_run_id)
    if root.deployment_id is not None:
        emit(waiting_event(root.id, root.deployment_id, waiting))
    question = (
        f"**{version.uri}** would become champion instead of {result.champion or 'none'}.\n\n"
        f"{escape_markdown(evidence.reason)}\n\nIts model card is in MLflow."
    )
    form = ApprovalForm.with_initial_data(description=question)
    try:
        answer = pause_flow_run(wait_for_input=form, timeout=72 * 3600, poll_interval=5)
    except FlowPauseTimeout:
        return Approval(approved=False, by=None)
    return Approval(approved=answer.approved, by=answer.by, note=answer.note)


def waiting_event(run_id: UUID, deployment_id: UUID, text: str) -> Event:
    """Event that the run of a deployment waits for a person: it is not cancelled after a day."""
    related = {f"prefect.deployment.{deployment_id}": "deployment", "prefect.tag.darkroom": "tag"}
    return Event(
        event=WAITING,
        resource={"prefect.resource.id": f"prefect.flow-run.{run_id}"},
        related=[{"prefect.resource.id": name, "prefect.resource.role": role} for name, role in related.items()],
        payload={"text": text},
    )


@retryable_task
def record(
    params: Params,
    evaluation: Evaluation,
    version: model_versions.Version,
    result: GateResult,
    approval: Approval | None,
    folder: Path,
) -> PromotionResult:
    """Commit the verdict to the ledger, then update MLflow: scores, card, copies of the entry, aliases.

    The report in ``folder`` begins with it from then on.
    """
    client = MlflowClient()
    entry = commit(client, version, result, approval).find_newest_entry(version.number)
    assert entry is not None, "the champion has an entry in the ledger"
    weights, data = model_versions.cached_weights(version), read_manifest(params.dataset_folder)
    summary = {
        "version": version.uri,
        "eval_key": evaluation.eval_key,
        "metrics": evaluation.metrics(),
        "gate": entry.evidence and entry.evidence.reason,
        "train_key": read_header(weights).get("train_key"),
    }
    client.log_dict(version.run_id, summary, version_artifact(version.weights_sha256))
    if version.tags.get(EVAL_KEY) != evaluation.eval_key:
        client.set_model_version_tag(version.model, str(version.number), EVAL_KEY, evaluation.eval_key)
    model_card.write(client, read_model_header(weights), evaluation, data, version, entry, result.comparison)
    champion = project(client, Ledger.of(version.model)).alias_numbers.champion
    if is_champion := champion == version.number:
        warn_of_takedown(reload_with_takedowns(version))
    verdict = PromotionResult(
        version=version,
        promoted=is_champion,
        verdict="promote" if is_champion else "reject" if entry.what == "reject" else "hold",
        reason="it is the champion already" if result.evidence is None else entry.why,
        champion=champion,
        entry=entry.number,
        comparison_page=folder / COMPARISON_PAGE if result.comparison else None,
    )
    page, title = folder / "report.html", f"{version.uri} is {verdict.title}"
    if page.is_file():  # an evaluation that was killed writes it the next time
        write_verdict(page, evaluation, result.comparison, verdict.verdict, title, verdict.reason)
        RunTracker(client, version.run_id).log_file(page, "evaluation")
    links = {
        "Model version": version_page(version.model, version.number),
        "MLflow run": run_page(client, version.run_id),
        "Comparison": run_page(client, version.run_id, f"evaluation/{COMPARISON_PAGE}"),
    }
    link_text = " · ".join(f"[{name}]({page})" for name, page in links.items())
    create_markdown_artifact(
        f"**{version.uri}** is {verdict.title}: {escape_markdown(verdict.reason)}\n\n{link_text}",
        key=artifact_key("verdict", version.model),
        description=title,
    )
    return verdict


def commit(
    client: MlflowClient, version: model_versions.Version, result: GateResult, approval: Approval | None
) -> History:
    """Append the verdict on ``version`` to its model's ledger unless it is there, or it must not be promoted."""

    def decide(history: History) -> LedgerEntry | None:
        # A takedown writes its record before it searches for versions, and this one is registered: either the record
        # is visible here, or the takedown finds and marks the version.
        require_promotable.fn(version)
        return next_entry(history, version, result, approval)

    return append(client, Ledger.of(version.model), decide)


def next_entry(
    history: History, version: model_versions.Version, result: GateResult, approval: Approval | None
) -> LedgerEntry | None:
    """Ledger entry of the verdict; None if it is there. Raises ConflictError if the champion has changed meanwhile."""
    champion, evidence = history.alias_numbers.champion, result.evidence
    if champion == version.number:
        return None
    if champion != result.champion:
        raise ConflictError(
            f"{history.describe_conflict()}; {version.uri} was compared with champion {result.champion or 'none'}: "
            "run `darkroom promote` again to compare it with the current one"
        )
    assert evidence is not None, "a version that is champion already needs no entry"
    event = "hold" if approval is not None and not approval.approved else evidence.verdict
    entry = history.next_entry(event, version.number, version.weights_sha256, evidence=evidence, approval=approval)
    last_entry = history.find_newest_entry(version.number)
    return None if last_entry is not None and last_entry.repeats(entry) else entry
