"""Trace: from a printed image back to the shards that its model learned from, link by link."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
from mlflow.client import MlflowClient
from mlflow.entities import Run

from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.data.manifest import FileEntry, Manifest, parse_manifest
from diffusion.data.versions.takedown_records import Removal
from diffusion.generation.generation_result import ABOUT, RequestRecord
from flows import environment
from flows.config import dataset_folder
from flows.datasets.catalog import Catalogue
from flows.datasets.dvc import KeptFiles, is_whole
from flows.provenance.reproduce import fetch_code
from flows.registry import model_versions
from flows.registry.aliases import none_if_missing
from flows.registry.model_versions import CODE, WEIGHTS
from flows.registry.takedown_marks import TAKEDOWN
from flows.sampling.lookup import Origin, Printed, StoredImage, disagreements, find
from flows.sampling.sampling_batch import DELETED, SUCCESS, Batch
from flows.storage.s3 import Location, Store
from flows.storage.tags import Tags, parse_tags
from flows.tracking.runs import MANIFEST_ARTIFACT


class TracedImage(Config):
    """An image as it is now."""

    where: str
    sha256: str
    pixels_sha256: str | None
    index: int
    seed: int
    label: str | None
    """The class that it was to show."""
    prompt: str | None
    as_generated: bool | None
    """Whether it equals its row in the manifest; None if there is none."""


class TracedModel(Config):
    """The registered version that made it."""

    uri: str
    aliases: list[str]
    registered: datetime
    code_sha256: str | None
    """Digest of the code that it ships, checked; None if it has no such tag, or ships other code now."""
    tags: dict[str, str]


class TracedRun(Config):
    """The training that made the version."""

    run_id: str
    name: str
    status: str
    started: datetime
    git_commit: str | None
    git_dirty: bool | None
    """Whether tracked files differed from the commit; None if that was not recorded."""


class TracedShard(FileEntry):
    """A shard, and an address, a path or words that say where it lies; None if nowhere (any more)."""

    where: str | None


class TracedData(Config):
    """The version of a data set that the run saw."""

    dataset: str
    version: str
    content_digest: str
    dvc_digest: str | None
    recorded: datetime | None
    """When it was put into the catalogue; None if it is not there."""
    images: int
    shards: list[TracedShard]


class Takedown(Config):
    """A removal of images that the version of the data set held."""

    name: str
    reason: str | None
    """None: it is only known by its name."""
    images: int | None


class Trace(Config):
    """The chain of records from an image, or a batch, to shards; a link that is missing is None."""

    image: TracedImage | None
    place: str | None
    """Prefix of the batch."""
    batch: Batch | None
    """The batch's ``batch.json``."""
    finished: bool | None
    """Whether the batch is whole."""
    request: RequestRecord | None
    """Instead of a batch, the ``request.json`` beside an image that was made on request."""
    model: TracedModel | None
    run: TracedRun | None
    data: TracedData | None
    takedowns: list[Takedown]
    """What was taken down since of the images that the model learned from."""
    broken: list[str]
    """Where the chain does not hold."""


def trace(where: str) -> Trace:
    """The chain behind an image of ours, or behind a whole batch: an address on S3, or a file.

    Raises UserError if there is nothing there, or nothing of ours.
    """
    store = Store()
    printed = find(where, store, environment.settings().bucket)
    return _Walk(store).along(printed)


class _Walk:
    """One walk along the chain, which goes on where a link is missing."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.client = MlflowClient()
        self.broken: list[str] = []

    def along(self, printed: Printed) -> Trace:
        """All links, from the image on."""
        origin, batch, place = printed.origin, printed.batch, printed.place
        image = printed.image and self.image(printed, printed.image)
        if batch is not None and place is not None:
            self.broken += disagreements(self.store, batch, place, image.index if image else None)
        elif not isinstance(origin, Origin) or origin.task is None:
            self.broken.append(f"no batch of {printed.where} is to be found beside it, or at the usual place")
        elif printed.request is None:
            self.broken.append(f"{printed.where} was made on request, and no {ABOUT} beside it says of what")
        model = self.model(origin.model, origin.version, origin.run_id, batch)
        run = self.run(origin.run_id)
        tags = self.tags(model, run)
        released = tags.released_from
        # Staging's remote is staging's to read.
        source = environment.data_source() if released else _source(run)
        manifest = self.manifest(run, tags.dataset, origin.content_digest, source)
        return Trace(
            image=image,
            place=None if place is None else f"{place}/",
            batch=batch,
            finished=None if place is None else self.finished(place),
            request=printed.request,
            model=model,
            run=run and _traced(run),
            data=manifest and self.data(manifest, tags.dvc_digest, source, released),
            takedowns=self.takedowns(tags.dataset, model, run, manifest, source),
            broken=list(dict.fromkeys(self.broken)),
        )

    def finished(self, place: Location) -> bool:
        """Whether the batch at ``place`` is whole, and not being deleted."""
        return self.store.exists(place.bucket, place.key(SUCCESS)) and not self.store.exists(
            place.bucket, f"{DELETED}/{place.prefix}"
        )

    def image(self, printed: Printed, image: StoredImage) -> TracedImage:
        """Whether it is what was printed, and what it was to show."""
        where, batch, row, origin = printed.where, printed.batch, image.row, image.origin
        if row is not None and row["sha256"] != image.sha256:
            same = row["pixels_sha256"] == image.pixels_sha256
            self.broken.append(
                f"{where} was saved anew: its pixels are what was printed, its bytes are not"
                if same
                else f"{where} was altered: its pixels are not what was printed, as was written down then"
            )
        elif row is None and (batch is not None or printed.request is not None):
            self.broken.append(f"what was written down of its batch or request has no row of {where}")
        theirs = origin and (origin.model, origin.version, origin.run_id, origin.seed, origin.index)
        if batch and origin and theirs != (batch.model, batch.version, batch.run_id, batch.seed, image.index):
            self.broken.append(f"{where} says of itself that it is another image than its batch has there")
        return TracedImage(
            where=where,
            sha256=image.sha256,
            pixels_sha256=image.pixels_sha256,
            index=image.index,
            seed=printed.origin.seed,
            label=_text(row and row.get("label")),
            prompt=_text(row and row.get("prompt")),
            as_generated=None if row is None else row["sha256"] == image.sha256,
        )

    def tags(self, model: TracedModel | None, run: Run | None) -> Tags:
        """Those of the model version, or else of its run; of whichever has one that is not ours, none."""
        found: dict[str, Any] = {}
        sources = [(model.uri, model.tags)] if model else []
        sources += [(f"run {run.info.run_id}", run.data.tags)] if run else []
        for where, tags in sources:
            try:
                found |= parse_tags(tags, where).model_dump(exclude_none=True, by_alias=True)
            except UserError as error:
                self.broken.append(str(error))
        return Tags.model_validate(found)

    def model(self, name: str, number: int, run_id: str, batch: Batch | None) -> TracedModel | None:
        """The version in the registry."""
        uri = f"models:/{name}/{number}"
        found = none_if_missing(self.client.get_model_version, name, str(number))
        if found is None:
            self.broken.append(f"{uri} is not in the registry (any more)")
            return None
        if found.run_id != run_id:
            self.broken.append(f"{uri} is of run {found.run_id} now, and the image of run {run_id}")
        if batch is not None and found.tags.get(WEIGHTS) != batch.weights_sha256:
            self.broken.append(f"{uri} has other weights now than those that drew the image")
        return TracedModel(
            uri=uri,
            code_sha256=self.code(name, number, batch),
            aliases=sorted(found.aliases),
            registered=_time(found.creation_timestamp),
            tags=dict(sorted(found.tags.items())),
        )

    def code(self, name: str, number: int, batch: Batch | None) -> str | None:
        """Digest of the code that the version ships, if its tag, the batch and what lies there agree on it."""
        try:
            version = model_versions.version_of(self.client, name, number)
            if batch is not None and batch.code_sha256 != version.code_sha256:
                tag, other = version.code_sha256 or "nothing", batch.code_sha256 or "nothing"
                self.broken.append(
                    f"the tag {CODE} of {version.uri} says {tag[:12]} of the code that it ships, and its batch "
                    f"{other[:12]}"
                )
            if version.code_sha256 is not None:
                with TemporaryDirectory() as scratch:
                    fetch_code(version, Path(scratch))
        except UserError as error:
            self.broken.append(str(error))
            return None
        return version.code_sha256

    def run(self, run_id: str) -> Run | None:
        """The run in MLflow, even if it is marked as deleted."""
        found = none_if_missing(self.client.get_run, run_id)
        if found is None:
            self.broken.append(f"run {run_id} is not in MLflow (any more)")
            return None
        if found.info.lifecycle_stage == "deleted":
            self.broken.append(
                f"run {run_id} is deleted: until `mlflow gc`, `mlflow runs restore --run-id {run_id}` brings it back"
            )
        return found

    def manifest(self, run: Run | None, dataset: str | None, content: str, source: str) -> Manifest | None:
        """That of the data set version, from the run, or else from the catalogue."""
        found = (run and self._logged(run.info.run_id)) or (dataset and self._catalogued(dataset, content, source))
        if not found:
            self.broken.append(f"no manifest of the data set version with the content {content} is to be found")
            return None
        if found.content_digest != content:
            self.broken.append(f"the run saw a data set of content {found.content_digest}, the image names {content}")
        return found

    def data(self, version: Manifest, dvc_digest: str | None, source: str, released: str | None) -> TracedData:
        """The data set version with its shards, each where it can be had: of a released model where that comes from."""
        kept = KeptFiles(version.name, source, dvc_digest)
        shards = (
            [TracedShard(**dict(shard), where=f"where {released} has it") for shard in version.shards]
            if released
            else _located(version, kept)
        )
        lost = [shard.name for shard in shards if shard.where is None]
        if lost:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            self.broken.append(f"shards that lie neither on {source} nor here: {', '.join(lost[:3])}{more}")
        catalogue = Catalogue.of(version.name, source, self.store)
        if dvc_digest is None:
            try:
                dvc_digest = catalogue.pointer(version.digest)
            except UserError as error:
                self.broken.append(str(error))
        return TracedData(
            dataset=version.name,
            version=version.digest,
            content_digest=version.content_digest,
            dvc_digest=dvc_digest,
            recorded=catalogue.written(version.digest),
            images=version.kept,
            shards=shards,
        )

    def takedowns(
        self, dataset: str | None, model: TracedModel | None, run: Run | None, version: Manifest | None, source: str
    ) -> list[Takedown]:
        """What the marks of model and run name, and what the catalogue says of the version's own tables."""
        marks = [tags.get(TAKEDOWN, "") for tags in (model.tags if model else {}, run.data.tags if run else {})]
        named = {name for mark in marks for name in mark.split(",") if name}
        told: dict[str, Removal] = {}
        try:
            told = {each.name: each for each in Catalogue.of(dataset, source, self.store).removals()} if dataset else {}
        except UserError as error:
            self.broken.append(str(error))
        tables = {part.records.sha256 for part in version.parts} if version else set()
        named |= {name for name, each in told.items() if tables.intersection(each.tables)}
        return [
            Takedown(
                name=name,
                reason=told[name].reason if name in told else None,
                images=told[name].images if name in told else None,
            )
            for name in sorted(named)
        ]

    def _logged(self, run_id: str) -> Manifest | None:
        if MANIFEST_ARTIFACT not in {item.path for item in self.client.list_artifacts(run_id, "dataset")}:
            self.broken.append(f"run {run_id} keeps no manifest of what it saw (any more)")
            return None
        where = f"runs:/{run_id}/{MANIFEST_ARTIFACT}"
        try:
            return parse_manifest(mlflow.artifacts.load_text(where).encode(), where)
        except UserError as error:
            self.broken.append(str(error))
            return None

    def _catalogued(self, dataset: str, content: str, source: str) -> Manifest | None:
        versions = Catalogue.of(dataset, source, self.store).versions().values()
        return next((each for each in versions if each.content_digest == content), None)


def _source(run: Run | None) -> str:
    """The DVC remote that the run had its data set from, or else that of the environment."""
    inputs = run.inputs.dataset_inputs if run and run.inputs else []
    return next(filter(None, (_uri(each.dataset.source) for each in inputs)), environment.data_source())


def _uri(source: str) -> str | None:
    """The S3 address in what MLflow has of a data set's source; None if there is none."""
    try:
        uri = json.loads(source)["uri"]
        return str(Location.parse(uri)) if isinstance(uri, str) else None
    except (ValueError, LookupError, TypeError, UserError):
        return None


def _traced(run: Run) -> TracedRun:
    dirty = run.data.tags.get("darkroom.git_dirty")
    return TracedRun(
        run_id=run.info.run_id,
        name=run.info.run_name,
        status=run.info.status,
        started=_time(run.info.start_time),
        git_commit=run.data.tags.get("mlflow.source.git.commit"),
        git_dirty=None if dirty is None else dirty == "True",
    )


def _located(version: Manifest, kept: KeptFiles) -> list[TracedShard]:
    listings = list(kept.listings(version.digest).values())

    def place(shard: FileEntry) -> str | None:
        for listing in listings:
            md5, remote = listing.get(shard.name), kept.remote
            if md5 and remote and (stat := remote.stat(md5)) and stat.size == shard.bytes:
                return remote.uri(md5)
        here = dataset_folder(version.name) / shard.name
        return str(here) if is_whole(here, shard.sha256) else _text(kept.find(shard))

    with ThreadPoolExecutor(16) as pool:
        places = pool.map(place, version.shards)
        return [TracedShard(**dict(shard), where=where) for shard, where in zip(version.shards, places, strict=True)]


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def _text(value: object) -> str | None:
    return None if value is None else str(value)
