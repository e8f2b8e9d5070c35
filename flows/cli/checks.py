"""Cheap checks of a command before servers' clients and torch are imported, and before there is a flow run.

What they find would otherwise stand in Prefect as a failed run. They import neither torch nor MLflow's or Prefect's
clients, which take seconds; the flows check again whatever may have changed since.
"""

import math
import os
import posixpath
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlencode

from pydantic import TypeAdapter, ValidationError
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from diffusion.common.errors import UserError
from diffusion.common.model_files import read_header
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.decode import UnusableEntryError, prepare
from diffusion.data.ingest.ingest import Rebuild, ingest, require_same_storage
from diffusion.data.manifest import Manifest, read_manifest, read_records
from diffusion.data.sources import open_source
from diffusion.data.sources.base import Access
from diffusion.data.sources.conventions import METADATA_FILES, holds_images, is_image, make_printable, visible_files
from diffusion.data.sources.hub_dataset import HubDataset
from diffusion.data.sources.known_sets import find_idx
from diffusion.data.sources.local_files import find_files
from diffusion.evaluation.config import MIN_PER_SPLIT, EvaluationConfig, require_enough
from diffusion.families.config import FamilyConfig, ModelConfig, classes_of
from diffusion.generation.config import Conditions, GenerationRequest, check_conditions
from diffusion.process.samplers import SamplingConfig
from flows.config import Params, override_keys, registered_autoencoder, registered_initial_weights
from flows.environment import settings
from flows.local_stack.http_api import NotServingError, query_mlflow
from flows.storage.tags import parse_model_uri, parse_tags

LISTED = 10
"""Most models or versions in a message."""
MAX_CHECKED = 1000
"""Maximum number of images that are decoded to check whether they suffice: seconds."""
MAX_LISTED = 20_000
"""Number of files from which a folder is not checked."""
SPOT_CHECKED = 16
"""Number of images that are decoded to see whether more have to be."""
SAMPLING_ERROR = 0.1
"""Difference between the shares of unusable images in a sample of ``MAX_CHECKED`` and in the source: six deviations."""


def require_source(config: IngestConfig) -> None:
    """Raise UserError if ``ingest.source`` is missing, not understood, a folder without images, or not on the Hub."""
    if config.source.startswith("s3://"):
        return
    source = open_source(config.source, Access(config, Path()))
    if isinstance(source, HubDataset):
        source.find()
    scheme, _, place = config.source.partition(":")
    if scheme in ("wds", "parquet") and not place.startswith("s3://"):
        find_files(place.partition("?")[0], f".{scheme}")  # raises for files that are not there
    if Path(config.source).is_dir() and not holds_images(Path(config.source)):
        idx = find_idx(Path(config.source))
        hint = f"use the source {idx}" if idx else "give a source of JPEG, PNG, WebP, GIF, BMP or TIFF images"
        raise UserError(f"no images in {config.source}{', but IDX files' if idx else ''}: {hint}")


def require_training_inputs(params: Params) -> Manifest:
    """Read the data set's manifest; raises UserError without it, or for an unknown model that training begins with."""
    version = read_manifest(params.dataset_folder)
    require_models(params)
    return version


def require_models(params: Params) -> None:
    """Raise UserError for an unknown model, registered or a file, that training begins with."""
    for path in (params.training.init_from, getattr(params.model, "autoencoder", None)):
        if path is not None and path != "champion" and not path.startswith("models:/"):
            read_header(Path(path))
    for uri in (registered_autoencoder(params), registered_initial_weights(params)):
        # While there is no champion, training begins with random weights.
        if uri is not None and uri != params.champion:
            require_version(uri)


def require_ingestable(params: Params, rebuild: Rebuild = "never") -> Manifest | None:
    """Version that an ingest adds to, if any; UserError if it stores images in another way and is not to be rebuilt."""
    from flows.datasets.catalog import Catalog
    from flows.datasets.checkout import read_pin
    from flows.datasets.sync import find_newer_version
    from flows.environment import data_source
    from flows.storage.s3 import S3Objects

    manifest, folder = None, params.dataset_folder
    if (source := params.ingest.source).startswith("s3://") and next(S3Objects().find(source), None) is None:
        raise UserError(f"there is nothing at {source}: check the address")
    catalog = Catalog.of(params.training.dataset, data_source())
    if read_pin(folder) is None and (digest := find_newer_version(params, catalog)) is not None:
        manifest = catalog.version(digest)
    elif (folder / "manifest.json").is_file():
        manifest = read_manifest(folder)
    if manifest is not None:
        require_same_storage(manifest, params.ingest, rebuild)
    require_usable(params.ingest)
    return manifest


def require_usable(config: IngestConfig) -> None:
    """Raise UserError if so few images of a folder can be used that its ingest would fail; large folders are not read.

    A few evenly spaced ones are decoded, and many more only if some of these are unusable.
    """
    root = Path(config.source)
    if not root.is_dir() or sum(1 for _ in islice(visible_files(root), MAX_LISTED)) == MAX_LISTED:
        return
    if config.fit == "bucket":  # whose shapes, which decide what is too small, may not be chosen yet
        config = config.model_copy(update={"fit": "crop", "buckets": None, "enlarge": True})
    reasons, checked, step = Counter[str](), 0, 1
    with TemporaryDirectory() as scratch:
        source = open_source(config.source, Access(config, Path(scratch)))
        entries = list(source.entries())
        for limit in (SPOT_CHECKED, MAX_CHECKED):
            step = math.ceil(len(entries) / limit) or 1
            reasons, checked = Counter[str](), len(entries[::step])
            for payload in source.read(entries[::step]):
                try:
                    if isinstance(payload, UnusableEntryError):
                        raise payload
                    prepare(payload, config)
                except UnusableEntryError as error:
                    reasons[str(error)] += 1
            if not reasons:
                return
    # A sample may have more unusable ones than the folder.
    allowed_share = config.max_quarantined + (0 if step == 1 else SAMPLING_ERROR)
    if reasons.total() == checked or reasons.total() > allowed_share * checked:
        words = "; ".join(f"{number} × {reason}" for reason, number in reasons.most_common(3))
        raise UserError(
            f"{reasons.total()} of {checked} images of {config.source} cannot be used ({words}), more than the share "
            f"of {config.max_quarantined:g} that ingest.max_quarantined allows: fix them, or allow more"
        )


def deployment_notes(params: Params, workspace: Path) -> list[str]:
    """Say what the first scheduled retraining would find in ``workspace``, as far as it is on this machine.

    Raises UserError if the data set there stores images in another way, so that every retraining would fail.
    """
    if not workspace.is_dir():
        return []
    notes, folder, run = [], workspace / params.dataset_folder, workspace / params.run_folder
    if (folder / "manifest.json").is_file():
        require_same_storage(read_manifest(folder), params.ingest, "never")
    else:
        notes.append(
            f"no data set {params.training.dataset} in {workspace}: the first run ingests {params.ingest.source}"
        )
    if (run / "final.safetensors").is_file():
        notes.append(f"runs train in {run}: what is there is discarded if it was trained with other inputs")
    return notes


def require_enough_images(params: Params, version: Manifest | None) -> None:
    """Raise UserError if the images of ``ingest.source`` and those of ``version`` are too few for an evaluation.

    Which images are held out depends on their pixels: a small source is ingested into a temporary folder for that.
    Sources that would be downloaded, and versions that are not on this machine, are left to the flow.
    """
    folder, config = params.dataset_folder, params.ingest
    if version is not None and min(version.counts.values()) >= MIN_PER_SPLIT:
        return
    from flows.storage.s3 import S3Objects

    share, objects = min(config.held_out, 1 - config.held_out), S3Objects()
    if not (config.source.startswith("s3://") or Path(config.source).exists()):
        return
    with TemporaryDirectory() as temporary:
        source, scratch = Path(temporary, "source"), Path(temporary, folder.name)
        source.mkdir()
        # With four times as many as needed, chance leaves enough.
        most = math.ceil(4 * MIN_PER_SPLIT / share)
        count = sum(1 for _ in islice(open_source(config.source, Access(config, source, objects)).entries(), most))
        if count == most:
            return
        if count > MAX_CHECKED:
            if count * share < MIN_PER_SPLIT:
                raise UserError(
                    f"ingest.held_out = {config.held_out:g} of {count:,} images leaves about {count * share:.0f} on "
                    f"one side, and evaluation needs {MIN_PER_SPLIT}: change it, or give more images"
                )
            return
        if version is not None:
            is_here = (folder / "manifest.json").is_file() and read_manifest(folder) == version
            if version.kept > MAX_CHECKED or not is_here:
                return
            shutil.copytree(folder, scratch)
        # Captions decide nothing here, and each would be paid for.
        ingest(scratch, config.model_copy(update={"runner": "threads", "captioner": None}), objects=objects)
        require_enough(read_manifest(scratch))


def require_network(params: Params) -> None:
    """Raise UserError for a device that is not there, or a network that images of ``ingest.size`` do not fit."""
    from diffusion.common.device import resolve_device

    for device in (params.training.device, params.sampling.device):
        resolve_device(device)
    has_weights = params.training.init_from is not None or params.model.family == "diffusers"
    if has_weights or (isinstance(params.model, ModelConfig) and params.model.autoencoder is not None):
        return  # pretrained weights decide
    import torch

    from diffusion.families import family_of

    with torch.device("meta"):
        family_of(params.model).make_network(params.model, (1, params.ingest.size, params.ingest.size), 0)


def require_extractor(config: EvaluationConfig) -> None:
    """Raise UserError if the file of the feature network is missing."""
    if config.extractor_weights is not None and not config.extractor_weights.is_file():
        raise UserError(f"no network at evaluation.extractor_weights = {config.extractor_weights}: give its path")


def require_evaluable(params: Params) -> None:
    """Raise UserError if the data set is missing or too small for an evaluation, or its feature network is missing."""
    require_enough(read_manifest(params.dataset_folder))
    require_extractor(params.evaluation)


def require_destination(to: str | None) -> None:
    """Raise UserError for an address that is none on S3, or names a bucket that is not there or cannot be used."""
    if to is not None:
        from flows.storage.s3 import Location, Store

        Store().require_conditional_puts(Location.parse(to).bucket, "samples")


def require_batch(
    params: Params,
    uri: str,
    count: int | None,
    seed: int,
    to: str | None,
    conditions: Conditions,
    requests: str | None,
    overrides: list[str],
) -> None:
    """Raise UserError for a sampling batch that cannot be planned; the arguments are those of ``sample``."""
    from mlflow.client import MlflowClient

    from flows.registry import model_versions
    from flows.sampling import generate_batch
    from flows.storage.s3 import Store

    require_destination(to)
    version = model_versions.resolve(MlflowClient(), uri)
    weights, config = model_versions.cached_weights(version), params.sampling_batch
    batch, _ = generate_batch.plan(
        Store(), version, weights, params.sampling, config, count, seed, conditions, requests
    )
    _require_effect(overrides, params.sampling, batch.sampling, uri)


def require_answerable(
    given_sampling: SamplingConfig,
    sampling: SamplingConfig,
    overrides: list[str],
    weights: Path,
    name: str,
    request: GenerationRequest,
) -> None:
    """Raise UserError for a ``request`` that a model cannot answer, such as a mask of another size.

    Also if some of the ``overrides``, which are in ``given_sampling``, have no effect when the model, called ``name``,
    answers with ``sampling``.
    """
    from diffusion.checkpoints import load_model
    from diffusion.generation.requests import input_of, sampling_of

    model = load_model(weights)
    used_sampling = sampling_of(model, request, sampling)
    input_of(model, request)
    _require_effect(overrides, given_sampling, used_sampling, name)


def _require_effect(
    overrides: list[str], given_sampling: SamplingConfig, used_sampling: SamplingConfig, name: str
) -> None:
    for key in override_keys(overrides):
        section, *fields = key.split(".")
        if section != "sampling" or not fields:
            continue
        # A scale of 1 is no guidance, and null leaves the choice to the model.
        without_effect = (None, 1) if fields[0] in ("guidance", "autoguidance") else (None,)
        if getattr(given_sampling, fields[0]) not in (*without_effect, getattr(used_sampling, fields[0], None)):
            raise UserError(f"--set {key} has no effect on these images of {name}: leave it out")


def require_run(params: Params) -> None:
    """Raise UserError if there is no run to evaluate, or it cannot be evaluated."""
    require_evaluable(params)
    if not any((params.run_folder / "checkpoints").glob("*.safetensors")):
        raise UserError(f"no checkpoint in {params.run_folder}: run `darkroom train` first")


def require_evaluation(folder: Path, model: str | None = None) -> None:
    """Raise UserError if ``folder`` has no evaluation of the training, or of ``model``, to promote by."""
    if not (folder / "evaluation.json").is_file():
        option = "" if model is None else f" --model {model}"
        raise UserError(f"no evaluation in {folder}: run `darkroom evaluate{option}` first")


def require_conditions_in_source(params: Params, conditions: Conditions) -> None:
    """Raise UserError for conditions that a model of the data set and the images of ``ingest.source`` will not know.

    Classes and captions of a source other than a folder of images are known only once it is read.
    """
    root, folder, known_classes, has_captions = Path(params.ingest.source), params.dataset_folder, set[str](), False
    if is_there := (folder / "manifest.json").is_file():
        manifest = read_manifest(folder)
        known_classes.update(manifest.labels)
        captions = (read_records(folder, part, ["caption"])["caption"] for part in manifest.parts)
        has_captions = params.model.text and any(column.null_count < len(column) for column in captions)
    is_plain = root.is_dir() and not any((root / name).exists() for name in METADATA_FILES)
    if params.model.text and is_plain and not has_captions:
        raise UserError(
            f"model.text conditions the network on captions, and {root} has none: put them into {root}/metadata.csv, "
            "with columns file_name and text, or leave model.text out"
        )
    labels = {label for label in conditions.labels if label is not None}
    required_count = 2 if labels or params.sampling.guides else 0
    if is_plain and not (labels <= known_classes and len(known_classes) >= required_count):
        for name in map(make_printable, visible_files(root)):
            if is_image(name) and (parent := posixpath.dirname(name)):
                known_classes.add(posixpath.basename(parent))
                if labels <= known_classes and len(known_classes) >= required_count:
                    break
    if not is_plain and not labels <= known_classes:
        known_classes |= labels
    if unknown_labels := sorted(labels - known_classes):
        hint = f"there is {', '.join(sorted(known_classes)[:20])}" if known_classes else "there are no classes"
        raise UserError(f"no class {unknown_labels[0]!r} in {root} or data set {params.training.dataset}: {hint}")
    if is_plain or is_there:
        classes = classes_of(params.model, dict.fromkeys(sorted(known_classes), 1))
        check_conditions(classes, params.model.text, params.sampling, conditions)


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
    """Raise UserError if the ``model`` with these weights generates other shapes than those of the data set."""
    version, header = read_manifest(params.dataset_folder), read_header(weights).get("model_header") or {}
    theirs, ours = (header.get("channels"), header.get("size")), (version.channels, version.size)
    if theirs != ours:
        colours: dict[Any, str] = {1: "grey", 3: "RGB"}
        they, we = (f"{size}×{size} in {colours.get(channels)}" for channels, size in (theirs, ours))
        settings: dict[str, Any] = {"ingest.mode": str(colours.get(theirs[0])).lower()} if theirs[0] != ours[0] else {}
        settings |= {"ingest.size": theirs[1]} if theirs[1] != ours[1] else {}
        raise UserError(
            f"{model} generates images of {they}, and data set {version.name} holds {we}: ingest images like its own, "
            f"with {' '.join(f'--set {key}={value}' for key, value in settings.items())}"
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
    entities: list[dict[str, Any]] = []
    token = ""
    # MLflow's client would wait for a slow server too.
    retryer = Retrying(
        retry=retry_if_exception_type(NotServingError), stop=stop_after_delay(30), wait=wait_fixed(1), reraise=True
    )
    while True:
        fields = {"filter": filter_, "page_token": token, "max_results": "1000"}
        query = urlencode({key: value for key, value in fields.items() if value})
        answer = retryer(query_mlflow, f"{resource}/search?{query}", timeout=10)
        entities += answer.get(resource.replace("-", "_"), ())
        if not (token := answer.get("next_page_token", "")):
            return entities


def _pairs(values: Mapping[str, Any], key: str, value: str) -> list[dict[str, Any]]:
    return [{key: name, value: text} for name, text in values.items()]


def _ledger_aliases(name: str) -> dict[str, int] | None:
    # The ledger decides, and MLflow's aliases may be behind.
    from flows.registry.ledger import Ledger

    head = Ledger.of(name).head()
    return None if head is None else head.aliases


def _abbreviate(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
