"""Cheap checks of a command before servers' clients and torch are imported, and before there is a flow run.

What they find would otherwise stand in Prefect as a failed run. They import neither torch nor MLflow's or Prefect's
clients, which take seconds; the flows check again whatever may have changed since.
"""

import os
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from pydantic import TypeAdapter, ValidationError
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from diffusion.common.errors import UserError
from diffusion.common.model_files import read_header
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.manifest import Manifest, read_manifest
from diffusion.data.sources import open_source
from diffusion.data.sources.base import Access
from diffusion.data.sources.conventions import METADATA_FILES, holds_images, is_image, printable, visible_files
from diffusion.generation.config import Conditions, check_conditions
from diffusion.models.config import FamilyConfig, classes_of
from flows.config import Params, registered, registered_start
from flows.environment import settings
from flows.local_stack.http_api import NotServing, query_mlflow
from flows.storage.tags import parse_model_uri, parse_tags

LISTED = 10
"""Most models or versions in a message."""


def require_source(config: IngestConfig) -> None:
    """Raise UserError if ``ingest.source`` is missing, not understood, or a folder without images."""
    if config.source.startswith("s3://"):
        return
    open_source(config.source, Access(config, Path()))
    if Path(config.source).is_dir() and not holds_images(Path(config.source)):
        raise UserError(f"no images in {config.source}: give a source of JPEG, PNG, WebP, GIF, BMP or TIFF images")


def require_training_inputs(params: Params) -> Manifest:
    """Read the data set's manifest; raises UserError without it, or for an unknown model that training begins with."""
    version = read_manifest(params.dataset_folder)
    for uri in (registered(params), registered_start(params)):
        # While there is no champion, training begins with random weights.
        if uri is not None and uri != params.champion:
            require_version(uri)
    return version


def require_run(params: Params) -> None:
    """Raise UserError if there is no run to evaluate."""
    read_manifest(params.dataset_folder)
    if not any((params.run_folder / "checkpoints").glob("*.safetensors")):
        raise UserError(f"no checkpoint in {params.run_folder}: run `darkroom train` first")


def require_evaluation(params: Params) -> None:
    """Raise UserError if there is no evaluation to promote by."""
    require_run(params)
    if not (params.report_folder / "evaluation.json").is_file():
        raise UserError(f"no evaluation in {params.report_folder}: run `darkroom evaluate` first")


def require_label_in_source(params: Params, conditions: Conditions) -> None:
    """Raise UserError for a label that neither the data set nor a folder of the source has."""
    labels = [label for label in conditions.labels if label is not None]
    root, known = Path(params.ingest.source), set[str]()
    if (params.dataset_folder / "manifest.json").is_file():
        known.update(read_manifest(params.dataset_folder).labels)
    if not labels or known.issuperset(labels):
        return
    if not root.is_dir() or any((root / name).exists() for name in METADATA_FILES):
        return  # its labels are known only once it is read
    for name in map(printable, visible_files(root)):
        if is_image(name) and (folder := posixpath.dirname(name)):
            known.add(posixpath.basename(folder))
            if known.issuperset(labels):
                return
    there = f"there is {', '.join(sorted(known)[:20])}" if known else "there are no classes"
    unknown = min(set(labels) - known)
    raise UserError(f"no class {unknown!r} in {root} or data set {params.training.dataset}: {there}")


def require_version(uri: str, params: Params | None = None, conditions: Conditions | None = None) -> None:
    """Raise UserError if ``uri`` names no registered version, or one that cannot generate under ``conditions``.

    Weights that are not on this machine are fetched for that, as the flow would.
    """
    name, which = parse_model_uri(uri)
    if (model := registered_models(name).get(name)) is None:
        known = sorted(registered_models())
        there = f"there is {_some(known)}" if known else "there is none yet"
        raise UserError(f"{uri}: no model {name} in the registry, {there}: `darkroom retrain` registers one")
    versions = {int(each["version"]): each for each in _search("model-versions", f"name='{name}'")}
    aliases = {each["alias"]: int(each["version"]) for each in model.get("aliases", ())}
    number = aliases.get(which[1:]) if which.startswith("@") else int(which)
    if number is None and (head := _ledger_aliases(name)) is not None:
        number = head.get(which[1:])
    if number is None or (number not in versions and not which.startswith("@")):
        numbers = _some([str(each) for each in sorted(versions)]) or "none"
        named = _some([f"@{alias} ({version})" for alias, version in sorted(aliases.items())]) or "none"
        raise UserError(f"{uri} is not in the registry: model {name} has versions {numbers} and aliases {named}")
    if params is not None and conditions is not None and number in versions:
        if not conditions.labels and not conditions.texts:
            return
        tags = {each["key"]: each["value"] for each in versions[number].get("tags", ())}
        sha256 = parse_tags(tags, f"version {number} of model {name}").weights_sha256
        weights = settings().folder / "models" / f"{sha256}.safetensors"
        if not weights.is_file():
            from mlflow.client import MlflowClient

            from flows.registry import model_versions

            weights = model_versions.cached_weights(model_versions.version_of(MlflowClient(), name, number))
        require_conditions(weights, params, conditions)


def require_model(params: Params) -> None:
    """Raise UserError if the data set has neither a registered model nor a ledger, nor images here."""
    name = params.model_name
    if name in (models := registered_models()) or (params.dataset_folder / "manifest.json").is_file():
        return
    if _ledger_aliases(name) is None:
        there = f"there is {_some(sorted(models))}" if models else "there is none yet"
        raise UserError(f"no model or data set {name}: give the --dataset of a model, {there}")


def require_conditions(weights: Path, params: Params, conditions: Conditions) -> None:
    """Raise UserError if the model in a file does not exist, or was not trained with these labels or prompts."""
    header: Any = read_header(weights).get("model_header")
    try:
        config: FamilyConfig = TypeAdapter(FamilyConfig).validate_python(header["model"])
        classes = classes_of(config, header["class_histogram"])
    except (ValidationError, KeyError, TypeError):
        return  # loading it will say what is wrong
    # Guidance may be chosen by the model itself, and is checked with it.
    named = conditions.model_copy(update={"negative_prompt": None})
    check_conditions(classes, config.text, params.sampling.unguided(), named)


def require_prompts(conditions: Conditions) -> None:
    """Raise UserError for prompts that are empty or too long."""
    if conditions.texts:
        from diffusion.generation.generate import check_prompts

        check_prompts(conditions)


def registered_models(name: str | None = None) -> dict[str, Any]:
    """Registered models of MLflow by name: all, or the one of that ``name``."""
    return {each["name"]: each for each in _search("registered-models", f"name='{name}'" if name else "")}


def _search(what: str, filter_: str) -> list[dict[str, Any]]:
    if not os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http"):  # a store that only MLflow itself reads
        from mlflow.client import MlflowClient

        if what == "registered-models":
            models = MlflowClient().search_registered_models(filter_ or None)
            return [{"name": each.name, "aliases": _pairs(each.aliases, "alias", "version")} for each in models]
        versions = MlflowClient().search_model_versions(filter_)
        return [{"version": each.version, "tags": _pairs(each.tags, "key", "value")} for each in versions]
    found: list[dict[str, Any]] = []
    token = ""
    # MLflow's client would wait for a slow server too.
    again = Retrying(
        retry=retry_if_exception_type(NotServing), stop=stop_after_delay(30), wait=wait_fixed(1), reraise=True
    )
    while True:
        fields = {"filter": filter_, "page_token": token, "max_results": "1000"}
        query = urlencode({key: value for key, value in fields.items() if value})
        answer = again(query_mlflow, f"{what}/search?{query}", timeout=10)
        found += answer.get(what.replace("-", "_"), ())
        if not (token := answer.get("next_page_token", "")):
            return found


def _pairs(values: Mapping[str, Any], key: str, value: str) -> list[dict[str, Any]]:
    return [{key: name, value: each} for name, each in values.items()]


def _ledger_aliases(name: str) -> dict[str, int] | None:
    # The ledger decides, and MLflow's aliases may be behind.
    from flows.registry.ledger import Ledger

    head = Ledger.of(name).head()
    return None if head is None else head.aliases


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
