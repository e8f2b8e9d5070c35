"""Registered models that a training depends on: its autoencoder, and its initial weights, which are resolved once."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from mlflow.client import MlflowClient
from pydantic import ValidationError

from diffusion.common.config import Config
from diffusion.common.errors import ConflictError, UserError, describe_validation_error
from diffusion.common.files import canonical_json
from diffusion.data.manifest import read_manifest
from diffusion.training.identity import data_digest, train_key
from flows.config import Params, registered_autoencoder, registered_initial_weights
from flows.environment import settings
from flows.registry import model_versions
from flows.registry.aliases import CHAMPION, resolve_alias
from flows.registry.model_versions import Version, registered_version
from flows.registry.takedown_marks import (
    TAKEDOWN,
    describe_takedowns,
    join_takedown_names,
    parse_takedown_names,
    reload_with_takedowns,
    warn_of_takedown,
)
from flows.storage.s3 import Location, Store
from flows.storage.s3_errors import MissingObjectError
from flows.storage.tags import parse_model_uri, parse_tags

logger = logging.getLogger(__name__)


class Start(Config):
    """Initial weights of a training."""

    version: str | None
    """Model version, models:/NAME/NUMBER; None for random weights, as there was no usable champion."""


AnyStart = TypeVar("AnyStart", bound=Start)


def request_key(params: Params) -> str:
    """Digest of the requested training, with the version of its autoencoder and the name of its initial weights.

    Initial weights fit one autoencoder: with another, where training begins is decided anew. Raises UserError if the
    registry has no such autoencoder.
    """
    manifest, model = read_manifest(params.dataset_folder), params.model
    training = params.training.with_batch_size(model, manifest.size)
    if (uri := registered_autoencoder(params)) is not None:
        model = model.model_copy(update={"autoencoder": model_versions.resolve(MlflowClient(), uri).uri})
    return train_key(data_digest(manifest, training), model, training)


def decide_once(model: str, key: str, kind: type[AnyStart], decide: Callable[[], AnyStart]) -> AnyStart:
    """Return where the training ``key`` of ``model`` begins, as ``decide`` said when this was first recorded on S3.

    Raises UserError if the record is damaged.
    """
    if (start := find_recorded(model, key, kind)) is not None:
        return start
    store, place = Store(), Location(settings().bucket) / "starts" / model
    store.require_conditional_puts(place.bucket, "starts")
    start = decide()
    try:
        store.put_once(place.bucket, place.key(f"{key}.json"), canonical_json(start.model_dump()).encode())
    except ConflictError:  # another machine was faster, and its record counts
        return find_recorded(model, key, kind) or start
    return start


def find_recorded(model: str, key: str, kind: type[AnyStart]) -> AnyStart | None:
    """Read where the training ``key`` of ``model`` begins by its record on S3; None if there is none yet.

    Raises UserError if the record is damaged.
    """
    place = Location(settings().bucket) / "starts" / model
    try:
        data = Store().get(place.bucket, place.key(f"{key}.json"))
    except MissingObjectError:
        return None
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        words = describe_validation_error(error.errors()[0])
        raise UserError(
            f"s3://{place.bucket}/{place.key(f'{key}.json')} does not say where this training began ({words}): put "
            "back what was there, or delete it, and the training begins again with what is there now"
        ) from error


def resolve_start(params: Params, uri: str) -> Version | None:
    """Resolve the initial version of the training ``params``, what ``uri`` names when this is first recorded on S3.

    None for random weights. Raises UserError if the registry has no such version.
    """

    def decide() -> Start:
        version = current_start(params, uri)
        logger.info("training begins with %s", version.uri if version else "random weights, as there is no champion")
        return Start(version=version and version.uri)

    start_uri = decide_once(params.model_name, request_key(params), Start, decide).version
    if start_uri is None:
        return None
    name, number = parse_model_uri(start_uri)
    if (version := registered_version(MlflowClient(), name, int(number))) is None:
        raise UserError(
            f"this training begins with {start_uri}, which is not in the registry any more: set training.init_from to "
            "another model, or training.seed to another number, and begin again"
        )
    return version


def current_start(params: Params, uri: str) -> Version | None:
    """Resolve the version that ``uri`` names now; None if training.init_from is champion and there is no usable one.

    A champion trained on images taken down since is not usable: a model that begins with it could not replace it.
    """
    client = MlflowClient()
    if params.training.init_from != CHAMPION:
        return model_versions.resolve(client, uri)
    if resolve_alias(client, params.model_name, CHAMPION) is None:
        return None
    champion = reload_with_takedowns(model_versions.resolve(client, uri))
    if (message := describe_takedowns(champion)) is not None:
        logger.warning("%s; until there is another champion, training begins with random weights", message)
        return None
    return champion


@dataclass(frozen=True)
class ResolvedParams:
    """Training configuration whose registered models are replaced by local files."""

    requested: Params
    params: Params
    autoencoder: str | None
    """Exact version of the autoencoder, models:/NAME/NUMBER; None if it is not a registered one."""
    start: str | None
    takedown: str | None
    """Names of later takedowns of images that either was trained on, separated by commas."""
    warm_start: int | None = None
    """Number of warm starts in the chain that this training continues, its own included; None: it is not one."""


def resolve_params(params: Params, dry_run: bool = False) -> ResolvedParams:
    """Fetch the models that a training depends on; a ``dry_run`` records nothing. Raises UserError without one."""
    autoencoder, start, ready, chain = None, None, params, None
    if (uri := registered_autoencoder(params)) is not None:
        autoencoder = reload_with_takedowns(model_versions.resolve(MlflowClient(), uri))
        ready = ready.model_copy(update={"model": params.model.model_copy(update={"autoencoder": _file(autoencoder)})})
    if (uri := registered_initial_weights(params)) is not None:
        start = current_start(params, uri) if dry_run else resolve_start(params, uri)
        start = start and reload_with_takedowns(start)
        file = start and _file(start, params.training.warm_start)
        ready = ready.model_copy(update={"training": params.training.model_copy(update={"init_from": file})})
        if start is not None and params.training.warm_start:
            chain = (parse_tags(start.tags, start.uri).warm_start or 0) + 1
    names = [
        name for version in (autoencoder, start) if version for name in parse_takedown_names(version.tags.get(TAKEDOWN))
    ]
    uris = [version.uri if version else None for version in (autoencoder, start)]
    return ResolvedParams(params, ready, uris[0], uris[1], join_takedown_names(None, *names) or None, chain)


def require_promotable_dependencies(params: Params) -> None:
    """Raise UserError before training if a model that it depends on must not be part of a champion."""
    ready = resolve_params(params)
    if ready.takedown is not None:
        raise _taken_down(" and ".join(filter(None, (ready.autoencoder, ready.start))), ready.takedown)


def require_versions_without_takedown(params: Params) -> None:
    """Raise UserError as ``require_promotable_dependencies``, without fetching weights or recording where one begins.

    A champion under takedown is not an error: training then begins with random weights.
    """
    for uri in (registered_autoencoder(params), registered_initial_weights(params)):
        if uri is not None and uri != params.champion:
            version = reload_with_takedowns(model_versions.resolve(MlflowClient(), uri))
            if names := parse_takedown_names(version.tags.get(TAKEDOWN)):
                raise _taken_down(version.uri, ",".join(names))


def _taken_down(uris: str, takedown: str) -> UserError:
    return UserError(
        f"{uris} learned from images that were taken down since (takedown {takedown}), so nothing made with "
        "it becomes champion: give model.autoencoder or training.init_from another version, or train it again"
    )


def _file(version: Version, with_state: bool = False) -> str:
    warn_of_takedown(version)
    return str((model_versions.cached_checkpoint if with_state else model_versions.cached_weights)(version))
