"""What a retraining begins with: the champion, whose training goes on (a warm start), or nothing; decided once."""

import logging
import math
from collections.abc import Iterator

import torch
from mlflow.client import MlflowClient

from diffusion.checkpoints import outline_model, read_model_header
from diffusion.common.errors import UserError
from diffusion.common.files import digest_of
from diffusion.data.manifest import read_manifest
from diffusion.training.config import TrainingConfig
from diffusion.training.starting_models import advise, make_latents, start_conflict, state_conflict
from flows.config import Params
from flows.registry import model_versions
from flows.registry.aliases import read_verified_history
from flows.registry.champion import champion_problem
from flows.registry.dependencies import Start, decide_once, find_recorded, request_key, resolve_params
from flows.registry.ledger import History, Ledger, LedgerEntry
from flows.registry.model_versions import Version, registered_version
from flows.registry.takedown_marks import describe_takedowns, reload_with_takedowns
from flows.storage.tags import parse_model_uri, parse_tags
from flows.tracking.runs import AUTOENCODER

logger = logging.getLogger(__name__)


class RetrainingStart(Start):
    """Where a retraining begins, and why."""

    reason: str

    @property
    def text(self) -> str:
        """Both in a line."""
        return f"{self.version}: {self.reason}" if self.version else self.reason

    def apply(self, params: Params) -> Params:
        """Configure the training that begins here: a warm start has a share of its length and learning rate."""
        if self.version is None:
            return params
        training, config = params.training, params.retraining
        fields = {
            "init_from": self.version,
            "warm_start": True,
            "images": training.images and math.ceil(training.images * config.length),
            "minutes": training.minutes and training.minutes * config.length,
            "warmup_images": round(training.warmup_images * config.length),
            "learning_rate": training.learning_rate * config.learning_rate,
        }
        return params.model_copy(update={"training": TrainingConfig.model_validate(training.model_dump() | fields)})


def resolve_retraining_start(params: Params) -> RetrainingStart:
    """Decide what a retraining of ``params`` on the data set's version begins with, at its first call.

    The decision is recorded on S3, and stays as it is when the champion changes: a killed retraining goes on. It is
    void once images that the recorded version learned from are taken down.
    """
    start = _void(decide_once(params.model_name, _key(params), RetrainingStart, lambda: decide_start(params)))
    logger.info("training begins %s", start.text)
    return start


def preview_retraining_start(params: Params, has_new_data: bool) -> RetrainingStart:
    """Return what ``resolve_retraining_start`` would; records nothing. ``has_new_data`` is as in ``decide_start``."""
    recorded = None if has_new_data else find_recorded(params.model_name, _key(params), RetrainingStart)
    return _void(recorded or decide_start(params, has_new_data))


def _key(params: Params) -> str:
    return digest_of([request_key(params), params.retraining.model_dump(mode="json")])


def _void(start: RetrainingStart) -> RetrainingStart:
    """Replace a recorded ``start`` whose version must not be used any more."""
    if start.version is None:
        return start
    name, number = parse_model_uri(start.version)
    version = registered_version(MlflowClient(), name, int(number))
    problem = f"{start.version} is not in the registry any more" if version is None else _takedown_of(version)
    return start if problem is None else _fresh(problem)


def decide_start(params: Params, has_new_data: bool = False) -> RetrainingStart:
    """Decide what a retraining of ``params`` would begin with now; records nothing.

    ``has_new_data``: the retraining will have another version of the data set than there is now. Raises UserError, with
    ways out, if the champion or the ledger is unusable.
    """
    if params.training.init_from is not None:
        return RetrainingStart(version=None, reason=f"with {params.training.init_from}, as training.init_from says")
    if not params.retraining.warm_start:
        return _fresh("retraining.warm_start is false")
    if not params.may_continue:
        return _fresh(f"the training of a model of the family {params.model.family} cannot be continued")
    client = MlflowClient()
    history = read_verified_history(client, Ledger.of(params.model_name))
    if (problem := champion_problem(client, history)) is not None:
        raise UserError(problem)
    if (number := history.alias_numbers.champion) is None:
        return _fresh("there is no champion yet")
    champion = model_versions.get_version(client, params.model_name, number)
    if (problem := _takedown_of(champion) or _conflict(params, champion, has_new_data)) is not None:
        return _fresh(problem)
    config = params.retraining
    warm_entries = list(_warm_starts(client, history, max(config.fresh_every or 0, config.fresh_after_held or 0)))
    held = next((n for n, entry in enumerate(warm_entries) if entry.what == "promote"), len(warm_entries))
    if config.fresh_after_held is not None and held >= config.fresh_after_held:
        return _fresh(f"the gate did not promote the last {held} warm starts (retraining.fresh_after_held)")
    if config.fresh_every is not None and len(warm_entries) >= config.fresh_every - 1:
        return _fresh(f"the last {len(warm_entries)} retrainings were warm starts (retraining.fresh_every)")
    chain = (parse_tags(champion.tags, champion.uri).warm_start or 0) + 1
    problem = state_conflict(model_versions.cached_checkpoint(champion), params.training, params.model)
    state = f"with its averaged weights alone, as {problem}" if problem else "with its optimizer state"
    share = _describe_share(params.training, params.retraining.length)
    return RetrainingStart(version=champion.uri, reason=f"warm start {chain} of its chain, for {share}, {state}")


def _describe_share(training: TrainingConfig, share: float) -> str:
    if training.images is not None:
        return f"{math.ceil(training.images * share):,} of {training.images:,} images"
    return f"{(training.minutes or 0) * share:g} of {training.minutes:g} minutes"


def _fresh(reason: str) -> RetrainingStart:
    return RetrainingStart(version=None, reason=f"from nothing, as {reason}")


def _takedown_of(version: Version) -> str | None:
    message = describe_takedowns(reload_with_takedowns(version))
    return message and message.removesuffix(": train again")


def _warm_starts(client: MlflowClient, history: History, count: int) -> Iterator[LedgerEntry]:
    """Yield the gate's entries on the newest warm starts, newest first, back to a training from nothing: ``count``."""
    seen = set[int]()
    for entry in reversed(history.entries):
        if entry.by_hand or entry.version in seen:
            continue
        seen.add(entry.version)
        version = registered_version(client, history.model, entry.version)
        if len(seen) > count or version is None or parse_tags(version.tags, version.uri).warm_start is None:
            return
        yield entry


def _conflict(params: Params, champion: Version, has_new_data: bool) -> str | None:
    """Describe why the training of ``champion`` cannot go on with the configuration and the data set; None if it can.

    Champions of the same data are conflicts: there is nothing new to learn.
    """
    weights = model_versions.cached_weights(champion)
    header = read_model_header(weights)
    if header.base is not None or header.student_steps is not None:
        return f"the champion {champion.uri} is {'an adapter' if header.base else 'a student'}"
    manifest = read_manifest(params.dataset_folder)
    if not has_new_data and header.content_digest == manifest.content_digest:
        return f"the champion {champion.uri} learned from this version of the data set"
    model, size = resolve_params(params, dry_run=True).params.model, manifest.size
    if model.autoencoder is not None:
        with torch.device("meta"):
            space = make_latents(model.autoencoder, manifest, outline_model).space
        model, size = model.model_copy(update={"autoencoder": f"sha256:{space.digest}"}), space.size
    if (conflict := start_conflict(outline_model(weights), model.resolve(size), manifest)) is None:
        return None
    advice = advise(conflict, champion.tags.get(AUTOENCODER))
    return f"the champion {champion.uri} {conflict.fact}{f': to begin with it, {advice}' if advice else ''}"
