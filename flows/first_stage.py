"""The autoencoder of a latent diffusion model, brought from the registry to this machine."""

from dataclasses import dataclass

from mlflow.client import MlflowClient

from flows import registry
from flows.derived import TAKEDOWN, warn_of_takedown
from flows.environment import settings
from flows.params import Params, registered


@dataclass(frozen=True)
class Fetched:
    """A configuration that can be trained here."""

    asked: Params
    """As it was given."""
    params: Params
    """The same with a file in place of a registered autoencoder."""
    autoencoder: str | None
    """Exactly which version that is, models:/NAME/NUMBER; None: none that is registered."""
    takedown: str | None
    """What was taken down of the pictures that it learned from: the names of those removals."""


def fetched(params: Params) -> Fetched:
    """``params`` with the version that model.autoencoder names now, if it names one, fetched once and checked.

    Raises UserError if the registry has none.
    """
    uri = registered(params)
    if uri is None:
        return Fetched(params, params, None, None)
    version = registry.resolve(MlflowClient(), uri)
    warn_of_takedown(version)
    weights = registry.fetch_weights(version, settings().folder / "models")
    model = params.model.model_copy(update={"autoencoder": str(weights)})
    return Fetched(params, params.model_copy(update={"model": model}), version.uri, version.tags.get(TAKEDOWN))
