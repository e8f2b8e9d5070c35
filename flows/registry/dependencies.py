"""What a training needs of the registry: its autoencoder, and the version that it begins with, decided once."""

import logging
from contextlib import suppress
from dataclasses import dataclass, replace

from mlflow.client import MlflowClient
from pydantic import ValidationError

from diffusion.common.config import Config
from diffusion.common.errors import Held, UserError
from diffusion.common.files import canonical_json
from diffusion.data.manifest import read_manifest
from diffusion.training.setup import data_digest, train_key
from flows.config import Params, registered, registered_start
from flows.environment import settings
from flows.registry import model_versions
from flows.registry.aliases import CHAMPION, named
from flows.registry.champion import registered_version
from flows.registry.model_versions import Version
from flows.registry.takedown_marks import TAKEDOWN, joined_names, names_of, takedowns, warn_of_takedown, with_takedowns
from flows.storage.s3 import Location, Store
from flows.storage.s3_errors import Missing

logger = logging.getLogger(__name__)


class Start(Config):
    """Where a training began."""

    version: str | None
    """models:/NAME/NUMBER; None: at random, for want of a champion that may be begun with."""


def decided(params: Params, uri: str) -> Version | None:
    """The version that the training ``params`` begins with, ``uri`` if it was never asked for before; None: at random.

    Raises UserError if the registry has no such version.
    """
    store, place = Store(), Location(settings().bucket) / "starts" / params.model_name
    key = place.key(f"{_asked_for(params)}.json")
    try:
        noted = store.get(place.bucket, key)
    except Missing:
        store.require_conditional_puts(place.bucket, "starts")
        version = named_now(params, uri)
        start = Start(version=version and version.uri)
        logger.info("training begins with %s", start.version or "random weights, as there is no champion")
        with suppress(Held):  # another machine was faster, and decided for this one as well
            store.put_once(place.bucket, key, canonical_json(start.model_dump()).encode())
        noted = store.get(place.bucket, key)
    try:
        begun = Start.model_validate_json(noted).version
    except ValidationError as error:
        raise UserError(
            f"s3://{place.bucket}/{key} does not say where this training began ({error.errors()[0]['msg']}): put back "
            "what was there, or delete it, and the training begins anew with what training.init_from names now"
        ) from error
    if begun is None:
        return None
    name, number = model_versions.parse_model_uri(begun)
    if (version := registered_version(MlflowClient(), name, int(number))) is None:
        raise UserError(
            f"this training begins with {begun}, which is not in the registry any more: set training.init_from to "
            "another model, or training.seed to another number, and begin anew"
        )
    return version


def named_now(params: Params, uri: str) -> Version | None:
    """The version that ``uri`` names now; None: training.init_from is champion, and there is none to begin with.

    A champion that learned from images taken down since is none: what begins with it could not take its place.
    """
    client = MlflowClient()
    if params.training.init_from != CHAMPION:
        return model_versions.resolve(client, uri)
    if named(client, params.model_name, CHAMPION) is None:
        return None
    champion = with_takedowns(model_versions.resolve(client, uri))
    if (words := takedowns(champion)) is not None:
        logger.warning("%s; until there is another champion, training begins with random weights", words)
        return None
    return champion


def _asked_for(params: Params) -> str:
    """Digest of a training as it is asked for, by the names of what it begins with."""
    digest = data_digest(read_manifest(params.dataset_folder), params.training)
    return train_key(digest, params.model, params.training)


@dataclass(frozen=True)
class Fetched:
    """A configuration that can be trained here."""

    asked: Params
    """As it was given."""
    params: Params
    """The same with files in place of registered models."""
    autoencoder: str | None = None
    """Exactly which version that is, models:/NAME/NUMBER; None: none that is registered."""
    start: str | None = None
    """Exactly which version training begins with; None: none that is registered."""
    takedown: str | None = None
    """What was taken down of the images that either learned from: the names of those removals."""


def fetched(params: Params, dry_run: bool = False) -> Fetched:
    """``params`` with the versions that model.autoencoder and training.init_from name, fetched once and checked.

    The start is the one that was decided on when this training was first asked for, and is decided now if it never was;
    a ``dry_run`` decides nothing. Raises UserError if the registry has no such version.
    """
    ready = Fetched(params, params)
    if (uri := registered(params)) is not None:
        version = with_takedowns(model_versions.resolve(MlflowClient(), uri))
        model = params.model.model_copy(update={"autoencoder": _file(version)})
        ready = _with(ready, version, autoencoder=version.uri, params=params.model_copy(update={"model": model}))
    if (uri := registered_start(params)) is not None:
        begun = named_now(params, uri) if dry_run else decided(params, uri)
        begun = begun and with_takedowns(begun)
        training = params.training.model_copy(update={"init_from": begun and _file(begun)})
        params = ready.params.model_copy(update={"training": training})
        ready = _with(ready, begun, start=begun and begun.uri, params=params)
    return ready


def require_promotable(params: Params) -> None:
    """Raise UserError, before hours of work, if what training would begin with must not be part of a champion."""
    ready = fetched(params)
    if ready.takedown is not None:
        whose = " and ".join(filter(None, (ready.autoencoder, ready.start)))
        raise UserError(
            f"{whose} learned from images that were taken down since (takedown {ready.takedown}), so nothing made with "
            "it becomes champion: give model.autoencoder or training.init_from another version, or train it anew"
        )


def _file(version: Version) -> str:
    warn_of_takedown(version)
    return str(model_versions.fetch_weights(version, settings().folder / "models"))


def _with(ready: Fetched, version: Version | None, **changes: object) -> Fetched:
    """``ready`` changed by what ``version`` is for, whose takedowns are its own."""
    names = names_of(version.tags.get(TAKEDOWN)) if version else []
    return replace(ready, takedown=joined_names(ready.takedown, *names) or None, **changes)  # type: ignore[arg-type]
