"""Import of models that were not trained here, pipelines of diffusers and model files, as versions of a model.

The run of an import says where the model comes from. Equal bytes under another name refer to the same logged model, so
that they lie on S3 once.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock
from mlflow.client import MlflowClient
from mlflow.entities import Param
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE, MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE

from diffusion.checkpoints import read_model_header
from diffusion.common.escaping import escape_markdown
from diffusion.common.files import is_model_file, remove_partials
from diffusion.diffusers_format.import_model import ImportedFile, ImportParts, import_file
from diffusion.families.config import effective_sampling
from diffusion.families.header import ModelHeader
from diffusion.process.samplers import SamplingConfig
from flows.environment import settings
from flows.registry import model_card, model_versions
from flows.registry.model_versions import LICENCE, ORIGIN, Version
from flows.registry.takedown_marks import ANCESTORS, TAKEDOWN, ancestors_tag
from flows.tracking.console import reporter
from flows.tracking.runs import AUTOENCODER, IMPORTED, ORIGIN_ARTIFACT, START, RunTracker, find_or_create_run

DIGEST = re.compile("[0-9a-f]{64}")
LINEAGE = ("darkroom.content_digest", "darkroom.dvc_digest", "darkroom.dataset", TAKEDOWN, AUTOENCODER, START)
"""Tags of a training's run that its versions have as well."""


class ImportedModel(ImportedFile):
    """A model that was imported, with its version."""

    version: Version


def import_model(
    source: str, name: str, licence: str | None, sampling: SamplingConfig, parts: ImportParts | None = None
) -> ImportedModel:
    """Register the model that ``source`` names as a version of the model ``name``; repeated, it finds that version.

    ``sampling`` is how the served version samples. Raises UserError as ``import_file`` does.
    """
    folder, cache = settings().folder / "imports" / name, settings().folder / "models"
    for path in (folder, cache):
        path.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        remove_partials(folder)
        imported_file = import_file(
            source, folder / "weights.safetensors", licence, folder / "downloads", reporter(), parts
        )
        header, client = read_model_header(imported_file.file), MlflowClient()
        # Imports of the same weights under several names wait for each other, so that they are stored once.
        with FileLock(folder.parent / f".{imported_file.sha256}.lock"):
            version = _register(client, name, imported_file, header, sampling)
            # A killed import may have registered the version, and left models of earlier attempts.
            model_versions.discard_other_models(client, version, version.run_id)
        model_card.write_imported(client, header, imported_file.origin, version)
        imported_file.file.replace(cache / f"{imported_file.sha256}.safetensors")
        for base in folder.glob("*.safetensors"):
            base.replace(cache / base.name)
        # Not before: after a kill nothing is downloaded again.
        shutil.rmtree(folder / "downloads", ignore_errors=True)
    return ImportedModel(
        **dict(imported_file) | {"file": cache / f"{imported_file.sha256}.safetensors"}, version=version
    )


def find_parts(base: str | None, pipeline_config: Path | None) -> ImportParts:
    """Fetch the weights of ``base``, a registered version or a file, which a LoRA belongs to."""
    if base is None or is_model_file(base):
        return ImportParts(base=None if base is None else Path(base), pipeline_config=pipeline_config)
    version = model_versions.resolve(MlflowClient(), base)
    return ImportParts(model_versions.cached_weights(version), version.uri, pipeline_config)


def _register(
    client: MlflowClient, name: str, imported_file: ImportedFile, header: ModelHeader, sampling: SamplingConfig
) -> Version:
    """Find or make the version of the imported weights."""
    if (version := model_versions.find(client, name, imported_file.sha256)) is not None:
        return version
    tags: dict[str, str | None] = {ORIGIN: imported_file.source, LICENCE: imported_file.origin.licence}
    tags |= model_versions.base_tags(client, imported_file.file)
    tags[ANCESTORS] = ancestors_tag(client, [tags.get(START)])
    if header.origin is None and DIGEST.fullmatch(header.content_digest):
        # By which a takedown of images that it learned from finds it.
        tags |= {"darkroom.dataset": header.dataset, "darkroom.content_digest": header.content_digest}
    if not (models := model_versions.find_stored_models(imported_file.sha256)):
        run_id, config = (
            _open_run(client, name, imported_file, header, tags),
            effective_sampling(header.model, sampling),
        )
        return model_versions.register(name, run_id, imported_file.file, config, tags, header.images)
    if IMPORTED not in (training_tags := client.get_run(str(models[0].source_run_id)).data.tags):
        # It was trained here: instead of an origin it has the lineage of that training.
        tags = {tag: training_tags.get(tag) for tag in LINEAGE}
    tags[ANCESTORS] = ancestors_tag(client, (tags.get(START), tags.get(AUTOENCODER)))
    logged_tags = {tag: models[0].tags.get(tag) for tag in model_versions.LOGGED_TAGS}
    entries = {tag: str(value) for tag, value in (logged_tags | tags).items() if value is not None}
    return model_versions.register_once(client, models[0].model_uri, name, imported_file.sha256, entries)


def _open_run(
    client: MlflowClient, name: str, imported_file: ImportedFile, header: ModelHeader, tags: Mapping[str, str | None]
) -> str:
    """Find or create the run of the import, with the origin and the digests of its files; returns its ID.

    ``tags`` are the version's.
    """
    run_tags = {
        MLFLOW_RUN_NOTE: f"Import of {escape_markdown(imported_file.source)}, {header.pixels} pixels, under the "
        f"licence {escape_markdown(imported_file.origin.licence or '')}. `origin.json` has the digests of its files.",
        MLFLOW_SOURCE_NAME: "darkroom model import",
        MLFLOW_SOURCE_TYPE: "LOCAL",
    }
    run_id = str(
        find_or_create_run(
            client, name, IMPORTED, imported_file.sha256, f"import-{imported_file.sha256[:8]}", run_tags
        ).info.run_id
    )
    fields = {
        "source": imported_file.origin.source,
        "revision": imported_file.origin.revision,
        "licence": imported_file.origin.licence,
    }
    params = {"model.family": imported_file.family} | {f"import.{key}": value for key, value in fields.items() if value}
    client.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])
    origin = imported_file.origin.model_dump(mode="json", include={"source", "revision", "licence", "files"})
    client.log_dict(run_id, origin, ORIGIN_ARTIFACT)
    tracker = RunTracker(client, run_id)
    tracker.tag({tag: tags.get(tag) for tag in (ORIGIN, LICENCE, START, "darkroom.content_digest")})
    tracker.finish()
    return run_id
