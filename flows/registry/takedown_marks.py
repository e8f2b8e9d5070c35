"""Marks of takedowns on derived runs, model versions and sampling batches, which were made from the images taken down.

A takedown finds and marks them; before a data set or a version is used, the catalog is checked for later takedowns.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
from mlflow.client import MlflowClient
from mlflow.entities import Run, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from diffusion.common.config import Config, dataset_folder
from diffusion.common.errors import UserError
from diffusion.common.escaping import escape_controls, escape_markdown
from diffusion.common.files import canonical_json
from diffusion.data.manifest import read_manifest
from diffusion.data.versions.takedown_records import Removal, find_affected_versions
from diffusion.data.versions.versions import known_versions
from diffusion.families.config import FAMILIES
from flows.datasets.catalog import Catalog, Heads
from flows.datasets.dvc import StoredFiles
from flows.environment import data_source
from flows.registry import model_versions
from flows.registry.aliases import none_if_missing
from flows.registry.model_versions import Version, registered_version
from flows.storage.s3 import Store
from flows.storage.tags import parse_model_uri, parse_tags
from flows.tracking.runs import AUTOENCODER, MANIFEST_ARTIFACT, START, RunTracker

TAKEDOWN = "darkroom.takedown"
"""Tag of runs and model versions trained on images taken down since: the names of those takedowns."""
EVALUATED_ON = "darkroom.evaluated_on"
"""Tag of runs of versions evaluated by themselves, and of sweeps: content digests of the data sets, with commas."""
ANCESTORS = "darkroom.ancestors"
"""Tag of a version: the data that those it was made from learned from, by which a takedown finds it without them."""
NOTE = "mlflow.note.content"
NOTE_BEGINS = "Takedown "


class DerivedRun(Config):
    """Training run on images that were taken down."""

    run_id: str
    name: str
    content_digest: str


class DerivedModel(Config):
    """Registered model version made from such a run."""

    uri: str
    run_id: str
    aliases: list[str]


class DerivedArtifacts(Config):
    """Runs, models and sampling batches made from data set versions that held the images."""

    runs: list[DerivedRun]
    models: list[DerivedModel]
    samples: list[str]
    """Sampling batches at their default place on S3, which are listed and not deleted, as their images are others."""
    evaluated: list[str]
    """Other runs whose evaluations show held-out images of these versions."""
    unclear_runs: list[str]
    """Runs on unknown versions of the data set, found neither here nor in the catalog."""


def find_derived(
    dataset: str, contents: Iterable[str], readable_contents: Iterable[str], bucket: str
) -> DerivedArtifacts:
    """Find runs, models and batches made from the versions of ``dataset`` with the content digests ``contents``.

    ``readable_contents`` holds the content digests of all versions that could be read.
    """
    client, digests = MlflowClient(), sorted(set(contents))
    runs: dict[str, Run] = {}
    models: dict[tuple[str, int], ModelVersion] = {}
    new_runs = [run for digest in digests for run in _runs("darkroom.content_digest", digest)]
    queries = [f"tags.`{tag}` LIKE '%{text}%'" for tag in ("darkroom.content_digest", ANCESTORS) for text in digests]
    while new_runs or queries:
        runs |= {run.info.run_id: run for run in new_runs}
        queries += [f"run_id = '{run.info.run_id}'" for run in new_runs]
        matches = [model for query in queries for model in mlflow.search_model_versions(filter_string=query)]
        new_models = {key: model for model in matches if (key := (model.name, int(model.version))) not in models}
        models |= new_models
        # A latent diffusion model contains its autoencoder, and a model inherits the training data of its initial
        # weights, transitively.
        uris = [f"models:/{name}/{number}" for name, number in new_models]
        new_runs, queries = [run for uri in uris for tag in (AUTOENCODER, START) for run in _runs(tag, uri)], []
    known_digests = {*digests, *readable_contents}
    return DerivedArtifacts(
        runs=[
            DerivedRun(run_id=run_id, name=run.info.run_name, content_digest=run.data.tags["darkroom.content_digest"])
            for run_id, run in sorted(runs.items())
        ],
        models=[
            DerivedModel(
                uri=f"models:/{name}/{number}",
                run_id=model.run_id or "",
                aliases=sorted(client.get_model_version(name, str(number)).aliases),
            )
            for (name, number), model in sorted(models.items())
        ],
        samples=[
            f"s3://{bucket}/{key.removesuffix('batch.json')}"
            for name, number in sorted(models)
            for key in Store().list_keys(bucket, f"samples/{name}/{number}/")
            if key.endswith("/batch.json")
        ],
        evaluated=sorted(
            {
                run.info.run_id
                for digest in digests
                for run in mlflow.search_runs(
                    search_all_experiments=True,
                    filter_string=f"tags.`{EVALUATED_ON}` LIKE '%{digest}%'",
                    output_format="list",
                )
            }
            - runs.keys()
        ),
        unclear_runs=sorted(
            run.info.run_id
            for run in _runs("darkroom.dataset", dataset)
            if run.data.tags.get("darkroom.content_digest") not in known_digests
        ),
    )


def mark(runs: Iterable[str], versions: Iterable[str], removal: Removal) -> None:
    """Tag runs, by ID, if they exist, and model versions, by URI, and describe the takedown there; idempotent."""
    client = MlflowClient()
    note = (
        f"{NOTE_BEGINS}{removal.name}: made from images that were removed from data set {removal.dataset} since "
        f"({escape_markdown(removal.reason)})."
    )
    for run_id in runs:
        if (run := none_if_missing(client.get_run, run_id)) is None:
            continue
        tags = run.data.tags
        marks = {
            TAKEDOWN: join_takedown_names(tags.get(TAKEDOWN), removal.name),
            NOTE: _append_note(tags.get(NOTE), note),
        }
        client.log_batch(run_id, tags=[RunTag(name, value) for name, value in marks.items()])
    for uri in versions:
        name, number = uri.removeprefix("models:/").rsplit("/", 1)
        model_version = client.get_model_version(name, number)
        client.set_model_version_tag(
            name, number, TAKEDOWN, join_takedown_names(model_version.tags.get(TAKEDOWN), removal.name)
        )
        client.update_model_version(name, number, description=_append_note(model_version.description, note))


def clear_images(derived: DerivedArtifacts) -> list[str]:
    """Delete artifacts that show real images of the data set from the runs; returns them as runs:/ID/PATH."""
    client, uris, run_ids = MlflowClient(), [], {run.run_id for run in derived.runs}
    for run in (client.get_run(run_id) for run_id in (*run_ids, *derived.evaluated)):
        folders = (None, "dataset", "explain", "evaluation", "evaluation/grids", "images")
        root, dataset, explain, evaluation, grids, images = (
            [item.path for item in client.list_artifacts(run.info.run_id, folder)] for folder in folders
        )
        params = run.data.params
        evaluated_by = FAMILIES[params.get("model.family", "ddpm")].evaluated_by
        if params.get("model.low_resolution", "None") != "None" or evaluated_by == "reconstructions":
            # What these generate are real images, enlarged or come back.
            grids += images
        else:
            grids = [path for path in grids if path.rpartition("/")[2].startswith("held_out")]
        pages = [path for path in (*root, *evaluation) if path.endswith(".html")]
        artifacts = get_artifact_repository(run.info.artifact_uri)
        dataset_files = dataset if run.info.run_id in run_ids else ()
        for path in (*dataset_files, *explain, *pages, *grids):
            if path != MANIFEST_ARTIFACT:
                artifacts.delete_artifacts(path)  # type: ignore[no-untyped-call]
                uris.append(f"runs:/{run.info.run_id}/{path}")
    return uris


def walk_lineage(client: MlflowClient, uris: Iterable[str | None]) -> Iterator[Version]:
    """Yield the versions ``uris`` and, transitively, their autoencoders and initial models, if they are registered."""
    queue, seen = [uri for uri in uris if uri], set[str]()
    while queue:
        if (uri := queue.pop(0)) in seen:
            continue
        seen.add(uri)
        name, number = parse_model_uri(uri)
        if (version := registered_version(client, name, int(number))) is not None:
            yield version
            tags = parse_tags(version.tags, uri)
            queue += [parent for parent in (tags.start, tags.autoencoder) if parent]


def ancestors_tag(client: MlflowClient, uris: Iterable[str | None]) -> str | None:
    """Value of the tag ``ANCESTORS`` of a version that is made from the versions ``uris``; None without any."""
    contents = set[tuple[str, str]]()
    for version in walk_lineage(client, uris):
        contents |= parse_tags(version.tags, version.uri).contents
    return canonical_json(sorted(contents)) if contents else None


def describe_takedowns(version: Version) -> str | None:
    """Warning for users of ``version`` that it was trained on images taken down since; None if it was not."""
    names = version.tags.get(TAKEDOWN)
    return names and f"{version.uri} was made from images that were taken down since (takedown {names}): train again"


def parse_takedown_names(tag: str | None) -> list[str]:
    """Names of takedowns in the value of a tag."""
    return tag.split(",") if tag else []


def join_takedown_names(tag: str | None, *names: str) -> str:
    """Value of a tag that lists ``names`` and those in ``tag``."""
    return ",".join(sorted({*parse_takedown_names(tag), *names}))


def find_notes(description: str) -> list[str]:
    """Notes on takedowns that ``mark`` left in the description of a run or a version."""
    return [paragraph for paragraph in description.split("\n\n") if paragraph.startswith(NOTE_BEGINS)]


def warn_of_takedown(version: Version) -> None:
    """Warn on standard error, in one line, if ``version`` was trained on images that were taken down since."""
    if warning := describe_takedowns(version):
        print(escape_controls(f"darkroom: {warning}"), file=sys.stderr, flush=True)


def _runs(tag: str, value: str) -> list[Run]:
    text = value.replace("'", "\\'")
    query = f"tags.`{tag}` = '{text}'"
    return list(mlflow.search_runs(search_all_experiments=True, filter_string=query, output_format="list"))


def _append_note(text: str | None, note: str) -> str:
    return text if text and note in text else "\n\n".join(filter(None, (text, note)))


def require_current(folder: Path, tracker: RunTracker | None = None) -> None:
    """Raise UserError if the data set in ``folder`` holds images taken down anywhere; marks the run first."""
    catalog = Catalog.of(folder.name, data_source())
    if not (removals := catalog.find_held_removals(folder)):
        return
    if tracker is not None:
        names = tracker.client.get_run(tracker.run_id).data.tags.get(TAKEDOWN)
        tracker.tag({TAKEDOWN: join_takedown_names(names, *(removal.name for removal in removals))})
    digest, head = read_manifest(folder).digest, Heads(catalog).newest()
    way = f"`darkroom ingest SOURCE --dataset {folder.name}` makes a version without them"
    if head not in (None, digest):
        way = f"go on with the newest, `darkroom data checkout {head[:12]} --dataset {folder.name}`"
    raise UserError(
        f"version {digest[:12]} of data set {folder.name} holds images that were taken down ({removals[0].reason}; "
        f"takedown {', '.join(removal.name for removal in removals)}): {way}"
    )


def reload_with_takedowns(version: Version) -> Version:
    """Reload ``version`` from MLflow, marked with every takedown of images that it was trained on.

    These are the images of its data set and, transitively, of its autoencoder and its initial weights.
    """
    client = MlflowClient()
    version = model_versions.get_version(client, version.model, version.number)
    names, contents = set[str](), set[tuple[str, str]]()
    for member in walk_lineage(client, [version.uri]):
        tags = parse_tags(member.tags, member.uri)
        names.update(parse_takedown_names(tags.takedown))
        contents |= tags.contents
    records = {removal.name: removal for digest, dataset in contents for removal in _find_removals(dataset, digest)}
    marks = set(parse_takedown_names(version.tags.get(TAKEDOWN)))
    for name in sorted(records.keys() - marks):
        mark([version.run_id], [version.uri], records[name])
    if not {*records, *names} - marks:
        return version
    # Read anew: a takedown may have added its name meanwhile.
    version = model_versions.get_version(client, version.model, version.number)
    value = join_takedown_names(version.tags.get(TAKEDOWN), *records, *names)
    client.set_model_version_tag(version.model, str(version.number), TAKEDOWN, value)
    return model_versions.get_version(client, version.model, version.number)


def _find_removals(dataset: str, content: str) -> list[Removal]:
    source, folder = data_source(), dataset_folder(dataset)
    catalog = Catalog.of(dataset, source)
    if not (removals := list(catalog.removals())):
        return []
    versions = known_versions(folder) if (folder / "manifest.json").is_file() else {}
    training_versions = [version for version in versions.values() if version.content_digest == content] or [
        version
        for version in (catalog.versions(retired=True) | catalog.versions()).values()
        if version.content_digest == content
    ]
    with TemporaryDirectory() as scratch:
        lookup = StoredFiles(dataset, source).remote_lookup(training_versions, Path(scratch))
        pairs = [(removal, find_affected_versions(folder, removal, training_versions, lookup)) for removal in removals]
    # As a takedown does: versions of equal content hold the same images.
    return [
        removal
        for removal, affected_versions in pairs
        if affected_versions.held
        and len(affected_versions.held) + len(affected_versions.unknown) == len(training_versions)
    ]
