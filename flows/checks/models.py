"""Checks of models: registered versions, files, and what they can be asked for."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from diffusion.common.errors import UserError
from diffusion.common.model_files import read_header
from diffusion.data.manifest import read_manifest
from diffusion.families.base import classes_of
from diffusion.families.config import FamilyConfig
from diffusion.generation.config import Conditions, GenerationRequest, check_conditions
from diffusion.process.samplers import SamplingConfig
from flows.config import Params, override_keys, registered_autoencoder, registered_initial_weights
from flows.environment import settings
from flows.local_stack.http_api import NotServingError, search_mlflow
from flows.storage.tags import parse_model_uri, parse_tags

MAX_NAMED = 10
"""Maximum number of models or versions in a message."""


def require_models(params: Params) -> None:
    """Raise UserError for an unknown model, registered or a file, that training begins with."""
    for path in (params.training.init_from, getattr(params.model, "autoencoder", None)):
        if path is not None and path != "champion" and not path.startswith("models:/"):
            read_header(Path(path))
    for uri in (registered_autoencoder(params), registered_initial_weights(params)):
        # While there is no champion, training begins with random weights.
        if uri is not None and uri != params.champion:
            require_version(uri)


def require_destination(to: str | None) -> None:
    """Raise UserError for an address that is not on S3, or names a bucket that is not there or cannot be used."""
    if to is not None:
        from flows.storage.s3 import Location, Store

        Store().require_conditional_puts(Location.parse(to).bucket, "samples")


def require_batch(
    params: Params,
    uri: str,
    count: int | None,
    seed: int,
    conditions: Conditions,
    requests: str | None,
    overrides: Sequence[str],
) -> None:
    """Raise UserError for a sampling batch that cannot be planned; the arguments are those that ``sample`` takes."""
    from mlflow.client import MlflowClient

    from flows.registry import model_versions
    from flows.sampling import generate_batch
    from flows.storage.s3 import Store

    version = model_versions.resolve(MlflowClient(), uri)
    weights, config = model_versions.cached_weights(version), params.sampling_batch
    batch, _ = generate_batch.plan(
        Store(), version, weights, params.sampling, config, count, seed, conditions, requests
    )
    _require_effect(overrides, params.sampling, batch.sampling, uri)


def require_answerable(
    params: Params,
    sampling: SamplingConfig,
    overrides: Sequence[str],
    weights: Path,
    name: str,
    request: GenerationRequest,
) -> None:
    """Raise UserError for a ``request`` that a model cannot answer, such as a mask of another size.

    Also if some of the ``overrides``, which are in ``params``, have no effect when the model, called ``name``, answers
    with ``sampling``.
    """
    from diffusion.checkpoints import load_model
    from diffusion.generation.requests import input_of, sampling_of

    model = load_model(weights)
    used_sampling = sampling_of(model, request, sampling)
    input_of(model, request)
    _require_effect(overrides, params.sampling, used_sampling, name)


def _require_effect(
    overrides: Sequence[str], given_sampling: SamplingConfig, used_sampling: SamplingConfig, name: str
) -> None:
    for key in override_keys(overrides):
        section, *fields = key.split(".")
        if section != "sampling" or not fields:
            continue
        # A scale of 1 does not guide, and null leaves the choice to the model.
        without_effect = (None, 1) if fields[0] in ("guidance", "autoguidance") else (None,)
        if getattr(given_sampling, fields[0]) not in (*without_effect, getattr(used_sampling, fields[0], None)):
            raise UserError(f"--set {key} has no effect on these images of {name}: leave it out")


def require_version(uri: str, params: Params | None = None, conditions: Conditions | None = None) -> None:
    """Raise UserError if ``uri`` names no registered version, or one that cannot generate under ``conditions``.

    Weights that are not on this machine are fetched for that, as the flow would.
    """
    name, reference = parse_model_uri(uri)
    if (model := registered_models(name).get(name)) is None:
        names = sorted(registered_models())
        hint = f"there is {_abbreviate(names)}" if names else "there is none yet"
        raise UserError(
            f"{uri}: no model {name} in the registry, {hint}: name another, by --dataset, --model or registry.model, "
            "or register one with `darkroom retrain`"
        )
    versions = {int(entry["version"]): entry for entry in _search("model-versions", f"name='{name}'")}
    aliases = {entry["alias"]: int(entry["version"]) for entry in model.get("aliases", ())}
    number = aliases.get(reference[1:]) if reference.startswith("@") else int(reference)
    if number is None and (head := _ledger_aliases(name)) is not None:
        number = head.get(reference[1:])
    if number is None or (number not in versions and not reference.startswith("@")):
        numbers = _abbreviate([str(key) for key in sorted(versions)]) or "none"
        alias_text = _abbreviate([f"@{alias} ({version})" for alias, version in sorted(aliases.items())]) or "none"
        raise UserError(f"{uri} is not in the registry: model {name} has versions {numbers} and aliases {alias_text}")
    if params is not None and conditions is not None and number in versions:
        if not conditions.labels and not conditions.texts:
            return
        tags = {entry["key"]: entry["value"] for entry in versions[number].get("tags", ())}
        sha256 = parse_tags(tags, f"version {number} of model {name}").weights_sha256
        weights = settings().folder / "models" / f"{sha256}.safetensors"
        if not weights.is_file():
            weights = fetch_weights(f"models:/{name}/{number}")
        require_conditions(weights, params, conditions)


def fetch_weights(uri: str) -> Path:
    """Fetch the weights of a registered version into a file named by their digest, as its flow would."""
    from mlflow.client import MlflowClient

    from flows.registry import model_versions

    return model_versions.cached_weights(model_versions.resolve(MlflowClient(), uri))


def require_shape(weights: Path, model: str, params: Params) -> None:
    """Raise UserError if the ``model`` with these weights generates other shapes than the data set has."""
    version, header = read_manifest(params.dataset_folder), read_header(weights).get("model_header") or {}
    of_model, of_data = (header.get("channels"), header.get("size")), (version.channels, version.size)
    if of_model != of_data:
        colours: dict[Any, str] = {1: "grey", 3: "RGB"}
        generated, held = (f"{size}×{size} in {colours.get(channels)}" for channels, size in (of_model, of_data))
        settings = {"ingest.mode": str(colours.get(of_model[0])).lower(), "ingest.size": of_model[1]}
        pairs = zip(settings.items(), of_model, of_data, strict=True)
        options = [
            f"--set {key}={value}" for (key, value), generated_one, held_one in pairs if generated_one != held_one
        ]
        raise UserError(
            f"{model} generates images of {generated}, and data set {version.name} holds {held}: ingest images like "
            f"its own, with {' '.join(options)}"
        )


def require_model(params: Params) -> None:
    """Raise UserError if the data set has neither a registered model nor a ledger, nor images here."""
    name = params.model_name
    if name in (models := registered_models()) or (params.dataset_folder / "manifest.json").is_file():
        return
    if _ledger_aliases(name) is None:
        hint = f"there is {_abbreviate(sorted(models))}" if models else "there is none yet"
        raise UserError(f"no model or data set {name}: give the --dataset of a model, {hint}")


def require_conditions(weights: Path, params: Params, conditions: Conditions) -> None:
    """Raise UserError if the model in a file does not exist, or cannot be conditioned on these labels or prompts."""
    header: Any = read_header(weights).get("model_header")
    try:
        config: FamilyConfig = TypeAdapter(FamilyConfig).validate_python(header["model"])
        classes = classes_of(config, header["class_histogram"])
    except (ValidationError, KeyError, TypeError):
        return  # loading it will say what is wrong
    # Guidance may be chosen by the model itself, and is checked with it.
    positive_conditions = conditions.model_copy(update={"negative_prompt": None})
    check_conditions(classes, config.text, params.sampling.without_guidance(), positive_conditions)
    if config.family != "diffusers":  # which has a tokenizer of its own
        require_prompts(conditions)


def require_prompts(conditions: Conditions) -> None:
    """Raise UserError for prompts that are empty, or too long for Darkroom's own text encoder."""
    if conditions.texts:
        from diffusion.generation.generate import check_prompts

        check_prompts(conditions)


def registered_models(name: str | None = None) -> dict[str, Any]:
    """Registered models of MLflow by name: all, or the one of that ``name``."""
    return {model["name"]: model for model in _search("registered-models", f"name='{name}'" if name else "")}


def _search(resource: str, filter_: str) -> list[dict[str, Any]]:
    if not os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http"):  # a store that only MLflow itself reads
        from mlflow.client import MlflowClient

        if resource == "registered-models":
            models = MlflowClient().search_registered_models(filter_ or None)
            return [{"name": entity.name, "aliases": _pairs(entity.aliases, "alias", "version")} for entity in models]
        versions = MlflowClient().search_model_versions(filter_)
        return [{"version": entity.version, "tags": _pairs(entity.tags, "key", "value")} for entity in versions]
    # MLflow's client would wait for a slow server too.
    retryer = Retrying(
        retry=retry_if_exception_type(NotServingError), stop=stop_after_delay(30), wait=wait_fixed(1), reraise=True
    )
    return retryer(search_mlflow, resource, filter_, timeout=10)


def _pairs(values: Mapping[str, Any], key: str, value: str) -> list[dict[str, Any]]:
    return [{key: name, value: text} for name, text in values.items()]


def _ledger_aliases(name: str) -> dict[str, int] | None:
    # The ledger decides, and MLflow's aliases may be behind.
    from flows.registry.ledger import Ledger

    head = Ledger.of(name).head()
    return None if head is None else head.aliases


def _abbreviate(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")
