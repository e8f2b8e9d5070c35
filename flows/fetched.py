"""What a training needs of the registry, brought to this machine: an autoencoder, and the model that it begins with."""

from dataclasses import dataclass, replace

from mlflow.client import MlflowClient

from diffusion.errors import UserError
from flows import registry
from flows.derived import TAKEDOWN, joined_names, names_of, warn_of_takedown
from flows.environment import settings
from flows.params import Params, registered, registered_start
from flows.registry import Version
from flows.start import decided, named_now
from flows.taken_down import with_takedowns


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
    """What was taken down of the pictures that either learned from: the names of those removals."""


def fetched(params: Params, dry_run: bool = False) -> Fetched:
    """``params`` with the versions that model.autoencoder and training.init_from name, fetched once and checked.

    The start is the one that was decided on when this training was first asked for, and is decided now if it never was;
    a ``dry_run`` decides nothing. Raises UserError if the registry has no such version.
    """
    ready = Fetched(params, params)
    if (uri := registered(params)) is not None:
        version = with_takedowns(registry.resolve(MlflowClient(), uri))
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
    return str(registry.fetch_weights(version, settings().folder / "models"))


def _with(ready: Fetched, version: Version | None, **changes: object) -> Fetched:
    """``ready`` changed by what ``version`` is for, whose takedowns are its own."""
    names = names_of(version.tags.get(TAKEDOWN)) if version else []
    return replace(ready, takedown=joined_names(ready.takedown, *names) or None, **changes)  # type: ignore[arg-type]
