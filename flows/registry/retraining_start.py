"""What a retraining begins with: the champion, whose training goes on (a warm start), or nothing; decided once."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path

from mlflow.client import MlflowClient

from diffusion.checkpoints import outline_model, read_model_header, weights_digest
from diffusion.common.files import digest_of
from diffusion.data.manifest import read_manifest
from diffusion.training.config import TrainingConfig
from diffusion.training.starting_models import start_conflict, state_conflict
from flows.config import Params
from flows.registry import model_versions
from flows.registry.aliases import read_verified_history
from flows.registry.dependencies import Start, decide_once, request_key, resolve_params
from flows.registry.ledger import History, Ledger, LedgerEntry
from flows.registry.model_versions import Version, registered_version
from flows.registry.takedown_marks import describe_takedowns, reload_with_takedowns
from flows.storage.tags import parse_model_uri, parse_tags

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
    """Decide what a retraining of ``params`` on the data set's version begins with, when it is first asked for.

    The decision is recorded on S3, and stays as it is when the champion changes: a killed retraining goes on. It is
    void once images that the recorded version learned from are taken down.
    """
    key = digest_of([request_key(params), params.retraining.model_dump(mode="json")])
    start = decide_once(params.model_name, key, RetrainingStart, lambda: decide_start(params))
    if start.version is not None:
        name, number = parse_model_uri(start.version)
        version = registered_version(MlflowClient(), name, int(number))
        problem = f"{start.version} is not in the registry any more" if version is None else _takedown_of(version)
        if problem is not None:
            start = _fresh(problem)
    logger.info("training begins %s", start.text)
    return start


def decide_start(params: Params) -> RetrainingStart:
    """Decide what a retraining of ``params`` would begin with now; records nothing."""
    if not params.goes_on:
        is_off = not params.retraining.warm_start
        return _fresh("retraining.warm_start is false" if is_off else "the section training says where it begins")
    client = MlflowClient()
    history = read_verified_history(client, Ledger.of(params.model_name))
    if (number := history.alias_numbers.champion) is None:
        return _fresh("there is no champion yet")
    champion = model_versions.get_version(client, params.model_name, number)
    if (problem := _takedown_of(champion) or _conflict(params, champion)) is not None:
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
    return RetrainingStart(version=champion.uri, reason=f"warm start {chain} of its chain, {state}")


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


def _conflict(params: Params, champion: Version) -> str | None:
    """Describe why the training of ``champion`` cannot go on with the configuration and the data set; None if it can.

    Champions of the same data are conflicts: there is nothing new to learn.
    """
    weights = model_versions.cached_weights(champion)
    header = read_model_header(weights)
    if header.base is not None or header.student_steps is not None:
        return f"the champion {champion.uri} is {'an adapter' if header.base else 'a student'}"
    manifest = read_manifest(params.dataset_folder)
    if header.content_digest == manifest.content_digest:
        return f"the champion {champion.uri} learned from this version of the data set"
    model, size = resolve_params(params, dry_run=True).params.model, manifest.size
    if model.autoencoder is not None:
        file = Path(model.autoencoder)
        digest = weights_digest(file).removeprefix("sha256:")
        latents = outline_model(file).make_latents(digest, size, manifest.shapes or [(size, size)])
        model = model.model_copy(update={"autoencoder": f"sha256:{digest}"})
        size = latents.space.size if latents else size
    words = start_conflict(outline_model(weights), model.resolve(size), manifest)
    return words and f"the champion {champion.uri} {words} or keep this"
