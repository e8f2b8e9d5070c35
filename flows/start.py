"""The version that a training begins with, decided once and noted on S3.

A champion changes when the training that began with it wins. Were it looked up each time, the same command would never
find its own run again, and a retraining that changes nothing would train forever, each time from its last result. So
``s3://BUCKET/starts/MODEL/<key>.json``, written once, says for a data set's content and a configuration where training
began. Other content or another configuration decides anew.
"""

import logging
from contextlib import suppress

from mlflow.client import MlflowClient
from pydantic import ValidationError

from diffusion.config import Config
from diffusion.data.manifest import read_manifest
from diffusion.errors import Held, UserError
from diffusion.files import canonical_json
from diffusion.training.setup import data_digest, train_key
from flows import registry
from flows.aliases import CHAMPION, named
from flows.champion import registered_version
from flows.derived import takedowns
from flows.environment import settings
from flows.params import Params
from flows.registry import Version
from flows.s3 import Location, Store
from flows.s3_errors import Missing
from flows.taken_down import with_takedowns

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
    name, number = registry.parse_model_uri(begun)
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
        return registry.resolve(client, uri)
    if named(client, params.model_name, CHAMPION) is None:
        return None
    champion = with_takedowns(registry.resolve(client, uri))
    if (words := takedowns(champion)) is not None:
        logger.warning("%s; until there is another champion, training begins with random weights", words)
        return None
    return champion


def _asked_for(params: Params) -> str:
    """Digest of a training as it is asked for, by the names of what it begins with."""
    digest = data_digest(read_manifest(params.dataset_folder), params.training)
    return train_key(digest, params.model, params.training)
