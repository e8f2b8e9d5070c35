"""Trace of a generated image: the chain of records back to the shards that its model was trained on."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
from mlflow.client import MlflowClient
from mlflow.entities import Run
from pydantic import Field

from diffusion.common.config import Config, dataset_folder
from diffusion.common.errors import UserError
from diffusion.data.manifest import FileEntry, Manifest
from diffusion.data.versions.takedown_records import Removal
from diffusion.generation.requests import ABOUT, RequestRecord
from flows import environment
from flows.datasets.catalog import Catalog
from flows.datasets.dvc import StoredFiles, is_whole
from flows.provenance.reproduce import fetch_code
from flows.registry import model_versions
from flows.registry.aliases import none_if_missing
from flows.registry.model_versions import CODE, WEIGHTS
from flows.registry.takedown_marks import TAKEDOWN, parse_takedown_names
from flows.sampling.batch_format import SUCCESS, SamplingBatch
from flows.sampling.consistency import find_disagreements
from flows.sampling.lookup import ImageOrigin, LocatedImage, SampleLocation, find
from flows.storage.s3 import DELETED, Location, Store
from flows.storage.tags import Tags, parse_tags
from flows.tracking.runs import ORIGIN_ARTIFACT, read_run_manifest


class TracedImage(Config):
    """Generated image as it is now."""

    where: str
    sha256: str
    pixels_sha256: str | None
    index: int
    seed: int
    label: str | None
    prompt: str | None
    as_generated: bool | None
    """Whether it equals its row in the manifest; None if it has no row."""


class TracedModel(Config):
    """Registered model version that generated the image."""

    uri: str
    aliases: list[str]
    registered: datetime
    code_sha256: str | None
    """Verified digest of the code that it ships; None without such a tag, or if it ships other code now."""
    tags: dict[str, str]


class TracedRun(Config):
    """Training run of the model version."""

    run_id: str
    name: str
    status: str
    started: datetime
    git_commit: str | None
    git_dirty: bool | None
    """Whether tracked files differed from the commit; None if not recorded."""


class TracedShard(FileEntry):
    """Shard and where it lies: an address, a path or a description; None if it was not found."""

    where: str | None


class TracedData(Config):
    """Data set version that the run was trained on."""

    dataset: str
    version: str
    content_digest: str
    dvc_digest: str | None
    recorded: datetime | None
    images: int
    sources: list[str]
    """Sources with versions of which it has images, as hf://datasets/OWNER/NAME@COMMIT."""
    captioners: dict[str, int] = Field({})
    """Number of its images by the captioner that captioned them."""
    shards: list[TracedShard]


class TracedOrigin(Config):
    """Origin of an imported model: the chain ends there."""

    uri: str
    """Version that was imported: the image's own, or one that its training began with."""
    source: str
    revision: str | None
    licence: str | None
    files: dict[str, str]
    """SHA-256 of each file of the source by path."""


class Takedown(Config):
    """Takedown of images that the data set version held."""

    name: str
    reason: str | None
    images: int | None


class Trace(Config):
    """Chain of records from an image or a batch to shards; a missing link is None."""

    image: TracedImage | None
    place: str | None
    batch: SamplingBatch | None
    finished: bool | None
    request: RequestRecord | None
    model: TracedModel | None
    run: TracedRun | None
    data: TracedData | None
    origins: list[TracedOrigin]
    """Imported models in it: itself, or what training began with. An imported model has no data of its own."""
    takedowns: list[Takedown]
    """Later takedowns of images that the model was trained on."""
    broken: list[str]


def trace(address: str) -> Trace:
    """Trace a generated image or a sampling batch, by S3 address or local file; raises UserError for others."""
    return _Walk().build_trace(address)


class _Walk:
    """Walk along the chain of records that continues past missing links."""

    def __init__(self) -> None:
        self.store, self.client = Store(), MlflowClient()
        self.broken: list[str] = []

    @contextmanager
    def record_errors(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.broken.append(str(error))

    def build_trace(self, address: str) -> Trace:
        location = find(address, self.store, environment.settings().bucket)
        origin, batch, place = location.origin, location.batch, location.place
        image = location.image and self.image(location, location.image)
        if batch is not None and place is not None:
            self.broken += find_disagreements(self.store, batch, place, image.index if image else None)
        elif not isinstance(origin, ImageOrigin) or origin.task is None:
            self.broken.append(f"no batch of {location.where} is to be found beside it, or at the usual place")
        elif location.request is None:
            self.broken.append(f"{location.where} was made on request, and no {ABOUT} beside it says of what")
        model = self.model(origin.model, origin.version, origin.run_id, batch)
        run = self.run(origin.run_id)
        tags = self.tags(model, run)
        source = environment.data_source()
        for dataset_input in run.inputs.dataset_inputs if run and run.inputs else ():
            with suppress(ValueError, LookupError, TypeError, AttributeError, UserError):
                source = str(Location.parse(json.loads(dataset_input.dataset.source)["uri"]))
                break
        # Of an imported model there is no data: the chain ends at its origin.
        manifest = self.manifest(run, tags.dataset, origin.content_digest, source) if tags.origin is None else None
        dirty = run and run.data.tags.get("darkroom.git_dirty")
        run_data = run and TracedRun(
            run_id=run.info.run_id,
            name=run.info.run_name,
            status=run.info.status,
            started=_time(run.info.start_time),
            git_commit=run.data.tags.get("mlflow.source.git.commit"),
            git_dirty=None if dirty is None else dirty == "True",
        )
        is_finished = None
        if place is not None:
            is_deleted = self.store.exists(place.bucket, f"{DELETED}/{place.prefix}")
            is_finished = not is_deleted and self.store.exists(place.bucket, place.key(SUCCESS))
        return Trace(
            image=image,
            place=None if place is None else f"{place}/",
            batch=batch,
            finished=is_finished,
            request=location.request,
            model=model,
            run=run_data,
            data=manifest and self.data(manifest, tags.dvc_digest, source),
            origins=self.origins(model) if model else [],
            takedowns=self.find_takedowns(tags.dataset, model, run, manifest, source),
            broken=list(dict.fromkeys(self.broken)),
        )

    def image(self, location: SampleLocation, image: LocatedImage) -> TracedImage:
        address, batch, row, origin = location.where, location.batch, image.row, image.origin
        if row is not None and row["sha256"] != image.sha256:
            message = "was altered: its pixels are not those that were generated, by its row in the manifest"
            if row["pixels_sha256"] == image.pixels_sha256:
                message = "was saved again: its pixels are those that were generated, its bytes are not"
            self.broken.append(f"{address} {message}")
        elif row is None and (batch is not None or location.request is not None):
            self.broken.append(f"what was written down of its batch or request has no row of {address}")
        claim = origin and (origin.model, origin.version, origin.run_id, origin.seed, origin.index)
        if batch and origin and claim != (batch.model, batch.version, batch.run_id, batch.seed, image.index):
            self.broken.append(f"{address} says of itself that it is another image than its batch has there")
        return TracedImage(
            where=address,
            sha256=image.sha256,
            pixels_sha256=image.pixels_sha256,
            index=image.index,
            seed=location.origin.seed,
            label=row and row.get("label"),
            prompt=row and row.get("prompt"),
            as_generated=None if row is None else row["sha256"] == image.sha256,
        )

    def tags(self, model: TracedModel | None, run: Run | None) -> Tags:
        """Merge the tags of the model version and its run; tags of a source with a malformed one are skipped."""
        fields: dict[str, Any] = {}
        sources = [(model.uri, model.tags)] if model else []
        sources += [(f"run {run.info.run_id}", run.data.tags)] if run else []
        for source, tags in sources:
            with self.record_errors():
                fields |= parse_tags(tags, source).model_dump(exclude_none=True, by_alias=True, round_trip=True)
        return Tags.model_validate(fields)

    def model(self, name: str, number: int, run_id: str, batch: SamplingBatch | None) -> TracedModel | None:
        uri = f"models:/{name}/{number}"
        if (model_version := none_if_missing(self.client.get_model_version, name, str(number))) is None:
            self.broken.append(f"{uri} is not in the registry (any more)")
            return None
        if model_version.run_id != run_id:
            self.broken.append(f"{uri} is of run {model_version.run_id} now, and the image of run {run_id}")
        if batch is not None and model_version.tags.get(WEIGHTS) != batch.weights_sha256:
            self.broken.append(f"{uri} has other weights now than those that generated the image")
        code_sha256 = None
        with self.record_errors():
            version = model_versions.get_version(self.client, name, number)
            if batch is not None and batch.code_sha256 != version.code_sha256:
                tag, batch_digest = version.code_sha256 or "nothing", batch.code_sha256 or "nothing"
                self.broken.append(
                    f"the tag {CODE} of {uri} says {tag[:12]} of the code that it ships, and its batch "
                    f"{batch_digest[:12]}"
                )
            if version.code_sha256 is not None:
                with TemporaryDirectory() as scratch:
                    fetch_code(version, Path(scratch))
            code_sha256 = version.code_sha256
        return TracedModel(
            uri=uri,
            code_sha256=code_sha256,
            aliases=sorted(model_version.aliases),
            registered=_time(model_version.creation_timestamp),
            tags=dict(sorted(model_version.tags.items())),
        )

    def origins(self, model: TracedModel) -> list[TracedOrigin]:
        """Find the imported models among the version and those that its training began with, transitively."""
        origins, queue, uris = list[TracedOrigin](), [model.uri], set[str]()
        while queue:
            uris.add(uri := queue.pop())
            with self.record_errors():
                version = model_versions.resolve(self.client, uri)
                tags = parse_tags(version.tags, uri)
                queue += [parent for parent in (tags.start, tags.autoencoder) if parent and parent not in uris]
                if tags.origin is not None:
                    artifact_uri = f"runs:/{version.run_id}/{ORIGIN_ARTIFACT}"
                    artifacts = {item.path for item in self.client.list_artifacts(version.run_id)}
                    if ORIGIN_ARTIFACT not in artifacts:
                        raise UserError(
                            f"{artifact_uri} is gone: {uri} came from {tags.origin}, and its files are not known"
                        )
                    text = mlflow.artifacts.load_text(artifact_uri)
                    origins.append(TracedOrigin(uri=uri, **json.loads(text) | {"licence": tags.licence}))
        return origins

    def run(self, run_id: str) -> Run | None:
        if (run := none_if_missing(self.client.get_run, run_id)) is None:
            self.broken.append(f"run {run_id} is not in MLflow (any more)")
        elif run.info.lifecycle_stage == "deleted":
            self.broken.append(
                f"run {run_id} is deleted: until `mlflow gc`, `mlflow runs restore --run-id {run_id}` brings it back"
            )
        return run

    def manifest(self, run: Run | None, dataset: str | None, content: str, source: str) -> Manifest | None:
        manifest: Manifest | None = None
        if run is not None:
            with self.record_errors():
                if (manifest := read_run_manifest(self.client, run.info.run_id)) is None:
                    raise UserError(f"run {run.info.run_id} keeps no manifest of what it saw (any more)")
        if manifest is None and dataset:
            versions = Catalog.of(dataset, source, self.store).versions().values()
            manifest = next((version for version in versions if version.content_digest == content), None)
        if manifest is None:
            self.broken.append(f"no manifest of the data set version with the content {content} is to be found")
        elif manifest.content_digest != content:
            self.broken.append(
                f"the run saw a data set of content {manifest.content_digest}, the image names {content}"
            )
        return manifest

    def data(self, version: Manifest, dvc_digest: str | None, source: str) -> TracedData:
        files = StoredFiles(version.name, source, dvc_digest)
        listings = list(files.listings(version.digest).values())

        def place(shard: FileEntry) -> TracedShard:
            for listing in listings:
                md5, remote = listing.get(shard.name), files.remote
                if md5 and remote and (stat := remote.stat(md5)) and stat.size == shard.bytes:
                    return TracedShard(**dict(shard), where=remote.uri(md5))
            local_path = dataset_folder(version.name) / shard.name
            path = local_path if is_whole(local_path, shard.sha256) else files.find(shard)
            return TracedShard(**dict(shard), where=path and str(path))

        with ThreadPoolExecutor(16) as pool:
            shards = list(pool.map(place, version.shards))
        if lost_names := [shard.name for shard in shards if shard.where is None]:
            more = f" and {len(lost_names) - 3} more" if len(lost_names) > 3 else ""
            self.broken.append(f"shards that lie neither on {source} nor here: {', '.join(lost_names[:3])}{more}")
        catalog = Catalog.of(version.name, source, self.store)
        if dvc_digest is None:
            with self.record_errors():
                dvc_digest = catalog.pointer(version.digest)
        return TracedData(
            dataset=version.name,
            version=version.digest,
            content_digest=version.content_digest,
            dvc_digest=dvc_digest,
            recorded=catalog.find_publication_time(version.digest),
            images=version.kept,
            sources=version.sources,
            captioners=version.captioners,
            shards=shards,
        )

    def find_takedowns(
        self, dataset: str | None, model: TracedModel | None, run: Run | None, version: Manifest | None, source: str
    ) -> list[Takedown]:
        marks = (model.tags if model else {}, run.data.tags if run else {})
        names = {name for tags in marks for name in parse_takedown_names(tags.get(TAKEDOWN)) if name}
        records: dict[str, Removal] = {}
        if dataset:
            with self.record_errors():
                records = {removal.name: removal for removal in Catalog.of(dataset, source, self.store).removals()}
        tables = {part.records.sha256 for part in version.parts} if version else set()
        names |= {name for name, removal in records.items() if tables.intersection(removal.tables)}
        pairs = [(name, records.get(name)) for name in sorted(names)]
        return [
            Takedown(name=name, reason=removal and removal.reason, images=removal and removal.images)
            for name, removal in pairs
        ]


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
